// Enough of CUDA to run the kernels of csrc/cuda on a CPU: the lanes of a warp are fibers that run until they meet in an
// exchange. Blocks, and the warps of a block, run one after the other. Lanes that do not all meet in the same exchange
// end the program; their order changes from exchange to exchange, so that a missing one shows in the results.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulation {

constexpr int kLanes = 32;
enum class Meeting { kNone, kSync, kShuffle };

struct Lane {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  Meeting meeting;
};

inline Lane lanes[kLanes];
inline ucontext_t scheduler;
inline int current;
inline int turn;
inline std::function<void()> body;
inline uint64_t exchanged[2][kLanes];

inline void run_lane() {
  body();
  lanes[current].meeting = Meeting::kNone;
}

inline void meet(Meeting meeting) {
  lanes[current].meeting = meeting;
  swapcontext(&lanes[current].context, &scheduler);
}

inline void run_warp(unsigned first_thread) {
  for (Lane& lane : lanes) {
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data();
    lane.context.uc_stack.ss_size = lane.stack.size();
    lane.context.uc_link = &scheduler;
    makecontext(&lane.context, run_lane, 0);
  }
  for (turn = 0;; ++turn) {
    for (int i = 0; i < kLanes; ++i) {
      current = turn % 2 ? kLanes - 1 - i : i;
      threadIdx = dim3(first_thread + current, 0, 0);
      swapcontext(&scheduler, &lanes[current].context);
    }
    for (const Lane& lane : lanes) {
      if (lane.meeting != lanes[0].meeting) {
        std::fprintf(stderr, "the lanes of a warp do not meet\n");
        std::abort();
      }
    }
    if (lanes[0].meeting == Meeting::kNone) {
      return;
    }
  }
}

}  // namespace emulation

inline void __syncwarp() { emulation::meet(emulation::Meeting::kSync); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  uint64_t* slots = emulation::exchanged[emulation::turn % 2];
  const int from = emulation::current ^ mask;
  std::memcpy(slots + emulation::current, &value, sizeof(T));
  emulation::meet(emulation::Meeting::kShuffle);
  std::memcpy(&value, slots + from, sizeof(T));
  return value;
}

template <typename T>
T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0) {
    std::fprintf(stderr, "emulation: a load of %zu bytes from an address that is no multiple of them\n", sizeof(T));
    std::abort();
  }
  return *from;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  emulation::body = [&] { kernel(arguments...); };
  for (unsigned z = 0; z < gridDim.z; ++z) {
    for (unsigned y = 0; y < gridDim.y; ++y) {
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = dim3(x, y, z);
        for (unsigned thread = 0; thread < blockDim.x; thread += emulation::kLanes) {
          emulation::run_warp(thread);
        }
      }
    }
  }
  return cudaSuccess;
}
