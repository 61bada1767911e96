// The CUDA kernels: device addresses, sizes, strides in elements, and a stream of the current
// device. Any C++ compiler can include this. Every function returns a cudaError_t as an int.
#pragma once
#include "cpu/kernels.h"  // FhType, FhRecurrence

// Rows of V (k, n) together with the block W (b, n), b up to 8. The first count rows take part:
// *count_at, read by the kernel, or count if that is null.
struct FhCudaBlock {
  void* v;
  int64_t ldv;
  FhType vtype;
  int64_t k, n;
  void* w;
  int64_t ldw;
  FhType wtype;
  int b;
  const double* h;  // (k, b) contiguous, or null
  const int64_t* count_at;
  int64_t count;
};

// The size of the workspace of fh_cuda_project in numbers; 0 if the query of the device fails.
int64_t fh_cuda_workspace(const FhCudaBlock& block);

// W -= H^T V if h is given, then c = V W^T (k, b) and g = W W^T (b, b), contiguous.
int fh_cuda_project(const FhCudaBlock& block, double* workspace, double* c, double* g,
                    void* stream);
// W = S (W - H^T V), s (b, b) or null. With append, row count of V becomes scale * the first row of
// the result, the first row of W becomes its last row, and the other rows of W do not change.
int fh_cuda_update(const FhCudaBlock& block, const double* s, bool append, double scale,
                   void* stream);
int fh_cuda_recur(const FhRecurrence& step, void* stream);
int fh_cuda_signs(void* out, FhType type, int64_t n, uint64_t seed, int64_t offset, void* stream);
int fh_cuda_normal(void* out, FhType type, int64_t n, uint64_t seed, int64_t offset, void* stream);
// out = beta * out + alpha * the concatenated pieces; beta = 0 does not read out.
int fh_cuda_pack(void* out, FhType type, const void* const* pieces, const int64_t* sizes,
                 int64_t count, double alpha, double beta, void* stream);
// u = scale (p u - p (p . u)), p = softmax(z), for each row over the classes of u and z (outer,
// classes, inner), contiguous; scale (outer, inner). Where scale is 0, u becomes 0.
int fh_cuda_softmax_curvature(void* u, const void* z, FhType type, int64_t outer, int64_t classes,
                              int64_t inner, const double* scale, void* stream);
