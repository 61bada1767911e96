#include <cuda_runtime.h>

#include "cuda/device.h"

namespace {
__global__ void probe() {}  // compiled for the same chips as every kernel
}  // namespace

FhCudaState fh_cuda_state() {
  FhCudaState state = {};
  const cudaError_t error = cudaGetDeviceCount(&state.devices);
  if (error != cudaSuccess) {
    state.devices = 0;
    state.reason = cudaGetErrorString(error);
    cudaGetLastError();  // clears the error, which the runtime would keep
  }
  cudaRuntimeGetVersion(&state.runtime);
  cudaDriverGetVersion(&state.driver);
  return state;
}

int fh_cuda_chip(int device) {
  int major = 0, minor = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = (cudaError_t)fh_cuda_enter(device);
  if (error != cudaSuccess) return -(int)error;
  if ((error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) ==
          cudaSuccess &&
      (error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)) ==
          cudaSuccess)
    error = cudaFuncGetAttributes(&attributes, probe);
  cudaGetLastError();
  if (error == cudaErrorNoKernelImageForDevice) return 0;
  return error == cudaSuccess ? 10 * major + minor : -(int)error;
}

int fh_cuda_enter(int device) {
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess && current != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

const char* fh_cuda_error(int error) { return cudaGetErrorString((cudaError_t)error); }
