// The CUDA part of the extension, with the kernels on the simulator: one device, no driver.
#include "bindings.h"
#include "cuda/device.h"
#include "cuda/launch.h"

int fh_cuda_enter(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
const char* fh_cuda_error(int error) { return cudaGetErrorString((cudaError_t)error); }

PYBIND11_MODULE(_simulated, m) {
  bind_cuda(m.def_submodule("cuda"));
  m.def("seed", &fhsim::seed);
}
