// C = V W^T and G = W W^T, first stage: one pass over V, with sums in registers over all tiles of a
// warp.
//
// A tile is 32 lanes x 16 bytes of a row of V. A warp holds up to DEPTH rows. All loads of a tile
// are issued before the first is used; the 16 warps of a multiprocessor keep up to 64 KB in flight.
// Every warp of the CTA reads the tile of W, all but the first from L1.
#pragma once
#include "cuda/deal.h"
#include "cuda/tile.h"

constexpr int PROJECT_WARPS = 8;
template <int B>
struct ProjectShape {
  static constexpr int depth = B == 8 ? 5 : B == 4 ? 4 : 8;  // sums take 2 B depth registers
  static constexpr int per_multiprocessor = B == 8 ? 1 : 2;
  static constexpr int gram_rows = B == 2 ? 2 : 1;
};

template <int B>
Plan project_plan(int64_t k, int multiprocessors) {
  using Shape = ProjectShape<B>;
  const int64_t groups = (k + PROJECT_WARPS * Shape::depth - 1) / (PROJECT_WARPS * Shape::depth);
  const int64_t ctas = (int64_t)multiprocessors * Shape::per_multiprocessor;
  // in a block of 3 or more, each warp takes one row of W W^T
  return {B, Shape::depth, PROJECT_WARPS, (int)(ctas > groups ? ctas : groups), false, B > 2};
}

// The sums of a warp: rows of V times rows of W, and rows of W times rows of W.
template <int B, int DEPTH, int GRAM>
struct Sums {
  double v[DEPTH][B];
  double w[GRAM][B];

  // Columns i.. of row r of V with the same columns x of W.
  template <class T, int LANE, int N>
  __device__ __forceinline__ void dot(int r, const Pack<T, LANE>& row, int i,
                                      const double (&x)[B][N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const double number = widen(row.x[i + j]);
#pragma unroll
      for (int q = 0; q < B; ++q) v[r][q] = fma(number, x[q][j], v[r][q]);
    }
  }
  // Columns of W with each other: in a block of 3 or more, `mine` is one of its rows.
  template <int ROWS, int N>
  __device__ __forceinline__ void gram(const double (&mine)[ROWS][N], const double (&x)[B][N]) {
#pragma unroll
    for (int p = 0; p < ROWS; ++p)
#pragma unroll
      for (int q = 0; q < (B <= 2 ? p + 1 : B); ++q)
#pragma unroll
        for (int j = 0; j < N; ++j) w[p][q] = fma(mine[p][j], x[q][j], w[p][q]);
  }
  __device__ __forceinline__ void leave(double* slot) {
    if (GRAM == 2) w[0][B - 1] = w[GRAM - 1][0];  // symmetric
#pragma unroll
    for (int r = 0; r < DEPTH + GRAM; ++r)
#pragma unroll
      for (int q = 0; q < B; ++q) {
        double sum = r < DEPTH ? v[r < DEPTH ? r : 0][q] : w[r < DEPTH ? 0 : r - DEPTH][q];
#pragma unroll
        for (int step = WARP / 2; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (threadIdx.x % WARP == 0) slot[r * B + q] = sum;
      }
  }
};

template <int B, class TV, class S>
__device__ __forceinline__ void project_tile(const Rows<TV>& a, const TV* first, int64_t step,
                                             int mine, bool gram, bool whole, int64_t column,
                                             S& sums) {
  constexpr int DEPTH = ProjectShape<B>::depth, LANE = 16 / sizeof(TV);
  constexpr int N = B > 2 || LANE < 4 ? 2 : 4;  // columns converted at a time
  const int left = a.left(column);
  Pack<TV, LANE> v[DEPTH] = {};
  load_rows<LANE>(first + column, step, mine, whole, left, v);
#pragma unroll
  for (int i = 0; i < LANE; i += N) {
    double w[B][N];
    load_block(a, column + i, whole, left - i, w);
    if (gram && B <= 2) sums.gram(w, w);
    if (gram && B > 2) {
      double mine[1][N];
      load_block(a, column + i, whole, left - i, mine, threadIdx.x / WARP);
      sums.gram(mine, w);
    }
#pragma unroll
    for (int r = 0; r < DEPTH; ++r)
      if (r < mine) sums.dot(r, v[r], i, w);  // conversions limit the speed
  }
}

template <class TV, int B>
__global__ void __launch_bounds__(PROJECT_WARPS* WARP, ProjectShape<B>::per_multiprocessor)
    project_kernel(Rows<TV> a, Plan plan, double* partial) {
  using Shape = ProjectShape<B>;
  constexpr int LANE = 16 / sizeof(TV), TILE = WARP * LANE;
  const int count = (int)a.live();
  const Deal d = deal(plan, count);
  const int cta = blockIdx.x, group = cta % d.groups, slice = cta / d.groups;
  if (slice >= d.slices) return;
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int end = (group + 1) * d.rows < count ? (group + 1) * d.rows : count;
  const int row = group * d.rows + warp % d.ways;
  const int mine = row < end ? (end - row + d.ways - 1) / d.ways : 0;
  const bool gram = group == 0 && (B > 2 ? warp < a.b : warp % d.ways == 0);
  const int columns = PROJECT_WARPS / d.ways;  // warps on adjacent columns

  Sums<B, Shape::depth, Shape::gram_rows> sums = {};
  const TV* first = a.v + row * a.ldv;
  if (mine || gram)
    for (int64_t tile = slice * columns + warp / d.ways; tile * TILE < a.n;
         tile += d.slices * columns) {
      const int64_t column = tile * TILE + lane * LANE;
      const bool whole = a.aligned && (tile + 1) * TILE <= a.n;
      project_tile<B>(a, first, d.ways * a.ldv, mine, gram, whole, column, sums);
    }
  sums.leave(partial + plan.slot(cta, warp));
}
