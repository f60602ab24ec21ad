// Schemas of the operators and the Python module `_raydetr`, whose import registers them.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/kernels.h"

#ifndef RAYDETR_CUDA_ARCHITECTURES
#define RAYDETR_CUDA_ARCHITECTURES ""
#endif

// Shapes are SymInt[] (height and width of every level in turn): nothing is read back from a device, and
// torch.compile may leave them symbolic. A gradient that is not wanted is an empty tensor.
STABLE_TORCH_LIBRARY(raydetr, m) {
  m.def(
      "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights)"
      " -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations,"
      " Tensor attention_weights, bool want_value, bool want_locations, bool want_weights, bool deterministic)"
      " -> (Tensor, Tensor, Tensor)");
}

// What `raydetr doctor` reports; the operators themselves are reached through torch.ops.raydetr.
PyMODINIT_FUNC PyInit__raydetr() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_raydetr", "Compiled operators of raydetr.", -1, nullptr, nullptr, nullptr,
      nullptr,               nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr) {
    PyModule_AddStringConstant(module, "cpu", raydetr::cpu::instruction_set());
    PyModule_AddStringConstant(module, "cuda", RAYDETR_CUDA_ARCHITECTURES);
  }
  return module;
}
