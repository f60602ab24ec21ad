// Compiles the kernels for each instruction set and chooses among them when the module is first used.
#include <cstdlib>
#include <string_view>

#include "kernels.h"

namespace raydetr::cpu {
namespace {

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define RAYDETR_X86 1
#endif

// Functions NAME_forward, NAME_sampling and NAME_value of both types, with vectors of BYTES.
#define RAYDETR_KERNELS(NAME, TARGET, BYTES)                                                                      \
  template <typename T>                                                                                           \
  TARGET void NAME##_forward(const ForwardTask<T>& task, int64_t begin, int64_t end) {                            \
    if (task.channels == 32 && task.points.point_count == 4) {                                                    \
      ForwardTask<T> common = task;                                                                               \
      common.channels = 32;                                                                                       \
      common.points.point_count = 4;                                                                              \
      forward_queries<T, BYTES / sizeof(T)>(common, begin, end);                                                  \
    } else {                                                                                                      \
      forward_queries<T, BYTES / sizeof(T)>(task, begin, end);                                                    \
    }                                                                                                             \
  }                                                                                                               \
  template <typename T>                                                                                           \
  TARGET void NAME##_sampling(const SamplingTask<T>& task, int64_t begin, int64_t end) {                          \
    if (task.channels == 32 && task.points.point_count == 4) {                                                    \
      SamplingTask<T> common = task;                                                                              \
      common.channels = 32;                                                                                       \
      common.points.point_count = 4;                                                                              \
      sampling_queries<T, BYTES / sizeof(T)>(common, begin, end);                                                 \
    } else {                                                                                                      \
      sampling_queries<T, BYTES / sizeof(T)>(task, begin, end);                                                   \
    }                                                                                                             \
  }                                                                                                               \
  template <typename T>                                                                                           \
  TARGET void NAME##_value(const ValueTask<T>& task) {                                                            \
    if (task.channels == 32 && task.points.point_count == 4) {                                                    \
      ValueTask<T> common = task;                                                                                 \
      common.channels = 32;                                                                                       \
      common.points.point_count = 4;                                                                              \
      common.points.level_count = 1;                                                                              \
      value_level<T, BYTES / sizeof(T)>(common);                                                                  \
    } else {                                                                                                      \
      value_level<T, BYTES / sizeof(T)>(task);                                                                    \
    }                                                                                                             \
  }                                                                                                               \
  template <typename T>                                                                                           \
  constexpr Kernels<T> NAME##_kernels{NAME##_forward<T>, NAME##_sampling<T>, NAME##_value<T>};

RAYDETR_KERNELS(base, , 16)
#ifdef RAYDETR_X86
RAYDETR_KERNELS(avx2, __attribute__((target("avx2,fma,bmi,bmi2"))), 32)
RAYDETR_KERNELS(avx512, __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,bmi,bmi2"))), 64)
#endif

enum class Set { kBase, kAvx2, kAvx512 };

Set choose() {
#ifdef RAYDETR_X86
  const char* wanted = std::getenv("RAYDETR_CPU");
  const std::string_view limit = wanted == nullptr ? "avx512" : wanted;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  if (avx512 && limit != "avx2" && limit != "default") {
    return Set::kAvx512;
  }
  if (avx2 && limit != "default") {
    return Set::kAvx2;
  }
#endif
  return Set::kBase;
}

Set chosen() {
  static const Set set = choose();
  return set;
}

}  // namespace

const char* instruction_set() {
  switch (chosen()) {
    case Set::kAvx512: return "avx512";
    case Set::kAvx2: return "avx2";
    default: return "default";
  }
}

template <typename T>
const Kernels<T>& kernels() {
#ifdef RAYDETR_X86
  switch (chosen()) {
    case Set::kAvx512: return avx512_kernels<T>;
    case Set::kAvx2: return avx2_kernels<T>;
    default: break;
  }
#endif
  return base_kernels<T>;
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();

}  // namespace raydetr::cpu
