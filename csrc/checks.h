// The operator's schemas and the checks of its inputs, shared by the devices. Every message begins with the argument
// that is wrong.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "interpolation.h"

namespace raydetr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Shapes are SymInt[] (height and width of every level in turn): nothing is read back from a device, and torch.compile
// may leave them symbolic. A gradient that is not wanted is an empty tensor.
constexpr const char* kForwardSchema =
    "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights)"
    " -> Tensor";
constexpr const char* kBackwardSchema =
    "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations,"
    " Tensor attention_weights, bool want_value, bool want_locations, bool want_weights, bool deterministic)"
    " -> (Tensor, Tensor, Tensor)";

// Sizes of a call, all checked.
struct Problem {
  int64_t batch;
  int64_t rows;  // cells of all levels
  int64_t heads;
  int64_t channels;
  int64_t queries;
  int64_t points;
  std::vector<Level> levels;

  int64_t level_count() const { return static_cast<int64_t>(levels.size()); }
  int64_t points_per_query() const { return level_count() * points; }  // of one head
};

inline std::string sizes_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

// What the locations and weights of values of this type have to be: never below fp32.
inline ScalarType sampling_type(ScalarType value) {
  return value == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::vector<Level> check_levels(const std::vector<int64_t>& spatial_shapes, int64_t rows) {
  STD_TORCH_CHECK(!spatial_shapes.empty() && spatial_shapes.size() % 2 == 0,
                  "spatial_shapes: expected height and width of every level in turn, got ", spatial_shapes.size(),
                  " numbers");
  std::vector<Level> levels;
  int64_t start = 0;
  for (size_t i = 0; i < spatial_shapes.size(); i += 2) {
    const int64_t height = spatial_shapes[i];
    const int64_t width = spatial_shapes[i + 1];
    STD_TORCH_CHECK(height > 0 && width > 0 && height <= std::numeric_limits<int32_t>::max() / width,
                    "spatial_shapes: level ", i / 2, " is ", height, " x ", width);
    levels.push_back({static_cast<int32_t>(height), static_cast<int32_t>(width), static_cast<int32_t>(start)});
    start += height * width;
    STD_TORCH_CHECK(start <= rows, "spatial_shapes: the levels have more cells than the ", rows, " of value");
  }
  STD_TORCH_CHECK(start == rows, "spatial_shapes: the levels have ", start, " cells, value has ", rows);
  return levels;
}

inline Problem check_inputs(const Tensor& value, const std::vector<int64_t>& spatial_shapes,
                            const Tensor& sampling_locations, const Tensor& attention_weights) {
  STD_TORCH_CHECK(value.dim() == 4, "value: expected [B, S, M, D], got ", sizes_of(value));
  STD_TORCH_CHECK(sampling_locations.dim() == 6 && sampling_locations.size(5) == 2,
                  "sampling_locations: expected [B, Q, M, L, P, 2], got ", sizes_of(sampling_locations));
  STD_TORCH_CHECK(attention_weights.dim() == 5, "attention_weights: expected [B, Q, M, L, P], got ",
                  sizes_of(attention_weights));
  STD_TORCH_CHECK(value.size(1) < std::numeric_limits<int32_t>::max(), "value: too many cells, ", value.size(1));
  Problem problem{value.size(0), value.size(1), value.size(2), value.size(3), sampling_locations.size(1),
                  sampling_locations.size(4), check_levels(spatial_shapes, value.size(1))};
  STD_TORCH_CHECK(sampling_locations.size(0) == problem.batch && sampling_locations.size(2) == problem.heads &&
                      sampling_locations.size(3) == problem.level_count(),
                  "sampling_locations: ", sizes_of(sampling_locations), " does not fit value ", sizes_of(value),
                  " with ", problem.level_count(), " levels (expected [B, Q, M, L, P, 2])");
  for (int64_t i = 0; i < 5; ++i) {
    STD_TORCH_CHECK(attention_weights.size(i) == sampling_locations.size(i), "attention_weights: ",
                    sizes_of(attention_weights), " does not fit sampling_locations ", sizes_of(sampling_locations));
  }
  const ScalarType type = value.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  "value: expected float64, float32, bfloat16 or float16, got ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(sampling_locations.scalar_type() == sampling_type(type), "sampling_locations: expected ",
                  torch::headeronly::toString(sampling_type(type)), " beside value of ",
                  torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(sampling_locations.scalar_type()));
  STD_TORCH_CHECK(attention_weights.scalar_type() == sampling_type(type), "attention_weights: expected ",
                  torch::headeronly::toString(sampling_type(type)), " beside value of ",
                  torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(attention_weights.scalar_type()));
  STD_TORCH_CHECK(sampling_locations.device() == value.device(), "sampling_locations: not on the device of value");
  STD_TORCH_CHECK(attention_weights.device() == value.device(), "attention_weights: not on the device of value");
  return problem;
}

inline void check_gradient(const Problem& problem, const Tensor& grad_output, const Tensor& value) {
  STD_TORCH_CHECK(grad_output.dim() == 3 && grad_output.size(0) == problem.batch &&
                      grad_output.size(1) == problem.queries &&
                      grad_output.size(2) == problem.heads * problem.channels,
                  "grad_output: expected [", problem.batch, ", ", problem.queries, ", ",
                  problem.heads * problem.channels, "], got ", sizes_of(grad_output));
  STD_TORCH_CHECK(grad_output.scalar_type() == value.scalar_type(), "grad_output: expected ",
                  torch::headeronly::toString(value.scalar_type()), ", the type of value, got ",
                  torch::headeronly::toString(grad_output.scalar_type()));
  STD_TORCH_CHECK(grad_output.device() == value.device(), "grad_output: not on the device of value");
}

}  // namespace raydetr
