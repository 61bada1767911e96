// Passes over V: the dispatch by type and size, and the second stage of the sums.
#include "cuda/corrected.h"
#include "cuda/rows.h"

namespace {
constexpr int REDUCE_THREADS = 128;

// One CTA adds up one row of C or, beyond k, of G. Thread i takes column i % block, so that the row
// of a slot is read at once. The order of the sum depends only on the plan and the count.
__global__ void __launch_bounds__(REDUCE_THREADS)
    reduce_kernel(Rows<float> a, Plan plan, const double* partial, double* c, double* g) {
  FH_SHARED(double, sums, REDUCE_THREADS);
  const int count = (int)a.live();
  const int64_t row = blockIdx.x;
  const int column = threadIdx.x % plan.block;
  const bool gram = row >= a.k;
  const int p = gram ? (int)(row - a.k) : 0;
  double sum = 0;
  if (gram || row < count) {
    const Deal d = deal(plan, count);
    int group = 0, way, slot_row;
    if (gram) {
      way = plan.block > 2 ? p : 0;
      slot_row = plan.depth + (plan.block > 2 ? 0 : p);
    } else {
      const int within = (int)row % d.rows;
      group = (int)row / d.rows;
      way = within % d.ways;
      slot_row = within / d.ways;
    }
    const int side = plan.warps / d.ways;
#pragma unroll 4
    for (int term = threadIdx.x / plan.block; term < d.slices * side;
         term += REDUCE_THREADS / plan.block) {
      const int cta = term / side * d.groups + group, warp = term % side * d.ways + way;
      sum += partial[plan.slot(cta, warp) + slot_row * plan.block + column];
    }
  }
  sums[threadIdx.x] = sum;
  for (int half = REDUCE_THREADS / 2; half >= plan.block; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x < a.b) (gram ? g + p * a.b : c + row * a.b)[threadIdx.x] = sums[threadIdx.x];
}

// The most rows that may take part, which the plan is made for.
int64_t bound(const FhCudaBlock& a) { return a.count_at ? a.k : a.count; }

bool fits_one_stream(const FhCudaBlock& a) {
  return for_block(a.b, [&](auto B) { return bound(a) <= corrected_most<decltype(B)::value>(); });
}
Plan plan_of(const FhCudaBlock& a, int multiprocessors) {
  const bool corrected = a.h && fits_one_stream(a);
  return for_block(a.b, [&](auto B) {
    constexpr int block = decltype(B)::value;
    return corrected ? corrected_plan<block>(bound(a), multiprocessors)
                     : project_plan<block>(bound(a), multiprocessors);
  });
}

cudaError_t update(const FhCudaBlock& a, const double* s, bool append, double scale,
                   cudaStream_t stream) {
  if (a.n == 0) return cudaSuccess;
  if (a.vtype == FH_F64) return update_rows<double>(a, s, append, scale, stream);
  if (a.vtype == FH_F16) return update_rows<__half>(a, s, append, scale, stream);
  return update_rows<float>(a, s, append, scale, stream);
}
}  // namespace

int64_t fh_cuda_workspace(const FhCudaBlock& block) {
  const int multiprocessors = fh::multiprocessors();
  if (multiprocessors == 0) return 0;
  const Plan plan = plan_of(block, multiprocessors);
  return plan.slot(plan.ctas, 0);
}

int fh_cuda_project(const FhCudaBlock& block, double* workspace, double* c, double* g,
                    void* stream) {
  const cudaStream_t on = (cudaStream_t)stream;
  const int multiprocessors = fh::multiprocessors();
  if (multiprocessors == 0) return cudaErrorInvalidValue;
  const Plan plan = plan_of(block, multiprocessors);
  const bool corrected = block.h && plan.one_group;
  if (block.h && !corrected) {  // more rows than registers hold: a second pass over V
    const cudaError_t error = update(block, nullptr, false, 1, on);
    if (error != cudaSuccess) return error;
  }
  cudaError_t error;
  if (block.vtype == FH_F64)
    error = project_rows<double>(block, corrected, plan, workspace, on);
  else if (block.vtype == FH_F16)
    error = project_rows<__half>(block, corrected, plan, workspace, on);
  else
    error = project_rows<float>(block, corrected, plan, workspace, on);
  if (error != cudaSuccess) return error;
  const Rows<float> counts = rows_of<float>(block);  // of V only sizes are read
  return fh::launch(reduce_kernel, dim3(block.k + block.b), dim3(REDUCE_THREADS), 0, on, counts,
                    plan, workspace, c, g);
}

int fh_cuda_update(const FhCudaBlock& block, const double* s, bool append, double scale,
                   void* stream) {
  return update(block, s, append, scale, (cudaStream_t)stream);
}
