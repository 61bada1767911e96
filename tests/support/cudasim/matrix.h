// Matrices of the three types for driver.cpp, and its tolerances.
#pragma once
#include <cmath>
#include <type_traits>
#include <vector>

#include "cuda/kernels.h"
#include "cudasim.h"

inline double uniform() {  // in -1 .. 1
  static uint64_t state = 1;
  state = state * 6364136223846793005 + 1442695040888963407;
  return (double)(state >> 11) * 0x1p-52 - 1;
}

inline float widen(__half x) { return __half2float(x); }
inline double widen(double x) { return x; }
template <class T>
T narrow(double x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn((float)x);
  else
    return (T)x;
}
template <class T>
constexpr FhType type_of = std::is_same_v<T, double>  ? FH_F64
                           : std::is_same_v<T, float> ? FH_F32
                                                      : FH_F16;

// Rows of n numbers, `shift` numbers off alignment, the last of them at the end of the memory.
template <class T>
struct Matrix {
  int64_t rows, n, ld, shift;
  std::vector<T> memory;
  Matrix(int64_t rows, int64_t n, int64_t ld, int64_t shift)
      : rows(rows), n(n), ld(ld), shift(shift), memory(rows ? shift + (rows - 1) * ld + n : 0) {
    for (T& x : memory) x = narrow<T>(uniform());
  }
  T* data() { return memory.data() + shift; }
  double at(int64_t i, int64_t j) const { return widen(memory[shift + i * ld + j]); }
};

template <class T>
double rounding() {
  return std::is_same_v<T, double> ? 0x1p-48 : std::is_same_v<T, float> ? 0x1p-23 : 0x1p-10;
}

// Whether `found` is the dot of two rows, up to the rounding of sums in float64.
template <class A, class B>
bool is_dot(double found, const Matrix<A>& a, int64_t p, const Matrix<B>& b, int64_t q) {
  double sum = 0, magnitude = 0;
  for (int64_t i = 0; i < a.n; ++i)
    sum += a.at(p, i) * b.at(q, i), magnitude += fabs(a.at(p, i) * b.at(q, i));
  return fabs(found - sum) <= 1e-13 * magnitude;
}
