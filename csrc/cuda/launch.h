// One way to write and launch a kernel for nvcc and for the CPU simulator of tests/support/cudasim.
//
// A kernel declares shared memory by FH_SHARED or FH_DYN_SHARED and is started by fh::launch, which
// converts the arguments to the kernel's own types. The simulator's header gives the same names,
// and of CUDA what is used here:
//   __global__ __device__ __forceinline__ __launch_bounds__ __restrict__ __grid_constant__, #pragma
//   unroll; threadIdx blockIdx blockDim gridDim; dim3;
//   __syncthreads __shfl_sync __shfl_xor_sync; __half __half2float __float2half_rn;
//   fma sqrt log exp expf sincospi; cudaStream_t cudaError_t cudaSuccess cudaErrorInvalidValue.
#pragma once

#ifdef FH_CUDA_SIM
#include "cudasim.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FH_SHARED(T, name, count) __shared__ T name[count]
// of any type; the launch says how many bytes
#define FH_DYN_SHARED(T, name)                                \
  extern __shared__ __align__(16) unsigned char fh_dynamic[]; \
  T* name = reinterpret_cast<T*>(fh_dynamic)

namespace fh {
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared,
                   cudaStream_t stream, Args... args) {
  // clang-format off: it separates the brackets in a header
  kernel<<<grid, block, shared, stream>>>(static_cast<Params>(args)...);
  // clang-format on
  return cudaGetLastError();
}

// The number of multiprocessors of the current device; 0 if the query fails.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 0;
  return count;
}
}  // namespace fh
#endif
