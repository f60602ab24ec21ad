// Sizes of a call as the kernels take them, and the order in which they walk the queries. Plain arithmetic: compiled and
// tested on the host too.
#pragma once

#include <cstdint>

#include "../interpolation.h"

namespace raydetr::cuda {

constexpr int kMaxLevels = 32;
constexpr uint32_t kTile = 8;

// Division by a number known before the launch, for dividends below 2^31: a multiplication and one correction.
struct Divisor {
  uint32_t by;
  uint32_t reciprocal;
};

struct Division {
  uint32_t quotient;
  uint32_t remainder;
};

inline Divisor divisor(uint32_t by) { return {by, 0xffffffffu / by}; }

RAYDETR_INLINE Division divide(uint32_t dividend, const Divisor& divisor) {
  Division result;
  result.quotient = static_cast<uint32_t>(static_cast<uint64_t>(dividend) * divisor.reciprocal >> 32);
  result.remainder = dividend - result.quotient * divisor.by;
  if (result.remainder >= divisor.by) {
    ++result.quotient;
    result.remainder -= divisor.by;
  }
  return result;
}

// Passed by value, so nothing is read back or copied. Batch elements are counted from `first_batch`: a launch holds so
// many of them at most.
struct Shape {
  int64_t first_batch;
  int32_t heads;
  int32_t channels;
  int32_t rows;     // cells of all levels
  int32_t queries;
  int32_t places;   // L * P, points of a (query, head)
  int32_t level_count;
  Divisor points;   // P
  Divisor all_places;
  bool tiled;       // the queries are the cells of the levels
  Level levels[kMaxLevels];
  Divisor bands[kMaxLevels];  // of the cells of a level into bands of kTile lines
};

// Query of a slot where the queries are the cells of the levels: each level in bands of 8 lines, each band column by
// column, so that 64 slots in a row are a tile of 8 x 8 cells, which look at nearly the same part of the image.
RAYDETR_INLINE uint32_t tiled_query(const Shape& shape, uint32_t slot) {
  int32_t index = 0;
  while (index + 1 < shape.level_count && slot >= static_cast<uint32_t>(shape.levels[index + 1].start)) {
    ++index;
  }
  const uint32_t start = static_cast<uint32_t>(shape.levels[index].start);
  const uint32_t width = static_cast<uint32_t>(shape.levels[index].width);
  const Division band = divide(slot - start, shape.bands[index]);
  const uint32_t first_line = band.quotient * kTile;
  const uint32_t below = static_cast<uint32_t>(shape.levels[index].height) - first_line;
  uint32_t x = band.remainder / kTile;
  uint32_t y = band.remainder % kTile;
  if (below < kTile) {
    x = band.remainder / below;
    y = band.remainder % below;
  }
  return start + (first_line + y) * width + x;
}

}  // namespace raydetr::cuda
