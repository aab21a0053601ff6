// SPDX-License-Identifier: Apache-2.0
//
// An engine with a matrix product of its own, here over weights of 8 bits with a scale per row,
// adds adapters with apply: y += s B (A x). The base is never widened, and a list of adapters can
// change between two calls.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "lora/adapter.hpp"
#include "lora/apply.hpp"

namespace {

using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// The engine's own layer: W(i, j) = scale(i) * steps(i, j).
struct int8_layer {
  Eigen::Matrix<std::int8_t, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> steps;
  Eigen::VectorXf scale;

  explicit int8_layer(const matrix& W)
      : steps(W.rows(), W.cols()), scale(W.rowwise().lpNorm<Eigen::Infinity>() / 127) {
    for (Eigen::Index i = 0; i < W.rows(); ++i)
      for (Eigen::Index j = 0; j < W.cols(); ++j)
        steps(i, j) = static_cast<std::int8_t>(std::lround(W(i, j) / scale(i)));
  }
  void multiply(const Eigen::VectorXf& x, Eigen::VectorXf& y) const {
    for (Eigen::Index i = 0; i < steps.rows(); ++i) {
      float sum = 0;
      for (Eigen::Index j = 0; j < steps.cols(); ++j) sum += static_cast<float>(steps(i, j)) * x(j);
      y(i) = scale(i) * sum;
    }
  }
  matrix widened() const { return scale.asDiagonal() * steps.cast<float>(); }
};

/// Numbers that are the same on every machine.
matrix pattern(Eigen::Index rows, Eigen::Index cols, int step, float size) {
  matrix m(rows, cols);
  for (Eigen::Index k = 0; k < m.size(); ++k)
    m.data()[k] = size * (static_cast<float>((k * step) % 31) / 15 - 1);
  return m;
}

}  // namespace

int main() {
  const int8_layer base(pattern(48, 64, 7, 0.3F));
  const std::vector<lora::adapter<float>> requested = {
      {pattern(6, 64, 11, 0.2F), pattern(48, 6, 3, 0.4F), {.alpha = 9}},
      {pattern(2, 64, 5, 0.2F),
       pattern(48, 2, 13, 0.4F),
       {.alpha = 3, .rule = lora::scaling_rule::rank_stabilized}}};
  const Eigen::VectorXf x = pattern(64, 1, 17, 1).col(0);

  Eigen::VectorXf y(48);
  base.multiply(x, y);  // the engine's product
  const Eigen::VectorXf plain = y;
  lora::apply(x, y, requested);  // and the adapters of this request

  // The same by hand, in double. 72 products of at most 0.3 in float stay within 72 * 72 * 0.3 *
  // 2^-24 = 9.3e-5 of it.
  Eigen::VectorXd exact = base.widened().cast<double>() * x.cast<double>();
  for (const auto& l : requested)
    exact +=
        l.scaling() * l.lora_B().cast<double>() * (l.lora_A().cast<double>() * x.cast<double>());
  std::printf("y(0)     without adapters %.4f, with %.4f\n", static_cast<double>(plain(0)),
              static_cast<double>(y(0)));
  std::printf("exact    %.4f; largest difference %s\n", exact(0),
              (y.cast<double>() - exact).cwiseAbs().maxCoeff() < 1e-4 ? "below 1e-4" : "TOO LARGE");
}
