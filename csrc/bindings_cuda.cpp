// The bindings of the CUDA kernels. They make the tensors' device current and check every error.
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace {
// Throws if there was an error; asked() describes the call.
template <class Asked>
void check(int error, Asked&& asked, int device) {
  if (error == 0) return;
  throw std::runtime_error("CUDA: " + std::string(fh_cuda_error(error)) + ", in " + asked() +
                           " on device " + std::to_string(device));
}

// Runs call() with the device current.
template <class Call, class Asked>
auto on_device(int device, Call&& call, Asked&& asked) {
  check(fh_cuda_enter(device), asked, device);
  return call();
}

template <class Call, class Asked>
void launch(int device, Call&& call, Asked&& asked) {
  int error = 0;
  {
    py::gil_scoped_release released;
    error = on_device(device, call, asked);
  }
  check(error, asked, device);
}

FhCudaBlock block_of(Address v, int64_t ldv, int vtype, int64_t k, int64_t n, Address w,
                     int64_t ldw, int wtype, int b, Address h, Address count_at, int64_t count) {
  return {(void*)v,
          ldv,
          (FhType)vtype,
          k,
          n,
          (void*)w,
          ldw,
          (FhType)wtype,
          b,
          (const double*)h,
          (const int64_t*)count_at,
          count};
}

std::string named(const char* function, int64_t k, int64_t n, int b) {
  return std::string(function) + " of V (" + std::to_string(k) + ", " + std::to_string(n) +
         ") and W (" + std::to_string(b) + ", " + std::to_string(n) + ")";
}
std::string named(const char* function, int64_t n) {
  return std::string(function) + " of " + std::to_string(n) + " numbers";
}
}  // namespace

void bind_cuda(py::module_ m) {
  m.def("workspace", [](Address v, int64_t ldv, int vtype, int64_t k, int64_t n, Address w,
                        int64_t ldw, int wtype, int b, Address h, Address count_at, int64_t count,
                        int device, Address) {
    const FhCudaBlock block = block_of(v, ldv, vtype, k, n, w, ldw, wtype, b, h, count_at, count);
    return on_device(
        device, [&] { return fh_cuda_workspace(block); },
        [&] { return named("the workspace for project", k, n, b); });
  });
  m.def("project", [](Address v, int64_t ldv, int vtype, int64_t k, int64_t n, Address w,
                      int64_t ldw, int wtype, int b, Address h, Address count_at, int64_t count,
                      Address workspace, Address c, Address g, int device, Address stream) {
    const FhCudaBlock block = block_of(v, ldv, vtype, k, n, w, ldw, wtype, b, h, count_at, count);
    launch(
        device,
        [&] {
          return fh_cuda_project(block, (double*)workspace, (double*)c, (double*)g, (void*)stream);
        },
        [&] { return named("project", k, n, b); });
  });
  m.def("update", [](Address v, int64_t ldv, int vtype, int64_t k, int64_t n, Address w,
                     int64_t ldw, int wtype, int b, Address h, Address count_at, int64_t count,
                     Address s, bool append, double scale, int device, Address stream) {
    const FhCudaBlock block = block_of(v, ldv, vtype, k, n, w, ldw, wtype, b, h, count_at, count);
    launch(
        device,
        [&] { return fh_cuda_update(block, (const double*)s, append, scale, (void*)stream); },
        [&] { return named("update", k, n, b); });
  });
  m.def("recur", [](Address c, int64_t ldc, Address g, int64_t ldg, Address t, int64_t ldt,
                    Address gauges, int64_t ldgauges, int64_t k, int64_t m, Address count_at,
                    int64_t count, double scale, Address h, Address s, int device, Address stream) {
    const FhRecurrence step =
        recurrence(c, ldc, g, ldg, t, ldt, gauges, ldgauges, k, m, count_at, count, scale, h, s);
    launch(
        device, [&] { return fh_cuda_recur(step, (void*)stream); },
        [&] { return named("recur", m); });
  });
  m.def("signs", [](Address out, int type, int64_t n, uint64_t seed, int64_t offset, int device,
                    Address stream) {
    launch(
        device,
        [&] { return fh_cuda_signs((void*)out, (FhType)type, n, seed, offset, (void*)stream); },
        [&] { return named("signs", n); });
  });
  m.def("normal", [](Address out, int type, int64_t n, uint64_t seed, int64_t offset, int device,
                     Address stream) {
    launch(
        device,
        [&] { return fh_cuda_normal((void*)out, (FhType)type, n, seed, offset, (void*)stream); },
        [&] { return named("normal", n); });
  });
  m.def("pack", [](Address out, int type, const Pieces& pieces, const Sizes& sizes, double alpha,
                   double beta, int device, Address stream) {
    launch(
        device,
        [&] {
          return fh_cuda_pack((void*)out, (FhType)type, (const void* const*)pieces.data(),
                              sizes.data(), (int64_t)pieces.size(), alpha, beta, (void*)stream);
        },
        [&] { return named("pack", (int64_t)pieces.size()) + " tensors"; });
  });
  m.def("softmax_curvature", [](Address u, Address z, int type, int64_t outer, int64_t classes,
                                int64_t inner, Address scale, int device, Address stream) {
    launch(
        device,
        [&] {
          return fh_cuda_softmax_curvature((void*)u, (const void*)z, (FhType)type, outer, classes,
                                           inner, (const double*)scale, (void*)stream);
        },
        [&] { return named("softmax_curvature", outer * classes * inner); });
  });
}
