// SPDX-License-Identifier: Apache-2.0
//
// What strengths round: s in the bounds is the double that the verb multiplies by, and each
// strength is one product in double on the way to it. Numbers near 1 whose products are all rounded
// up by nearly half a step, in double.
#include <cstdint>
#include <random>
#include <vector>

#include "support/agreement.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"

namespace {

using real = long double;  // 64 bits of mantissa
constexpr double u = 0x1p-53;

/// Numbers slightly above 1, so that a product of two of them has few digits beyond a double's.
class numbers {
 public:
  double next() { return 1 + static_cast<double>(engine_() % (1u << 26) + (1u << 25)) * 0x1p-52; }
  /// A number by which a's product is rounded up by nearly half a step, relative to 1; 0 where none
  /// is found soon.
  double partner(double a) {
    for (int k = 0; k < 5000; ++k) {
      const double b = next();
      if (excess(a, b) > 0.98 * u) return b;
    }
    return 0;
  }
  /// The rounding of a * b, exactly: below 2^-52, a double.
  static double excess(double a, double b) { return -std::fma(a, b, -(a * b)); }

 private:
  std::mt19937_64 engine_{20261205};
};

/// s, a strength (or two), A and B: each product in the order of the fold rounds up.
struct rounded_up {
  double s, inner, outer, A, B;

  rounded_up() {
    numbers g;
    do {
      s = g.next();
      inner = g.partner(s);
      outer = g.partner(inner * s);
      B = g.partner(outer * (inner * s));
      A = g.partner(outer * (inner * s) * B);
    } while (inner == 0 || outer == 0 || B == 0 || A == 0);
  }
  lora::adapter<double> adapter() const {
    return {test::matrix<double>::Constant(1, 1, A),
            test::matrix<double>::Constant(1, 1, B),
            {.alpha = s}};
  }
};

/// Relative difference in u, of products of numbers near 1: logarithms of their parts beyond 1
/// would do; long double has 11 bits more than a double.
double units(double got, real exact) {
  return static_cast<double>((static_cast<real>(got) - exact) / exact / u);
}

}  // namespace

TEST_CASE("each strength rounds once on the way to s", "[bound][strength]") {
  const rounded_up n;
  const auto l = n.adapter();
  const auto inner = lora::scaled(n.inner, l);
  const auto outer = lora::scaled(n.outer, inner);
  CHECK(outer.scaling() == n.outer * (n.inner * n.s));
  const real exact = static_cast<real>(n.outer) * n.inner * n.s * n.B * n.A;
  const real seen = static_cast<real>(outer.scaling()) * n.B * n.A;
  const double delta = lora::delta_weight(outer)(0, 0);
  // R = 1. From s as the verb sees it, gamma_{R+2}; from the product of the strengths two roundings
  // more, which are met.
  CHECK(units(delta, seen) <= 3);
  CHECK(units(delta, exact) > 3);
  CHECK(units(delta, exact) <= 5);
  test::matrix<double> W = test::matrix<double>::Constant(1, 1, 0x1.00001p-53);
  lora::merge(W, outer);
  CHECK(units(W(0, 0), seen + 0x1.00001p-53L) <= 4);
}

TEST_CASE("a strength on a packed adapter, of a batch and of a linear is the same s",
          "[bound][strength]") {
  const rounded_up n;
  const auto l = n.adapter();
  const auto inner = lora::scaled(n.inner, l);
  const std::vector<lora::packed_adapter<double>> packed{lora::packed_adapter<double>(inner)};
  CHECK(lora::scaled(n.outer, packed[0]).scaling() == lora::scaled(n.outer, inner).scaling());
  const test::matrix<double> W = test::matrix<double>::Zero(1, 1),
                             x = test::matrix<double>::Ones(1, 1);
  test::matrix<double> plain(1, 1), strong(1, 1), batched(1, 1);
  lora::forward(W, x, plain, lora::scaled(n.outer, inner));
  lora::forward(W, x, strong, lora::scaled(n.outer, packed[0]));
  lora::batch who{packed};
  who.add({{0, n.outer}});
  lora::forward(W, x, batched, who);
  CHECK(strong == plain);
  CHECK(batched == plain);
  // A linear multiplies the strengths first, and is as far from the exact product.
  lora::linear<double> layer{W};
  layer.attach("a", lora::scaled(n.outer, inner));
  CHECK(layer.at("a").strength == n.outer * n.inner);
}

TEST_CASE("a layer in double stays within its bound where every step rounds up",
          "[bound][strength]") {
  // W x and the bias lie just above half a step of what they are added to: without FMA the product
  // with B rounds, too.
  numbers g;
  double x, A, s, strength, B;
  do {
    x = g.next();
    A = g.partner(x);
    s = g.next();
    strength = g.partner(s);
    B = g.partner(strength * s * (A * x));
  } while (A == 0 || strength == 0 || B == 0 || numbers::excess(strength * s, A * x) < 0.98 * u);
  const test::matrix<double> W = test::matrix<double>::Constant(1, 1, 0x1.00001p-53 / x);
  const test::matrix<double> X = test::matrix<double>::Constant(1, 1, x);
  const std::vector<double> bias{0x1.00001p-53};
  const lora::adapter<double> l{test::matrix<double>::Constant(1, 1, A),
                                test::matrix<double>::Constant(1, 1, B),
                                {.alpha = s}};
  test::matrix<double> y(1, 1);
  const auto strong = lora::scaled(strength, l);
  lora::forward(lora::with_bias(W, bias), X, y, strong);
  const real base = static_cast<real>(W(0, 0)) * x + bias[0],
             seen = base + static_cast<real>(strong.scaling()) * B * A * x;
  const agreement::state mixed{.merged = {}, .mixed = {agreement::part_of(strong)}};
  const double bound =
      agreement::error_bound(W, Eigen::VectorXd::Constant(1, bias[0]), mixed, X,
                             agreement::formats_of<double, double, double>())(0, 0);
  CHECK(static_cast<double>(std::abs(static_cast<real>(y(0, 0)) - seen)) <= bound);
#if !defined(__FMA__) && defined(__x86_64__)
  // From the exact product of strength and scaling it is one rounding more, which is met:
  // gamma_{n+R+4}.
  const real exact = base + static_cast<real>(strength) * s * B * A * x;
  CHECK(units(y(0, 0), exact) > 5);
  CHECK(units(y(0, 0), exact) <= 6);
#endif
}
