// SPDX-License-Identifier: Apache-2.0
//
// DoRA against its definition in long double, for every storage of W, with several adapters in order; what it refuses.
#include "lora/dora.hpp"

#include <limits>

#include "support/bits.hpp"
#include "support/catch.hpp"

namespace {

using lora::index_t;
using test::exact_matrix;

/// Whole numbers from -8 to 8, never all zero in a row.
template <class T>
test::matrix<T> drawn(index_t rows, index_t cols, unsigned seed) {
  test::matrix<T> m(rows, cols);
  unsigned state = seed * 2654435761u + 1;
  for (index_t k = 0; k < m.size(); ++k) {
    state = state * 1664525u + 1013904223u;
    m.data()[k] = test::stored<T>(static_cast<double>((state >> 20) % 17) - 8 + (k % cols == 0 ? 0.5 : 0));
  }
  return m;
}

/// diag(m / |rows of W + D|) (before + D).
exact_matrix step(const exact_matrix& before, const exact_matrix& W, const exact_matrix& D, const std::vector<double>& m) {
  exact_matrix result = before + D;
  if (m.empty()) return result;
  for (index_t i = 0; i < W.rows(); ++i)
    result.row(i) *= static_cast<long double>(m[static_cast<std::size_t>(i)]) / (W.row(i) + D.row(i)).norm();
  return result;
}

template <class T>
double largest(const exact_matrix& want, const test::matrix<T>& got) {
  return static_cast<double>((want - test::exact(got)).cwiseAbs().maxCoeff());
}

}  // namespace

TEMPLATE_TEST_CASE("DoRA is its definition, merged and mixed, in every order", "[dora]", float, double, lora::bfloat16) {
  using T = TestType;
  using F = std::conditional_t<std::is_same_v<T, double>, double, float>;
  // u of the stored scalar, and of the accumulator: entries and magnitudes are below 2^8 in total, 40 steps at most.
  const double u = std::is_same_v<T, double> ? 0x1p-53 : std::is_same_v<T, float> ? 0x1p-24 : 0x1p-9;
  const double accumulator = std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24;
  for (const auto& [out, in, r] : std::vector<std::array<index_t, 3>>{{1, 1, 1}, {7, 5, 2}, {70, 3, 5}, {3, 65, 4}}) {
    CAPTURE(out, in, r);
    const auto W = drawn<T>(out, in, 1);
    std::vector<F> m, n;
    for (index_t i = 0; i < out; ++i) {
      m.push_back(static_cast<F>(1 + i % 5));
      n.push_back(static_cast<F>(-2 + 0.5 * static_cast<double>(i % 3)));
    }
    const lora::dora_adapter<F> first(drawn<F>(r, in, 2), drawn<F>(out, r, 3), {.alpha = 0.5}, m);
    const lora::dora_adapter<F> second(drawn<F>(2, in, 4), drawn<F>(out, 2, 5), {.alpha = 0.25}, n);
    const lora::adapter<F> plain(drawn<F>(1, in, 6), drawn<F>(out, 1, 7), {.alpha = 0.125});
    const exact_matrix base = test::exact(W), D1 = test::exact_delta(first.factors()),
                       D2 = -0.5L * test::exact_delta(second.factors()), D3 = test::exact_delta(plain);
    const std::vector<double> dm(m.begin(), m.end()), dn(n.begin(), n.end());
    const exact_matrix want = step(step(step(base, base, D1, dm), base, D3, {}), base, D2, dn);
    const auto layer = lora::attach(W, first, plain, lora::scaled(-0.5, second));
    const double scale = static_cast<double>(want.cwiseAbs().maxCoeff() + D1.cwiseAbs().maxCoeff() +
                                             D2.cwiseAbs().maxCoeff() + D3.cwiseAbs().maxCoeff()) +
                         1;
    const double bound = scale * (u + 60 * accumulator) * 16;
    auto merged = W;
    CHECK(lora::merge(merged, layer).became_nonfinite == 0);
    CHECK(largest(want, merged) <= bound);
    // Stored the other way round, as a transposed view.
    test::matrix<T> stored = W.transpose();
    lora::merge(stored.transpose(), lora::attach(stored.transpose(), first, plain, lora::scaled(-0.5, second)));
    CHECK(largest(want, test::matrix<T>(stored.transpose())) <= bound);
    // Mixed: forward, and apply on a product of our own.
    const test::matrix<F> x = drawn<F>(in, 3, 8);
    test::matrix<F> y(out, 3), own(out, 3);
    lora::forward(W, x, y, layer);
    const exact_matrix exact_y = test::times(want, test::exact(x));
    const double y_bound = bound * 9 * static_cast<double>(in + 4);
    CHECK(largest(exact_y, y) <= y_bound);
    lora::forward(W, x, own);
    lora::apply(x, own, layer);
    CHECK(largest(exact_y, own) <= y_bound);
    // A bias is not scaled.
    const std::vector<F> b(static_cast<std::size_t>(out), F(3));
    test::matrix<F> biased(out, 3);
    lora::forward(lora::with_bias(W, b), x, biased, layer);
    CHECK(largest(exact_y.array() + 3.0L, biased) <= y_bound);
    // And back.
    lora::unmerge(merged, layer);
    CHECK(largest(base, merged) <= bound * 64 * static_cast<double>(1 / layer.base_scale().cwiseAbs().minCoeff() + 1));
  }
}

TEST_CASE("DoRA without adapters is the base, and without magnitude LoRA", "[dora]") {
  auto W = drawn<float>(5, 4, 1), same = W;
  const lora::adapter<float> l(drawn<float>(2, 4, 2), drawn<float>(5, 2, 3), {.alpha = 2});
  lora::merge(same, lora::attach(W));
  CHECK(test::same_bits(same, W));
  lora::merge(same, lora::attach(W, l));
  lora::merge(W, l);
  CHECK(test::same_bits(same, W));  // whole numbers: nothing rounds
}

TEST_CASE("DoRA refuses what has no norm, and writes nothing", "[dora]") {
  const auto A = drawn<float>(2, 4, 2), B = drawn<float>(3, 2, 3);
  test::matrix<float> W = drawn<float>(3, 4, 1);
  const auto before = W;
  CHECK_THROWS_AS((lora::dora_adapter<float>(A, B, {.alpha = 1}, {1, 2})), lora::shape_error);
  const lora::dora_adapter<float> good(A, B, {.alpha = 1}, {1, 2, 3});
  test::matrix<float> zero_row = W;
  zero_row.row(1) = -lora::delta_weight(good.factors()).row(1);
  const auto zero_before = zero_row;
  CHECK_THROWS_WITH(lora::merge(zero_row, good), Catch::Contains("output 1"));
  CHECK(test::same_bits(zero_row, zero_before));
  const lora::dora_adapter<float> not_finite(A, B, {.alpha = 1}, {1, std::numeric_limits<float>::infinity(), 3});
  CHECK_THROWS_AS(lora::merge(W, not_finite), lora::value_error);
  test::matrix<float> wide = drawn<float>(4, 3, 1);
  CHECK_THROWS_AS(lora::attach(wide, good), lora::shape_error);
  const auto layer = lora::attach(W, good);
  CHECK_THROWS_AS(lora::merge(wide, layer), lora::shape_error);
  test::matrix<float> y = drawn<float>(4, 2, 1);
  const auto y_before = y;
  CHECK_THROWS_AS(lora::apply(drawn<float>(4, 2, 2), y, layer), lora::shape_error);
  CHECK(test::same_bits(y, y_before));
  CHECK(test::same_bits(W, before));
  const lora::dora_adapter<float> vanishing(A, B, {.alpha = 1}, {1, 0, 3});
  const auto gone = lora::attach(W, vanishing);
  lora::merge(W, gone);
  CHECK(W.row(1).isZero());
  CHECK_THROWS_WITH(lora::unmerge(W, gone), Catch::Contains("magnitude 0"));
}
