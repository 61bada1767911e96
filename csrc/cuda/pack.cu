// Copies many tensors into one flat vector. The table of pieces is a kernel argument: it needs no
// copy and no synchronisation, and a captured graph keeps it.
#include "cuda/kernels.h"
#include "cuda/tile.h"

namespace {
constexpr int THREADS = 256, PER_MULTIPROCESSOR = 8;
constexpr int64_t CHUNK = THREADS * 16;  // numbers per CTA and round
constexpr int PIECES = 240;              // of 16 bytes each; kernel arguments may take 4 KB

struct Table {
  const void* piece[PIECES];
  int64_t start[PIECES + 1];  // in the output; start[pieces] is its end
  int pieces;
};

template <class T, class Access>
__device__ __forceinline__ void blend(Access* out, const Access* in, int64_t n, T alpha, T beta) {
  constexpr int M = sizeof(Access) / sizeof(T);
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < n; i += THREADS) {
    Access x = in[i];
#pragma unroll
    for (int j = 0; j < M; ++j) x.x[j] *= alpha;
    if (beta != 0) {
      const Access y = out[i];
#pragma unroll
      for (int j = 0; j < M; ++j) x.x[j] = fma(beta, y.x[j], x.x[j]);
    }
    out[i] = x;
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    pack_kernel(const __grid_constant__ Table table, T* out, T alpha, T beta) {
  constexpr int M = 16 / sizeof(T);
  using One = Pack<T, 1>;
  using Wide = Pack<T, M>;
  const int64_t total = table.start[table.pieces];
  for (int64_t lo = blockIdx.x * CHUNK; lo < total; lo += gridDim.x * CHUNK) {
    const int64_t hi = lo + CHUNK < total ? lo + CHUNK : total;
    int p = 0;  // the last piece that starts at or before lo
    for (int above = table.pieces; above - p > 1;) {
      const int middle = (p + above) / 2;
      (table.start[middle] <= lo ? p : above) = middle;
    }
    for (int64_t at = lo; at < hi; ++p) {
      const int64_t stop = table.start[p + 1] < hi ? table.start[p + 1] : hi;
      const T* in = (const T*)table.piece[p] + (at - table.start[p]);
      T* const to = out + at;
      const int64_t n = stop - at;
      int64_t head = n, wide = 0;  // one by one up to `head` and after the wide ones
      if (((uintptr_t)in - (uintptr_t)to) % 16 == 0) {
        head = (16 - (uintptr_t)to % 16) % 16 / sizeof(T);
        head = head < n ? head : n;
        wide = (n - head) / M;
      }
      const int64_t tail = head + wide * M;
      blend((One*)to, (const One*)in, head, alpha, beta);
      blend((Wide*)(to + head), (const Wide*)(in + head), wide, alpha, beta);
      blend((One*)(to + tail), (const One*)(in + tail), n - tail, alpha, beta);
      at = stop;
    }
  }
}

template <class T>
cudaError_t pack(T* out, const void* const* pieces, const int64_t* sizes, int64_t count, T alpha,
                 T beta, cudaStream_t stream) {
  for (int64_t p = 0; p < count;) {
    Table table = {};
    for (; p < count && table.pieces < PIECES; ++p) {
      if (sizes[p] == 0) continue;
      table.piece[table.pieces] = pieces[p];
      table.start[table.pieces + 1] = table.start[table.pieces] + sizes[p];
      ++table.pieces;
    }
    const int64_t total = table.start[table.pieces];
    if (total == 0) continue;
    const int64_t chunks = (total + CHUNK - 1) / CHUNK;
    const int64_t most = (int64_t)fh::multiprocessors() * PER_MULTIPROCESSOR;
    const dim3 grid(chunks < most ? chunks : most);
    const cudaError_t error =
        fh::launch(pack_kernel<T>, grid, dim3(THREADS), 0, stream, table, out, alpha, beta);
    if (error != cudaSuccess) return error;
    out += total;
  }
  return cudaSuccess;
}
}  // namespace

int fh_cuda_pack(void* out, FhType type, const void* const* pieces, const int64_t* sizes,
                 int64_t count, double alpha, double beta, void* stream) {
  const cudaStream_t on = (cudaStream_t)stream;
  if (type == FH_F64) return pack((double*)out, pieces, sizes, count, alpha, beta, on);
  return pack((float*)out, pieces, sizes, count, (float)alpha, (float)beta, on);
}
