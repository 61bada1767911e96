// The devices, versions and errors that the CUDA runtime reports.
#pragma once

struct FhCudaState {
  int devices;
  int runtime, driver;  // 1000 * major + 10 * minor; driver 0: none installed
  const char* reason;   // null when devices could be counted
};

// Also works without a driver.
FhCudaState fh_cuda_state();

// 10 * major + minor of a device's chip; 0 if this build has no code for it; a negative error
// code if the query fails.
int fh_cuda_chip(int device);

// Makes a device current for the calling thread. The caller restores the previous one:
// cudaSetDevice would create a context on it, torch's guard does not.
int fh_cuda_enter(int device);
const char* fh_cuda_error(int error);
