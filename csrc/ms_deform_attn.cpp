// The operators, and the Python module `_raydetr`, whose import registers them.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/kernels.h"

#ifndef RAYDETR_CUDA_ARCHITECTURES
#define RAYDETR_CUDA_ARCHITECTURES ""
#endif

STABLE_TORCH_LIBRARY(raydetr, m) {
  m.def(raydetr::kForwardSchema);
  m.def(raydetr::kBackwardSchema);
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
