// The operator on the CPU: memory, threads and types around the kernels of kernels.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../checks.h"
#include "kernels.h"

namespace raydetr::cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Ask for huge pages under large memory that is about to be written for the first time: page faults of 4 KiB would take
// longer than the work.
inline void prefer_huge_pages(void* data, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: nothing is lost if it is not granted
  }
#endif
}

inline Tensor on_huge_pages(Tensor tensor) {
  prefer_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}

// Memory that is not cleared when it is made.
template <typename T>
std::unique_ptr<T[]> scratch(int64_t size) {
  std::unique_ptr<T[]> memory(new T[std::max<int64_t>(size, 1)]);
  prefer_huge_pages(memory.get(), size * sizeof(T));
  return memory;
}

// The values of some (batch, head) pairs, each as S contiguous rows behind one row of zeros. In [B, S, M, D] the rows of
// a head lie M * D apart, which maps them to a fraction of the sets of a cache.
template <typename T>
class PackedHeads {
 public:
  PackedHeads(const Problem& problem, int64_t pairs)
      : problem_(problem), pair_size_((problem.rows + 1) * problem.channels), data_(scratch<T>(pairs * pair_size_)) {}

  template <typename Storage>
  void fill(const Storage* value, int64_t first_pair, int64_t pairs) {
    const int64_t rows = problem_.rows;
    const int64_t channels = problem_.channels;
    torch::stable::parallel_for(0, pairs * rows, 4096, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t pair = begin / rows;
        const int64_t last = std::min(end, (pair + 1) * rows);
        T* to = data_.get() + pair * pair_size_;
        if (begin == pair * rows) {
          std::fill_n(to, channels, T(0));
        }
        const int64_t batch = (first_pair + pair) / problem_.heads;
        const int64_t head = (first_pair + pair) % problem_.heads;
        for (int64_t row = begin - pair * rows; row < last - pair * rows; ++row) {
          const Storage* from = value + ((batch * rows + row) * problem_.heads + head) * channels;
          T* cell = to + (row + 1) * channels;
          for (int64_t d = 0; d < channels; ++d) {
            cell[d] = static_cast<T>(from[d]);
          }
        }
        begin = last;
      }
    });
  }

  Rows<T> rows(int64_t pair) const {
    return {data_.get() + pair * pair_size_ + problem_.channels, problem_.channels, nullptr};
  }

 private:
  const Problem& problem_;
  int64_t pair_size_;
  std::unique_ptr<T[]> data_;
};

// Whether so few cells are touched that working in place is cheaper than a contiguous copy of each head.
inline bool sparse(const Problem& problem) {
  return 2 * problem.queries * problem.points_per_query() <= problem.rows;
}

// Set `size` elements to zero, each thread its share.
template <typename T>
void clear(T* data, int64_t size) {
  torch::stable::parallel_for(0, size, 1 << 15,
                              [&](int64_t begin, int64_t end) { std::memset(data + begin, 0, (end - begin) * sizeof(T)); });
}

// Call `body(pair, rows of values, first query, last query)` for all queries of all (batch, head) pairs, in parallel.
// Values are packed when enough of them are read to pay for it, and always when they have to be converted.
template <typename Storage, typename T, typename Body>
void for_packed_queries(const Problem& problem, const Storage* value, const Body& body) {
  const int64_t pairs = problem.batch * problem.heads;
  // As many pairs at a time as there are threads: little memory, and what is packed is still in the caches.
  const int64_t group = std::max<int64_t>(1, std::min<int64_t>(pairs, torch::stable::get_num_threads()));
  PackedHeads<T> packed(problem, group);
  for (int64_t first = 0; first < pairs; first += group) {
    const int64_t count = std::min(group, pairs - first);
    packed.fill(value, first, count);
    torch::stable::parallel_for(0, count * problem.queries, 64, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t pair = begin / problem.queries;
        const int64_t last = std::min(end, (pair + 1) * problem.queries);
        body(first + pair, packed.rows(pair), begin - pair * problem.queries, last - pair * problem.queries);
        begin = last;
      }
    });
  }
}

// The same in place: all heads of a few queries in turn, since they look at the same part of the image and so at the
// same pages of memory.
template <typename T, typename Body>
void for_sparse_queries(const Problem& problem, const T* value, const Body& body) {
  constexpr int64_t few = 16;
  const int64_t stride = problem.heads * problem.channels;
  const std::vector<T> zeros(problem.channels, T(0));
  torch::stable::parallel_for(0, problem.batch * problem.queries, few, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t batch = begin / problem.queries;
      const int64_t first = begin % problem.queries;
      const int64_t last = std::min({end - batch * problem.queries, first + few, problem.queries});
      for (int64_t head = 0; head < problem.heads; ++head) {
        const Rows<T> rows{value + batch * problem.rows * stride + head * problem.channels, stride, zeros.data()};
        body(batch * problem.heads + head, rows, first, last);
      }
      begin += last - first;
    }
  });
}

template <typename Storage, typename T, typename Body>
void for_queries(const Problem& problem, const Storage* value, const Body& body) {
  if constexpr (std::is_same_v<Storage, T>) {
    if (sparse(problem)) {
      for_sparse_queries(problem, value, body);
      return;
    }
  }
  for_packed_queries<Storage, T>(problem, value, body);
}

// Sampling points of one (batch, head) pair.
template <typename T>
Points<T> points_of(const Problem& problem, const T* locations, const T* weights, int64_t pair) {
  const int64_t per_query = problem.points_per_query();
  const int64_t batch = pair / problem.heads;
  const int64_t head = pair % problem.heads;
  const int64_t first = (batch * problem.queries * problem.heads + head) * per_query;
  return {locations + 2 * first,  weights + first,       problem.heads * per_query,
          problem.levels.data(),  problem.level_count(), problem.points};
}

// Where the output of a (batch, head) pair begins.
inline int64_t output_offset(const Problem& problem, int64_t pair) {
  return (pair / problem.heads * problem.queries * problem.heads + pair % problem.heads) * problem.channels;
}

template <typename Storage>
Tensor forward_typed(const Problem& problem, const Tensor& value, const Tensor& locations, const Tensor& weights) {
  using T = typename SumOf<Storage>::type;
  Tensor output = on_huge_pages(torch::stable::new_empty(
      value, {problem.batch, problem.queries, problem.heads * problem.channels}, locations.scalar_type()));
  T* to = static_cast<T*>(output.mutable_data_ptr());
  const T* location = static_cast<const T*>(locations.const_data_ptr());
  const T* weight = static_cast<const T*>(weights.const_data_ptr());
  for_queries<Storage, T>(problem, static_cast<const Storage*>(value.const_data_ptr()),
                          [&](int64_t pair, const Rows<T>& rows, int64_t begin, int64_t end) {
                            const ForwardTask<T> task{points_of(problem, location, weight, pair), rows,
                                                      problem.channels, to + output_offset(problem, pair),
                                                      problem.heads * problem.channels};
                            kernels<T>().forward(task, begin, end);
                          });
  return std::is_same_v<Storage, T> ? output : torch::stable::to(output, value.scalar_type());
}

// Gradient of the values: a task owns the cells of one (batch, head, level), or of some rows of it where there are more
// threads than that, so no two threads ever add to the same cell.
template <typename Storage>
Tensor value_gradient(const Problem& problem, const Tensor& grad_output, const Tensor& value, const Tensor& locations,
                      const Tensor& weights) {
  using T = typename SumOf<Storage>::type;
  Tensor grad_value = on_huge_pages(
      torch::stable::new_empty(value, {problem.batch, problem.rows, problem.heads, problem.channels}));
  Storage* to = static_cast<Storage*>(grad_value.mutable_data_ptr());
  const T* location = static_cast<const T*>(locations.const_data_ptr());
  const T* weight = static_cast<const T*>(weights.const_data_ptr());
  const T* gradient = static_cast<const T*>(grad_output.const_data_ptr());
  const int64_t channels = problem.channels;
  const int64_t stride = problem.heads * channels;
  const int64_t slices = problem.batch * problem.heads * problem.level_count();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t bands = slices >= 2 * threads ? 1 : (2 * threads + slices - 1) / std::max<int64_t>(slices, 1);
  const bool in_place = std::is_same_v<Storage, T> && sparse(problem);
  if (in_place) {
    clear(to, problem.batch * problem.rows * stride);
  }
  torch::stable::parallel_for(0, slices * bands, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> sums;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t pair = index / bands / problem.level_count();
      const int64_t level_index = index / bands % problem.level_count();
      const int64_t band = index % bands;
      Level level = problem.levels[level_index];
      const int64_t cells = static_cast<int64_t>(level.height) * level.width;
      const int64_t first = cells * band / bands;
      const int64_t last = cells * (band + 1) / bands;
      const int64_t start = level.start;
      level.start = 0;
      Storage* rows = to + ((pair / problem.heads) * problem.rows + start) * stride + pair % problem.heads * channels;
      ValueTask<T> task{points_of(problem, location, weight, pair), problem.queries, channels,
                        gradient + output_offset(problem, pair), stride, nullptr, channels,
                        static_cast<int32_t>(first), static_cast<int32_t>(last)};
      task.points.locations += 2 * level_index * problem.points;
      task.points.weights += level_index * problem.points;
      task.points.levels = &level;
      task.points.level_count = 1;
      if constexpr (std::is_same_v<Storage, T>) {
        if (in_place) {
          task.grad_value = rows + first * stride;
          task.grad_stride = stride;
          kernels<T>().value(task);
          continue;
        }
      }
      sums.assign((last - first) * channels, T(0));
      task.grad_value = sums.data();
      kernels<T>().value(task);
      for (int64_t cell = first; cell < last; ++cell) {
        const T* from = sums.data() + (cell - first) * channels;
        for (int64_t d = 0; d < channels; ++d) {
          rows[cell * stride + d] = static_cast<Storage>(from[d]);
        }
      }
    }
  });
  return grad_value;
}

template <typename Storage>
std::tuple<Tensor, Tensor, Tensor> backward_typed(const Problem& problem, const Tensor& grad_output,
                                                  const Tensor& value, const Tensor& locations, const Tensor& weights,
                                                  bool want_value, bool want_locations, bool want_weights) {
  using T = typename SumOf<Storage>::type;
  const Tensor gradient =
      std::is_same_v<Storage, T> ? grad_output : torch::stable::to(grad_output, locations.scalar_type());
  Tensor grad_locations =
      on_huge_pages(want_locations ? torch::stable::empty_like(locations) : torch::stable::new_empty(locations, {0}));
  Tensor grad_weights =
      on_huge_pages(want_weights ? torch::stable::empty_like(weights) : torch::stable::new_empty(weights, {0}));
  if (want_locations || want_weights) {
    const T* location = static_cast<const T*>(locations.const_data_ptr());
    const T* weight = static_cast<const T*>(weights.const_data_ptr());
    const T* from = static_cast<const T*>(gradient.const_data_ptr());
    T* to_locations = want_locations ? static_cast<T*>(grad_locations.mutable_data_ptr()) : nullptr;
    T* to_weights = want_weights ? static_cast<T*>(grad_weights.mutable_data_ptr()) : nullptr;
    for_queries<Storage, T>(
        problem, static_cast<const Storage*>(value.const_data_ptr()),
        [&](int64_t pair, const Rows<T>& rows, int64_t begin, int64_t end) {
          const Points<T> points = points_of(problem, location, weight, pair);
          const SamplingTask<T> task{points,
                                     rows,
                                     problem.channels,
                                     from + output_offset(problem, pair),
                                     problem.heads * problem.channels,
                                     want_locations ? to_locations + (points.locations - location) : nullptr,
                                     want_weights ? to_weights + (points.weights - weight) : nullptr};
          kernels<T>().sampling(task, begin, end);
        });
  }
  // Last: until then the values are still where the forward left them, in a cache.
  Tensor grad_value = want_value ? value_gradient<Storage>(problem, gradient, value, locations, weights)
                                 : torch::stable::new_empty(value, {0});
  return {grad_value, grad_locations, grad_weights};
}

// Call `body` with a value of the storage type that `type` names.
template <typename Body>
auto with_storage(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Double: return body(double{});
    case ScalarType::BFloat16: return body(BFloat16{});
    case ScalarType::Half: return body(Half{});
    default: return body(float{});
  }
}

Tensor forward(const Tensor& value, std::vector<int64_t> spatial_shapes, const Tensor& sampling_locations,
               const Tensor& attention_weights) {
  const Problem problem = check_inputs(value, spatial_shapes, sampling_locations, attention_weights);
  return with_storage(value.scalar_type(), [&](auto storage) {
    return forward_typed<decltype(storage)>(problem, torch::stable::contiguous(value),
                                            torch::stable::contiguous(sampling_locations),
                                            torch::stable::contiguous(attention_weights));
  });
}

// Always deterministic, whatever `deterministic` says.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& value,
                                            std::vector<int64_t> spatial_shapes, const Tensor& sampling_locations,
                                            const Tensor& attention_weights, bool want_value, bool want_locations,
                                            bool want_weights, bool) {
  const Problem problem = check_inputs(value, spatial_shapes, sampling_locations, attention_weights);
  check_gradient(problem, grad_output, value);
  return with_storage(value.scalar_type(), [&](auto storage) {
    return backward_typed<decltype(storage)>(
        problem, torch::stable::contiguous(grad_output), torch::stable::contiguous(value),
        torch::stable::contiguous(sampling_locations), torch::stable::contiguous(attention_weights), want_value,
        want_locations, want_weights);
  });
}

}  // namespace
}  // namespace raydetr::cpu

STABLE_TORCH_LIBRARY_IMPL(raydetr, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&raydetr::cpu::forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&raydetr::cpu::backward));
}
