// SPDX-License-Identifier: Apache-2.0
//
// DoRA against its definition in long double, for every storage of W, with several adapters in
// order; what it refuses.
#include "lora/dora.hpp"

#include <cmath>
#include <limits>
#include <vector>

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
    m.data()[k] =
        test::stored<T>(static_cast<double>((state >> 20) % 17) - 8 + (k % cols == 0 ? 0.5 : 0));
  }
  return m;
}

/// diag(m / |rows of W + D|) (before + D).
exact_matrix step(const exact_matrix& before, const exact_matrix& W, const exact_matrix& D,
                  const std::vector<double>& m) {
  exact_matrix result = before + D;
  if (m.empty()) return result;
  for (index_t i = 0; i < W.rows(); ++i)
    result.row(i) *=
        static_cast<long double>(m[static_cast<std::size_t>(i)]) / (W.row(i) + D.row(i)).norm();
  return result;
}

/// |got - want| <= bound, element by element; false for NaN.
template <class T>
bool within(const exact_matrix& want, const test::matrix<T>& got, const exact_matrix& bound) {
  return ((want - test::exact(got)).cwiseAbs().array() <= bound.array()).all();
}

long double gamma(index_t k, double u) {
  return static_cast<long double>(k) * u / (1 - static_cast<long double>(k) * u);
}

/// An adapter of the list, exact: its delta, sum |s| |B| |A|, rank and magnitude (none: empty).
struct piece {
  exact_matrix delta, size;
  index_t rank;
  std::vector<double> magnitude;

  template <class L>
  piece(const L& l, double weight, std::vector<double> m)
      : delta(weight * test::exact_delta(l)),
        size(std::abs(weight * l.scaling()) *
             test::times(test::exact(l.lora_B()).cwiseAbs(), test::exact(l.lora_A()).cwiseAbs())),
        rank(l.rank()),
        magnitude(std::move(m)) {}
};

/// The bound of dora.hpp, with its gammas written out: g is off by what the deltas under its norms
/// are off; a term meets its chain over the ranks, the fold, g and the sum with g W.
struct bounds {
  exact_matrix weight;  ///< of W', before it is stored
  exact_matrix size;    ///< |g W| + sum |g s| |B| |A|
  Eigen::Matrix<long double, Eigen::Dynamic, 1> g;

  bounds(const exact_matrix& W, const std::vector<piece>& list, double u) : g(W.rows()) {
    g.setOnes();
    auto relative = g;
    relative.setConstant(4 * u);
    exact_matrix terms = exact_matrix::Zero(W.rows(), W.cols());
    weight = terms;
    index_t rank = 0;
    for (const piece& p : list) rank += p.rank;
    for (std::size_t k = list.size(); k-- > 0;) {
      const piece& p = list[k];
      for (index_t i = 0; !p.magnitude.empty() && i < W.rows(); ++i) {
        const long double norm = (W.row(i) + p.delta.row(i)).norm();
        g(i) *= std::abs(p.magnitude[static_cast<std::size_t>(i)]) / norm;
        relative(i) += 1.01L * gamma(p.rank + 3, u) * p.size.row(i).norm() / norm + 4 * u;
      }
      const exact_matrix term = g.asDiagonal() * p.size;
      terms += term;
      weight += (relative.array() + gamma(rank + 4, u)).matrix().asDiagonal() * term;
    }
    const exact_matrix base = g.asDiagonal() * W.cwiseAbs();
    weight += (relative.array() + gamma(3, u)).matrix().asDiagonal() * base;
    size = base + terms;
  }
};

}  // namespace

TEMPLATE_TEST_CASE("DoRA is its definition, merged and mixed, in every order", "[dora]", float,
                   double, lora::bfloat16) {
  using T = TestType;
  using F = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const double stored_u = std::is_same_v<T, lora::bfloat16> ? 0x1p-8 : 0;
  const double u = std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24;
  for (const auto& [out, in, r] :
       std::vector<std::array<index_t, 3>>{{1, 1, 1}, {7, 5, 2}, {70, 3, 5}, {3, 65, 4}}) {
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
    const exact_matrix base = test::exact(W);
    const std::vector<double> dm(m.begin(), m.end()), dn(n.begin(), n.end());
    const std::vector<piece> list{
        {first.factors(), 1, dm}, {plain, 1, {}}, {second.factors(), -0.5, dn}};
    exact_matrix want = base;
    for (const piece& p : list) want = step(want, base, p.delta, p.magnitude);
    const auto layer = lora::mixed(W, first, plain, lora::scaled(-0.5, second));
    const bounds e(base, list, u);
    const exact_matrix bound = e.weight + stored_u * (want.cwiseAbs() + e.weight);
    auto merged = W;
    CHECK(lora::merge(merged, layer).became_nonfinite == 0);
    CHECK(within(want, merged, bound));
    // Stored the other way round, as a transposed view.
    test::matrix<T> stored = W.transpose();
    lora::merge(stored.transpose(),
                lora::mixed(stored.transpose(), first, plain, lora::scaled(-0.5, second)));
    CHECK(within(want, test::matrix<T>(stored.transpose()), bound));
    // Mixed: forward, and apply on a product of our own.
    const test::matrix<F> x = drawn<F>(in, 3, 8);
    test::matrix<F> y(out, 3), own(out, 3);
    lora::forward(W, x, y, layer);
    const exact_matrix exact_y = test::times(want, test::exact(x));
    const exact_matrix y_bound =
        test::times(e.weight + gamma(in + r + 3 + 8, u) * e.size, test::exact(x).cwiseAbs()) +
        3 * u * exact_y.cwiseAbs();
    CHECK(within(exact_y, y, y_bound));
    lora::forward(W, x, own);
    lora::apply(x, own, layer);
    CHECK(within(exact_y, own, y_bound));
    // A bias is not scaled.
    const std::vector<F> b(static_cast<std::size_t>(out), F(3));
    test::matrix<F> biased(out, 3);
    lora::forward(lora::with_bias(W, b), x, biased, layer);
    CHECK(within(exact_y.array() + 3.0L, biased, y_bound.array() + 3 * u * 4));
    // And back: what the weight is off, over g, and its own rounding.
    lora::unmerge(merged, layer);
    const exact_matrix back =
        e.g.cwiseInverse().asDiagonal() * (bound + e.weight + gamma(4, u) * e.size);
    CHECK(within(base, merged, back + (stored_u + u) * (base.cwiseAbs() + back)));
  }
}

TEST_CASE("DoRA at strength 0 does not read the factors", "[dora]") {
  const auto W = drawn<float>(3, 4, 1);
  const auto A =
      test::matrix<float>::Constant(2, 4, std::numeric_limits<float>::quiet_NaN()).eval();
  const lora::adapter<float> poison(A, drawn<float>(3, 2, 3), {.alpha = 1});
  const lora::dora_adapter<float> strong(poison, {1, 2, 3});
  auto same = W, normed = W;
  lora::merge(same, lora::mixed(W, lora::scaled(0, poison)));
  CHECK(test::same_bits(same, W));
  lora::merge(normed, lora::mixed(W, lora::scaled(0, strong)));
  CHECK(normed.allFinite());
  CHECK(std::abs(normed.row(1).norm() - 2) < 1e-5);  // its magnitude stays
}

TEST_CASE("DoRA adds a double bias in double", "[dora]") {
  const test::matrix<float> W = test::matrix<float>::Ones(1, 1), x = W;
  const auto layer = lora::mixed(W);
  const std::vector<double> b{-1 + 0x1p-40};  // -1 as a float
  test::matrix<float> y(1, 1);
  lora::forward(lora::with_bias(W, b), x, y, layer);
  CHECK(y(0, 0) == 0x1p-40F);
}

TEST_CASE("DoRA refuses an output over what it reads", "[dora]") {
  test::matrix<float> W = drawn<float>(4, 4, 1), x = drawn<float>(4, 4, 2);
  const auto W_before = W, x_before = x;
  std::vector<float> b(4, 1.0F);
  const lora::dora_adapter<float> l(drawn<float>(2, 4, 4), drawn<float>(4, 2, 3), {.alpha = 1},
                                    {1, 2, 3, 4});
  const auto layer = lora::mixed(W, l);
  CHECK_THROWS_AS(lora::forward(W, x, W, layer), lora::shape_error);
  CHECK_THROWS_AS(lora::forward(W, x, x, layer), lora::shape_error);
  CHECK_THROWS_AS(lora::apply(x, x, layer), lora::shape_error);
  CHECK_THROWS_AS(lora::forward(lora::with_bias(W, b), x.col(0), b, layer), lora::shape_error);
  CHECK(test::same_bits(W, W_before));
  CHECK(test::same_bits(x, x_before));
  CHECK(b == std::vector<float>(4, 1.0F));
}

TEST_CASE("DoRA without adapters is the base, and without magnitude LoRA", "[dora]") {
  auto W = drawn<float>(5, 4, 1), same = W;
  const lora::adapter<float> l(drawn<float>(2, 4, 2), drawn<float>(5, 2, 3), {.alpha = 2});
  lora::merge(same, lora::mixed(W));
  CHECK(test::same_bits(same, W));
  lora::merge(same, lora::mixed(W, l));
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
  const lora::dora_adapter<float> not_finite(A, B, {.alpha = 1},
                                             {1, std::numeric_limits<float>::infinity(), 3});
  CHECK_THROWS_AS(lora::merge(W, not_finite), lora::value_error);
  test::matrix<float> wide = drawn<float>(4, 3, 1);
  CHECK_THROWS_AS((void)lora::mixed(wide, good), lora::shape_error);
  const auto layer = lora::mixed(W, good);
  CHECK_THROWS_AS(lora::merge(wide, layer), lora::shape_error);
  test::matrix<float> y = drawn<float>(4, 2, 1);
  const auto y_before = y;
  CHECK_THROWS_AS(lora::apply(drawn<float>(4, 2, 2), y, layer), lora::shape_error);
  CHECK(test::same_bits(y, y_before));
  CHECK(test::same_bits(W, before));
  const lora::dora_adapter<float> vanishing(A, B, {.alpha = 1}, {1, 0, 3});
  const auto gone = lora::mixed(W, vanishing);
  lora::merge(W, gone);
  CHECK(W.row(1).isZero());
  CHECK_THROWS_WITH(lora::unmerge(W, gone), Catch::Contains("magnitude 0"));
}

namespace {

/// The gains m / n of one adapter on a weight with the storage of M.
template <class M>
std::vector<float> gains_on(const M& W, const lora::dora_adapter<float>& l) {
  return lora::mixed(W, l).gain();
}

}  // namespace

// Norms are summed in the tiles of each storage order, columns of bfloat16 even ones apart from odd
// ones: outputs that change places would change gains. Sizes are those of whole tiles and of edges.
TEMPLATE_TEST_CASE("each output has its own norm in either storage order", "[dora]", float,
                   lora::float16, lora::bfloat16) {
  for (const index_t out : {3, 33, 70, 131})
    for (const index_t in : {5, 40, 67}) {
      CAPTURE(out, in);
      const auto drawn_W = drawn<float>(out, in, 9);
      test::matrix<TestType> W(out, in);
      std::vector<float> ones(static_cast<std::size_t>(out), 1);
      for (index_t i = 0; i < out; ++i)  // no two rows are of one size
        for (index_t j = 0; j < in; ++j)
          W(i, j) = test::stored<TestType>(static_cast<double>(drawn_W(i, j)) *
                                           static_cast<double>(i + 2) / 16);
      const lora::dora_adapter<float> l(drawn<float>(2, in, 3), drawn<float>(out, 2, 4),
                                        {.alpha = 0.7}, ones);
      const auto by_rows = gains_on(W, l);
      const auto by_cols = gains_on(test::col_matrix<TestType>(W), l);
      REQUIRE(by_cols.size() == by_rows.size());
      // Sums in double in two orders, each quotient rounded to float: one step of float apart.
      for (std::size_t i = 0; i < by_rows.size(); ++i)
        CHECK(std::abs(by_cols[i] - by_rows[i]) <= 0x1p-23F * by_rows[i]);
    }
}
