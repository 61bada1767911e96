// What the CUDA runtime says of this machine and of its calls.
#pragma once

struct FhCudaState {
  int devices;
  int runtime, driver;  // 1000 * major + 10 * minor; driver 0: none installed
  const char* reason;   // null when devices could be counted
};

// Answers without a driver too.
FhCudaState fh_cuda_state();

// 10 * major + minor of a device's chip; a negative error code if it cannot be asked, or 0 if
// this build has no code for it.
int fh_cuda_chip(int device);

// Makes a device current for the calling thread. The way back is the caller's: cudaSetDevice makes
// a context on the device that it is given, torch's guard only where there is one.
int fh_cuda_enter(int device);
const char* fh_cuda_error(int error);
