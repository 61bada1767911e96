// The product with the Hessian of a cross-entropy at its logits: u = scale (p u - p (p . u)).
//
// A team of threads takes up to 32 adjacent rows: one lane per row, and `ways` threads per lane
// that share the classes. Each thread keeps its own sums, relative to the largest logit it has
// read. In the second pass it reads the same classes again and writes them.
#include "cuda/kernels.h"
#include "cuda/tile.h"

namespace {
constexpr int THREADS = 512;

struct Logits {
  int64_t outer, classes, inner;
  int lanes, ways;  // powers of two, their product at most THREADS
};

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// What is subtracted from logits: their maximum, or 0 while all are -inf (exponentials 0).
template <class T>
__device__ __forceinline__ T origin(T top) {
  return top == -(T)INFINITY ? 0 : top;
}

template <class T>
struct Sums {
  T top = -(T)INFINITY;
  double total = 0, dot = 0;  // of exp(z - top), and of that with u

  __device__ void raise(T most) {
    if (most == top) return;
    const double shrink = exponential(top - most);
    total *= shrink, dot *= shrink, top = most;
  }
};

// N classes of one row per thread: `gap` numbers apart, or adjacent and aligned if `whole`.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> gather(const T* p, int64_t gap, int left, bool whole,
                                             T missing) {
  if (whole) return load<true, N>(p, left);
  Pack<T, N> x;
#pragma unroll
  for (int i = 0; i < N; ++i) x.x[i] = i < left ? p[i * gap] : missing;
  return x;
}
template <int N, class T>
__device__ __forceinline__ void scatter(T* p, const Pack<T, N>& x, int64_t gap, int left,
                                        bool whole) {
  if (whole) return store<true, N>(p, x, left);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < left) p[i * gap] = x.x[i];
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    curvature_kernel(T* u, const T* z, const double* scale, Logits a) {
  constexpr int N = 16 / sizeof(T);
  FH_SHARED(T, tops, THREADS);
  FH_SHARED(double, totals, THREADS);
  FH_SHARED(double, dots, THREADS);
  const int size = a.lanes * a.ways;  // threads per team
  const int lane = threadIdx.x % a.lanes, way = threadIdx.x % size / a.lanes;
  const int64_t tiles = (a.inner + a.lanes - 1) / a.lanes;
  const int64_t tile = (int64_t)blockIdx.x * (THREADS / size) + threadIdx.x / size;
  const int64_t block = tile / tiles, column = tile % tiles * a.lanes + lane;
  const bool mine = block < a.outer && column < a.inner;
  const double factor = mine ? scale[block * a.inner + column] : 0;
  u += block * a.classes * a.inner + column, z += block * a.classes * a.inner + column;

  const bool wide = a.inner == 1 && ((uintptr_t)u | (uintptr_t)z) % 16 == 0;
  const int64_t first = wide ? way * N : way, step = wide ? 1 : a.ways;  // in classes
  const int64_t gap = step * a.inner, stride = (int64_t)a.ways * N;
  const int64_t rounds = mine && first < a.classes ? (a.classes - first + stride - 1) / stride : 0;
  const auto left_at = [&](int64_t k) {
    const int64_t left = (a.classes - k + step - 1) / step;
    return left < N ? (int)left : N;
  };

  Sums<T> sums;
  for (int64_t round = 0; round < rounds && factor != 0; ++round) {
    const int64_t k = first + round * stride, at = k * a.inner;
    const int left = left_at(k);
    const Pack<T, N> logit = gather<N>(z + at, gap, left, wide && left == N, -(T)INFINITY);
    const Pack<T, N> given = gather<N>(u + at, gap, left, wide && left == N, (T)0);
    T most = sums.top;
#pragma unroll
    for (int i = 0; i < N; ++i) most = logit.x[i] > most ? logit.x[i] : most;
    sums.raise(most);
    const T zero = origin(most);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const double e = exponential(logit.x[i] - zero);
      sums.total += e, sums.dot = fma(e, (double)given.x[i], sums.dot);
    }
  }

  T most = sums.top;
  for (int by = a.lanes; by < size && by < WARP; by *= 2) {
    const T other = __shfl_xor_sync(~0u, most, by);
    most = other > most ? other : most;
  }
  sums.raise(most);
  for (int by = a.lanes; by < size && by < WARP; by *= 2) {
    sums.total += __shfl_xor_sync(~0u, sums.total, by);
    sums.dot += __shfl_xor_sync(~0u, sums.dot, by);
  }
  if (size > WARP) {
    tops[threadIdx.x] = sums.top, totals[threadIdx.x] = sums.total, dots[threadIdx.x] = sums.dot;
    __syncthreads();
    const int from = threadIdx.x / size * size + lane;
    for (int i = from; i < from + size; i += WARP) most = tops[i] > most ? tops[i] : most;
    sums = {most};
    for (int i = from; i < from + size; i += WARP) {
      Sums<T> part = {tops[i], totals[i], dots[i]};
      part.raise(most);
      sums.total += part.total, sums.dot += part.dot;
    }
  }

  const T zero = origin(sums.top), mean = (T)(sums.dot / sums.total);
  const T weight = (T)(factor / sums.total);
  for (int64_t round = rounds; round-- > 0;) {  // from the end, which is still in cache
    const int64_t k = first + round * stride, at = k * a.inner;
    const int left = left_at(k);
    Pack<T, N> product = {};
    if (factor != 0) {
      const Pack<T, N> logit = gather<N>(z + at, gap, left, wide && left == N, -(T)INFINITY);
      const Pack<T, N> given = gather<N>(u + at, gap, left, wide && left == N, (T)0);
#pragma unroll
      for (int i = 0; i < N; ++i)
        product.x[i] = exponential(logit.x[i] - zero) * weight * (given.x[i] - mean);
    }
    scatter(u + at, product, gap, left, wide && left == N);
  }
}

template <class T>
cudaError_t softmax_curvature(T* u, const T* z, const double* scale, Logits a,
                              cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T);
  for (a.lanes = 1; a.lanes < WARP && a.lanes < a.inner;) a.lanes *= 2;
  for (a.ways = 1; a.lanes * a.ways < THREADS && a.ways * N < a.classes;) a.ways *= 2;
  const int64_t tiles = a.outer * ((a.inner + a.lanes - 1) / a.lanes);
  const int64_t teams = THREADS / (a.lanes * a.ways);
  const dim3 grid((tiles + teams - 1) / teams);
  return fh::launch(curvature_kernel<T>, grid, dim3(THREADS), 0, stream, u, z, scale, a);
}
}  // namespace

int fh_cuda_softmax_curvature(void* u, const void* z, FhType type, int64_t outer, int64_t classes,
                              int64_t inner, const double* scale, void* stream) {
  if (outer == 0 || classes == 0 || inner == 0) return cudaSuccess;
  const Logits a = {outer, classes, inner, 1, 1};
  const cudaStream_t on = (cudaStream_t)stream;
  if (type == FH_F64) return softmax_curvature((double*)u, (const double*)z, scale, a, on);
  return softmax_curvature((float*)u, (const float*)z, scale, a, on);
}
