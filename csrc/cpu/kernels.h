// The table of CPU kernels that one ISA unit exports. The units share only plain data: of an inline
// function the linker keeps one copy, which might be the AVX-512 one.
#pragma once
#include <cstdint>

enum FhType : int { FH_F32 = 0, FH_F64 = 1, FH_F16 = 2 };

// One pass over the rows of V (k, n), ld in elements, together with the block W (b, n).
//   h (k, b) or null: W -= h^T V first;  s (b, b) or null: then W = s W;
//   g (b, b) and c (k, b): dots of the new W, summed in float64; none are taken if g is null
//   (c without rows is null, too);
//   slot (n) or null: a row of V's type that becomes scale * the first row of W; then the first
//   row of W becomes the last, and the others do not change.
// Only rows of V may be FH_F16.
struct FhBlock {
  const void* v;
  int64_t ldv;
  FhType vtype;
  int64_t k, n;
  void* w;
  int64_t ldw;
  FhType wtype;
  int b;
  const double* h;
  const double* s;
  double* c;
  double* g;
  int threads;
  void* slot;
  double scale;
};

// One delayed Gram-Schmidt step: see fasthessian/kernels/reference.py.
struct FhRecurrence {
  const double *c, *g;  // (k, 2) and (2, 2)
  int64_t ldc, ldg;
  double *t, *gauges;  // (m + 1, m + 1) and (m + 1, 3)
  int64_t ldt, ldgauges;
  int64_t k, m;
  int64_t* count_at;  // two numbers, which are advanced; null to use count
  int64_t count;
  double scale;
  double *h, *s;  // (k, 2) and (2, 2) contiguous, written
};

void fh_cpu_recur(const FhRecurrence& step);

struct FhCpuKernels {
  const char* name;
  bool (*project)(const FhBlock&);  // false: the workspace could not be allocated
  void (*signs)(void* out, FhType type, int64_t n, uint64_t seed, int64_t offset, int threads);
  void (*normal)(void* out, FhType type, int64_t n, uint64_t seed, int64_t offset, int threads);
  void (*pack)(void* out, FhType type, const void* const* pieces, const int64_t* sizes,
               int64_t count, double alpha, double beta, int threads);
  // u = scale (p u - p (p . u)), p = softmax(z), for each row over the classes of u and z (outer,
  // classes, inner); scale (outer, inner). Where scale is 0, u becomes 0.
  void (*softmax_curvature)(void* u, const void* z, FhType type, int64_t outer, int64_t classes,
                            int64_t inner, const double* scale, int threads);
};

extern "C" {
extern const FhCpuKernels fh_cpu_generic, fh_cpu_avx2, fh_cpu_avx512;
}
