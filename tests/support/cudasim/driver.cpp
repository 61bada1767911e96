// Runs every kernel of csrc/cuda on small matrices and compares with plain loops. Arrays end where
// the data end, so that sanitizers see an access one element too far.
//   driver [SEED [CASE]]     prints what is wrong, and sets the exit code
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cudasim.h"
#include "matrix.h"

namespace {
bool failed = false;
std::string current;

void require(bool holds, const char* what) {
  if (!holds) printf("wrong: %s: %s\n", current.c_str(), what);
  failed |= !holds;
}

void check_launch(int error) {
  if (error) printf("error: %s: %s\n", current.c_str(), cudaGetErrorString((cudaError_t)error));
  failed |= error != 0;
}

struct Shape {
  int64_t k, n;
  int b;
  int64_t count;  // of live rows; the others hold NaN
  int shift;      // 0: rows aligned to 16 bytes
  bool tensor;    // the count is read from memory
};

template <class TV, class TW>
struct Problem {
  Shape shape;
  Matrix<TV> V;
  Matrix<TW> W;
  std::vector<double> H;
  int64_t count_memory;

  explicit Problem(const Shape& s)
      : shape(s),
        V(s.k, s.n, s.shift ? s.n + s.shift : (s.n + 7) / 8 * 8, s.shift),
        W(s.b, s.n, s.shift ? s.n + s.shift : (s.n + 7) / 8 * 8, s.shift),
        H(s.k * s.b),
        count_memory(s.count) {
    for (double& x : H) x = uniform();
    for (int64_t r = s.count; r < s.k; ++r) {
      for (int64_t i = 0; i < s.n; ++i) V.data()[r * V.ld + i] = narrow<TV>(NAN);
      for (int q = 0; q < s.b; ++q) H[r * s.b + q] = NAN;
    }
  }

  FhCudaBlock block(bool with_h) {
    return {V.data(),
            V.ld,
            type_of<TV>,
            shape.k,
            shape.n,
            W.data(),
            W.ld,
            type_of<TW>,
            shape.b,
            with_h ? H.data() : nullptr,
            shape.tensor ? &count_memory : nullptr,
            shape.tensor ? -1 : shape.count};
  }

  // (W - H^T V)[q, i] and the sum of the magnitudes, which bounds the rounding errors.
  double corrected(const Matrix<TW>& W, int q, int64_t i, double* magnitude) const {
    double sum = W.at(q, i);
    *magnitude = fabs(sum);
    for (int64_t r = 0; r < shape.count; ++r) {
      const double product = H[r * shape.b + q] * V.at(r, i);
      sum -= product, *magnitude += fabs(product);
    }
    return sum;
  }
};

template <class TV, class TW>
void project(const Shape& shape, bool with_h) {
  Problem<TV, TW> p(shape);
  const Matrix<TW> before = p.W;
  const FhCudaBlock block = p.block(with_h);
  std::vector<double> workspace(fh_cuda_workspace(block), NAN);
  std::vector<double> C(shape.k * shape.b, NAN), G(shape.b * shape.b, NAN);
  check_launch(fh_cuda_project(block, workspace.data(), C.data(), G.data(), nullptr));
  bool w = true, c = true, g = true;
  for (int q = 0; q < shape.b; ++q) {
    for (int64_t i = 0; i < shape.n; ++i) {
      double magnitude = 0;
      const double want = with_h ? p.corrected(before, q, i, &magnitude) : before.at(q, i);
      w &= fabs(p.W.at(q, i) - want) <= rounding<TW>() * magnitude;
    }
    for (int64_t r = 0; r < shape.k; ++r)
      c &= r < shape.count ? is_dot(C[r * shape.b + q], p.V, r, p.W, q) : C[r * shape.b + q] == 0;
    for (int o = 0; o < shape.b; ++o)
      g &= is_dot(G[q * shape.b + o], p.W, q, p.W, o) && G[q * shape.b + o] == G[o * shape.b + q];
  }
  require(w, "W of project_"), require(c, "C of project_"), require(g, "G of project_");
}

template <class TV, class TW>
void update(const Shape& shape, bool mix, bool append) {
  Problem<TV, TW> p(shape);
  const int b = shape.b;
  const Matrix<TW> before = p.W;
  const Matrix<TV> V = p.V;
  std::vector<double> S(b * b);
  for (double& x : S) x = uniform();
  const double scale = 8;
  check_launch(
      fh_cuda_update(p.block(true), mix ? S.data() : nullptr, append, append ? scale : 1, nullptr));
  bool w = true, v = true;
  for (int64_t i = 0; i < shape.n; ++i) {
    std::vector<double> part(b), size(b), want(b), error(b);
    for (int q = 0; q < b; ++q) part[q] = p.corrected(before, q, i, &size[q]);
    for (int q = 0; q < b; ++q)
      for (int o = 0; o < b; ++o) {
        const double factor = mix ? S[q * b + o] : q == o;
        want[q] += factor * part[o], error[q] += fabs(factor) * size[o];
      }
    for (int q = 0; q < b; ++q) {
      const int from = append ? b - 1 : q;
      const bool kept = append && q > 0;
      w &= fabs(p.W.at(q, i) - (kept ? before.at(q, i) : want[from])) <=
           (kept ? 0 : rounding<TW>() * error[from]);
    }
    if (append)
      v &= fabs(p.V.at(shape.count, i) - scale * want[0]) <= rounding<TV>() * scale * error[0];
  }
  for (int64_t r = 0; r < shape.count; ++r)
    for (int64_t i = 0; i < shape.n; ++i) v &= p.V.at(r, i) == V.at(r, i);
  require(w, "W of update_"), require(v, "V of update_");
}

bool near(double found, double want) {
  return fabs(found - want) <= 1e-10 * (1 + fabs(want)) || (found != found && want != want);
}

// The step as in reference.py, with j live rows of a basis of m.
void recur(int64_t j, int64_t m, bool tensor, bool fresh) {
  const int64_t k = m, ld = m + 3;
  Matrix<double> C(k, 2, 2, 0), T(m + 1, m + 1, ld, 1), gauges(m + 1, 3, 4, 0);
  const double scale = 4;
  double G[4] = {fresh ? 3.0 * (k + 1) : 0, 0.7, 0.7, 2};
  int64_t count[2] = {j, -1};
  std::vector<double> H(2 * k, NAN), S(4, NAN), s(j), z(j);
  const Matrix<double> before = T;
  check_launch(fh_cuda_recur({C.data(), G, 2, 2, T.data(), gauges.data(), ld, 4, k, m,
                              tensor ? count : nullptr, tensor ? -1 : j, scale, H.data(), S.data()},
                             nullptr));
  double nu2 = G[0], uw = G[1], link_s = 0, asymmetry = 0;
  for (int64_t r = 0; r < j; ++r) {
    s[r] = C.at(r, 0) / scale, z[r] = C.at(r, 1) / scale;
    nu2 -= s[r] * s[r], uw -= s[r] * z[r], link_s += before.at(j, r) * s[r];
  }
  const double nu = sqrt(nu2), t = uw / nu2;
  bool right = true;
  for (int64_t r = 0; r < j; ++r) {
    const double link = before.at(j, r);
    double coupling = z[r];
    for (int64_t c = 0; c < j; ++c) coupling -= before.at(r, c) * s[c];
    asymmetry = fmax(asymmetry, fabs(coupling / nu - nu * link));
    right &= near(T.at(j, r), fresh ? nu * link : 0) && T.at(r, j) == T.at(j, r);
    for (int q = 0; q < 2; ++q) right &= near(H[2 * r + q], fresh ? C.at(r, q) / 16 : 0);
  }
  right &= near(T.at(j, j), fresh ? t - link_s : 0);
  for (int64_t r = 0; r <= j; ++r) right &= T.at(j + 1, r) == (r == j);
  for (int64_t r = 2 * j; r < 2 * k; ++r) right &= H[r] == 0;
  const double mixed[4] = {1 / nu, 0, -t / nu, 1 / nu};
  for (int i = 0; i < 4; ++i) right &= near(S[i], fresh ? mixed[i] : 0);
  right &= near(gauges.at(j, 0), G[0]) && near(gauges.at(j, 1), nu2);
  right &= near(gauges.at(j, 2), fresh ? asymmetry : 0);
  require(right, "recur_");
  require(!tensor || (count[0] == j + 1 && count[1] == j), "the count after recur_");
}

using Stream = int (*)(void*, FhType, int64_t, uint64_t, int64_t, void*);

// A piece of a stream equals that part of the whole.
template <class T>
void stream(Stream fill, int64_t n, int64_t offset) {
  std::vector<T> whole(n + offset, NAN), piece(n + 1, NAN);
  check_launch(fill(whole.data(), type_of<T>, n + offset, 5, 0, nullptr));
  piece.resize(n);
  check_launch(fill(piece.data(), type_of<T>, n, 5, offset, nullptr));
  bool right = true;
  for (int64_t i = 0; i < n; ++i) right &= piece[i] == whole[offset + i];
  require(right, "a piece of a stream");
}

template <class T>
void pack(std::vector<int64_t> sizes, double beta) {
  std::vector<std::vector<T>> pieces;
  std::vector<const void*> addresses;
  std::vector<double> want;
  for (const int64_t size : sizes) {
    pieces.emplace_back(size);
    for (T& x : pieces.back()) x = (T)uniform(), want.push_back(0.3 * x + (beta ? 2 * beta : 0));
    addresses.push_back(pieces.back().data());
  }
  std::vector<T> out(want.size(), beta ? 2 : (T)NAN);
  check_launch(fh_cuda_pack(out.data(), type_of<T>, addresses.data(), sizes.data(), sizes.size(),
                            0.3, beta, nullptr));
  bool right = true;
  for (size_t i = 0; i < want.size(); ++i) right &= fabs(out[i] - want[i]) <= 4 * rounding<T>();
  require(right, "pack_");
}

// Rows of logits with a masked class, and a row of NaN with weight 0.
template <class T>
void softmax(int64_t outer, int64_t classes, int64_t inner, int shift) {
  current = "softmax " + std::to_string(classes) + " inner " + std::to_string(inner);
  const int64_t n = outer * classes * inner;
  Matrix<T> U(1, n, n, shift), Z(1, n, n, shift);
  std::vector<double> scale(outer * inner);
  for (double& s : scale) s = uniform();
  for (int64_t i = 0; i < n; ++i) Z.data()[i] *= 20;
  for (int64_t r = 0; r < outer; ++r) Z.data()[r * classes * inner] = classes > 1 ? -INFINITY : 1;
  scale.back() = 0, U.data()[n - 1] = Z.data()[n - 1] = (T)NAN;
  const Matrix<T> before = U;
  check_launch(fh_cuda_softmax_curvature(U.data(), Z.data(), type_of<T>, outer, classes, inner,
                                         scale.data(), nullptr));
  bool right = true;
  for (int64_t r = 0; r < outer * inner; ++r) {
    const auto at = [&](int64_t k) { return (r / inner * classes + k) * inner + r % inner; };
    double top = -INFINITY, total = 0, mean = 0, reach = 0;
    for (int64_t k = 0; k < classes; ++k) top = fmax(top, Z.at(0, at(k)));
    for (int64_t k = 0; k < classes; ++k) total += exp(Z.at(0, at(k)) - top);
    for (int64_t k = 0; k < classes; ++k) {
      const double p = exp(Z.at(0, at(k)) - top) / total, u = before.at(0, at(k));
      mean += p * u, reach += p * fabs(u);
    }
    for (int64_t k = 0; k < classes; ++k) {
      const double p = exp(Z.at(0, at(k)) - top) / total, u = before.at(0, at(k));
      right &= scale[r] == 0 ? U.at(0, at(k)) == 0
                             : fabs(U.at(0, at(k)) - scale[r] * p * (u - mean)) <=
                                   40 * rounding<T>() * fabs(scale[r]) * p * (fabs(u) + reach);
    }
  }
  require(right, "softmax_curvature_");
}

template <class T>
void softmaxes() {
  softmax<T>(2, 4116, 1, 0);  // several rounds of a whole block of threads, and a tail
  softmax<T>(3, 1030, 1, 1);  // rows of any alignment
  softmax<T>(90, 10, 1, 0);   // many teams to a block
  softmax<T>(3, 150, 5, 0);   // a team of several warps, fewer rows than lanes
  softmax<T>(2, 33, 70, 0);
  softmax<T>(40, 1, 3, 0);
}

template <class TV, class TW>
void matrices(const char* types) {
  const Shape shapes[] = {
      {0, 5, 1, 0, 3, false},
      {3, 7, 2, 3, 3, false},
      {9, 2600, 1, 7, 0, true},    // a whole tile of every kernel, and a tail
      {70, 530, 2, 66, 0, true},   // several tiles to a block
      {40, 420, 3, 38, 1, false},  // rows of any alignment
      {40, 300, 8, 38, 0, false},
      {131, 261, 2, 129, 0, true},  // more rows than a block of threads holds
      {400, 40, 8, 399, 0, false},  // more of H than shared memory holds
      {3, 0, 2, 2, 0, false},
  };
  for (const Shape& shape : shapes) {
    current = std::string(types) + " k " + std::to_string(shape.k) + " n " +
              std::to_string(shape.n) + " b " + std::to_string(shape.b);
    if (shape.k < 400) project<TV, TW>(shape, false), project<TV, TW>(shape, true);
    update<TV, TW>(shape, false, false);
    update<TV, TW>(shape, true, false);
    if (shape.count < shape.k) update<TV, TW>(shape, true, true);
  }
}

template <class T>
void vectors(const char* type) {
  current = type;
  for (const Stream fill : {fh_cuda_signs, fh_cuda_normal})
    for (const int64_t n : {0, 1, 131, 3001}) stream<T>(fill, n, 31);
  for (const double beta : {0.0, -0.5}) {
    pack<T>({}, beta);
    pack<T>({12, 0, 1, 1, 2001, 16}, beta);
    pack<T>(std::vector<int64_t>(300, 3), beta);
  }
}
}  // namespace

int main(int argc, char** argv) {
  fhsim::seed(argc > 1 ? atoi(argv[1]) : 0);
  const std::string only = argc > 2 ? argv[2] : "";
  const auto wanted = [&only](const char* name) { return only.empty() || only == name; };
  if (wanted("f32")) matrices<float, float>("f32");
  if (wanted("f64")) matrices<double, double>("f64");
  if (wanted("f16")) matrices<__half, float>("f16");
  if (wanted("mixed")) matrices<__half, double>("mixed");
  if (wanted("recur"))
    for (const int64_t j : {0, 1, 2, 37, 70})
      for (const bool tensor : {false, true})
        for (const bool fresh : {false, true}) {
          current = "j " + std::to_string(j);
          recur(j, 71, tensor, fresh);
        }
  if (wanted("softmax")) softmaxes<float>(), softmaxes<double>();
  if (wanted("vectors")) vectors<float>("float"), vectors<double>("double");
  if (!failed) printf("ok\n");
  return failed;
}
