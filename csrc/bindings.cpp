// Python bindings: no torch, no mathematics.
#include "bindings.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#ifdef FH_WITH_CUDA
#include "cuda/device.h"
#endif

namespace {
std::vector<const FhCpuKernels*> served_here() {
  std::vector<const FhCpuKernels*> tables{&fh_cpu_generic};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
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

void run(const FhBlock& block) {
  py::gil_scoped_release released;
  if (!kernels->project(block)) throw std::bad_alloc();
}

void bind_cpu(py::module_ m) {
  // on a CPU the count is passed by value, never by address
  m.def("workspace", [](Address, int64_t, int, int64_t, int64_t, Address, int64_t, int, int,
                        Address, Address, int64_t, int) { return 0; });
  m.def("project", [](Address v, int64_t ldv, int vtype, int64_t k, int64_t n, Address w,
                      int64_t ldw, int wtype, int b, Address h, Address, int64_t count, Address,
                      Address c, Address g, int threads) {
    run({(const void*)v, ldv, (FhType)vtype, count, n, (void*)w, ldw, (FhType)wtype, b,
         (const double*)h, nullptr, (double*)c, (double*)g, threads, nullptr, 1});
    std::fill((double*)c + count * b, (double*)c + k * b, 0.0);
  });
  m.def("update", [](Address v, int64_t ldv, int vtype, int64_t, int64_t n, Address w, int64_t ldw,
                     int wtype, int b, Address h, Address, int64_t count, Address s, bool append,
                     double scale, int threads) {
    const int64_t bytes = vtype == FH_F64 ? 8 : vtype == FH_F32 ? 4 : 2;
    void* slot = append ? (char*)v + count * ldv * bytes : nullptr;
    run({(const void*)v, ldv, (FhType)vtype, count, n, (void*)w, ldw, (FhType)wtype, b,
         (const double*)h, (const double*)s, nullptr, nullptr, threads, slot, scale});
  });
  m.def("recur", [](Address c, int64_t ldc, Address g, int64_t ldg, Address t, int64_t ldt,
                    Address gauges, int64_t ldgauges, int64_t k, int64_t m, Address count_at,
                    int64_t count, double scale, Address h, Address s, int) {
    fh_cpu_recur(
        recurrence(c, ldc, g, ldg, t, ldt, gauges, ldgauges, k, m, count_at, count, scale, h, s));
  });
  m.def("signs", [](Address out, int type, int64_t n, uint64_t seed, int64_t offset, int threads) {
    py::gil_scoped_release released;
    kernels->signs((void*)out, (FhType)type, n, seed, offset, threads);
  });
  m.def("normal", [](Address out, int type, int64_t n, uint64_t seed, int64_t offset, int threads) {
    py::gil_scoped_release released;
    kernels->normal((void*)out, (FhType)type, n, seed, offset, threads);
  });
  m.def("pack", [](Address out, int type, const Pieces& pieces, const Sizes& sizes, double alpha,
                   double beta, int threads) {
    py::gil_scoped_release released;
    kernels->pack((void*)out, (FhType)type, (const void* const*)pieces.data(), sizes.data(),
                  (int64_t)pieces.size(), alpha, beta, threads);
  });
  m.def("softmax_curvature", [](Address u, Address z, int type, int64_t outer, int64_t classes,
                                int64_t inner, Address scale, int threads) {
    py::gil_scoped_release released;
    kernels->softmax_curvature((void*)u, (const void*)z, (FhType)type, outer, classes, inner,
                               (const double*)scale, threads);
  });
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
  bind_cpu(m.def_submodule("cpu"));
#ifdef FH_WITH_CUDA
  bind_cuda(m.def_submodule("cuda"));
  m.def("cuda_state", [] {  // (devices, runtime version, driver version, reason or None)
    const FhCudaState state = fh_cuda_state();
    return py::make_tuple(state.devices, state.runtime, state.driver, state.reason);
  });
  m.def("cuda_chip", &fh_cuda_chip);
  m.def("cuda_error", &fh_cuda_error);
#endif
}
