// One calling convention for CPU and CUDA: addresses, sizes, strides and types. The last arguments
// say where to work: a number of threads, or a device and a stream.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

namespace py = pybind11;
using Address = uintptr_t;  // 0 for none
using Pieces = std::vector<Address>;
using Sizes = std::vector<int64_t>;

void bind_cuda(py::module_ module);
