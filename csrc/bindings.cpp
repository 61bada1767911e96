// Python bindings: addresses, sizes and strides in, nothing of torch and no mathematics.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#ifdef FH_WITH_CUDA
#include "cuda/device.h"
#endif

namespace py = pybind11;

namespace {
std::vector<const FhCpuKernels*> served_here() {
  std::vector<const FhCpuKernels*> tables{&fh_cpu_generic};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    tables.push_back(&fh_cpu_avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    tables.push_back(&fh_cpu_avx512);
#endif
  return tables;
}

const FhCpuKernels* choose() {
  const std::vector<const FhCpuKernels*> tables = served_here();
  const char* wanted = std::getenv("FASTHESSIAN_ISA");
  if (!wanted || !*wanted) return tables.back();
  std::string names;
  for (const FhCpuKernels* table : tables) {
    if (table->name == std::string(wanted)) return table;
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::runtime_error("FASTHESSIAN_ISA=" + std::string(wanted) +
                           " cannot serve on this processor; accepted: " + names);
}

const FhCpuKernels* kernels = nullptr;

void project(uintptr_t v, int64_t ldv, bool v64, int64_t k, int64_t n, uintptr_t w, int64_t ldw,
             bool w64, int b, uintptr_t h, uintptr_t s, uintptr_t c, uintptr_t g, int threads) {
  py::gil_scoped_release released;
  const bool done = kernels->project({(const void*)v, ldv, v64 ? FH_F64 : FH_F32, k, n, (void*)w,
                                      ldw, w64 ? FH_F64 : FH_F32, b, (const double*)h,
                                      (const double*)s, (double*)c, (double*)g, threads});
  if (!done) throw std::bad_alloc();
}

void pack(uintptr_t out, bool f64, const std::vector<uintptr_t>& pieces,
          const std::vector<int64_t>& sizes, double alpha, double beta, int threads) {
  py::gil_scoped_release released;
  kernels->pack((void*)out, f64 ? FH_F64 : FH_F32, (const void* const*)pieces.data(), sizes.data(),
                (int64_t)pieces.size(), alpha, beta, threads);
}
}  // namespace

PYBIND11_MODULE(_native, m) {
  kernels = choose();
  m.def("isa", [] { return kernels->name; });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const FhCpuKernels* table : served_here()) names.push_back(table->name);
    return names;
  });
  m.def("project", &project);
  m.def("pack", &pack);
  m.def("signs", [](uintptr_t out, bool f64, int64_t n, uint64_t seed, int64_t offset, int t) {
    py::gil_scoped_release released;
    kernels->signs((void*)out, f64 ? FH_F64 : FH_F32, n, seed, offset, t);
  });
  m.def("normal", [](uintptr_t out, bool f64, int64_t n, uint64_t seed, int64_t offset, int t) {
    py::gil_scoped_release released;
    kernels->normal((void*)out, f64 ? FH_F64 : FH_F32, n, seed, offset, t);
  });
#ifdef FH_WITH_CUDA
  m.def("cuda", [] {  // (devices, runtime version, driver version, reason or None)
    const FhCudaState state = fh_cuda_state();
    return py::make_tuple(state.devices, state.runtime, state.driver, state.reason);
  });
#endif
}
