// W -= H^T V, then the dots with the stored W, in one pass over V: the values of a tile stay in the
// registers of the warps that loaded them until the tile of W is final.
//
// A CTA has all rows, so there may be at most 16 DEPTH of them; for more, see rows.cu.
#pragma once
#include "cuda/project.h"

constexpr int CORRECTED_WARPS = 16;  // at most
template <int B>
struct CorrectedShape {
  static constexpr int depth = B == 8 ? 2 : B == 4 ? 4 : 8;
  static constexpr int gram_rows = ProjectShape<B>::gram_rows;
  static constexpr int together = B < 2 ? 1 : 2;  // rows of W corrected at a time
};

template <int B>
constexpr int64_t corrected_most() {
  return CORRECTED_WARPS * CorrectedShape<B>::depth;
}
template <int B>
Plan corrected_plan(int64_t k, int multiprocessors) {
  constexpr int depth = CorrectedShape<B>::depth;
  int warps = B > 2 ? 8 : 4;  // a warp takes at most one row of W W^T
  while (warps < CORRECTED_WARPS && warps * depth < k) warps *= 2;
  return {B, depth, warps, multiprocessors * (CORRECTED_WARPS / warps), true, true};
}

template <class TV, int B>
struct CorrectedTile {
  // columns per lane; with 8, a block of 2 or more needs 70 KB of shared memory, above the default
  // limit of 48, and a block of 2 has too few registers for its sums
  static constexpr int lane = sizeof(TV) == 2 && B > 1 ? 4 : 16 / sizeof(TV);
  static constexpr int columns = WARP * lane;
};
template <class TV, int B>
size_t corrected_shared(const Plan& plan) {
  const int partial = plan.warps * CorrectedShape<B>::together * CorrectedTile<TV, B>::columns;
  return (partial + B * CorrectedTile<TV, B>::columns + plan.warps * plan.depth * B) *
         sizeof(double);
}

// Subtracts `part` from column `column` of row q of W, stores the rounded number and returns it.
template <class TV>
__device__ __forceinline__ double correct(const Rows<TV>& a, int q, int64_t column, double part) {
  if (a.w64) {
    double* w = (double*)a.w + q * a.ldw + column;
    return *w -= part;
  }
  float* w = (float*)a.w + q * a.ldw + column;
  return *w = (float)(*w - part);
}

template <class TV, int B>
__global__ void __launch_bounds__(CORRECTED_WARPS* WARP, 1)
    corrected_kernel(Rows<TV> a, Plan plan, double* partial) {
  using Shape = CorrectedShape<B>;
  constexpr int DEPTH = Shape::depth, TOGETHER = Shape::together;
  constexpr int LANE = CorrectedTile<TV, B>::lane, COLUMNS = CorrectedTile<TV, B>::columns;
  FH_DYN_SHARED(double, parts);                                     // [warps][TOGETHER][COLUMNS]
  double* const settled = parts + plan.warps * TOGETHER * COLUMNS;  // [B][COLUMNS]
  double* const h = settled + B * COLUMNS;                          // [warps * DEPTH][B]
  const int count = (int)a.live();
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int mine = warp < count ? (count - warp + plan.warps - 1) / plan.warps : 0;
  for (int i = threadIdx.x; i < plan.warps * DEPTH * B; i += blockDim.x)
    h[i] = i / B < count && i % B < a.b ? a.h[(int64_t)(i / B) * a.b + i % B] : 0;
  for (int i = threadIdx.x; i < B * COLUMNS; i += blockDim.x) settled[i] = 0;
  __syncthreads();

  Sums<B, DEPTH, Shape::gram_rows> sums = {};
  for (int64_t tile = blockIdx.x; tile * COLUMNS < a.n; tile += gridDim.x) {
    const int64_t column = tile * COLUMNS + lane * LANE;
    const int left = a.left(column);
    const bool whole = a.aligned && (tile + 1) * COLUMNS <= a.n;
    Pack<TV, LANE> v[DEPTH] = {};
    load_rows(a.v + warp * a.ldv + column, plan.warps * a.ldv, mine, whole, left, v);
#pragma unroll
    for (int q = 0; q < B; q += TOGETHER) {
      if (B > 2 && q >= a.b) break;
      double part[TOGETHER][LANE] = {};
#pragma unroll
      for (int r = 0; r < DEPTH; ++r) {
        forget(v[r]);
        const double* const c = h + (r * plan.warps + warp) * B + q;
#pragma unroll
        for (int j = 0; j < LANE; ++j)
#pragma unroll
          for (int p = 0; p < TOGETHER; ++p) part[p][j] = fma(c[p], widen(v[r].x[j]), part[p][j]);
      }
#pragma unroll
      for (int p = 0; p < TOGETHER; ++p)
#pragma unroll
        for (int j = 0; j < LANE; ++j)
          parts[(warp * TOGETHER + p) * COLUMNS + lane * LANE + j] = part[p][j];
      __syncthreads();
      for (int i = threadIdx.x; i < TOGETHER * COLUMNS; i += blockDim.x) {
        const int64_t at = tile * COLUMNS + i % COLUMNS;
        const int p = i / COLUMNS;
        double sum = 0;
        for (int other = 0; other < plan.warps; ++other)
          sum += parts[other * TOGETHER * COLUMNS + i];
        const bool there = at < a.n && (B <= 2 || q + p < a.b);
        settled[q * COLUMNS + i] = there ? correct(a, q + p, at, sum) : 0;
      }
      __syncthreads();
    }
    const bool gram = B > 2 ? warp < a.b : warp == 0;
#pragma unroll
    for (int r = 0; r < DEPTH; ++r) forget(v[r]);
#pragma unroll
    for (int i = 0; i < LANE; i += 2) {
      double w[B][2];
      const double* const at = settled + lane * LANE + i;
#pragma unroll
      for (int q = 0; q < B; ++q) w[q][0] = at[q * COLUMNS], w[q][1] = at[q * COLUMNS + 1];
      if (gram && B <= 2) sums.gram(w, w);
      if (gram && B > 2) {
        const double mine[1][2] = {{at[warp * COLUMNS], at[warp * COLUMNS + 1]}};
        sums.gram(mine, w);
      }
#pragma unroll
      for (int r = 0; r < DEPTH; ++r) sums.dot(r, v[r], i, w);
    }
  }
  sums.leave(partial + plan.slot(blockIdx.x, warp));
}
