// Bilinear interpolation of multi-scale deformable attention: the arithmetic that the CPU and the CUDA kernels share.
//
// A location in 0..1 lies at pixel `location * size - 0.5` (align_corners=False). Corners are ordered
// (top, left), (top, right), (bottom, left), (bottom, right); a corner outside its level counts as zero.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define RAYDETR_INLINE __host__ __device__ __forceinline__
#else
#define RAYDETR_INLINE inline __attribute__((always_inline))
#endif

namespace raydetr {

// Type in which values of a storage type are summed.
template <typename Storage>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};

// A level of the feature pyramid: its size and the row of the flattened values where it begins.
struct Level {
  int32_t height;
  int32_t width;
  int32_t start;
};

// Position along one axis: the lower neighbour and the fraction of the way to the upper one.
template <typename T>
struct Axis {
  int32_t low;
  T fraction;
};

// Neighbours are inside where they are in [0, size). The selects are false for NaN and keep every conversion within the
// integers; the fraction of NaN and of infinity is NaN, which marks the result of their own query and head alone.
template <typename T>
RAYDETR_INLINE Axis<T> locate(T location, int32_t size) {
  const T extent = static_cast<T>(size);
  const T position = location * extent - static_cast<T>(0.5);
  const T below = std::floor(position);
  T low = below > static_cast<T>(-2) ? below : static_cast<T>(-2);
  low = low < extent ? low : extent;
  return {static_cast<int32_t>(low), position - below};
}

// Row of the flattened values that holds cell (y, x), or -1 where the cell is outside its level.
RAYDETR_INLINE int32_t cell_row(int32_t y, int32_t x, const Level& level) {
  const bool inside = (static_cast<uint32_t>(y) < static_cast<uint32_t>(level.height)) &
                      (static_cast<uint32_t>(x) < static_cast<uint32_t>(level.width));
  const uint32_t row = static_cast<uint32_t>(level.start) + static_cast<uint32_t>(y) * static_cast<uint32_t>(level.width) +
                       static_cast<uint32_t>(x);  // may wrap outside, where it is not used
  return inside ? static_cast<int32_t>(row) : -1;
}

// Rows and weights of the four corners of a sampling point, weights times `scale`.
template <typename T>
struct Corners {
  int32_t row[4];
  T weight[4];
};

template <typename T>
RAYDETR_INLINE Corners<T> corners(const Axis<T>& x, const Axis<T>& y, const Level& level, T scale) {
  const T right = x.fraction;
  const T left = static_cast<T>(1) - right;
  const T bottom = y.fraction * scale;
  const T top = (static_cast<T>(1) - y.fraction) * scale;
  return {{cell_row(y.low, x.low, level), cell_row(y.low, x.low + 1, level), cell_row(y.low + 1, x.low, level),
           cell_row(y.low + 1, x.low + 1, level)},
          {top * left, top * right, bottom * left, bottom * right}};
}

// The same for kernels that read every corner of a point: a corner outside its level takes the place of one inside and
// weighs `outside`, which is 0, or NaN to mark the result. A point that has nothing to add has row[0] == -1.
template <typename T>
struct Patch {
  int32_t row[4];
  T weight[4];
  bool inside[4];
};

template <typename T>
RAYDETR_INLINE Patch<T> patch(const Axis<T>& x, const Axis<T>& y, const Level& level, T scale, T outside) {
  const bool in_left = static_cast<uint32_t>(x.low) < static_cast<uint32_t>(level.width);
  const bool in_right = static_cast<uint32_t>(x.low + 1) < static_cast<uint32_t>(level.width);
  const bool in_top = static_cast<uint32_t>(y.low) < static_cast<uint32_t>(level.height);
  const bool in_bottom = static_cast<uint32_t>(y.low + 1) < static_cast<uint32_t>(level.height);
  const T left = in_left ? static_cast<T>(1) - x.fraction : outside;
  const T right = in_right ? x.fraction : outside;
  const T top = in_top ? (static_cast<T>(1) - y.fraction) * scale : outside;
  const T bottom = in_bottom ? y.fraction * scale : outside;
  const int32_t left_column = in_left ? x.low : 0;
  const int32_t right_column = in_right ? x.low + 1 : left_column;
  const int32_t top_line = in_top ? y.low : 0;
  const int32_t bottom_line = in_bottom ? y.low + 1 : top_line;
  const int32_t top_row = level.start + top_line * level.width;
  const int32_t bottom_row = level.start + bottom_line * level.width;
  const bool used = ((in_left | in_right) & (in_top | in_bottom)) | (outside != static_cast<T>(0));
  return {{used ? top_row + left_column : -1, top_row + right_column, bottom_row + left_column,
           bottom_row + right_column},
          {top * left, top * right, bottom * left, bottom * right},
          {in_top && in_left, in_top && in_right, in_bottom && in_left, in_bottom && in_right}};
}

// Gradients of one sampling point from the products <grad_output, corner> over the channels of its head.
template <typename T>
struct PointGradient {
  T x;
  T y;
  T weight;
};

template <typename T>
RAYDETR_INLINE PointGradient<T> point_gradient(const T* product, T right, T bottom, T weight, const Level& level) {
  const T left = static_cast<T>(1) - right;
  const T top = static_cast<T>(1) - bottom;
  const T upper = left * product[0] + right * product[1];
  const T lower = left * product[2] + right * product[3];
  const T along_x = top * (product[1] - product[0]) + bottom * (product[3] - product[2]);
  return {weight * static_cast<T>(level.width) * along_x, weight * static_cast<T>(level.height) * (lower - upper),
          top * upper + bottom * lower};
}

}  // namespace raydetr
