// Kernels with one bug each, to see that the simulator and the sanitizers find them.
//   planted NAME [SEED]     prints the launch's error, or "ok" and the answer's checksum
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cudasim.h"

namespace {
constexpr int threads = 96;  // three warps

__global__ void reversed(float* x, bool barrier) {
  FH_SHARED(float, line, threads);
  line[threadIdx.x] = x[threadIdx.x];  // planted: write
  if (barrier) __syncthreads();
  x[threadIdx.x] = line[threads - 1 - threadIdx.x];  // planted: read
}

// The second round's write may overtake the first round's read.
__global__ void reused(float* x, bool barrier) {
  FH_SHARED(float, line, threads);
  for (int round = 0; round < 2; ++round) {
    line[threadIdx.x] = x[threadIdx.x];  // planted: overtaking write
    __syncthreads();
    x[threadIdx.x] = line[threads - 1 - threadIdx.x] + 1;  // planted: overtaken read
    if (barrier) __syncthreads();
  }
}

__global__ void neighbours(float* x, bool barrier) {
  FH_SHARED(float, line, threads);
  line[threadIdx.x] = x[threadIdx.x];  // planted: lane's write
  if (barrier) __syncwarp();
  x[threadIdx.x] = line[threadIdx.x ^ 1];  // planted: lane's read
}

__global__ void divergent_barrier(float* x) {
  if (threadIdx.x < 40) __syncthreads();  // planted: divergent
  x[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 1);
}

__global__ void two_barriers(float* x) {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
  x[threadIdx.x] = 0;
}

__global__ void divergent_shuffle(float* x) {
  if (threadIdx.x % 32 < 7) x[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 1);
  __syncthreads();
}

__global__ void outside_mask(float* x) { x[threadIdx.x] = __shfl_sync(0xffff, x[threadIdx.x], 0); }

__global__ void behind_shared(float* x) {
  FH_SHARED(float, line, threads);
  line[threadIdx.x + 1] = 1;  // planted: behind shared
  x[threadIdx.x] = 0;
}

__global__ void out_of_bounds(float* x) {
  x[blockIdx.x * threads + threadIdx.x] = 1;  // planted: out of bounds
}

struct alignas(16) Four {
  float x[4];
};

__global__ void misaligned(float* x) {
  const Four four = *reinterpret_cast<const Four*>(x + 1);  // planted: misaligned
  x[threadIdx.x] = four.x[0] + four.x[3];
}

__global__ void counter(float* x) {
  x[0] = x[0] + 1;  // planted: counter
}

__global__ void across_blocks(float* x) {
  __syncthreads();
  if (threadIdx.x == 0) x[0] = blockIdx.x;  // planted: across blocks
  __syncthreads();
}

__global__ void too_much_shared(float* x) {
  FH_SHARED(double, big, 7000);
  x[0] = big[0];
}
}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  std::vector<float> x(threads);
  for (int i = 0; i < threads; ++i) x[i] = i;
  const auto go = [&x](auto kernel, unsigned blocks, auto... arguments) {
    return fh::launch(kernel, blocks, threads, 0, nullptr, x.data(), arguments...);
  };
  const std::map<std::string, std::function<cudaError_t()>> cases = {
      {"reversed", [&] { return go(reversed, 1, false); }},
      {"reversed-right", [&] { return go(reversed, 1, true); }},
      {"reused", [&] { return go(reused, 1, false); }},
      {"reused-right", [&] { return go(reused, 1, true); }},
      {"neighbours", [&] { return go(neighbours, 1, false); }},
      {"neighbours-right", [&] { return go(neighbours, 1, true); }},
      {"divergent-barrier", [&] { return go(divergent_barrier, 1); }},
      {"two-barriers", [&] { return go(two_barriers, 1); }},
      {"divergent-shuffle", [&] { return go(divergent_shuffle, 1); }},
      {"outside-mask", [&] { return go(outside_mask, 1); }},
      {"behind-shared", [&] { return go(behind_shared, 1); }},
      {"out-of-bounds", [&] { return go(out_of_bounds, 2); }},
      {"misaligned", [&] { return go(misaligned, 1); }},
      {"counter", [&] { return go(counter, 1); }},
      {"across-blocks", [&] { return go(across_blocks, 2); }},
      {"too-much-shared", [&] { return go(too_much_shared, 1); }},
      {"empty-grid", [&] { return go(counter, 0); }},
  };
  const auto found = cases.find(argv[1]);
  if (found == cases.end()) return 2;
  fhsim::seed(argc > 2 ? atoi(argv[2]) : 0);
  const cudaError_t error = found->second();
  if (error) {
    printf("error: %s\n", cudaGetErrorString(error));
    return 0;
  }
  double checksum = 0;
  for (int i = 0; i < threads; ++i) checksum += (i + 1) * (double)x[i];
  printf("ok %g\n", checksum);
}
