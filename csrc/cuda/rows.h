// The interface between the dispatch in rows.cu and the units for each type of V's rows.
#pragma once
#include <type_traits>

#include "cuda/deal.h"
#include "cuda/kernels.h"

// Writes partial sums; with `corrected`, W is corrected first.
template <class TV>
cudaError_t project_rows(const FhCudaBlock& a, bool corrected, const Plan& plan, double* partial,
                         cudaStream_t stream);
template <class TV>
cudaError_t update_rows(const FhCudaBlock& a, const double* s, bool append, double scale,
                        cudaStream_t stream);

// Calls f with the size of the smallest compiled block that holds b rows of W, as a constant.
template <class F>
auto for_block(int b, F&& f) {
  if (b == 1) return f(std::integral_constant<int, 1>{});
  if (b == 2) return f(std::integral_constant<int, 2>{});
  if (b <= 4) return f(std::integral_constant<int, 4>{});
  return f(std::integral_constant<int, 8>{});
}
