// SPDX-License-Identifier: Apache-2.0
//
// The bounds that users call, against exact results in long double: they hold, they are close to
// what can happen, and a mistake exceeds them. docs/numerics.md derives the formulas;
// laws/agreement has the many random layers.
#include "lora/bounds.hpp"

#include <limits>
#include <vector>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/within_bound.hpp"

namespace {

using lora::bfloat16;
using lora::float16;
using lora::index_t;
using test::elements;
using test::exact_matrix;

constexpr std::uint64_t seed = 20261201;
constexpr double infinity = std::numeric_limits<double>::infinity();

/// A weight stored in T, factors in F, activations in X.
template <class T, class F, class X>
struct formats {
  using weight = T;
  using factor = F;
  using activation = X;
};
using all_float = formats<float, float, float>;
using all_double = formats<double, double, double>;
using all_bfloat16 = formats<bfloat16, bfloat16, bfloat16>;
using all_float16 = formats<float16, float16, float16>;
using bfloat16_base = formats<bfloat16, float, float>;
using float16_base = formats<float16, float, float16>;
using double_factors = formats<float, double, float>;
using double_base = formats<double, float, float>;
using eigen_formats = formats<Eigen::bfloat16, Eigen::half, float>;

/// Up to three adapters of one shape; s is not 1, and a rank may exceed both dimensions.
template <class F>
std::vector<lora::adapter<F>> adapters(test::random& g, index_t out, index_t in) {
  std::vector<lora::adapter<F>> result;
  for (index_t n = g.integer(1, 3); n > 0; --n) {
    const index_t rank = g.integer(1, g.one_in(3) ? 2 * std::max(out, in) : 6);
    const double s = g.uniform(0.1, 3) * (g.one_in(2) ? -1 : 1);
    result.push_back({g.reals<F>(rank, in, 0.2),
                      g.reals<F>(out, rank, 0.2),
                      {.alpha = s, .rule = lora::scaling_rule::fixed}});
  }
  return result;
}

template <class L>
exact_matrix exact_sum(const std::vector<L>& all, index_t out, index_t in) {
  exact_matrix sum = exact_matrix::Zero(out, in);
  for (const auto& l : all) sum += test::exact_delta(l);
  return sum;
}

/// The largest |got - want| / bound, 0 where nothing differs.
template <class M, class B>
double farthest(const M& got, const exact_matrix& want, const B& bound) {
  const exact_matrix difference = (test::exact(got) - want).cwiseAbs(), most = elements(bound);
  double largest = 0;
  for (index_t k = 0; k < difference.size(); ++k)
    if (!(difference(k) == 0))
      largest = std::max(largest, static_cast<double>(difference(k) / most(k)));
  return (difference.array() <= most.array()).all() ? largest : std::max(2.0, largest);
}

}  // namespace

TEMPLATE_TEST_CASE("a merge is within its bound", "", all_float, all_double, all_bfloat16,
                   all_float16, bfloat16_base, double_factors, double_base, eigen_formats) {
  test::random g(seed);
  CAPTURE(g.seed());
  using T = typename TestType::weight;
  for (int n = 0; n < 60; ++n) {
    const index_t out = g.integer(1, 20), in = g.integer(1, 30);
    const auto W = g.reals<T>(out, in, 0.5);
    const auto all = adapters<typename TestType::factor>(g, out, in);
    const auto bound = lora::merge_bound(W, all);
    REQUIRE(bound.rows() == out);
    REQUIRE(bound.cols() == in);
    const double ratio =
        farthest(lora::merged(W, all), test::exact(W) + exact_sum(all, out, in), bound);
    CHECK(ratio <= 1);
    const double share = bound.share(lora::merged(W, all));
    CHECK(share <= ratio * (1 + 1e-6));
    CHECK(share >= ratio * 0.95);  // the exact result is computed, too
  }
}

TEST_CASE("a bound takes weights of every layout") {
  test::random g(seed);
  const index_t out = 13, in = 70;
  const auto W = g.reals<float>(out, in, 0.5);
  const auto all = adapters<float>(g, out, in);
  const exact_matrix want = elements(lora::merge_bound(W, all));
  const test::col_matrix<float> by_columns = W, turned = W.transpose();
  test::matrix<float> large = g.reals<float>(out + 4, in + 9, 1);
  large.block(2, 5, out, in) = W;
  const lora::packed_weight packed{W};
  CHECK(elements(lora::merge_bound(by_columns, all)) == want);
  CHECK(elements(lora::merge_bound(turned.transpose(), all)) == want);
  CHECK(elements(lora::merge_bound(large.block(2, 5, out, in), all)) == want);
  CHECK(elements(lora::merge_bound(packed, all)) == want);
  CHECK(lora::merge_bound(W, all).share(lora::merged(packed, all)) <= 1);
}

TEST_CASE("rows and the largest element of a bound are those of its elements") {
  test::random g(seed);
  const index_t out = 300, in = 17;  // more rows than a block
  const auto W = g.reals<bfloat16>(out, in, 0.5);
  const auto bound = lora::merge_bound(W, adapters<float>(g, out, in));
  exact_matrix by_rows(out, in);
  index_t next = 0;
  bound.each_row([&](index_t i, std::span<const double> row) {
    REQUIRE(i == next++);
    for (index_t j = 0; j < in; ++j) by_rows(i, j) = row[static_cast<std::size_t>(j)];
  });
  const exact_matrix want = elements(bound);
  CHECK(next == out);
  CHECK((by_rows - want).cwiseAbs().maxCoeff() <= 1e-12L * want.maxCoeff());
  CHECK(bound.largest() == Approx(static_cast<double>(want.maxCoeff())).epsilon(1e-12));
}

TEMPLATE_TEST_CASE("unmerge and delta_weight are within their bounds", "", all_float, all_double,
                   all_bfloat16, float16_base) {
  test::random g(seed);
  CAPTURE(g.seed());
  using T = typename TestType::weight;
  for (int n = 0; n < 40; ++n) {
    const index_t out = g.integer(1, 20), in = g.integer(1, 30);
    const auto W = g.reals<T>(out, in, 0.5);
    const auto all = adapters<typename TestType::factor>(g, out, in);
    const exact_matrix delta = exact_sum(all, out, in);
    auto less = W;
    lora::unmerge(less, all);
    CHECK(farthest(less, test::exact(W) - delta, lora::unmerge_bound(W, all)) <= 1);
    CHECK(lora::unmerge_bound(W, all).share(less) <= 1);
    const auto formed = lora::delta_weight(all);
    CHECK(farthest(formed, delta, lora::delta_weight_bound(all)) <= 1);
    CHECK(lora::delta_weight_bound(all).share(formed) <= 1);
  }
}

TEMPLATE_TEST_CASE("forward is within its bound in every state", "", all_float, all_double,
                   all_bfloat16, bfloat16_base, float16_base, double_factors, double_base) {
  test::random g(seed);
  CAPTURE(g.seed());
  using T = typename TestType::weight;
  using X = typename TestType::activation;
  for (int n = 0; n < 40; ++n) {
    const index_t out = g.integer(1, 20), in = g.integer(1, 30), tokens = g.integer(1, 5);
    const auto W = g.reals<T>(out, in, 0.5);
    const auto x = g.reals<X>(in, tokens, 1);
    const auto b = g.reals<X>(out, 1, 1);
    const auto inside = adapters<typename TestType::factor>(g, out, in),
               beside = adapters<typename TestType::factor>(g, out, in);
    const exact_matrix base = test::exact(W) + exact_sum(beside, out, in);
    test::matrix<X> y(out, tokens);

    lora::forward(W, x, y, beside);
    CHECK(farthest(y, test::times(base, test::exact(x)), lora::forward_bound(W, x, y, beside)) <=
          1);

    lora::forward(lora::with_bias(W, b), x, y, beside);
    exact_matrix want = test::times(base, test::exact(x));
    want.colwise() += test::exact(b).col(0);
    CHECK(farthest(y, want, lora::forward_bound(lora::with_bias(W, b), x, y, beside)) <= 1);

    const auto merged = lora::merged(W, inside);
    lora::forward(lora::with_bias(merged, b), x, y, beside);
    want += test::times(exact_sum(inside, out, in), test::exact(x));
    const auto bound =
        lora::forward_bound(lora::with_merged(lora::with_bias(W, b), inside), x, y, beside);
    CHECK(farthest(y, want, bound) <= 1);
  }
}

TEMPLATE_TEST_CASE("apply is within the bound of what y held before", "", all_float, all_double,
                   all_bfloat16, double_factors) {
  test::random g(seed);
  CAPTURE(g.seed());
  using X = typename TestType::activation;
  for (int n = 0; n < 40; ++n) {
    const index_t out = g.integer(1, 20), in = g.integer(1, 30), tokens = g.integer(1, 5);
    const auto x = g.reals<X>(in, tokens, 1);
    auto y = g.reals<X>(out, tokens, 1);
    const auto all = adapters<typename TestType::factor>(g, out, in);
    const auto bound = lora::apply_bound(x, y, all);
    const exact_matrix want = test::exact(y) + test::times(exact_sum(all, out, in), test::exact(x));
    lora::apply(x, y, all);
    CHECK(farthest(y, want, bound) <= 1);
  }
}

TEST_CASE("packed weights and adapters have the bound of plain ones") {
  test::random g(seed);
  const index_t out = 40, in = 33, rank = 21;
  const auto W = g.reals<bfloat16>(out, in, 0.5);
  const auto x = g.reals<bfloat16>(in, 3, 1);
  const test::matrix<float> y(out, 3);
  const lora::adapter<float> l{
      g.reals<float>(rank, in, 1), g.reals<float>(out, rank, 1), {.alpha = 3}};
  const lora::adapter<bfloat16> small{
      g.reals<bfloat16>(rank, in, 1), g.reals<bfloat16>(out, rank, 1), {.alpha = 3}};
  const lora::packed_weight packed{W};
  const lora::packed_adapter<float> packed_l{l};
  const lora::packed_adapter<bfloat16> packed_small{small};
  CHECK(lora::forward_bound(packed, x, y, lora::scaled(0.3, packed_l), packed_small) ==
        lora::forward_bound(W, x, y, lora::scaled(0.3, l), small));
  CHECK(lora::forward_bound(lora::with_merged(packed, l), x, y, packed_small) ==
        lora::forward_bound(lora::with_merged(W, l), x, y, small));
}

TEST_CASE(
    "U in bfloat16 is within the bound of the packed adapter, and beyond that of the plain one") {
  test::random g(seed);
  const index_t out = 24, in = 30;
  const auto W = g.reals<float>(out, in, 0.01);
  const auto x = g.reals<float>(in, 8, 1);
  test::matrix<float> y(out, 8);
  const lora::adapter<bfloat16> l{
      g.reals<bfloat16>(5, in, 1), g.reals<bfloat16>(out, 5, 1), {.alpha = 3}};
  const lora::packed_adapter<bfloat16> rounded{l, lora::intermediate_format::factors};
  lora::forward(W, x, y, rounded);
  const exact_matrix want = test::times(test::exact(W) + test::exact_delta(l), test::exact(x));
  CHECK(farthest(y, want, lora::forward_bound(W, x, y, rounded)) <= 1);
  CHECK(farthest(y, want, lora::forward_bound(W, x, y, l)) > 1);
}

TEST_CASE("a batch has for each token the bound of its own adapters") {
  test::random g(seed);
  const index_t out = 24, in = 30;
  const auto W = g.reals<float>(out, in, 0.5);
  const auto x = g.reals<float>(in, 4, 1);
  test::matrix<float> y(out, 4);
  std::vector<lora::adapter<float>> plain;
  for (index_t rank : {3, 9})
    plain.push_back({g.reals<float>(rank, in, 1), g.reals<float>(out, rank, 1), {.alpha = 3}});
  const std::vector<lora::packed_adapter<float>> served(plain.begin(), plain.end());
  lora::batch who{served};
  who.add();
  who.add({{0}});
  who.add({{0, 0.7}, {1, -0.3}});
  who.add({{1, 0.5}});
  const auto bound = lora::forward_bound(W, x, y, who);
  const auto of = [&](index_t t, const auto&... l) {
    return Eigen::MatrixXd(lora::forward_bound(W, x.col(t).eval(), y.col(t).eval(), l...));
  };
  CHECK(bound.col(0).isApprox(of(0), 1e-12));
  CHECK(bound.col(1).isApprox(of(1, plain[0]), 1e-12));
  CHECK(bound.col(2).isApprox(of(2, lora::scaled(0.7, plain[0]), lora::scaled(-0.3, plain[1])),
                              1e-12));
  CHECK(bound.col(3).isApprox(of(3, lora::scaled(0.5, plain[1])), 1e-12));
  who.add();
  CHECK_THROWS_AS(lora::forward_bound(W, x, y, who), lora::shape_error);
}

// --- Close to what can happen
// -------------------------------------------------------------------------------------------

TEST_CASE("a merge reaches nine tenths of its bound") {
  // 1 + 2^-24 is a tie that float rounds down to 1: the error is u |W|, and the bound has d = 2^-24
  // beside it.
  const test::matrix<float> W = test::matrix<float>::Ones(1, 1);
  const auto with = [](double delta) {
    return lora::adapter<float>{test::matrix<float>::Constant(1, 1, static_cast<float>(delta)),
                                test::matrix<float>::Ones(1, 1),
                                {.alpha = 1, .rule = lora::scaling_rule::fixed}};
  };
  const auto l = with(0x1p-24);
  CHECK(lora::merge_bound(W, l).share(lora::merged(W, l)) > 0.9);
  // The same where bfloat16 rounds, and float does not.
  const test::matrix<bfloat16> small = test::matrix<bfloat16>::Constant(1, 1, bfloat16(1));
  const auto step = with(0x1p-8);
  CHECK(lora::merge_bound(small, step).share(lora::merged(small, step)) > 0.9);
}

TEST_CASE("forward reaches nine tenths of its bound") {
  // Every element after the first is half a step of the sum, and is lost.
  const index_t in = 200;
  test::matrix<float> W = test::matrix<float>::Constant(1, in, 0x1p-24F), y(1, 1);
  W(0, 0) = 1;
  const test::matrix<float> x = test::matrix<float>::Ones(in, 1);
  lora::forward(W, x, y);
  CHECK(farthest(y, test::times(test::exact(W), test::exact(x)), lora::forward_bound(W, x, y)) >
        0.9);
}

TEST_CASE("adapters that are not read have no error") {
  test::random g(seed);
  const auto W = g.reals<float>(4, 5, 1), x = g.reals<float>(5, 2, 1), y = g.reals<float>(4, 2, 1);
  const lora::adapter<float> l{
      g.reals<float>(2, 5, infinity), g.reals<float>(4, 2, 1), {.alpha = 3}};
  const auto off = lora::scaled(0, l);
  CHECK(lora::merge_bound(W, off).largest() == 0);
  CHECK(lora::merge_bound(W).share(W) == 0);
  CHECK(lora::apply_bound(x, y, off).isZero(0));
  CHECK(lora::forward_bound(W, x, y, off) == lora::forward_bound(W, x, y));
}

// --- Mistakes
// -------------------------------------------------------------------------------------------------

TEMPLATE_TEST_CASE("a lost adapter and a scale used twice exceed the bound", "", all_float,
                   all_double, all_float16) {
  test::random g(seed);
  using T = typename TestType::weight;
  const index_t out = 20, in = 30;
  const auto W = g.reals<T>(out, in, 0.5);
  const auto x = g.reals<T>(in, 4, 1);
  test::matrix<T> y(out, 4);
  using adapter = lora::adapter<typename TestType::factor>;
  const adapter l{g.reals<typename TestType::factor>(4, in, 1),
                  g.reals<typename TestType::factor>(out, 4, 1),
                  {.alpha = 1.5}};
  const auto twice = lora::scaled(l.scaling(), l);
  CHECK(lora::merge_bound(W, l).share(W) > 10);
  CHECK(lora::merge_bound(W, l).share(lora::merged(W, twice)) > 10);
  const exact_matrix want = test::times(test::exact(W) + test::exact_delta(l), test::exact(x));
  const auto bound = lora::forward_bound(W, x, y, l);
  lora::forward(W, x, y);
  CHECK(farthest(y, want, bound) > 10);
  lora::forward(W, x, y, twice);
  CHECK(farthest(y, want, bound) > 10);
}

TEST_CASE("a result with NaN or infinity has an infinite share") {
  test::random g(seed);
  const auto W = g.reals<float>(4, 5, 1);
  const lora::adapter<float> l{g.reals<float>(2, 5, 1), g.reals<float>(4, 2, 1), {.alpha = 3}};
  for (const float spoiled :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    test::matrix<float> result = lora::merged(W, l);
    result(3, 2) = spoiled;
    CHECK(lora::merge_bound(W, l).share(result) == infinity);
  }
}

// --- Numbers that a build takes for zero
// --------------------------------------------------------------------------------

TEST_CASE("what dot products take for zero is in the bounds") {
  // Factors and products of about 2^-130: in builds without dot products of bfloat16 nothing is
  // lost.
  const index_t out = 3, in = 64, rank = 8;
  const auto tiny = [](index_t rows, index_t cols, double v) {
    return test::matrix<bfloat16>(test::matrix<bfloat16>::Constant(rows, cols, bfloat16(v)));
  };
  const lora::adapter<bfloat16> l{
      tiny(rank, in, 0x1p-65), tiny(out, rank, 0x1p-65), {.alpha = 4.0 * rank}};
  const auto delta = lora::delta_weight(l);
  CHECK(farthest(delta, test::exact_delta(l), lora::delta_weight_bound(l)) <= 1);
  const auto W = tiny(out, in, 0x1p-128), x = tiny(in, 2, 1);
  test::matrix<float> y(out, 2);
  lora::forward(W, x, y, l);
  CHECK(farthest(y, test::times(test::exact(W) + test::exact_delta(l), test::exact(x)),
                 lora::forward_bound(W, x, y, l)) <= 1);
  if (lora::flush_threshold_of_delta<float, decltype(l)>() != 0) CHECK(delta.isZero(0));
  lora::forward(W, x, y);
  CHECK(farthest(y, test::times(test::exact(W), test::exact(x)), lora::forward_bound(W, x, y)) <=
        1);
  if (lora::flush_threshold_of_product<float, bfloat16, bfloat16>() != 0) CHECK(y.isZero(0));
}

// --- Memory and refusals
// ------------------------------------------------------------------------------------------------

TEST_CASE("no bound holds a matrix of the weight's size") {
  test::random g(seed);
  const index_t out = 1024, in = 2048;
  const auto W = g.reals<bfloat16>(out, in, 0.5);
  const auto x = g.reals<float>(in, 2, 1);
  const test::matrix<float> y(out, 2);
  const lora::adapter<float> l{g.reals<float>(4, in, 1), g.reals<float>(out, 4, 1), {.alpha = 3}};
  const lora::packed_weight packed{W};
  const auto merged = lora::merged(W, l);
  test::allocations::start(
      static_cast<std::size_t>(out * in));  // half of W, an eighth of W in double
  const auto bound = lora::merge_bound(W, l);
  const double share = bound.share(merged), largest = bound.largest(),
               of_delta = lora::delta_weight_bound(l).largest();
  const double mixed = lora::forward_bound(lora::with_merged(packed, l), x, y, l).maxCoeff();
  test::allocations::stop();
  CHECK(test::allocations::now.count > 0);
  CHECK(test::allocations::now.large_count == 0);
  CHECK(share <= 1);
  CHECK(of_delta < largest);
  CHECK(mixed > 0);
}

TEST_CASE("bounds refuse what the verbs refuse") {
  const test::matrix<float> W = test::matrix<float>::Ones(4, 5),
                            x = test::matrix<float>::Ones(5, 2),
                            y = test::matrix<float>::Ones(4, 2), turned = W.transpose();
  const lora::adapter<float> l{
      test::matrix<float>::Ones(2, 5), test::matrix<float>::Ones(4, 2), {.alpha = 3}};
  const std::vector<lora::adapter<float>> none;
  CHECK_THROWS_AS(lora::merge_bound(turned, l), lora::shape_error);
  CHECK_THROWS_AS(lora::with_merged(turned, l), lora::shape_error);
  CHECK_THROWS_AS(lora::forward_bound(W, y, y, l), lora::shape_error);
  CHECK_THROWS_AS(lora::forward_bound(W, x, x, l), lora::shape_error);
  CHECK_THROWS_AS(lora::apply_bound(y, x, l), lora::shape_error);
  CHECK_THROWS_AS(lora::merge_bound(W, l).share(turned), lora::shape_error);
  CHECK_THROWS_AS(lora::delta_weight_bound(none), lora::value_error);
}
