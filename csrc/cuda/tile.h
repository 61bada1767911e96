// What the kernels on rows of V share: wide loads, rows of W in float64, their arguments.
#pragma once
#include "cuda/kernels.h"
#include "cuda/launch.h"

constexpr int WARP = 32;

// N numbers that are loaded or stored in one access if they are aligned to their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T x[N];
};

// N numbers at p, of which `left` exist: the others are read as 0 and not written.
template <bool WHOLE, int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* p, int left) {
  if constexpr (WHOLE) {
    return *reinterpret_cast<const Pack<T, N>*>(p);
  } else {
    Pack<T, N> pack = {};
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < left) pack.x[i] = p[i];
    return pack;
  }
}
template <bool WHOLE, int N, class T>
__device__ __forceinline__ void store(T* p, const Pack<T, N>& pack, int left) {
  if constexpr (WHOLE) {
    *reinterpret_cast<Pack<T, N>*>(p) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < left) p[i] = pack.x[i];
  }
}

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ double widen(float x) { return x; }
__device__ __forceinline__ double widen(__half x) { return __half2float(x); }

__device__ __forceinline__ void narrow(double x, double& y) { y = x; }
__device__ __forceinline__ void narrow(double x, float& y) { y = (float)x; }
__device__ __forceinline__ void narrow(double x, __half& y) { y = __float2half_rn((float)x); }

// The arguments of a kernel on rows of V. All threads take the same branch on the type of W.
template <class TV>
struct Rows {
  TV* v;
  int64_t ldv, k, n;
  void* w;
  int64_t ldw;
  int b;
  bool w64;
  bool aligned;  // every row of V and W starts at a multiple of 16 bytes
  const double* h;
  const int64_t* count_at;
  int64_t count;

  __device__ int64_t live() const {
    const int64_t rows = count_at ? *count_at : count;
    return rows < 0 ? 0 : rows < k ? rows : k;
  }
  // The number of columns from this one on, capped for a lane; negative when there are none.
  __device__ int left(int64_t column) const { return n - column < WARP ? (int)(n - column) : WARP; }
};

template <class TV>
Rows<TV> rows_of(const FhCudaBlock& a) {
  const auto aligned = [](const void* p, int64_t rows, int64_t ld, int64_t bytes) {
    return (uintptr_t)p % 16 == 0 && (rows < 2 || ld * bytes % 16 == 0);
  };
  const bool w64 = a.wtype == FH_F64;
  const bool both = aligned(a.v, a.k, a.ldv, sizeof(TV)) && aligned(a.w, a.b, a.ldw, w64 ? 8 : 4);
  return {(TV*)a.v, a.ldv, a.k, a.n, a.w, a.ldw, a.b, w64, both, a.h, a.count_at, a.count};
}

// Hides the value of x from the compiler, as 32-bit words. It then converts x again after a barrier
// instead of keeping 64-bit copies across it, and keeps two halves in one register.
template <class T, int N>
__device__ __forceinline__ void forget(Pack<T, N>& x) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) < 8) {
#pragma unroll
    for (int i = 0; i < (int)(sizeof(x) / 4); ++i) asm volatile("" : "+r"(((uint32_t*)&x)[i]));
  }
#endif
}

// Hides a stride, so that its multiples are computed at each use and take no registers.
__device__ __forceinline__ void forget(int64_t& stride) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+l"(stride));
#endif
}

// Row r of `rows` at v + r step; the others up to DEPTH are not changed. All loads are issued
// before the first is used.
template <int N, class T, int DEPTH>
__device__ __forceinline__ void load_rows(const T* v, int64_t step, int rows, bool whole, int left,
                                          Pack<T, N> (&x)[DEPTH]) {
  forget(step);
  if (whole) {
#pragma unroll
    for (int r = 0; r < DEPTH; ++r)
      if (r < rows) x[r] = load<true, N>(v + r * step, left);
  } else {
#pragma unroll
    for (int r = 0; r < DEPTH; ++r)
      if (r < rows) x[r] = load<false, N>(v + r * step, left);
  }
  if (sizeof(T) == 2)
#pragma unroll
    for (int r = 0; r < DEPTH; ++r) forget(x[r]);
}

// N columns from w on, of b rows, as float64; the other rows up to B are 0.
template <bool WHOLE, class TW, int B, int N>
__device__ __forceinline__ void widen_rows(const TW* w, int64_t ldw, int b, int left,
                                           double (&x)[B][N]) {
  constexpr int M = 16 / sizeof(TW) < N ? 16 / sizeof(TW) : N;
  Pack<TW, M> part[B][N / M] = {};
#pragma unroll
  for (int q = 0; q < B; ++q)
#pragma unroll
    for (int i = 0; i < N; i += M)
      if (B <= 2 || q < b) part[q][i / M] = load<WHOLE, M>(w + q * ldw + i, left - i);
#pragma unroll
  for (int q = 0; q < B; ++q)
#pragma unroll
    for (int i = 0; i < N; ++i) x[q][i] = part[q][i / M].x[i % M];
}
// Columns of b rows of W from row `first` on; B = 1, 2: b is B.
template <int B, int N, class TV>
__device__ __forceinline__ void load_block(const Rows<TV>& a, int64_t column, bool whole, int left,
                                           double (&x)[B][N], int first = 0) {
  const int64_t at = first * a.ldw + column;
  if (a.w64 && whole)
    widen_rows<true>((const double*)a.w + at, a.ldw, a.b, left, x);
  else if (a.w64)
    widen_rows<false>((const double*)a.w + at, a.ldw, a.b, left, x);
  else if (whole)
    widen_rows<true>((const float*)a.w + at, a.ldw, a.b, left, x);
  else
    widen_rows<false>((const float*)a.w + at, a.ldw, a.b, left, x);
}
