// Who sums what: rows of V and columns are dealt to CTAs and warps by the number of live rows,
// which only the device knows; the kernels that leave partial sums and the one that adds them agree
// here.
#pragma once
#include "cuda/launch.h"

// Of a launch, known to the host.
struct Plan {
  int block;  // rows of W the kernel is compiled for: 1, 2, 4 or 8
  int depth;  // rows of V that a warp holds
  int warps;  // of a CTA
  int ctas;
  bool one_group;  // every CTA has all rows
  bool all_ways;   // every warp of a CTA has its own rows

  // Each warp leaves its sums in a slot of its own: `depth` rows of V, then of W (for W W^T):
  // both of them in a block of 2, one of a larger block.
  __host__ __device__ int slot_rows() const { return depth + (block == 2 ? 2 : 1); }
  __host__ __device__ int64_t slot(int cta, int warp) const {
    return ((int64_t)cta * warps + warp) * slot_rows() * block;
  }
};

struct Deal {
  int groups;  // of CTAs, each with its own rows
  int rows;    // of a group; the last may have fewer
  int ways;    // warps of a CTA over which these rows are split; beyond, the columns are
  int slices;  // CTAs of a group, each with its own columns
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
