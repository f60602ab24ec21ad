// The CUDA kernels of the forward and of the backward.
//
// A group of lanes works on one (query, head), each lane on `Width` neighbouring channels, read at once. In every round
// each lane prepares one sampling point, rows and weights of its corners, and hands it to its group through shared
// memory: two 16-byte reads a point, where shuffles would be eight. A block is one tile of queries of one (batch, head),
// so that its reads meet in the L1 cache. Sums are fp32 (fp64 for fp64). Every lane of a warp takes part in every
// exchange: lanes of no query work on query 0 and write nothing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "shape.h"

namespace raydetr::cuda {

constexpr unsigned kWarp = 0xffffffffu;
constexpr int kThreads = 256;  // of a block at most: with 4 lanes a group, a tile of queries

__device__ __forceinline__ void convert(float from, float& to) { to = from; }
__device__ __forceinline__ void convert(double from, double& to) { to = from; }
__device__ __forceinline__ void convert(__half from, float& to) { to = __half2float(from); }
__device__ __forceinline__ void convert(float from, __half& to) { to = __float2half_rn(from); }
__device__ __forceinline__ void convert(__nv_bfloat16 from, float& to) { to = __bfloat162float(from); }
__device__ __forceinline__ void convert(float from, __nv_bfloat16& to) { to = __float2bfloat16_rn(from); }

// How a kernel is cut: `Channels` of a head, or 0 where the number is known only when it runs.
template <typename StorageType, int Channels, int Width, int Lanes>
struct Layout {
  using Storage = StorageType;
  using Sum = typename SumOf<StorageType>::type;
  static constexpr int kChannels = Channels;
  static constexpr int kWidth = Width;
  static constexpr int kLanes = Lanes;
};

// Neighbouring elements that are read and written at once.
template <typename T, int Width>
struct alignas(sizeof(T) * Width) Pack {
  T element[Width];
};

template <int Bytes>
struct RawOf;
template <>
struct RawOf<2> {
  using type = unsigned short;
};
template <>
struct RawOf<4> {
  using type = unsigned;
};
template <>
struct RawOf<8> {
  using type = uint2;
};
template <>
struct RawOf<16> {
  using type = uint4;
};

// Read what no thread writes while the kernel runs.
template <typename P>
__device__ __forceinline__ P load(const char* from) {
  const auto raw = __ldg(reinterpret_cast<const typename RawOf<sizeof(P)>::type*>(from));
  P pack;
  memcpy(&pack, &raw, sizeof(P));
  return pack;
}

template <typename Storage, int Width, typename T>
__device__ __forceinline__ void unpack(const Pack<Storage, Width>& pack, T (&to)[Width]) {
  if constexpr (std::is_same_v<Storage, __nv_bfloat16> && Width % 2 == 0) {
    // A bf16 is the upper half of a float: one instruction each, where element by element takes two for every other.
#pragma unroll
    for (int i = 0; i < Width; i += 2) {
      unsigned pair;
      memcpy(&pair, pack.element + i, sizeof(pair));
      to[i] = __uint_as_float(pair << 16);
      to[i + 1] = __uint_as_float(pair & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      convert(pack.element[i], to[i]);
    }
  }
}

// Holds a number or an address in a register: the compiler would rather load or compute it anew at each of its uses.
template <typename T>
__device__ __forceinline__ void pin(T& number) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_pointer_v<T>) {
    asm volatile("" : "+l"(number));
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("" : "+f"(number));
  } else {
    asm volatile("" : "+d"(number));
  }
#endif
}

// The same channels of another row, rows being `stride` bytes apart: one instruction, which a product of signed numbers
// is not everywhere.
template <typename Byte>
__device__ __forceinline__ Byte* row_of(Byte* base, int32_t row, int32_t stride) {
  return base + static_cast<uint64_t>(static_cast<uint32_t>(row)) * static_cast<uint32_t>(stride);
}

template <typename T>
struct alignas(16) Rows {
  T corner[4];
};

// What the lanes of a block hand to their groups. The slots of a group are permuted so that the groups of a warp, which
// read the same point of their own at once, read different banks.
template <typename T>
struct Handover {
  Rows<int32_t> rows[kThreads];
  Rows<T> weights[kThreads];
};

template <typename L>
struct Group {
  int lane;
  int first_slot;  // of the group in the handover; slot of a point: first_slot ^ its place in the round
  bool inside;     // has a query
  int64_t item;    // (batch, query, head) in the order of the output
  int64_t value;   // first channel of the head in row 0 of the values
};

template <typename L>
__device__ __forceinline__ Group<L> group_of(const Shape& shape) {
  const uint32_t slot = blockIdx.x * (blockDim.x / L::kLanes) + threadIdx.x / L::kLanes;
  const bool inside = slot < static_cast<uint32_t>(shape.queries);
  uint32_t query = inside ? slot : 0;
  if (shape.tiled) {
    query = tiled_query(shape, query);
  }
  const int64_t batch = shape.first_batch + blockIdx.z;
  const int64_t head = blockIdx.y;
  const int channels = L::kChannels ? L::kChannels : shape.channels;
  const int64_t first_item = batch * shape.queries * shape.heads + head;
  return {static_cast<int>(threadIdx.x % L::kLanes),
          static_cast<int>(threadIdx.x / L::kLanes * L::kLanes + threadIdx.x % 32 / 8), inside,
          first_item + static_cast<int64_t>(static_cast<uint64_t>(query) * static_cast<uint32_t>(shape.heads)),
          (batch * shape.rows * shape.heads + head) * channels};
}

// A sampling point as it lies in memory.
template <typename T>
struct Sample {
  T x;
  T y;
  T weight;
};

// The points of one lane in turn, `Lanes` places apart. Places past the last one lie far outside.
template <typename T, int Lanes>
struct Samples {
  __device__ __forceinline__ Samples(const T* locations, const T* weights, int64_t first_place, int lane, int places)
      : location(reinterpret_cast<const char*>(locations + 2 * (first_place + lane))),
        weight(reinterpret_cast<const char*>(weights + first_place + lane)),
        left(places - lane) {
    pin(location);
    pin(weight);
  }

  __device__ __forceinline__ Sample<T> next() {
    Sample<T> sample{T(-4), T(-4), T(0)};
    if (left > 0) {
      const Pack<T, 2> at = load<Pack<T, 2>>(location);
      sample = {at.element[0], at.element[1], load<Pack<T, 1>>(weight).element[0]};
    }
    location += 2 * Lanes * sizeof(T);
    weight += Lanes * sizeof(T);
    left -= Lanes;
    return sample;
  }

  const char* location;
  const char* weight;
  int left;
};

__device__ __forceinline__ const Level& level_of(const Shape& shape, int place) {
  const int last = shape.places - 1;
  return shape.levels[divide(static_cast<uint32_t>(place < last ? place : last), shape.points).quotient];
}

template <typename T>
__device__ __forceinline__ void hand_over(Handover<T>& shared, int slot, const Patch<T>& point) {
  __syncwarp();  // all have read the last round's
  shared.rows[slot] = {{point.row[0], point.row[1], point.row[2], point.row[3]}};
  shared.weights[slot] = {{point.weight[0], point.weight[1], point.weight[2], point.weight[3]}};
  __syncwarp();
}

template <typename L>
__global__ void __launch_bounds__(kThreads, L::kChannels ? 4 : 2)
    forward_kernel(const __grid_constant__ Shape shape, const typename L::Storage* value,
                   const typename L::Sum* locations, const typename L::Sum* weights, typename L::Storage* output) {
  using T = typename L::Sum;
  using Cell = Pack<typename L::Storage, L::kWidth>;
  __shared__ Handover<T> shared;
  const Group<L> group = group_of<L>(shape);
  const int channels = L::kChannels ? L::kChannels : shape.channels;
  const int32_t stride = shape.heads * channels * static_cast<int32_t>(sizeof(typename L::Storage));
  for (int first = 0; first < channels; first += L::kLanes * L::kWidth) {
    const int channel = first + group.lane * L::kWidth;
    const bool mine = L::kChannels || channel < channels;
    const char* cells = reinterpret_cast<const char*>(value + group.value + (mine ? channel : 0));
    pin(cells);
    T sum[L::kWidth] = {};
    Samples<T, L::kLanes> samples(locations, weights, group.item * shape.places, group.lane, shape.places);
    Sample<T> next = samples.next();
#pragma unroll 1
    for (int round = 0; round < shape.places; round += L::kLanes) {
      const Sample<T> sample = next;
      const Level& level = level_of(shape, round + group.lane);
      const Axis<T> x = locate(sample.x, level.width);
      const Axis<T> y = locate(sample.y, level.height);
      // Zero, or NaN where a number of the point is bad: its result is then bad too.
      const T outside = (x.fraction + y.fraction + sample.weight) * T(0);
      hand_over(shared, group.first_slot ^ group.lane, patch(x, y, level, sample.weight, outside));
      next = samples.next();
#pragma unroll
      for (int point = 0; point < L::kLanes; ++point) {
        const Rows<int32_t> rows = shared.rows[group.first_slot ^ point];
        if (rows.corner[0] < 0) {
          continue;
        }
        const Rows<T> by = shared.weights[group.first_slot ^ point];
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          T cell[L::kWidth];
          unpack(load<Cell>(row_of(cells, rows.corner[corner], stride)), cell);
#pragma unroll
          for (int i = 0; i < L::kWidth; ++i) {
            sum[i] += by.corner[corner] * cell[i];
          }
        }
      }
    }
    if (group.inside && mine) {
      Cell result;
#pragma unroll
      for (int i = 0; i < L::kWidth; ++i) {
        convert(sum[i], result.element[i]);
      }
      *reinterpret_cast<Cell*>(output + group.item * channels + channel) = result;
    }
  }
}

// Add neighbouring channels to global memory, four fp32 ones at once where the device can.
template <int Width, typename T>
__device__ __forceinline__ void add(char* address, const T (&by)[Width]) {
#ifdef __CUDA_ARCH__
#if __CUDA_ARCH__ >= 900
  constexpr bool vectors = true;
#else
  constexpr bool vectors = false;
#endif
  if constexpr (vectors && Width == 4 && sizeof(T) == 4) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(by[0]), "f"(by[1]), "f"(by[2]),
                 "f"(by[3])
                 : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      if constexpr (sizeof(T) == 4) {
        asm volatile("red.global.add.f32 [%0], %1;" ::"l"(address + i * sizeof(T)), "f"(by[i]) : "memory");
      } else {
        asm volatile("red.global.add.f64 [%0], %1;" ::"l"(address + i * sizeof(T)), "d"(by[i]) : "memory");
      }
    }
  }
#else
  for (int i = 0; i < Width; ++i) {
    reinterpret_cast<T*>(address)[i] += by[i];
  }
#endif
}

// Sum each of four numbers over a group: lane l ends with number l % 4. Halving what is sent in every exchange costs
// fewer shuffles than four sums that all lanes end with.
template <int Lanes, typename T>
__device__ __forceinline__ T group_sum(const T (&number)[4], int lane) {
  const bool upper = lane & 2;
  const bool odd = lane & 1;
  const T low = (upper ? number[2] : number[0]) + __shfl_xor_sync(kWarp, upper ? number[0] : number[2], 2);
  const T high = (upper ? number[3] : number[1]) + __shfl_xor_sync(kWarp, upper ? number[1] : number[3], 2);
  T sum = (odd ? high : low) + __shfl_xor_sync(kWarp, odd ? low : high, 1);
#pragma unroll
  for (int step = 4; step < Lanes; step *= 2) {
    sum += __shfl_xor_sync(kWarp, sum, step);
  }
  return sum;
}

// The gradient of the values (`Value`), added to zeros, and those of locations and weights (`Sampling`), written; of
// these two a null pointer is one that is not wanted.
template <typename L, bool Value, bool Sampling>
__global__ void __launch_bounds__(kThreads, L::kChannels ? 3 : 2)
    backward_kernel(const __grid_constant__ Shape shape, const typename L::Storage* grad_output,
                    const typename L::Storage* value, const typename L::Sum* locations,
                    const typename L::Sum* weights, typename L::Sum* grad_value, typename L::Sum* grad_locations,
                    typename L::Sum* grad_weights) {
  using T = typename L::Sum;
  using Cell = Pack<typename L::Storage, L::kWidth>;
  constexpr int kStep = L::kLanes * L::kWidth;
  __shared__ Handover<T> shared;
  __shared__ Rows<T> products[Sampling ? kThreads : 1];
  const Group<L> group = group_of<L>(shape);
  const int channels = L::kChannels ? L::kChannels : shape.channels;
  const int32_t row_size = shape.heads * channels;
  const int first_channel = group.lane * L::kWidth;
  const int64_t first_place = group.item * shape.places;
  const char* cells = reinterpret_cast<const char*>(value + group.value + first_channel);
  const char* gradients = reinterpret_cast<const char*>(grad_output + group.item * channels + first_channel);
  char* sums = Value ? reinterpret_cast<char*>(grad_value + group.value + first_channel) : nullptr;
  pin(cells);
  pin(gradients);
  pin(sums);
  // Of few channels, known to the compiler, the output's gradient stays in registers.
  constexpr int kHeld = L::kChannels ? L::kChannels / kStep : 1;
  T gradient[kHeld][L::kWidth];
  if constexpr (L::kChannels != 0) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      unpack(load<Cell>(gradients + i * kStep * sizeof(typename L::Storage)), gradient[i]);
#pragma unroll
      for (T& number : gradient[i]) {
        pin(number);
      }
    }
  }
  Samples<T, L::kLanes> samples(locations, weights, first_place, group.lane, shape.places);
  Sample<T> next = samples.next();
#pragma unroll 1
  for (int round = 0; round < shape.places; round += L::kLanes) {
    const Sample<T> sample = next;
    const int place = round + group.lane;
    const Level& level = level_of(shape, place);
    const Axis<T> x = locate(sample.x, level.width);
    const Axis<T> y = locate(sample.y, level.height);
    Patch<T> own = patch(x, y, level, sample.weight, T(0));
    own.row[0] = group.inside ? own.row[0] : -1;
    hand_over(shared, group.first_slot ^ group.lane, own);
    next = samples.next();
#pragma unroll
    for (int point = 0; point < L::kLanes; ++point) {
      const int slot = group.first_slot ^ point;
      const Rows<int32_t> rows = shared.rows[slot];
      T product[4] = {};
      if (rows.corner[0] >= 0) {
        const Rows<T> by = shared.weights[slot];
#pragma unroll
        for (int first = 0; first < channels; first += kStep) {
          T(&mine)[L::kWidth] = gradient[first / kStep % kHeld];
          if constexpr (L::kChannels == 0) {
            if (first + first_channel >= channels) {
              break;
            }
            unpack(load<Cell>(gradients + first * sizeof(typename L::Storage)), mine);
          }
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            if constexpr (Sampling) {
              T cell[L::kWidth];
              const int32_t stride = row_size * static_cast<int32_t>(sizeof(typename L::Storage));
              unpack(load<Cell>(row_of(cells, rows.corner[corner], stride) + first * sizeof(typename L::Storage)),
                     cell);
#pragma unroll
              for (int i = 0; i < L::kWidth; ++i) {
                product[corner] += mine[i] * cell[i];
              }
            }
            if constexpr (Value) {
              T share[L::kWidth];
#pragma unroll
              for (int i = 0; i < L::kWidth; ++i) {
                share[i] = by.corner[corner] * mine[i];
              }
              const int32_t stride = row_size * static_cast<int32_t>(sizeof(T));
              add(row_of(sums, rows.corner[corner], stride) + first * sizeof(T), share);
            }
          }
        }
      }
      if constexpr (Sampling) {
        const T sum = group_sum<L::kLanes>(product, group.lane);
        if (group.lane < 4) {
          products[slot].corner[group.lane] = sum;
        }
      }
    }
    if constexpr (Sampling) {
      __syncwarp();
      Rows<T> product = products[group.first_slot ^ group.lane];
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        product.corner[corner] = own.inside[corner] ? product.corner[corner] : T(0);
      }
      const PointGradient<T> result = point_gradient(product.corner, x.fraction, y.fraction, sample.weight, level);
      if (group.inside && place < shape.places) {
        if (grad_locations != nullptr) {
          reinterpret_cast<Pack<T, 2>*>(grad_locations)[first_place + place] = {{result.x, result.y}};
        }
        if (grad_weights != nullptr) {
          grad_weights[first_place + place] = result.weight;
        }
      }
    }
  }
}

}  // namespace raydetr::cuda
