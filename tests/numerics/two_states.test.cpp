// SPDX-License-Identifier: Apache-2.0
//
// attach<bfloat16>: the factors that are mixed are rounded, those that are merged are not, so two
// states differ by their bounds and by what the factors round. And overflow: which state meets it
// depends on where s multiplies, and a merge says so.
#include <cstdio>
#include <limits>

#include "lora/linear.hpp"
#include "support/agreement.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

namespace {

using lora::bfloat16;
using lora::index_t;

constexpr std::uint64_t seed = 20261208;

/// What rounding both factors to bfloat16 changes of y: u |s| |B| |A| |x| twice, and half a step of
/// subnormal elements.
Eigen::MatrixXd rounded_factors(const agreement::part& p, const Eigen::MatrixXd& x) {
  const double u = 0x1p-8, half = 0x1p-134;
  const Eigen::MatrixXd ax = x.cwiseAbs(), A = p.A.cwiseAbs(), B = p.B.cwiseAbs();
  const Eigen::MatrixXd changed_A = (u * A).array() + half, changed_B = (u * B).array() + half;
  return std::abs(p.s) * (changed_B * (A * ax) + (B + changed_B) * (changed_A * ax));
}

}  // namespace

TEST_CASE("merged and mixed panels of bfloat16 differ by what the factors round", "[law][linear]") {
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  test::random g(seed);
  double most = 0;
  for (int k = 0; k < 300; ++k) {
    const index_t out = g.integer(1, 30), in = g.integer(1, 40), tokens = g.integer(1, 4);
    CAPTURE(g.seed(), k, out, in, tokens);
    const auto W = g.reals<float>(out, in, 1e-3), x = g.reals<float>(in, tokens, 1);
    const lora::adapter<float> l{
        g.reals<float>(3, in, 1), g.reals<float>(out, 3, 1), {.alpha = 0.7}};
    lora::linear<float> layer{W};
    layer.attach<bfloat16>("l", lora::scaled(1.3, l));
    test::matrix<float> mixed(out, tokens), merged(out, tokens);
    layer.forward(x, mixed);
    layer.merge("l");
    layer.forward(x, merged);
    const auto part = agreement::part_of(lora::scaled(1.3, l));
    agreement::part held = part;
    for (auto* m : {&held.A, &held.B})
      for (index_t i = 0; i < m->size(); ++i)
        m->data()[i] = static_cast<double>(bfloat16(m->data()[i]));
    const auto f = agreement::formats_of<float, float, float>();
    const Eigen::MatrixXd base = agreement::in_double(W), tokens_in = agreement::in_double(x);
    const Eigen::MatrixXd rounding =
        agreement::error_bound(base, {}, {.merged = {part}, .mixed = {}}, tokens_in, f) +
        agreement::error_bound(base, {}, {.merged = {}, .mixed = {held}}, tokens_in, f);
    const Eigen::ArrayXXd difference =
        (agreement::in_double(mixed) - agreement::in_double(merged)).cwiseAbs();
    const Eigen::ArrayXXd bound = (rounding + rounded_factors(part, tokens_in)).array();
    REQUIRE((difference <= bound).all());
    most = std::max(most, (difference / rounding.array()).maxCoeff());
  }
  CHECK(most > 10);  // without the factors' term it does not hold
}

TEST_CASE("an overflow that only one state meets is counted where it is in the weight",
          "[linear][overflow]") {
  const auto run = [](double s, float A, float B, float x, float(&y)[2]) {
    const test::matrix<float> none = test::matrix<float>::Zero(1, 1);
    lora::linear<float> layer{none};
    layer.attach("a", lora::adapter<float>{test::matrix<float>::Constant(1, 1, A),
                                           test::matrix<float>::Constant(1, 1, B),
                                           {.alpha = s}});
    const test::matrix<float> token = test::matrix<float>::Constant(1, 1, x);
    test::matrix<float> result(1, 1);
    layer.forward(token, result);
    y[0] = result(0, 0);
    const auto report = layer.merge("a");
    layer.forward(token, result);
    y[1] = result(0, 0);
    return report.became_nonfinite;
  };
  float y[2];
  // s B overflows, s (A x) does not: the merge says so.
  CHECK(run(0x1p100, 0x1p-140F, 0x1p60F, 1, y) == 1);
  CHECK((y[0] == 0x1p20F && !lora::detail::is_finite(y[1])));
  // s (A x) overflows, s B does not: the token's result is infinite, and only it says so.
  CHECK(run(0x1p100, 1, 0x1p-140F, 0x1p40F, y) == 0);
  CHECK((!lora::detail::is_finite(y[0]) && y[1] == 1));
}
