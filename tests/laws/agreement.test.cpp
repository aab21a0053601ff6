// SPDX-License-Identifier: Apache-2.0
//
// The law the library exists for: every state of one set of (adapter, weight) pairs is the same
// function up to the bound of docs/numerics.md. Random layers of every format, any shape from 1x1,
// ranks up to three times the smaller side, s from 1e-3 to 1e3; each of the states against exact
// arithmetic and against each other, element by element.
#include <array>
#include <cstdio>
#include <string>

#include "support/catch.hpp"
#include "support/layers.hpp"

namespace {

constexpr std::uint64_t seed = 20261124;

// LORA_TEST_VARIANT: one set of formats for each base, for builds with other flags.

/// A layer with two adapters and everything that its states are compared by.
template <class T, class F, class X, class Y>
struct trial {
  layers::generator& g;
  Eigen::Index out = layers::size(g, 40), in = layers::size(g, 60), tokens = layers::size(g, 4);
  // Down to 2e-5, where most float16 weights are subnormal.
  double spread = std::pow(10.0, layers::uniform(g, -4.7, 0.5));
  layers::matrix<T> W = layers::normal<T>(g, out, in, spread);
  Eigen::Matrix<float, Eigen::Dynamic, 1> bias =
      layers::normal<float>(g, g() % 2 == 0 ? out : 0, 1, spread);
  lora::adapter<F> first = layers::adapter<F>(g, out, in, spread),
                   second = layers::adapter<F>(g, out, in, spread);
  double first_weight = layers::uniform(g, -2, 2), second_weight = layers::uniform(g, 0.1, 1);
  layers::matrix<X> x = layers::normal<X>(g, in, tokens, 1.0);

  lora::linear<T> layer() const {
    lora::linear<T> q =
        bias.size() == 0 ? lora::linear<T>(W) : lora::linear<T>(lora::with_bias(W, bias));
    q.attach("first", lora::scaled(first_weight, first));
    q.attach("second", lora::scaled(second_weight, second));
    return q;
  }
};

template <class T, class F, class X, class Y>
void check(const char* name, int count) {
  layers::generator g(seed);
  layers::ratios against_exact, between;
  bool all_within = true;
  for (int k = 0; k < count; ++k) {
    trial<T, F, X, Y> t{g};
    auto q = t.layer();
    const std::array parts{agreement::part_of(lora::scaled(t.first_weight, t.first)),
                           agreement::part_of(lora::scaled(t.second_weight, t.second))};
    const Eigen::MatrixXd W = agreement::in_double(t.W), x = agreement::in_double(t.x);
    const Eigen::VectorXd bias = t.bias.template cast<double>();
    const layers::exact_matrix exact = layers::reference(W, bias, {parts[0], parts[1]}, x);
    // A merge accumulates by the formats of the weight and the factors, a product also by those of
    // the activations, and only factors that are evaluated in it count.
    const auto merge = agreement::formats_of<T, Y, lora::accumulator_t<T, F>>();
    const auto mixed = agreement::formats_of<T, Y, lora::accumulator_t<T, F, X, Y>, X>();
    const auto plain = agreement::formats_of<T, Y, lora::accumulator_t<T, X, Y>, X>();
    std::array<Eigen::MatrixXd, 4> results, bounds;
    for (unsigned merged = 0; merged < 4; ++merged) {
      q.unmerge();
      agreement::state where;
      for (unsigned a = 0; a < 2; ++a) {
        const bool inside = (merged >> a & 1) != 0;
        (inside ? where.merged : where.mixed).push_back(parts[a]);
        if (inside) q.merge(a == 0 ? "first" : "second");
      }
      layers::matrix<Y> y(t.out, t.tokens);
      q.forward(t.x, y);
      results[merged] = agreement::in_double(y);
      bounds[merged] =
          agreement::error_bound(W, bias, where, x, where.mixed.empty() ? plain : mixed, merge);
      const Eigen::ArrayXXd difference =
          (results[merged].template cast<long double>() - exact).cwiseAbs().template cast<double>();
      all_within = all_within && (difference <= bounds[merged].array()).all();
      against_exact.add((difference / bounds[merged].array()).maxCoeff());
    }
    for (unsigned a = 0; a < 4; ++a)
      for (unsigned b = 0; b < a; ++b) {
        const Eigen::ArrayXXd difference = (results[a] - results[b]).cwiseAbs();
        const Eigen::ArrayXXd bound = (bounds[a] + bounds[b]).array();
        all_within = all_within && (difference <= bound).all();
        between.add((difference / bound).maxCoeff());
      }
    if (!all_within) {
      CAPTURE(name, k, t.out, t.in, t.tokens, t.first.rank(), t.second.rank(), t.spread);
      CHECK(all_within);
      return;
    }
  }
  std::printf(
      "%-34s %6d layers  to exact: median %.1e, 99.9 %% %.2f, most %.2f   between states: median "
      "%.1e, most %.2f\n",
      name, count, against_exact.quantile(0.5), against_exact.quantile(0.999),
      against_exact.quantile(1), between.quantile(0.5), between.quantile(1));
  CHECK(against_exact.quantile(1) <= 1);
  CHECK(between.quantile(1) <= 1);
}

}  // namespace

using lora::bfloat16;
using lora::float16;

TEST_CASE("all states of a layer agree within the bound", "[law]") {
  std::printf("seed %llu; measured / bound\n", static_cast<unsigned long long>(seed));
  check<float, float, float, float>("float, float factors", 10000 / layers::thinning);
  check<double, double, double, double>("double, double factors", 10000 / layers::thinning);
  check<bfloat16, float, bfloat16, bfloat16>("bfloat16, float factors, all bfloat16",
                                             10000 / layers::thinning);
  check<bfloat16, bfloat16, bfloat16, bfloat16>("bfloat16, all bfloat16", 10000 / layers::thinning);
  check<float16, float, float16, float16>("float16, float factors, all float16",
                                          10000 / layers::thinning);
}

#if !defined(LORA_TEST_VARIANT)
TEST_CASE("all states of a layer agree within the bound: other factors and activations", "[law]") {
  check<float, bfloat16, float, bfloat16>("float, bfloat16 factors, y bfloat16",
                                          2000 / layers::thinning);
  check<float, double, float, float>("float, double factors", 2000 / layers::thinning);
  check<float, float, double, double>("float, double activations", 2000 / layers::thinning);
  check<double, float, float, float>("double, float factors and activations",
                                     2000 / layers::thinning);
  check<bfloat16, bfloat16, float, float>("bfloat16, bfloat16 factors, float x y",
                                          2000 / layers::thinning);
  check<bfloat16, double, bfloat16, float>("bfloat16, double factors", 2000 / layers::thinning);
  check<float16, float16, float, float>("float16, float16 factors, float x y",
                                        2000 / layers::thinning);
}
#endif
