// Enough of CUDA C++ to run this project's kernels on a CPU, for the tests: plain g++ compiles the
// .cu files with -DFH_CUDA_SIM, and csrc/cuda/launch.h includes this file for cuda_runtime.h.
//
// Modelled: threads, blocks, barriers, warp collectives, shared memory (poisoned, guarded), the
// half type, the limits of a launch. Not modelled: weak memory ordering, streams (a launch returns
// when it is done), asynchronous copies, registers, speed. A loop that waits for another thread
// without a barrier never ends.
#pragma once
#include <mutex>

#include "half.h"
#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

namespace fhsim {
// References: g++ 12 compiles (p ? a : b)[f().x] wrongly when f returns by value.
FHSIM_UNWATCHED inline const uint3& thread_index() { return running->index; }
FHSIM_UNWATCHED inline const uint3& block_index() { return running->block->index; }
FHSIM_UNWATCHED inline const dim3& block_size() { return machine.block; }
FHSIM_UNWATCHED inline const dim3& grid_size() { return machine.grid; }
FHSIM_UNWATCHED inline unsigned lane() { return running->lane; }
FHSIM_UNWATCHED inline size_t dynamic_bytes() { return machine.dynamic; }

// The value of lane `from`; poison if it takes no part, since CUDA leaves the result undefined.
template <class T>
T exchange(const char* operation, unsigned mask, T mine, unsigned from, Where where) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle of at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &mine, sizeof(T));
  bits = meet(true, mask, operation, where, false, bits, [from](const Meeting& meeting) {
    return meeting.lanes >> from & 1 ? meeting.value[from] : ~(uint64_t)0;
  });
  memcpy(&mine, &bits, sizeof(T));
  return mine;
}

// The lane `other` of the segment of `width` lanes that holds this one, or this one if outside.
inline unsigned within(unsigned other, unsigned width) {
  return (other & ~(width - 1)) == (lane() & ~(width - 1)) ? other : lane();
}
}  // namespace fhsim

#define threadIdx (fhsim::thread_index())
#define blockIdx (fhsim::block_index())
#define blockDim (fhsim::block_size())
#define gridDim (fhsim::grid_size())
#define warpSize 32

#define FHSIM_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(FHSIM_HERE) {
  fhsim::meet(false, ~0u, "__syncthreads", {file, line}, true, 0, [](auto&) { return 0; });
}
inline void __syncwarp(unsigned mask = ~0u, FHSIM_HERE) {
  fhsim::meet(true, mask, "__syncwarp", {file, line}, true, 0, [](auto&) { return 0; });
}
template <class T>
T __shfl_sync(unsigned mask, T x, int from, int width = 32, FHSIM_HERE) {
  const unsigned lane = (fhsim::lane() & ~(width - 1)) | (from & (width - 1));
  return fhsim::exchange("__shfl_sync", mask, x, lane, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int by, int width = 32, FHSIM_HERE) {
  const unsigned lane = fhsim::within(fhsim::lane() ^ by, width);
  return fhsim::exchange("__shfl_xor_sync", mask, x, lane, {file, line});
}

// Exact at multiples of a quarter turn, like CUDA's.
inline void sincospi(double x, double* sine, double* cosine) {
  const double turned = remainder(x, 2.0), quarters = rint(2 * turned);
  const double angle = M_PI * (turned - quarters / 2), s = sin(angle), c = cos(angle);
  const int turn = (int)quarters & 3;
  *sine = (turn & 1 ? c : s) * (turn & 2 ? -1 : 1);
  *cosine = (turn & 1 ? s : c) * ((turn + 1) & 2 ? -1 : 1);
}

#define FH_SHARED(T, name, count)   \
  static const char name##_key = 0; \
  T* name = (T*)fhsim::shared_array(&name##_key, #name, sizeof(T) * (count))
#define FH_DYN_SHARED(T, name) \
  T* name = (T*)fhsim::shared_array(&fhsim::machine.dynamic, #name, fhsim::dynamic_bytes())

typedef struct CUstream_st* cudaStream_t;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};

// The error of a failed launch: what the simulator found.
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return fhsim::machine.failure.c_str();
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
         : error == cudaErrorInvalidValue       ? "invalid argument"
                                                : "no error";
}

namespace fh {
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t,
                   A... args) {
  const uint64_t threads = (uint64_t)block.x * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || shared > fhsim::shared_bytes_at_most ||
      grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  try {
    fhsim::run(grid, block, shared, [=] { kernel((P)args...); });
  } catch (const fhsim::Error&) {
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

inline int multiprocessors() { return 3; }  // few and odd: each block has several tiles
}  // namespace fh
