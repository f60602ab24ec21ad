// The gradient of the values in an order that is the same every time, without atomics: sort the sampling points of some
// (batch, head) pairs by the cell that is the top left of their corners (stable, so that ties keep the order of the
// queries), then let a warp gather each cell's sum from the points around it. Each cell is written once.
#pragma once

#include "kernels.cuh"

namespace raydetr::cuda {

// A top left corner lies in -1..size-1, so a level of H x W cells has (H + 1) * (W + 1) of them.
struct CornerGrid {
  uint32_t corners;             // of all levels
  uint32_t start[kMaxLevels];   // of a level
};

inline uint64_t corner_count(const Level& level) {
  return (static_cast<uint64_t>(level.height) + 1) * (static_cast<uint64_t>(level.width) + 1);
}

// Keys [pairs, Q, L * P] and the points they belong to. The key of a point outside its level is the number of all keys.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    key_kernel(const __grid_constant__ Shape shape, const __grid_constant__ CornerGrid grid, int64_t first_pair,
               const T* locations, uint32_t* keys, uint32_t* points) {
  const uint32_t count = static_cast<uint32_t>(shape.queries) * static_cast<uint32_t>(shape.places);
  const uint32_t point = blockIdx.x * kThreads + threadIdx.x;
  if (point >= count) {
    return;
  }
  const Division at = divide(point, shape.all_places);
  const int64_t pair = first_pair + blockIdx.y;
  const int64_t item = (pair / shape.heads * shape.queries + at.quotient) * shape.heads + pair % shape.heads;
  const Pack<T, 2> location = reinterpret_cast<const Pack<T, 2>*>(locations)[item * shape.places + at.remainder];
  const int32_t index = static_cast<int32_t>(divide(at.remainder, shape.points).quotient);
  const Level& level = shape.levels[index];
  const int32_t x = locate(location.element[0], level.width).low + 1;
  const int32_t y = locate(location.element[1], level.height).low + 1;
  const bool near = (x >= 0) & (x <= level.width) & (y >= 0) & (y <= level.height);
  const uint32_t corner = grid.start[index] + static_cast<uint32_t>(y * (level.width + 1) + x);
  const int64_t to = static_cast<int64_t>(blockIdx.y) * count + point;
  keys[to] = near ? blockIdx.y * grid.corners + corner : gridDim.y * grid.corners;
  points[to] = point;
}

// Where each key begins among the sorted ones, and where the last one ends: `first` has `keys + 1` elements.
__global__ void __launch_bounds__(kThreads)
    first_kernel(const uint32_t* sorted, uint32_t count, uint32_t keys, uint32_t* first) {
  const uint32_t key = blockIdx.x * kThreads + threadIdx.x;
  if (key > keys) {
    return;
  }
  uint32_t low = 0;
  uint32_t high = count;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (sorted[middle] < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  first[key] = low;
}

// A warp sums one cell: its groups take the points in turn and add up their sums at the end.
template <typename L>
__global__ void __launch_bounds__(kThreads, L::kChannels ? 4 : 2)
    gather_kernel(const __grid_constant__ Shape shape, const __grid_constant__ CornerGrid grid, int64_t first_pair,
                  const uint32_t* first, const uint32_t* points, const typename L::Storage* grad_output,
                  const typename L::Sum* locations, const typename L::Sum* weights,
                  typename L::Storage* grad_value) {
  using T = typename L::Sum;
  using Cell = Pack<typename L::Storage, L::kWidth>;
  const int32_t row = static_cast<int32_t>(blockIdx.x * (kThreads / 32) + threadIdx.x / 32);
  if (row >= shape.rows) {
    return;
  }
  int32_t index = 0;
  while (index + 1 < shape.level_count && row >= shape.levels[index + 1].start) {
    ++index;
  }
  const Level& level = shape.levels[index];
  const int32_t y = (row - level.start) / level.width;
  const int32_t x = (row - level.start) % level.width;
  const int64_t pair = first_pair + blockIdx.y;
  const int64_t batch = pair / shape.heads;
  const int64_t head = pair % shape.heads;
  const int channels = L::kChannels ? L::kChannels : shape.channels;
  const int lane = threadIdx.x % L::kLanes;
  const uint32_t group = threadIdx.x % 32 / L::kLanes;
  first += static_cast<int64_t>(blockIdx.y) * grid.corners + grid.start[index];
  for (int start = 0; start < channels; start += L::kLanes * L::kWidth) {
    const int channel = start + lane * L::kWidth;
    const bool mine = L::kChannels || channel < channels;
    T sum[L::kWidth] = {};
#pragma unroll
    for (int below = 1; below >= 0; --below) {  // whether the cell is one of the points' lower corners
      // Of two neighbouring corners, the points of the left one have this cell on their right.
      const uint32_t* corner = first + static_cast<int64_t>(y + 1 - below) * (level.width + 1) + x;
      const uint32_t middle = corner[1];
      const uint32_t last = corner[2];
      for (uint32_t entry = corner[0] + group; entry < last; entry += 32 / L::kLanes) {
        const Division at = divide(points[entry], shape.all_places);
        const int64_t item = (batch * shape.queries + at.quotient) * shape.heads + head;
        const int64_t place = item * shape.places + at.remainder;
        const Pack<T, 2> location = load<Pack<T, 2>>(reinterpret_cast<const char*>(locations + 2 * place));
        const T right = locate(location.element[0], level.width).fraction;
        const T bottom = locate(location.element[1], level.height).fraction;
        const T by = weights[place] * (below ? bottom : T(1) - bottom) * (entry < middle ? right : T(1) - right);
        if (mine) {
          T gradient[L::kWidth];
          unpack(load<Cell>(reinterpret_cast<const char*>(grad_output + item * channels + channel)), gradient);
#pragma unroll
          for (int i = 0; i < L::kWidth; ++i) {
            sum[i] += by * gradient[i];
          }
        }
      }
    }
    __syncwarp();
    Cell result;
#pragma unroll
    for (int i = 0; i < L::kWidth; ++i) {
#pragma unroll
      for (int step = L::kLanes; step < 32; step *= 2) {
        sum[i] += __shfl_xor_sync(kWarp, sum[i], step);
      }
      convert(sum[i], result.element[i]);
    }
    if (group == 0 && mine) {
      *reinterpret_cast<Cell*>(grad_value + ((batch * shape.rows + row) * shape.heads + head) * channels + channel) =
          result;
    }
  }
}

}  // namespace raydetr::cuda
