// Counter-based random vectors, with the same bits as csrc/cpu/random.inc.
#include "cuda/kernels.h"
#include "cuda/tile.h"

namespace {
constexpr int THREADS = 256, PER_MULTIPROCESSOR = 8;
constexpr uint32_t SIGNS = 0, NORMAL = 1;  // third counter word: two separate streams

struct Words {
  uint32_t x[4];
};
// Philox 4x32-10 (Salmon et al. 2011).
__device__ __forceinline__ Words philox(uint64_t counter, uint32_t kind, uint64_t seed) {
  Words w = {{(uint32_t)counter, (uint32_t)(counter >> 32), kind, 0}};
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = (uint64_t)w.x[0] * 0xD2511F53u, p1 = (uint64_t)w.x[2] * 0xCD9E8D57u;
    w = {{(uint32_t)(p1 >> 32) ^ w.x[1] ^ k0, (uint32_t)p1, (uint32_t)(p0 >> 32) ^ w.x[3] ^ k1,
          (uint32_t)p0}};
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return w;
}

// 128 elements per counter. Each lane computes the words of one counter. The warp writes one
// counter after the other, the 32 elements of each word by adjacent lanes.
template <class T>
__global__ void __launch_bounds__(THREADS)
    signs_kernel(T* out, int64_t n, uint64_t seed, int64_t offset) {
  const int lane = threadIdx.x % WARP;
  const int64_t first = offset / 128, end = (offset + n + 127) / 128;
  const int64_t warp = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / WARP;
  const int64_t warps = (int64_t)gridDim.x * THREADS / WARP;
  for (int64_t counter = first + warp * WARP; counter < end; counter += warps * WARP) {
    const Words mine = philox(counter + lane, SIGNS, seed);
    const int64_t start = counter * 128 - offset;
    for (int other = 0; other < WARP && counter + other < end; ++other)
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const uint32_t bits = __shfl_sync(~0u, mine.x[word], other);
        const int64_t at = start + other * 128 + word * 32 + lane;
        if (at >= 0 && at < n) out[at] = bits >> lane & 1 ? (T)-1 : (T)1;
      }
  }
}

// Four elements per counter, by Box-Muller in float64.
template <class T>
__global__ void __launch_bounds__(THREADS)
    normal_kernel(T* out, int64_t n, uint64_t seed, int64_t offset) {
  const int64_t first = offset / 4, end = (offset + n + 3) / 4;
  const int64_t threads = (int64_t)gridDim.x * THREADS;
  constexpr int M = 16 / sizeof(T);
  const bool aligned = ((uintptr_t)out - (uint64_t)offset * sizeof(T)) % 16 == 0;
  for (int64_t counter = first + (int64_t)blockIdx.x * THREADS + threadIdx.x; counter < end;
       counter += threads) {
    const Words words = philox(counter, NORMAL, seed);
    Pack<T, M> values[4 / M];
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const double u = (words.x[2 * pair] + 0.5) * 0x1p-32;
      const double v = (words.x[2 * pair + 1] + 0.5) * 0x1p-31;
      double sine, cosine;
      sincospi(v, &sine, &cosine);
      const double radius = sqrt(-2 * log(u));
      values[2 * pair / M].x[2 * pair % M] = (T)(radius * cosine);
      values[2 * pair / M].x[2 * pair % M + 1] = (T)(radius * sine);
    }
    const int64_t start = counter * 4 - offset;
    const bool whole = aligned && start >= 0 && start + 4 <= n;
#pragma unroll
    for (int i = 0; i < 4; i += M) {
      if (whole) {
        store<true>(out + start + i, values[i / M], M);
        continue;
      }
#pragma unroll
      for (int j = 0; j < M; ++j)
        if (start + i + j >= 0 && start + i + j < n) out[start + i + j] = values[i / M].x[j];
    }
  }
}

dim3 ctas(int64_t work, int64_t of_cta) {
  const int64_t wanted = (work + of_cta - 1) / of_cta;
  const int64_t most = (int64_t)fh::multiprocessors() * PER_MULTIPROCESSOR;
  return dim3(wanted < most ? wanted : most);
}
}  // namespace

int fh_cuda_signs(void* out, FhType type, int64_t n, uint64_t seed, int64_t offset, void* stream) {
  if (n == 0) return cudaSuccess;
  const dim3 grid = ctas(n / 128 + 2, THREADS);
  const cudaStream_t on = (cudaStream_t)stream;
  if (type == FH_F64)
    return fh::launch(signs_kernel<double>, grid, dim3(THREADS), 0, on, (double*)out, n, seed,
                      offset);
  return fh::launch(signs_kernel<float>, grid, dim3(THREADS), 0, on, (float*)out, n, seed, offset);
}

int fh_cuda_normal(void* out, FhType type, int64_t n, uint64_t seed, int64_t offset, void* stream) {
  if (n == 0) return cudaSuccess;
  const dim3 grid = ctas(n / 4 + 2, THREADS);
  const cudaStream_t on = (cudaStream_t)stream;
  if (type == FH_F64)
    return fh::launch(normal_kernel<double>, grid, dim3(THREADS), 0, on, (double*)out, n, seed,
                      offset);
  return fh::launch(normal_kernel<float>, grid, dim3(THREADS), 0, on, (float*)out, n, seed, offset);
}
