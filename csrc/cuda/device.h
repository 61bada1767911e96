#pragma once

struct FhCudaState {
  int devices;
  int runtime, driver;  // 1000 * major + 10 * minor; driver 0: none installed
  const char* reason;   // null when devices could be counted
};

FhCudaState fh_cuda_state();
