// The operator on CUDA, given a stream: memory, choice of kernel and launches. Nothing waits for the device or reads from
// it, so calls may be captured in a CUDA graph.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cub/device/device_radix_sort.cuh>
#include <limits>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "deterministic.cuh"
#include "kernels.cuh"

#ifndef RAYDETR_MAX_GRID
#define RAYDETR_MAX_GRID 65535
#endif

namespace raydetr::cuda {

constexpr int64_t kMaxGrid = RAYDETR_MAX_GRID;  // blocks along the second and the third axis
constexpr int64_t kMaxSorted = 1 << 24;         // points sorted at a time, unless one (batch, head) alone has more

inline Shape shape_of(const Problem& problem) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(problem.level_count() <= kMaxLevels, "spatial_shapes: ", problem.level_count(),
                  " levels, the CUDA kernels take at most ", kMaxLevels);
  STD_TORCH_CHECK(problem.heads <= kMaxGrid, "value: ", problem.heads, " heads, the CUDA kernels take at most ",
                  kMaxGrid);
  STD_TORCH_CHECK(problem.channels <= limit / 8 / problem.heads, "value: too many channels, ", problem.heads, " * ",
                  problem.channels);
  STD_TORCH_CHECK(problem.points_per_query() <= 1 << 20 && problem.queries <= limit / problem.points_per_query(),
                  "sampling_locations: too many points of one head, ", problem.queries, " * ",
                  problem.points_per_query());
  Shape shape{};
  shape.heads = static_cast<int32_t>(problem.heads);
  shape.channels = static_cast<int32_t>(problem.channels);
  shape.rows = static_cast<int32_t>(problem.rows);
  shape.queries = static_cast<int32_t>(problem.queries);
  shape.places = static_cast<int32_t>(problem.points_per_query());
  shape.level_count = static_cast<int32_t>(problem.level_count());
  shape.points = divisor(static_cast<uint32_t>(problem.points));
  shape.all_places = divisor(static_cast<uint32_t>(shape.places));
  shape.tiled = problem.queries == problem.rows;
  std::copy(problem.levels.begin(), problem.levels.end(), shape.levels);
  std::transform(problem.levels.begin(), problem.levels.end(), shape.bands, [](const Level& level) {
    // A level whose band would have more cells than 31 bits count is less than a band high: one division by a larger
    // number gives its one band as well.
    const int64_t cells = int64_t{kTile} * level.width;
    return divisor(static_cast<uint32_t>(std::min<int64_t>(cells, std::numeric_limits<int32_t>::max())));
  });
  return shape;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, unsigned threads, cudaStream_t stream,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.stream = stream;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

inline unsigned blocks_for(int64_t threads, int64_t of_a_block) {
  return static_cast<unsigned>((threads + of_a_block - 1) / of_a_block);
}

// Launch a kernel with a group of lanes for every (batch, head, query), batch elements a grid at a time.
template <typename L, typename Launch>
void for_groups(const Problem& problem, Shape shape, const Launch& launch_one) {
  // Few queries in small blocks, so that they spread over the multiprocessors.
  const unsigned threads = problem.queries >= 2048 ? kThreads : kThreads / 4;
  for (int64_t first = 0; first < problem.batch; first += kMaxGrid) {
    shape.first_batch = first;
    const dim3 blocks(blocks_for(problem.queries, threads / L::kLanes), static_cast<unsigned>(problem.heads),
                      static_cast<unsigned>(std::min(kMaxGrid, problem.batch - first)));
    launch_one(shape, blocks, threads);
  }
}

// Choose how the channels are read: at most Bytes at once, by 4 or 8 lanes; any number of channels one by one.
template <typename Storage, int Bytes, typename Body>
void with_layout(int64_t channels, const Body& body) {
  if constexpr (sizeof(Storage) < 8) {
    constexpr int width = Bytes / sizeof(Storage);
    constexpr int lanes = width * 4 >= 16 && sizeof(Storage) == 2 ? 4 : 8;
    if (channels == 32) {
      body(Layout<Storage, 32, width, lanes>{});
      return;
    }
    if (channels % width == 0) {
      body(Layout<Storage, 0, width, 8>{});
      return;
    }
  }
  body(Layout<Storage, 0, 1, 8>{});
}

template <typename Body>
void with_storage(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Double: body(double{}); break;
    case ScalarType::BFloat16: body(__nv_bfloat16{}); break;
    case ScalarType::Half: body(__half{}); break;
    default: body(float{}); break;
  }
}

// Vectors are read from addresses that are multiples of 16; a view may begin anywhere.
inline Tensor aligned(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : torch::stable::clone(dense);
}

template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* write(Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor forward(const Tensor& value, const std::vector<int64_t>& spatial_shapes,
                      const Tensor& sampling_locations, const Tensor& attention_weights, cudaStream_t stream) {
  const Problem problem = check_inputs(value, spatial_shapes, sampling_locations, attention_weights);
  Tensor output = torch::stable::new_empty(value, {problem.batch, problem.queries, problem.heads * problem.channels});
  if (output.numel() == 0) {
    return output;
  }
  if (attention_weights.numel() == 0) {
    torch::stable::zero_(output);
    return output;
  }
  const Shape shape = shape_of(problem);
  const Tensor values = aligned(value);
  const Tensor locations = aligned(sampling_locations);
  const Tensor weights = aligned(attention_weights);
  with_storage(value.scalar_type(), [&](auto storage) {
    using Storage = decltype(storage);
    using T = typename SumOf<Storage>::type;
    with_layout<Storage, 16>(problem.channels, [&](auto layout) {
      using L = decltype(layout);
      for_groups<L>(problem, shape, [&](const Shape& part, dim3 blocks, unsigned threads) {
        launch(forward_kernel<L>, blocks, threads, stream, part, read<Storage>(values), read<T>(locations),
               read<T>(weights), write<Storage>(output));
      });
    });
  });
  return output;
}

// The gradient of the values by sorting, see deterministic.cuh.
template <typename Storage>
Tensor sorted_value_gradient(const Problem& problem, const Shape& shape, const Tensor& gradient, const Tensor& value,
                             const Tensor& locations, const Tensor& weights, cudaStream_t stream) {
  using T = typename SumOf<Storage>::type;
  CornerGrid grid{};
  uint64_t corners = 0;
  for (int64_t i = 0; i < problem.level_count(); ++i) {
    grid.start[i] = static_cast<uint32_t>(corners);
    corners += corner_count(problem.levels[i]);
  }
  STD_TORCH_CHECK(corners < std::numeric_limits<int32_t>::max(), "value: too many cells, ", problem.rows);
  grid.corners = static_cast<uint32_t>(corners);
  const int64_t of_a_pair = problem.queries * problem.points_per_query();
  const int64_t pairs = problem.batch * problem.heads;
  const int64_t chunk = std::max<int64_t>(
      1, std::min({pairs, kMaxGrid, kMaxSorted / of_a_pair, int64_t{std::numeric_limits<int32_t>::max()} / grid.corners}));
  const int64_t count = chunk * of_a_pair;
  Tensor grad_value = torch::stable::new_empty(value, value.sizes());
  const auto scratch = [&](int64_t size) { return torch::stable::new_empty(value, {size}, ScalarType::Int); };
  Tensor keys = scratch(count);
  Tensor sorted_keys = scratch(count);
  Tensor points = scratch(count);
  Tensor sorted_points = scratch(count);
  Tensor first = scratch(chunk * grid.corners + 1);
  const auto sort = [&](void* memory, size_t& bytes, int64_t size, int bits) {
    STD_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(memory, bytes, read<uint32_t>(keys), write<uint32_t>(sorted_keys),
                                                   read<uint32_t>(points), write<uint32_t>(sorted_points), size, 0,
                                                   bits, stream));
  };
  size_t bytes = 0;
  sort(nullptr, bytes, count, 32);
  Tensor memory = torch::stable::new_empty(value, {static_cast<int64_t>(bytes) + 1}, ScalarType::Byte);
  for (int64_t pair = 0; pair < pairs; pair += chunk) {
    const int64_t part = std::min(chunk, pairs - pair);
    const uint32_t last_key = static_cast<uint32_t>(part) * grid.corners;
    const unsigned rows = static_cast<unsigned>(part);
    launch(key_kernel<T>, dim3(blocks_for(of_a_pair, kThreads), rows), kThreads, stream, shape, grid, pair,
           read<T>(locations), write<uint32_t>(keys), write<uint32_t>(points));
    int bits = 1;
    while (last_key >> bits != 0) {
      ++bits;
    }
    sort(memory.mutable_data_ptr(), bytes, part * of_a_pair, bits);
    launch(first_kernel, dim3(blocks_for(int64_t{last_key} + 1, kThreads)), kThreads, stream,
           read<uint32_t>(sorted_keys), static_cast<uint32_t>(part * of_a_pair), last_key, write<uint32_t>(first));
    with_layout<Storage, 16>(problem.channels, [&](auto layout) {
      using L = decltype(layout);
      launch(gather_kernel<L>, dim3(blocks_for(problem.rows, kThreads / 32), rows), kThreads, stream, shape, grid, pair,
             read<uint32_t>(first), read<uint32_t>(sorted_points), read<Storage>(gradient), read<T>(locations),
             read<T>(weights), write<Storage>(grad_value));
    });
  }
  return grad_value;
}

template <typename Storage>
std::tuple<Tensor, Tensor, Tensor> backward_typed(const Problem& problem, const Tensor& gradient, const Tensor& values,
                                                  const Tensor& locations, const Tensor& weights, bool want_value,
                                                  bool want_locations, bool want_weights, bool deterministic,
                                                  cudaStream_t stream) {
  using T = typename SumOf<Storage>::type;
  const Shape shape = shape_of(problem);
  const bool scattered = want_value && !deterministic;
  // Sums stay in fp32 until the end: a cell of a coarse level meets a thousand points, where 16 bits stop growing.
  Tensor grad_value = scattered    ? torch::stable::new_zeros(values, values.sizes(), locations.scalar_type())
                      : want_value ? sorted_value_gradient<Storage>(problem, shape, gradient, values, locations, weights,
                                                                    stream)
                                   : torch::stable::new_empty(values, {0});
  Tensor grad_locations =
      want_locations ? torch::stable::empty_like(locations) : torch::stable::new_empty(locations, {0});
  Tensor grad_weights = want_weights ? torch::stable::empty_like(weights) : torch::stable::new_empty(weights, {0});
  const bool sampling = want_locations || want_weights;
  if (scattered || sampling) {
    // 8 bytes of 16-bit values: their sums are 16 bytes, and the lanes of a group add to 64 bytes in a row at once.
    with_layout<Storage, sizeof(Storage) == 2 ? 8 : 16>(problem.channels, [&](auto layout) {
      using L = decltype(layout);
      const auto kernel = !sampling    ? backward_kernel<L, true, false>
                          : !scattered ? backward_kernel<L, false, true>
                                       : backward_kernel<L, true, true>;
      for_groups<L>(problem, shape, [&](const Shape& part, dim3 blocks, unsigned threads) {
        launch(kernel, blocks, threads, stream, part, read<Storage>(gradient), read<Storage>(values), read<T>(locations),
               read<T>(weights), scattered ? write<T>(grad_value) : nullptr, write<T>(grad_locations),
               write<T>(grad_weights));
      });
    });
  }
  if (scattered && !std::is_same_v<Storage, T>) {
    grad_value = torch::stable::to(grad_value, values.scalar_type());
  }
  return {grad_value, grad_locations, grad_weights};
}

inline std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& value,
                                                   const std::vector<int64_t>& spatial_shapes,
                                                   const Tensor& sampling_locations, const Tensor& attention_weights,
                                                   bool want_value, bool want_locations, bool want_weights,
                                                   bool deterministic, cudaStream_t stream) {
  const Problem problem = check_inputs(value, spatial_shapes, sampling_locations, attention_weights);
  check_gradient(problem, grad_output, value);
  if (grad_output.numel() == 0 || attention_weights.numel() == 0) {
    const auto zeros = [](const Tensor& like, bool want) {
      return want ? torch::stable::new_zeros(like, like.sizes()) : torch::stable::new_empty(like, {0});
    };
    return {zeros(value, want_value), zeros(sampling_locations, want_locations), zeros(attention_weights, want_weights)};
  }
  std::tuple<Tensor, Tensor, Tensor> gradients;
  with_storage(value.scalar_type(), [&](auto storage) {
    gradients = backward_typed<decltype(storage)>(problem, aligned(grad_output), aligned(value),
                                                  aligned(sampling_locations), aligned(attention_weights), want_value,
                                                  want_locations, want_weights, deterministic, stream);
  });
  return gradients;
}

}  // namespace raydetr::cuda
