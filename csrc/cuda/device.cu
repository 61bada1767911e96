// What the CUDA runtime says of this machine; answers without a driver too.
#include <cuda_runtime.h>

#include "cuda/device.h"

FhCudaState fh_cuda_state() {
  FhCudaState state = {};
  const cudaError_t error = cudaGetDeviceCount(&state.devices);
  if (error != cudaSuccess) {
    state.devices = 0;
    state.reason = cudaGetErrorString(error);
    cudaGetLastError();  // the runtime keeps the error otherwise
  }
  cudaRuntimeGetVersion(&state.runtime);
  cudaDriverGetVersion(&state.driver);
  return state;
}
