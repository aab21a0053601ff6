// SPDX-License-Identifier: Apache-2.0
//
// The bounds of PEFT's two roundings: they hold against long double in every format, element by
// element and row by row, and a mistake exceeds them.
#include "lora/rounding_bounds.hpp"

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/within_bound.hpp"

namespace {

using lora::bfloat16;
using lora::float16;
using lora::index_t;
using test::elements;
using test::exact_matrix;
using test::within;

template <class T, class F>
struct formats {
  using weight = T;
  using factor = F;
};
using all_float = formats<float, float>;
using all_double = formats<double, double>;
using all_bfloat16 = formats<bfloat16, bfloat16>;
using all_float16 = formats<float16, float16>;
using bfloat16_base = formats<bfloat16, float>;
using mixed = formats<bfloat16, float16>;
using double_factors = formats<float, double>;

}  // namespace

TEMPLATE_TEST_CASE("PEFT's roundings are within their bounds", "", all_float, all_double,
                   all_bfloat16, all_float16, bfloat16_base, mixed, double_factors) {
  test::random g(20261204);
  CAPTURE(g.seed());
  using T = typename TestType::weight;
  using F = typename TestType::factor;
  for (int n = 0; n < 60; ++n) {
    const index_t out = g.integer(1, 20), in = g.integer(1, 30);
    const auto W = g.reals<T>(out, in, 0.5);
    std::vector<lora::adapter<F>> all;
    exact_matrix delta = exact_matrix::Zero(out, in);
    for (index_t count = g.integer(1, 3); count > 0; --count) {
      const index_t rank = g.integer(1, g.one_in(3) ? 2 * std::max(out, in) : 6);
      all.push_back(
          {g.reals<F>(rank, in, 0.3), g.reals<F>(out, rank, 0.3), {.alpha = g.uniform(-9, 9)}});
      delta += test::exact_delta(all.back());
    }
    const auto check = [&](const auto& policy) {
      const auto bound = lora::merge_bound(policy, W, all);
      auto merged = W;
      lora::merge(policy, merged, all);
      CHECK(within(merged, test::exact(W) + delta, bound));
      CHECK_FALSE(within(W, test::exact(W) + delta, bound));
      auto back = merged;
      lora::unmerge(policy, back, all);
      CHECK(within(back, test::exact(merged) - delta, lora::unmerge_bound(policy, merged, all)));
      exact_matrix by_rows(out, in);
      bound.each_row([&](index_t i, std::span<const double> row) {
        for (index_t j = 0; j < in; ++j) by_rows(i, j) = row[static_cast<std::size_t>(j)];
      });
      CHECK((by_rows - elements(bound)).cwiseAbs().maxCoeff() <= 1e-12L * by_rows.maxCoeff());
    };
    check(lora::rounding::as_peft);
    check(lora::rounding::as_peft_safe);
  }
}

TEST_CASE("a step of PEFT's rounding has the bound of docs/numerics.md") {
  const auto one = [](double v) {
    return test::matrix<bfloat16>::Constant(1, 1, bfloat16(v)).eval();
  };
  const lora::adapter<bfloat16> l{one(0.5), one(0.25), {.alpha = 3}};
  const double u = 0x1p-24, u_s = 0x1p-8, eta = 0x1p-149, eta_s = 0x1p-133, d = 0.375, W = 2;
  const double t = 3 * u / (1 - 3 * u) * d + eta * 4;
  const double e_D = t + u_s * (d + t) + eta_s / 2;
  const double e = e_D + u * (W + d + e_D);
  CHECK(lora::merge_bound(lora::rounding::as_peft, one(W), l)(0, 0) ==
        Approx(e + u_s * (W + d + e) + eta_s / 2).epsilon(1e-12));
  // Rounding D to its own format again does nothing.
  CHECK(lora::merge_bound(lora::rounding::as_peft_safe, one(W), l)(0, 0) ==
        lora::merge_bound(lora::rounding::as_peft, one(W), l)(0, 0));
}
