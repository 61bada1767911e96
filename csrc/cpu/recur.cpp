// The scalars of one delayed Gram-Schmidt step of Lanczos, for a T of the size of a Krylov basis.
#include <cmath>
#include <vector>

#include "cpu/kernels.h"

namespace {
constexpr double CANCELLED = 1e-4;  // as in fasthessian/kernels/contract.py

// x . y in eight partial sums, which the compiler keeps in vectors
double dot(const double* x, const double* y, int64_t n) {
  double part[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int l = 0; l < 8; ++l) part[l] += x[i + l] * y[i + l];
  for (; i < n; ++i) part[i % 8] += x[i] * y[i];
  for (int half = 4; half; half /= 2)
    for (int l = 0; l < half; ++l) part[l] += part[l + half];
  return part[0];
}
}  // namespace

void fh_cpu_recur(const FhRecurrence& a) {
  const int64_t j = a.count_at ? a.count_at[0] : a.count;
  const double unit = 1 / a.scale;  // scales the dots with a stored row
  double* const last = a.t + j * a.ldt;
  std::vector<double> s(j), z(j);
  for (int64_t i = 0; i < j; ++i) s[i] = unit * a.c[i * a.ldc], z[i] = unit * a.c[i * a.ldc + 1];
  const double uu = a.g[0], nu2 = uu - dot(s.data(), s.data(), j);
  const bool fresh = nu2 > CANCELLED * uu;
  const double nu = std::sqrt(nu2), inverse = 1 / nu;
  const double t = (a.g[1] - dot(s.data(), z.data(), j)) / nu2;
  const double alpha = t - dot(last, s.data(), j);

  // q_i'Aq_j for each final row i, beside the value in row j; a NaN stays
  double asymmetry = 0;
  for (int64_t i = 0; i < j; ++i) {
    const double coupling = (z[i] - dot(a.t + i * a.ldt, s.data(), j)) * inverse;
    const double difference = std::fabs(coupling - nu * last[i]);
    if (difference > asymmetry || difference != difference) asymmetry = difference;
  }
  for (int64_t i = 0; i < j; ++i) a.t[i * a.ldt + j] = last[i] = fresh ? nu * last[i] : 0;
  last[j] = fresh ? alpha : 0;
  for (int64_t i = 0; i <= j; ++i) last[a.ldt + i] = i == j;

  double* const gauge = a.gauges + j * a.ldgauges;
  gauge[0] = uu, gauge[1] = nu2, gauge[2] = fresh ? asymmetry : 0;
  for (int64_t i = 0; i < a.k; ++i)
    for (int q = 0; q < 2; ++q)
      a.h[2 * i + q] = fresh && i < j ? unit * unit * a.c[i * a.ldc + q] : 0;
  a.s[0] = a.s[3] = fresh ? inverse : 0;
  a.s[1] = 0;
  a.s[2] = fresh ? -t * inverse : 0;
  if (a.count_at) a.count_at[0] = j + 1, a.count_at[1] = j;
}
