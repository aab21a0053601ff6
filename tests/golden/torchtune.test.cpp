// SPDX-License-Identifier: Apache-2.0
//
// torchtune's own regression number for its LoRALinear.
#include "support/golden.hpp"

namespace {

/// 0, 1/n, 2/n ... in the shape's order. n is a power of two here, so that nothing rounds.
test::matrix<float> counted(Eigen::Index rows, Eigen::Index cols) {
  test::matrix<float> m(rows, cols);
  for (Eigen::Index k = 0; k < m.size(); ++k)
    m.data()[k] = static_cast<float>(k) / static_cast<float>(m.size());
  return m;
}

/// The mean of all outputs with the adapter merged or beside, computed in T, and the mean of the
/// outputs' bounds.
template <class T>
std::pair<double, double> mean(bool merged) {
  const auto x = golden::tensor<T>(
      lora::safetensors::read(golden::outside("golden/torchtune/input.safetensors")), "x");
  const test::matrix<float> W = counted(128, 64), A = counted(4, 64), B = counted(128, 4);
  const Eigen::VectorXf b = counted(128, 1);
  const lora::adapter<float> l(A, B, {.alpha = 1});
  lora::linear<T> layer(lora::with_bias(W, b));
  layer.attach("tuned", l);
  if (merged) layer.merge();
  test::col_matrix<T> y(128, x.rows());
  layer.forward(x.transpose(), y);

  agreement::state where;
  (merged ? where.merged : where.mixed).push_back(agreement::part_of(l));
  const auto bound =
      agreement::error_bound(W.cast<double>(), b.cast<double>(), where,
                             x.transpose().template cast<double>(), golden::all_in<T>());
  return {y.template cast<double>().mean(), bound.mean()};
}

}  // namespace

TEST_CASE("LoRA on a linear layer with bias has torchtune's mean", "[golden]") {
  constexpr double published = 1.1252,
                   published_within = 1e-4;  // tests/torchtune/modules/peft/test_lora.py
  constexpr double recomputed = 1.12517425,
                   recomputed_within = 5e-9;  // float64, by the digits that are given
  for (const bool merged : {false, true}) {
    CAPTURE(merged);
    const auto [in_float, float_bound] = mean<float>(merged);
    const auto [in_double, double_bound] = mean<double>(merged);
    CHECK(std::abs(in_float - published) <= published_within);
    CHECK(std::abs(in_double - published) <= published_within);
    CHECK(std::abs(in_double - recomputed) <= recomputed_within + double_bound);
    CHECK(std::abs(in_float - recomputed) <= recomputed_within + float_bound);
  }
}
