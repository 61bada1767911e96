// One calling convention for CPU and CUDA: addresses, sizes, strides and types. The last arguments
// say where to work: a number of threads, or a device and a stream.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;
using Address = uintptr_t;  // 0 for none
using Pieces = std::vector<Address>;
using Sizes = std::vector<int64_t>;

inline FhRecurrence recurrence(Address c, int64_t ldc, Address g, int64_t ldg, Address t,
                               int64_t ldt, Address gauges, int64_t ldgauges, int64_t k, int64_t m,
                               Address count_at, int64_t count, double scale, Address h,
                               Address s) {
  return {(const double*)c,
          (const double*)g,
          ldc,
          ldg,
          (double*)t,
          (double*)gauges,
          ldt,
          ldgauges,
          k,
          m,
          (int64_t*)count_at,
          count,
          scale,
          (double*)h,
          (double*)s};
}

void bind_cuda(py::module_ module);
