// The scalars of one delayed Gram-Schmidt step of Lanczos, by one CTA. Nothing is read back.
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace {
constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr double CANCELLED = 1e-4;  // as in fasthessian/kernels/contract.py

// The sum of one number per thread over the CTA, in a fixed order; all threads get it.
__device__ __forceinline__ double block_sum(double x, double* shared) {
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < WARPS; ++warp) sum += shared[warp];
  return sum;
}
// The maximum; NaN if either is NaN.
__device__ __forceinline__ double larger(double a, double b) { return a > b || a != a ? a : b; }

__global__ void __launch_bounds__(THREADS) recur_kernel(FhRecurrence a) {
  FH_SHARED(double, sums, WARPS);
  const int64_t j = a.count_at ? a.count_at[0] : a.count;
  const bool room = j >= 0 && j < a.m && j <= a.k;  // no row if a graph is replayed too often
  const int64_t rows = room ? j : 0;
  const double unit = 1 / a.scale;  // scales the dots with a stored row
  double* const last = a.t + rows * a.ldt;
  double ss = 0, sz = 0, link_s = 0;
  for (int64_t i = threadIdx.x; i < rows; i += THREADS) {
    const double s = unit * a.c[i * a.ldc], z = unit * a.c[i * a.ldc + 1];
    ss += s * s, sz += s * z, link_s += last[i] * s;
  }
  ss = block_sum(ss, sums), sz = block_sum(sz, sums), link_s = block_sum(link_s, sums);
  const double uu = a.g[0], uw = a.g[1], nu2 = uu - ss;
  const bool fresh = room && nu2 > CANCELLED * uu;
  const double nu = sqrt(nu2), inverse = 1 / nu, t = (uw - sz) / nu2;

  // each warp takes a row i of T and compares q_i'Aq_j with the value in row j
  double asymmetry = 0;
  for (int64_t i = threadIdx.x / 32; i < rows; i += WARPS) {
    double ts = 0;
    for (int64_t l = threadIdx.x % 32; l < rows; l += 32) ts += a.t[i * a.ldt + l] * a.c[l * a.ldc];
    for (int step = 16; step; step /= 2) ts += __shfl_xor_sync(~0u, ts, step);
    const double coupling = (a.c[i * a.ldc + 1] - ts) * unit * inverse;
    asymmetry = larger(fabs(coupling - nu * last[i]), asymmetry);
  }
  __syncthreads();  // row j and the sums have been read
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = asymmetry;
  __syncthreads();

  for (int64_t i = threadIdx.x; i < rows; i += THREADS) {
    const double coupling = fresh ? nu * last[i] : 0;
    last[i] = coupling;
    a.t[i * a.ldt + rows] = coupling;
  }
  for (int64_t i = threadIdx.x; i < 2 * a.k; i += THREADS)
    a.h[i] = fresh && i / 2 < rows ? unit * unit * a.c[i / 2 * a.ldc + i % 2] : 0;
  if (room)
    for (int64_t i = threadIdx.x; i <= rows; i += THREADS) last[a.ldt + i] = i == rows;
  if (threadIdx.x) return;
  a.s[0] = a.s[3] = fresh ? inverse : 0;
  a.s[1] = 0;
  a.s[2] = fresh ? -t * inverse : 0;
  if (!room) return;
  for (int warp = 1; warp < WARPS; ++warp) asymmetry = larger(sums[warp], asymmetry);
  last[rows] = fresh ? t - link_s : 0;
  double* const gauge = a.gauges + rows * a.ldgauges;
  gauge[0] = uu, gauge[1] = nu2, gauge[2] = fresh ? asymmetry : 0;
  if (a.count_at) a.count_at[0] = j + 1, a.count_at[1] = j;
}
}  // namespace

int fh_cuda_recur(const FhRecurrence& step, void* stream) {
  return fh::launch(recur_kernel, dim3(1), dim3(THREADS), 0, (cudaStream_t)stream, step);
}
