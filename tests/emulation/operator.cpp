// The CUDA operator of csrc/cuda on CPU tensors, as torch.ops.raydetr_emulated; see cuda_runtime.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <vector>

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call) STD_TORCH_CHECK((call) == cudaSuccess, #call)

#include "../../csrc/cuda/operator.h"

namespace {

using torch::stable::Tensor;

Tensor forward(const Tensor& value, std::vector<int64_t> spatial_shapes, const Tensor& sampling_locations,
               const Tensor& attention_weights) {
  return raydetr::cuda::forward(value, spatial_shapes, sampling_locations, attention_weights, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& value,
                                            std::vector<int64_t> spatial_shapes, const Tensor& sampling_locations,
                                            const Tensor& attention_weights, bool want_value, bool want_locations,
                                            bool want_weights, bool deterministic) {
  return raydetr::cuda::backward(grad_output, value, spatial_shapes, sampling_locations, attention_weights, want_value,
                                 want_locations, want_weights, deterministic, nullptr);
}

// The queries of all slots, in the order in which the kernels walk them.
std::vector<int64_t> tiles(std::vector<int64_t> spatial_shapes) {
  raydetr::cuda::Shape shape{};
  int32_t cells = 0;
  for (size_t i = 0; i < spatial_shapes.size(); i += 2) {
    const auto height = static_cast<int32_t>(spatial_shapes[i]);
    const auto width = static_cast<int32_t>(spatial_shapes[i + 1]);
    shape.levels[shape.level_count] = {height, width, cells};
    shape.bands[shape.level_count++] = raydetr::cuda::divisor(raydetr::cuda::kTile * width);
    cells += height * width;
  }
  std::vector<int64_t> queries;
  for (int32_t slot = 0; slot < cells; ++slot) {
    queries.push_back(raydetr::cuda::tiled_query(shape, slot));
  }
  return queries;
}

// Quotient and remainder, as the kernels divide.
std::vector<int64_t> divide(int64_t dividend, int64_t by) {
  const raydetr::cuda::Division result =
      raydetr::cuda::divide(static_cast<uint32_t>(dividend), raydetr::cuda::divisor(static_cast<uint32_t>(by)));
  return {result.quotient, result.remainder};
}

}  // namespace

STABLE_TORCH_LIBRARY(raydetr_emulated, m) {
  m.def(raydetr::kForwardSchema);
  m.def(raydetr::kBackwardSchema);
  m.def("tiles(int[] spatial_shapes) -> int[]");
  m.def("divide(int dividend, int by) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(raydetr_emulated, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&backward));
}

STABLE_TORCH_LIBRARY_IMPL(raydetr_emulated, CompositeExplicitAutograd, m) {
  m.impl("tiles", TORCH_BOX(&tiles));
  m.impl("divide", TORCH_BOX(&divide));
}
