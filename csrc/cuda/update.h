// W = S (W - H^T V) in one pass over V: a thread owns the columns of one wide load and loops over
// all rows, with AHEAD loads in flight.
#pragma once
#include "cuda/tile.h"

constexpr int UPDATE_THREADS = 256, AHEAD = 8;

template <class TV, int B>
struct UpdateShape {
  // columns per thread; 8 in a block of 4 need 150 to 170 registers: one CTA instead of two
  static constexpr int lane = sizeof(TV) == 2 && B == 4 ? 4 : 16 / sizeof(TV);
  static constexpr int per_multiprocessor = B == 8 ? 1 : 2;
  static constexpr int columns = UPDATE_THREADS * lane;
  static constexpr int held = 3072 / B;  // rows of H in shared memory at a time: 24 KB
};
template <class TV, int B>
size_t update_shared(int64_t count) {
  constexpr int held = UpdateShape<TV, B>::held;
  const int64_t rows = (count + AHEAD - 1) / AHEAD * AHEAD;
  return (rows < held ? rows : held) * B * sizeof(double);
}

// w -= h^T v over the first `rows` rows; h is padded with 0 to a multiple of AHEAD.
template <class TV, int B, int N>
__device__ __forceinline__ void subtract(const TV* v, int64_t ldv, int rows, bool whole, int left,
                                         const double* h, double (&w)[B][N]) {
#pragma unroll 1
  for (; rows > 0; rows -= AHEAD, v += AHEAD * ldv, h += AHEAD * B) {
    Pack<TV, N> x[AHEAD] = {};
    load_rows(v, ldv, rows, whole, left, x);
#pragma unroll
    for (int r = 0; r < AHEAD; ++r) {
      double c[B];
#pragma unroll
      for (int q = 0; q < B; ++q) c[q] = -h[r * B + q];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const double number = widen(x[r].x[j]);
#pragma unroll
        for (int q = 0; q < B; ++q) w[q][j] = fma(c[q], number, w[q][j]);
      }
    }
  }
}

// y = row p of S times w, or row p of w without S.
template <int B, int N>
__device__ __forceinline__ void mix(const double* s, int p, const double (&w)[B][N],
                                    double (&y)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) y[j] = 0;
#pragma unroll
  for (int q = 0; q < B; ++q)
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (s) y[j] = fma(s[p * B + q], w[q][j], y[j]);
      if (!s && p == q) y[j] = w[q][j];
    }
}

template <bool WHOLE, class T, int N>
__device__ __forceinline__ void round_to(T* p, const double (&y)[N], double scale, int left) {
  constexpr int M = sizeof(T) * N > 16 ? 16 / sizeof(T) : N;
#pragma unroll
  for (int i = 0; i < N; i += M) {
    Pack<T, M> pack;
#pragma unroll
    for (int j = 0; j < M; ++j) narrow(scale * y[i + j], pack.x[j]);
    store<WHOLE>(p + i, pack, left - i);
  }
}
template <bool WHOLE, class TV, int N>
__device__ __forceinline__ void store_row(const Rows<TV>& a, int q, int64_t column, int left,
                                          const double (&y)[N]) {
  if (a.w64)
    round_to<WHOLE>((double*)a.w + q * a.ldw + column, y, 1, left);
  else
    round_to<WHOLE>((float*)a.w + q * a.ldw + column, y, 1, left);
}

template <bool WHOLE, class TV, int B, int N>
__device__ __forceinline__ void finish(const Rows<TV>& a, const double* s, TV* slot, double scale,
                                       int64_t column, const double (&w)[B][N]) {
  const int left = a.left(column);
  double y[N];
  if (slot) {
    mix(s, 0, w, y);
    round_to<WHOLE>(slot + column, y, scale, left);
    mix(s, a.b - 1, w, y);
    store_row<WHOLE>(a, 0, column, left, y);
    return;
  }
#pragma unroll
  for (int p = 0; p < B; ++p)
    if (B <= 2 || p < a.b) {
      mix(s, p, w, y);
      store_row<WHOLE>(a, p, column, left, y);
    }
}

template <class TV, int B>
__global__ void __launch_bounds__(UPDATE_THREADS, UpdateShape<TV, B>::per_multiprocessor)
    update_kernel(Rows<TV> a, const double* s, bool append, double scale) {
  using Shape = UpdateShape<TV, B>;
  constexpr int N = Shape::lane;
  FH_DYN_SHARED(double, h);  // [rows held][B]
  FH_SHARED(double, mixing, B* B);
  const int count = (int)a.live();
  if (threadIdx.x < B * B) {
    const int p = threadIdx.x / B, q = threadIdx.x % B;
    mixing[threadIdx.x] = s && p < a.b && q < a.b ? s[p * a.b + q] : 0;
  }
  __syncthreads();
  TV* const slot = append && count < a.k ? a.v + count * a.ldv : nullptr;
  int held = -1;  // the first row of H in shared memory
  for (int64_t tile = blockIdx.x; tile * Shape::columns < a.n; tile += gridDim.x) {
    const int64_t column = tile * Shape::columns + threadIdx.x * N;
    const int left = a.left(column);
    const bool whole = a.aligned && (tile + 1) * Shape::columns <= a.n;
    double w[B][N];
    load_block(a, column, whole, left, w);
    for (int first = 0; first < count; first += Shape::held) {
      const int rows = count - first < Shape::held ? count - first : Shape::held;
      if (first != held) {
        __syncthreads();
        for (int i = threadIdx.x; i < (rows + AHEAD - 1) / AHEAD * AHEAD * B; i += UPDATE_THREADS)
          h[i] = i / B < rows && i % B < a.b ? a.h[(int64_t)(first + i / B) * a.b + i % B] : 0;
        held = first;
        __syncthreads();
      }
      const TV* v = a.v + first * a.ldv + column;
      subtract(v, a.ldv, rows, whole, left, h, w);
    }
    const double* const mixed = s ? mixing : nullptr;
    if (whole)
      finish<true>(a, mixed, slot, scale, column, w);
    else
      finish<false>(a, mixed, slot, scale, column, w);
  }
}
