// The operator on CUDA as torch calls it: on the device of the values and on its current stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "operator.h"

namespace raydetr::cuda {
namespace {

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor forward_here(const Tensor& value, std::vector<int64_t> spatial_shapes, const Tensor& sampling_locations,
                    const Tensor& attention_weights) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  return forward(value, spatial_shapes, sampling_locations, attention_weights, current_stream(value));
}

std::tuple<Tensor, Tensor, Tensor> backward_here(const Tensor& grad_output, const Tensor& value,
                                                 std::vector<int64_t> spatial_shapes, const Tensor& sampling_locations,
                                                 const Tensor& attention_weights, bool want_value, bool want_locations,
                                                 bool want_weights, bool deterministic) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  return backward(grad_output, value, spatial_shapes, sampling_locations, attention_weights, want_value,
                  want_locations, want_weights, deterministic, current_stream(value));
}

}  // namespace
}  // namespace raydetr::cuda

STABLE_TORCH_LIBRARY_IMPL(raydetr, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&raydetr::cuda::forward_here));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&raydetr::cuda::backward_here));
}
