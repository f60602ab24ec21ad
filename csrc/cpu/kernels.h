// The CPU kernels, over the queries of one batch element and head at a time.
//
// `cpu/dispatch.cpp` compiles every body once per instruction set: the bodies are forced inline into functions that
// carry a target attribute, so they contain no call that would fall back to the base instruction set.
// Values of one head are rows of D channels; row -1 stands for "outside" and reads as zeros.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

#include "../interpolation.h"

#define RAYDETR_FORCE inline __attribute__((always_inline))

namespace raydetr::cpu {

// Queries whose sampling points are prepared together: long enough to vectorise, short enough to stay in the L1 cache.
constexpr int64_t kBlock = 32;

// Sampling points and attention weights of one (batch, head), for queries 0..Q-1.
template <typename T>
struct Points {
  const T* locations;        // [L, P, 2] of query 0
  const T* weights;          // [L, P] of query 0
  int64_t query_stride;      // in points: from a query to the next
  const Level* levels;       // L of them
  int64_t level_count;
  int64_t point_count;
};

// Rows of values of one (batch, head).
template <typename T>
struct Rows {
  const T* data;       // row 0
  int64_t stride;      // in elements
  const T* outside;    // row of zeros; null when it lies at row -1
};

template <typename T>
struct ForwardTask {
  Points<T> points;
  Rows<T> value;
  int64_t channels;
  T* output;               // [D] of query 0
  int64_t output_stride;   // in elements
};

template <typename T>
struct SamplingTask {
  Points<T> points;
  Rows<T> value;
  int64_t channels;
  const T* grad_output;      // [D] of query 0
  int64_t output_stride;
  T* grad_locations;         // as Points, or null
  T* grad_weights;           // as Points, or null
};

template <typename T>
struct ValueTask {
  Points<T> points;          // of one level: level_count is 1, locations and weights begin at it
  int64_t queries;
  int64_t channels;
  const T* grad_output;
  int64_t output_stride;
  T* grad_value;             // row `first_row` of the accumulator
  int64_t grad_stride;
  int32_t first_row;         // only rows in [first_row, last_row) are this task's
  int32_t last_row;
};

template <typename T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <typename T, int N>
using Vector = typename VectorOf<T, N>::type;

template <typename T, int N>
RAYDETR_FORCE void load(Vector<T, N>& vector, const T* from) {
  std::memcpy(&vector, from, sizeof(vector));
}
template <typename T, int N>
RAYDETR_FORCE void store(T* to, const Vector<T, N>& vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

// The prepared points of a block of queries, in the order [level][query][point].
template <typename T>
struct Prepared {
  // Room for `points` points of a block of `queries` queries; a few queries take little.
  Prepared(int64_t queries, int64_t points)
      : size((queries < kBlock ? queries : kBlock) * points), rows(new int32_t[4 * size]), buffer(new T[13 * size]) {}

  int32_t* row(int corner) { return rows.get() + corner * size; }
  T* weight(int corner) { return buffer.get() + corner * size; }
  T* right() { return buffer.get() + 4 * size; }
  T* bottom() { return buffer.get() + 5 * size; }
  T* x() { return buffer.get() + 6 * size; }
  T* y() { return buffer.get() + 7 * size; }
  T* scale() { return buffer.get() + 8 * size; }     // attention weights
  T* products() { return buffer.get() + 9 * size; }  // [points, 4]: <grad_output, corner>

  int64_t size;
  std::unique_ptr<int32_t[]> rows;  // not cleared: for a few queries that would take as long as the work
  std::unique_ptr<T[]> buffer;
};

// Corners of `count` points of one level, and their weights times the attention weights.
template <typename T>
RAYDETR_FORCE void prepare_points(Prepared<T>& prepared, int64_t offset, int64_t count, const Level& level) {
  const T* __restrict scale = prepared.scale() + offset;
  const T* __restrict x = prepared.x() + offset;
  const T* __restrict y = prepared.y() + offset;
  T* __restrict right = prepared.right() + offset;
  T* __restrict bottom = prepared.bottom() + offset;
  int32_t* __restrict row0 = prepared.row(0) + offset;
  int32_t* __restrict row1 = prepared.row(1) + offset;
  int32_t* __restrict row2 = prepared.row(2) + offset;
  int32_t* __restrict row3 = prepared.row(3) + offset;
  T* __restrict weight0 = prepared.weight(0) + offset;
  T* __restrict weight1 = prepared.weight(1) + offset;
  T* __restrict weight2 = prepared.weight(2) + offset;
  T* __restrict weight3 = prepared.weight(3) + offset;
  const Level own = level;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const Axis<T> across = locate(x[i], own.width);
    const Axis<T> down = locate(y[i], own.height);
    const Corners<T> found = corners(across, down, own, scale[i]);
    right[i] = across.fraction;
    bottom[i] = down.fraction;
    row0[i] = found.row[0];
    row1[i] = found.row[1];
    row2[i] = found.row[2];
    row3[i] = found.row[3];
    weight0[i] = found.weight[0];
    weight1[i] = found.weight[1];
    weight2[i] = found.weight[2];
    weight3[i] = found.weight[3];
  }
}

// Prepare queries [first, first + count) of all levels.
template <typename T>
RAYDETR_FORCE void prepare_block(Prepared<T>& prepared, const Points<T>& points, int64_t first, int64_t count) {
  const int64_t per_level = points.point_count;
  for (int64_t level = 0; level < points.level_count; ++level) {
    const int64_t offset = level * count * per_level;
    for (int64_t q = 0; q < count; ++q) {
      const int64_t from = (first + q) * points.query_stride + level * per_level;
      T* x = prepared.x() + offset + q * per_level;
      T* y = prepared.y() + offset + q * per_level;
      T* scale = prepared.scale() + offset + q * per_level;
#pragma GCC ivdep
      for (int64_t p = 0; p < per_level; ++p) {
        x[p] = points.locations[2 * (from + p)];
        y[p] = points.locations[2 * (from + p) + 1];
        scale[p] = points.weights[from + p];
      }
    }
    prepare_points(prepared, offset, count * per_level, points.levels[level]);
  }
}

// `Padded`: the row of zeros lies at row -1 and needs no choice.
template <bool Padded, typename T>
RAYDETR_FORCE const T* row_pointer(const Rows<T>& rows, int32_t row) {
  const T* found = rows.data + static_cast<int64_t>(row) * rows.stride;
  return Padded || row >= 0 ? found : rows.outside;
}

// Add `Width` channels, from `channel` on, of one level's points of the query at place `q` of the block to `output`.
// Several independent sums hide the latency of the multiply-adds.
template <typename T, int Lanes, bool Padded, int Width>
RAYDETR_FORCE void gather(Prepared<T>& prepared, const ForwardTask<T>& task, int64_t level, int64_t first_point,
                          int64_t channel, T* output) {
  constexpr int lanes = Width < Lanes ? Width : Lanes;
  constexpr int registers = Width / lanes;
  constexpr int sums = registers >= 8 ? 1 : registers >= 4 ? 2 : 4;
  Vector<T, lanes> sum[sums][registers] = {};
  if (level != 0) {
#pragma GCC unroll 16
    for (int r = 0; r < registers; ++r) {
      load<T, lanes>(sum[0][r], output + channel + r * lanes);
    }
  }
  for (int64_t i = first_point; i < first_point + task.points.point_count; ++i) {
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      const T* row = row_pointer<Padded>(task.value, prepared.row(corner)[i]) + channel;
      const T weight = prepared.weight(corner)[i];
#pragma GCC unroll 16
      for (int r = 0; r < registers; ++r) {
        Vector<T, lanes> cell;
        load<T, lanes>(cell, row + r * lanes);
        sum[corner % sums][r] += cell * weight;
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < registers; ++r) {
    Vector<T, lanes> total = sum[0][r];
#pragma GCC unroll 4
    for (int s = 1; s < sums; ++s) {
      total += sum[s][r];
    }
    store<T, lanes>(output + channel + r * lanes, total);
  }
}

// Split D channels into powers of two, largest first: 71 = 64 + 4 + 2 + 1.
#define RAYDETR_SPLIT_CHANNELS(channels, CALL)                        \
  do {                                                                \
    int64_t channel = 0;                                              \
    for (; (channels) - channel >= 64; channel += 64) { CALL(64); }   \
    if ((channels) & 32) { CALL(32); channel += 32; }                 \
    if ((channels) & 16) { CALL(16); channel += 16; }                 \
    if ((channels) & 8) { CALL(8); channel += 8; }                    \
    if ((channels) & 4) { CALL(4); channel += 4; }                    \
    if ((channels) & 2) { CALL(2); channel += 2; }                    \
    if ((channels) & 1) { CALL(1); channel += 1; }                    \
  } while (false)

template <typename T, int Lanes, bool Padded>
RAYDETR_FORCE void forward_block_range(const ForwardTask<T>& task, int64_t begin, int64_t end) {
  const int64_t per_query = task.points.level_count * task.points.point_count;
  Prepared<T> prepared(end - begin, per_query);
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = end - first < kBlock ? end - first : kBlock;
    prepare_block(prepared, task.points, first, count);
    // Level by level: the cells that neighbouring queries share are still in the L1 cache.
    for (int64_t level = 0; level < task.points.level_count; ++level) {
      for (int64_t q = 0; q < count; ++q) {
        const int64_t first_point = (level * count + q) * task.points.point_count;
        T* output = task.output + (first + q) * task.output_stride;
#define RAYDETR_CALL(width) (gather<T, Lanes, Padded, width>(prepared, task, level, first_point, channel, output))
        RAYDETR_SPLIT_CHANNELS(task.channels, RAYDETR_CALL);
#undef RAYDETR_CALL
      }
    }
  }
}

// Outputs of queries [begin, end).
template <typename T, int Lanes>
RAYDETR_FORCE void forward_queries(const ForwardTask<T>& task, int64_t begin, int64_t end) {
  if (task.value.outside == nullptr) {
    forward_block_range<T, Lanes, true>(task, begin, end);
  } else {
    forward_block_range<T, Lanes, false>(task, begin, end);
  }
}

// Sums of the lanes of four vectors.
template <typename T, int N>
RAYDETR_FORCE void sum_lanes(const Vector<T, N> (&vectors)[4], T* sums) {
  if constexpr (N > 4) {
    Vector<T, N / 2> halves[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      Vector<T, N / 2> low, high;
      std::memcpy(&low, &vectors[i], sizeof(low));
      std::memcpy(&high, reinterpret_cast<const char*>(&vectors[i]) + sizeof(low), sizeof(high));
      halves[i] = low + high;
    }
    sum_lanes<T, N / 2>(halves, sums);
  } else if constexpr (N == 4) {
    Vector<T, 4> ab = __builtin_shufflevector(vectors[0], vectors[1], 0, 4, 1, 5) +
                      __builtin_shufflevector(vectors[0], vectors[1], 2, 6, 3, 7);
    Vector<T, 4> cd = __builtin_shufflevector(vectors[2], vectors[3], 0, 4, 1, 5) +
                      __builtin_shufflevector(vectors[2], vectors[3], 2, 6, 3, 7);
    Vector<T, 4> total = __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    store<T, 4>(sums, total);
  } else {
    for (int i = 0; i < 4; ++i) {
      sums[i] = vectors[i][0];
      for (int lane = 1; lane < N; ++lane) {
        sums[i] += vectors[i][lane];
      }
    }
  }
}

// Products <grad_output, corner> over `Width` channels of the four corners of one query's points of one level, added to
// those before unless these are the first channels.
template <typename T, int Lanes, bool Padded, int Width>
RAYDETR_FORCE void corner_products(Prepared<T>& prepared, const SamplingTask<T>& task, int64_t first_point,
                                   int64_t channel, const T* grad_output) {
  T* products = prepared.products();
  constexpr int lanes = Width < Lanes ? Width : Lanes;
  constexpr int registers = Width / lanes;
  Vector<T, lanes> gradient[registers];
#pragma GCC unroll 16
  for (int r = 0; r < registers; ++r) {
    load<T, lanes>(gradient[r], grad_output + channel + r * lanes);
  }
  for (int64_t i = first_point; i < first_point + task.points.point_count; ++i) {
    Vector<T, lanes> sum[4];
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      const T* row = row_pointer<Padded>(task.value, prepared.row(corner)[i]) + channel;
      Vector<T, lanes> cell;
      load<T, lanes>(cell, row);
      sum[corner] = cell * gradient[0];
#pragma GCC unroll 16
      for (int r = 1; r < registers; ++r) {
        load<T, lanes>(cell, row + r * lanes);
        sum[corner] += cell * gradient[r];
      }
    }
    T total[4];
    sum_lanes<T, lanes>(sum, total);
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      products[4 * i + corner] = channel == 0 ? total[corner] : products[4 * i + corner] + total[corner];
    }
  }
}

template <typename T>
RAYDETR_FORCE void finish_sampling(Prepared<T>& prepared, const SamplingTask<T>& task, int64_t first, int64_t count) {
  const int64_t per_level = task.points.point_count;
  for (int64_t level = 0; level < task.points.level_count; ++level) {
    const Level own = task.points.levels[level];
    const int64_t offset = level * count * per_level;
    T* __restrict x = prepared.x() + offset;  // the locations are no longer needed
    T* __restrict y = prepared.y() + offset;
    T* __restrict weight = prepared.weight(0) + offset;
    const T* __restrict right = prepared.right() + offset;
    const T* __restrict bottom = prepared.bottom() + offset;
    const T* __restrict scale = prepared.scale() + offset;
    const T* __restrict product = prepared.products() + 4 * offset;
#pragma GCC ivdep
    for (int64_t i = 0; i < count * per_level; ++i) {
      const PointGradient<T> gradient = point_gradient(product + 4 * i, right[i], bottom[i], scale[i], own);
      x[i] = gradient.x;
      y[i] = gradient.y;
      weight[i] = gradient.weight;
    }
    for (int64_t q = 0; q < count; ++q) {
      const int64_t to = (first + q) * task.points.query_stride + level * per_level;
      for (int64_t p = 0; p < per_level && task.grad_locations != nullptr; ++p) {
        task.grad_locations[2 * (to + p)] = x[q * per_level + p];
        task.grad_locations[2 * (to + p) + 1] = y[q * per_level + p];
      }
      for (int64_t p = 0; p < per_level && task.grad_weights != nullptr; ++p) {
        task.grad_weights[to + p] = weight[q * per_level + p];
      }
    }
  }
}

template <typename T, int Lanes, bool Padded>
RAYDETR_FORCE void sampling_block_range(const SamplingTask<T>& task, int64_t begin, int64_t end) {
  const int64_t per_query = task.points.level_count * task.points.point_count;
  Prepared<T> prepared(end - begin, per_query);
  if (task.channels == 0) {
    std::memset(prepared.products(), 0, 4 * prepared.size * sizeof(T));  // nothing else writes them
  }
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = end - first < kBlock ? end - first : kBlock;
    prepare_block(prepared, task.points, first, count);
    for (int64_t level = 0; level < task.points.level_count; ++level) {
      for (int64_t q = 0; q < count; ++q) {
        const int64_t first_point = (level * count + q) * task.points.point_count;
        const T* grad_output = task.grad_output + (first + q) * task.output_stride;
#define RAYDETR_CALL(width) \
  (corner_products<T, Lanes, Padded, width>(prepared, task, first_point, channel, grad_output))
        RAYDETR_SPLIT_CHANNELS(task.channels, RAYDETR_CALL);
#undef RAYDETR_CALL
      }
    }
    finish_sampling(prepared, task, first, count);
  }
}

// Gradients of the locations and the weights of queries [begin, end).
template <typename T, int Lanes>
RAYDETR_FORCE void sampling_queries(const SamplingTask<T>& task, int64_t begin, int64_t end) {
  if (task.value.outside == nullptr) {
    sampling_block_range<T, Lanes, true>(task, begin, end);
  } else {
    sampling_block_range<T, Lanes, false>(task, begin, end);
  }
}

// Add `Width` channels of one query's gradient to the corners of its points.
template <typename T, int Lanes, int Width>
RAYDETR_FORCE void scatter(Prepared<T>& prepared, const ValueTask<T>& task, int64_t q, int64_t channel,
                           const T* grad_output) {
  constexpr int lanes = Width < Lanes ? Width : Lanes;
  constexpr int registers = Width / lanes;
  Vector<T, lanes> gradient[registers];
#pragma GCC unroll 16
  for (int r = 0; r < registers; ++r) {
    load<T, lanes>(gradient[r], grad_output + channel + r * lanes);
  }
  const uint32_t row_count = static_cast<uint32_t>(task.last_row - task.first_row);
  const int64_t begin = q * task.points.point_count;
  for (int64_t i = begin; i < begin + task.points.point_count; ++i) {
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      const int32_t row = prepared.row(corner)[i] - task.first_row;
      if (static_cast<uint32_t>(row) < row_count) {
        T* to = task.grad_value + static_cast<int64_t>(row) * task.grad_stride + channel;
        const T weight = prepared.weight(corner)[i];
#pragma GCC unroll 16
        for (int r = 0; r < registers; ++r) {
          Vector<T, lanes> cell;
          load<T, lanes>(cell, to + r * lanes);
          cell += gradient[r] * weight;
          store<T, lanes>(to + r * lanes, cell);
        }
      }
    }
  }
}

// Gradient of the values of one level (or of some rows of it). Every cell is summed in the order of the queries, so the
// result does not depend on how the rows are shared out.
template <typename T, int Lanes>
RAYDETR_FORCE void value_level(const ValueTask<T>& task) {
  Prepared<T> prepared(task.queries, task.points.point_count);
  for (int64_t first = 0; first < task.queries; first += kBlock) {
    const int64_t count = task.queries - first < kBlock ? task.queries - first : kBlock;
    prepare_block(prepared, task.points, first, count);
    for (int64_t q = 0; q < count; ++q) {
      const T* grad_output = task.grad_output + (first + q) * task.output_stride;
#define RAYDETR_CALL(width) (scatter<T, Lanes, width>(prepared, task, q, channel, grad_output))
      RAYDETR_SPLIT_CHANNELS(task.channels, RAYDETR_CALL);
#undef RAYDETR_CALL
    }
  }
}

// One instruction set's kernels.
template <typename T>
struct Kernels {
  void (*forward)(const ForwardTask<T>&, int64_t, int64_t);
  void (*sampling)(const SamplingTask<T>&, int64_t, int64_t);
  void (*value)(const ValueTask<T>&);
};

// The kernels of the widest instruction set that this processor has; RAYDETR_CPU=default|avx2|avx512 asks for less.
const char* instruction_set();
template <typename T>
const Kernels<T>& kernels();

}  // namespace raydetr::cpu
