// SPDX-License-Identifier: Apache-2.0
//
// DoRA within its bound where W + D cancels, so that the norm has few digits left, with one
// magnitude and several, merged, unmerged, mixed and looked up; the bounds of lora/dora_bounds.hpp
// against those of support/dora_bound.hpp in long double; and rows whose norm lies near the ends of
// double's range.
#include "support/dora_bound.hpp"

#include <cstdio>

#include "lora/dora_bounds.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

namespace {

using lora::index_t;
using test::exact_column;
using test::exact_matrix;

constexpr std::uint64_t seed = 20261202;

/// A base that the first adapter cancels: all but 2^-lost of -D in most columns, and numbers of
/// that size in the others.
template <class T, class L>
test::matrix<T> cancelled(test::random& g, const L& l, double lost) {
  const exact_matrix D = test::exact_delta(l);
  const double rest = std::exp2(-lost);
  test::matrix<T> W(D.rows(), D.cols());
  for (index_t i = 0; i < W.rows(); ++i)
    for (index_t j = 0; j < W.cols(); ++j)
      W(i, j) = test::stored<T>((j % 4 == 3 ? 0.0 : -static_cast<double>(D(i, j))) + rest * g.uniform(0.5, 1.5));
  return W;
}

template <class F>
std::vector<F> magnitudes(test::random& g, index_t out) {
  std::vector<F> m;
  for (index_t i = 0; i < out; ++i) m.push_back(static_cast<F>(g.uniform(0.2, 3) * (i % 3 == 0 ? -1 : 1)));
  return m;
}
template <class F>
std::vector<double> in_double(const std::vector<F>& m) {
  return {m.begin(), m.end()};
}

/// The elements of a bound of the library, which has no long double.
template <class B>
exact_matrix elements(const B& bound) {
  exact_matrix result(bound.rows(), bound.cols());
  for (index_t i = 0; i < bound.rows(); ++i)
    for (index_t j = 0; j < bound.cols(); ++j) result(i, j) = static_cast<long double>(bound(i, j));
  return result;
}
template <class T, class B>
bool within(const test::matrix<T>& got, const exact_matrix& want, const B& bound) {
  return ((test::exact(got) - want).cwiseAbs().array() <= elements(bound).array()).all();
}
/// What is stored in the accumulator adds no rounding: then the two bounds are the same formula. The oracle finds P as a
/// product of 1 + t, of which long double keeps five digits where t is 2^-48.
template <class T, class Acc, class B>
bool same_bound(const B& bound, const exact_matrix& e) {
  const exact_matrix got = elements(bound);
  return !std::is_same_v<T, Acc> || ((got - e).array().abs() <= 1e-4L * e.array()).all();
}

template <class T, class F>
void check(test::random& g) {
  const index_t out = g.integer(1, 9), in = g.integer(2, 30), r = g.integer(1, 5), tokens = 3;
  const double lost = g.uniform(0, std::is_same_v<F, float> ? 14 : 40);
  const lora::adapter<F> first(g.reals<F>(r, in, 3), g.reals<F>(out, r, 3), {.alpha = 0.7});
  const lora::adapter<F> second(g.reals<F>(2, in, 0.1), g.reals<F>(out, 2, 0.1), {.alpha = -1.3});
  const lora::adapter<F> plain(g.reals<F>(1, in, 0.1), g.reals<F>(out, 1, 0.1), {.alpha = 0.3});
  const test::matrix<T> W = cancelled<T>(g, first, lost);
  const auto m = magnitudes<F>(g, out), n = magnitudes<F>(g, out);
  const lora::dora_adapter<F> one(first, m), two(second, n);
  const bool several = !g.one_in(3);
  CAPTURE(g.seed(), out, in, r, lost, several);
  const auto layer = several ? lora::mixed(W, one, plain, two) : lora::mixed(W, one);
  std::vector<test::dora_piece> pieces{{first, in_double(m)}};
  if (several) {
    pieces.emplace_back(plain, std::vector<double>());
    pieces.emplace_back(second, in_double(n));
  }
  using acc = lora::accumulator_t<T, F>;
  const auto bound = test::dora_bound::of<acc>(test::exact(W), pieces);
  auto stored = W;
  lora::merge(stored, layer);
  REQUIRE(test::stored_within<T, acc>(stored, bound.merged, bound.weight()));
  const auto sure = several ? lora::attach_bound(W, one, plain, two) : lora::attach_bound(W, one);
  REQUIRE(within(stored, bound.merged, lora::merge_bound(W, sure)));
  REQUIRE(same_bound<T, acc>(lora::merge_bound(W, sure), bound.weight()));
  // (W' - deltas) / g_0 of what is stored
  const exact_matrix base_part = bound.sign_g0.asDiagonal() * bound.W;
  const exact_matrix deltas = bound.merged - base_part;
  const exact_matrix q = bound.sign_g0.cwiseInverse().asDiagonal() * (test::exact(stored) - deltas);
  auto back = stored;
  lora::unmerge(back, layer);
  REQUIRE(test::stored_within<T, acc>(back, q, bound.unmerged(q)));
  REQUIRE(within(back, q, lora::unmerge_bound(stored, sure)));

  const test::matrix<F> x = g.reals<F>(in, tokens, 1);
  const std::vector<F> bias(static_cast<std::size_t>(out), F(0.3F));
  const exact_column b = exact_column::Constant(out, static_cast<long double>(bias[0]));
  test::matrix<F> y(out, tokens);
  lora::forward(lora::with_bias(W, bias), x, y, layer);
  exact_matrix want = test::times(bound.merged, test::exact(x));
  want.colwise() += b;
  REQUIRE(test::stored_within<F, acc>(y, want, bound.mixed(test::exact(x), b)));
  REQUIRE(within(y, want, lora::forward_bound(lora::with_bias(W, bias), x, y, sure)));
  REQUIRE(same_bound<F, acc>(lora::forward_bound(lora::with_bias(W, bias), x, y, sure), bound.mixed(test::exact(x), b)));

  const test::matrix<F> base_y = g.reals<F>(out, tokens, 1);
  const auto apply_bound = lora::apply_bound(x, base_y, sure);
  y = base_y;
  lora::apply(x, y, layer);
  const exact_matrix want_applied = bound.sign_g0.asDiagonal() * test::exact(base_y) + test::times(deltas, test::exact(x));
  REQUIRE(within(y, want_applied, apply_bound));

  const test::matrix<T> embedding = W.transpose();
  const std::vector<index_t> ids{in - 1, 0, in - 1};
  const double c = g.uniform(0.1, 9);
  test::matrix<F> found(out, 3);
  lora::rows(lora::with_scale(embedding, c), ids, found, layer);
  const auto K = static_cast<index_t>(pieces.size());  // not fewer than gains
  const exact_matrix e = bound.weight(K + 4, K + 4) * c;
  exact_matrix want_rows(out, 3), rows_bound(out, 3);
  for (index_t t = 0; t < 3; ++t) {
    want_rows.col(t) = bound.merged.col(ids[static_cast<std::size_t>(t)]) * static_cast<long double>(c);
    rows_bound.col(t) = e.col(ids[static_cast<std::size_t>(t)]);
  }
  REQUIRE(test::stored_within<F, acc>(found, want_rows, rows_bound));
  REQUIRE(within(found, want_rows, lora::rows_bound(lora::with_scale(embedding, c), ids, found, sure)));
}

}  // namespace

TEMPLATE_TEST_CASE("DoRA stays within its bound where the norm cancels", "[dora][bound]", float, double, lora::bfloat16) {
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  test::random g(seed);
  for (int k = 0; k < 400; ++k) check<TestType, std::conditional_t<std::is_same_v<TestType, double>, double, float>>(g);
}

TEST_CASE("the error of DoRA is that of the norm where it cancels", "[dora][bound]") {
  // One column holds nearly all of the delta, and the base takes it away; the other column has no
  // delta at all.
  const float a = 1000 * 1.0001F, b = 1000 * 0.9999F;
  test::matrix<float> W(1, 2), A(1, 2), B(1, 1);
  A << a, 0;
  B << b;
  W << 1 - a * b, 1;
  const lora::dora_adapter<float> l{A, B, {.alpha = 1}, {1}};
  const auto bound = test::dora_bound::of<float>(test::exact(W), {test::dora_piece(l.factors(), {1})});
  const long double without_norm = test::gamma(4, 0x1p-24L) * bound.g[0](0);  // element (0, 1)
  lora::merge(W, l);
  const long double error = std::abs(bound.merged(0, 1) - static_cast<long double>(W(0, 1)));
  CHECK(error > 100 * without_norm);
  CHECK(error <= bound.weight()(0, 1));
}

TEST_CASE("DoRA takes the norm of rows of any size", "[dora]") {
  for (const double w : {1e-320, 1e-300, 1e-200, 1e-162, 1e-154, 1e-145, 1e-100, 1e100, 1e154, 1e160, 1e300, 1.7e308}) {
    CAPTURE(w);
    test::matrix<double> W(2, 3);
    W << w, -w, w, 2, 1, 2;
    const lora::dora_adapter<double> l{
        test::matrix<double>::Zero(1, 3).eval(), test::matrix<double>::Zero(2, 1).eval(), {.alpha = 3}, {w, 6}};
    // |row| = sqrt(3) w, with the magnitude w
    const exact_matrix before = test::exact(W);
    lora::merge(W, l);
    const long double want = before(0, 0) / std::sqrt(3.0L);
    const long double u = 0x1p-53L, bound = test::gamma(3 + 5 + 4, u) * want + static_cast<long double>(0x1p-1074);
    for (index_t j = 0; j < 3; ++j) CHECK(std::abs(std::abs(static_cast<long double>(W(0, j))) - want) <= bound);
    CHECK(W(1, 0) == 4);  // an ordinary row, with exact numbers
  }
}

TEST_CASE("DoRA refuses a factor that no number holds", "[dora]") {
  const test::matrix<double> tiny = test::matrix<double>::Constant(1, 2, 1e-320);
  const test::matrix<double> none = test::matrix<double>::Zero(1, 2), B = test::matrix<double>::Zero(1, 1);
  const lora::dora_adapter<double> l{none, B, {.alpha = 2}, {1.5}};
  CHECK_THROWS_WITH((void)lora::mixed(tiny, l), Catch::Contains("output 0"));
  const test::matrix<float> small = test::matrix<float>::Constant(1, 2, 1e-40F);
  const lora::dora_adapter<float> f{
      test::matrix<float>::Zero(1, 2).eval(), test::matrix<float>::Zero(1, 1).eval(), {.alpha = 2}, {1.5F}};
  CHECK_THROWS_WITH((void)lora::mixed(small, f), Catch::Contains("accumulator"));
}
