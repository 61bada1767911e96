// How rows of V and columns are distributed over CTAs and warps. It depends on the number of live
// rows, which only the device knows. The kernels that write partial sums and the one that adds them
// share this.
#pragma once
#include "cuda/launch.h"

// The plan of a launch, known to the host.
struct Plan {
  int block;  // rows of W the kernel is compiled for: 1, 2, 4 or 8
  int depth;  // rows of V that a warp holds
  int warps;  // per CTA
  int ctas;
  bool one_group;  // every CTA has all rows
  bool all_ways;   // every warp of a CTA has its own rows

  // Each warp writes its sums to its own slot: `depth` rows of V, then rows of W (for W W^T):
  // both rows of a block of 2, one row of a larger block.
  __host__ __device__ int slot_rows() const { return depth + (block == 2 ? 2 : 1); }
  __host__ __device__ int64_t slot(int cta, int warp) const {
    return ((int64_t)cta * warps + warp) * slot_rows() * block;
  }
};

struct Deal {
  int groups;  // groups of CTAs, each with its own rows
  int rows;    // rows per group; the last group may have fewer
  int ways;    // warps over which these rows are split; other warps split the columns
  int slices;  // CTAs per group, each with its own columns
};

__device__ __forceinline__ Deal deal(const Plan& plan, int count) {
  const int most = plan.depth * plan.warps;
  Deal d;
  d.groups = plan.one_group || count <= most ? 1 : (count + most - 1) / most;
  d.rows = (count + d.groups - 1) / d.groups;
  d.ways = plan.warps;
  if (!plan.all_ways)
    for (d.ways = 1; d.ways * plan.depth < d.rows;) d.ways *= 2;
  d.slices = plan.ctas / d.groups;
  return d;
}
