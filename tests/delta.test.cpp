// SPDX-License-Identifier: Apache-2.0
//
// delta_weight against a plain triple loop: exactly, on whole numbers, where no step rounds; within
// the bound of docs/numerics.md elsewhere.
#include <cmath>
#include <limits>
#include <list>
#include <type_traits>
#include <vector>

#include "lora/delta.hpp"
#include "support/adapters.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refused.hpp"

using lora::index_t;
using lora::scaling_rule;
using test::mentions;
using test::refusal;

TEST_CASE("an example computed by hand", "[delta]") {
  Eigen::MatrixXf A(2, 3), B(2, 2);
  A << 1, 2, 3,  //
      0, -1, 1;
  B << 1, 0,  //
      -2, 4;
  // B A = [1 2 3; -2 -8 -2], s = 3 / 2.
  Eigen::MatrixXf expected(2, 3);
  expected << 1.5F, 3, 4.5F,  //
      -3, -12, -3;
  const lora::adapter<float> l{A, B, {.alpha = 3}};
  CHECK(lora::delta_weight(l) == expected);
  CHECK(lora::delta_weight(lora::scaled(-2, l)) == -2 * expected);
  CHECK(lora::delta_weight(l, lora::scaled(0.5, l)) == 1.5F * expected);
}

TEMPLATE_TEST_CASE("whole numbers give the exact delta", "[delta]", float, double, lora::float16,
                   lora::bfloat16, Eigen::half, Eigen::bfloat16) {
  test::random g(61);
  CAPTURE(g.seed());
  for (int trial = 0; trial < 60; ++trial) {
    const index_t out = g.integer(1, 40), in = g.integer(1, 50);
    const test::whole_adapters<TestType> adapters(g, out, in, 1, 4);
    const auto& all = adapters.all;
    const auto& expected = adapters.delta;
    CAPTURE(trial, out, in, all.size());
    const auto delta = lora::delta_weight(all);
    static_assert(std::is_same_v<typename decltype(delta)::Scalar, lora::accumulator_t<TestType>>);
    static_assert(!decltype(delta)::IsRowMajor);
    CHECK(test::exact(delta) == expected);
    CHECK(test::same_bits(lora::delta_weight(all[0], all[0]),
                          lora::delta_weight(std::list{all[0], all[0]})));
  }
}

TEMPLATE_TEST_CASE("any numbers stay within gamma_{R+2} sum |s| |B| |A|", "[delta]", float, double,
                   lora::float16, lora::bfloat16) {
  test::random g(62);
  CAPTURE(g.seed());
  constexpr bool wide = std::is_same_v<TestType, double>;
  // The accumulator's unit roundoff, and its smallest step for products that underflow.
  const long double u = wide ? 0x1p-53L : 0x1p-24L, eta = wide ? 0x1p-1074L : 0x1p-149L;
  for (int trial = 0; trial < 20; ++trial) {
    const index_t out = g.integer(1, 33), in = g.integer(1, 70), rank = g.integer(1, 90);
    const lora::adapter<TestType> l{
        g.reals<TestType>(rank, in, 1),
        g.reals<TestType>(out, rank, 1),
        {.alpha = g.uniform(-40, 40), .rule = scaling_rule::rank_stabilized}};
    const test::exact_matrix difference =
        (test::exact(lora::delta_weight(l)) - test::exact_delta(l)).cwiseAbs();
    const test::exact_matrix size =
        std::abs(static_cast<long double>(l.scaling())) *
        test::times(test::exact(l.lora_B()).cwiseAbs(), test::exact(l.lora_A()).cwiseAbs());
    const long double k = static_cast<long double>(rank) + 2;
    const test::exact_matrix bound = (k * u / (1 - k * u) * size).array() + k * eta;
    CAPTURE(trial, out, in, rank);
    CHECK((difference.array() <= bound.array()).all());
  }
}

TEST_CASE("scalars mix: double anywhere makes the delta double", "[delta]") {
  const Eigen::MatrixXf A = Eigen::MatrixXf::Ones(1, 2);
  const Eigen::MatrixXd B = Eigen::MatrixXd::Constant(2, 1, 1 + 0x1p-40);
  const lora::basic_adapter mixed(A, B, lora::scaling{.alpha = 2});
  const auto delta = lora::delta_weight(mixed);
  static_assert(std::is_same_v<std::remove_const_t<decltype(delta)>, Eigen::MatrixXd>);
  CHECK(delta(1, 1) == 2 + 0x1p-39);
  const lora::adapter<lora::bfloat16> narrow{
      Eigen::Matrix<lora::bfloat16, 1, 2>::Constant(lora::bfloat16(3)),
      Eigen::Matrix<lora::bfloat16, 2, 1>::Constant(lora::bfloat16(5)),
      {.alpha = 2}};
  static_assert(std::is_same_v<decltype(lora::delta_weight(narrow)), Eigen::MatrixXf>);
  static_assert(std::is_same_v<decltype(lora::delta_weight(narrow, mixed)), Eigen::MatrixXd>);
  CHECK(lora::delta_weight(narrow, mixed)(0, 0) == 30 + 2 + 0x1p-39);
}

TEST_CASE("s is folded in double: a scaling that no float holds rounds once", "[delta]") {
  // 0.1 * b in double, to float: not 0.1F * b.
  const Eigen::MatrixXf A = Eigen::MatrixXf::Ones(1, 1),
                        B = Eigen::VectorXf::LinSpaced(200, 1, 200);
  const lora::adapter<float> l{A, B, {.alpha = 0.1, .rule = scaling_rule::fixed}};
  CHECK(lora::delta_weight(l) == (0.1 * B.cast<double>()).cast<float>());
  REQUIRE(0.1F * B != (0.1 * B.cast<double>()).cast<float>());
  const Eigen::MatrixXf large = Eigen::MatrixXf::Constant(1, 1, 0x1p100F),
                        small = Eigen::MatrixXf::Constant(1, 1, 0x1p-100F);
  const lora::adapter<float> huge{small, large, {.alpha = 0x1p50, .rule = scaling_rule::fixed}};
  CHECK(std::isinf(lora::delta_weight(huge)(0, 0)));  // s B has no float, and nothing hides that
}

TEST_CASE("an adapter at strength 0 is not read", "[delta]") {
  const Eigen::MatrixXf nan =
      Eigen::MatrixXf::Constant(3, 3, std::numeric_limits<float>::quiet_NaN());
  const Eigen::MatrixXf two = Eigen::MatrixXf::Constant(3, 3, 2);
  const lora::adapter<float> poison{nan, nan, {.alpha = 5}}, good{two, two, {.alpha = 1.5}};
  CHECK(lora::delta_weight(lora::scaled(0, poison)).isZero(0));
  CHECK(lora::delta_weight(good, lora::scaled(0, poison)) == Eigen::MatrixXf::Constant(3, 3, 6));
  CHECK(lora::delta_weight(lora::scaled(0, poison), good) == Eigen::MatrixXf::Constant(3, 3, 6));
}

TEST_CASE("rank 0 and no features", "[delta]") {
  const Eigen::MatrixXf A(0, 4), B(3, 0), tall(2, 0), flat(0, 2);
  const lora::adapter<float> nothing{A, B, {.alpha = 2, .rule = scaling_rule::fixed}};
  CHECK(lora::delta_weight(nothing) == Eigen::MatrixXf::Zero(3, 4));
  const auto empty = lora::delta_weight(lora::adapter<float>{tall, flat, {.alpha = 2}});
  CHECK((empty.rows() == 0 && empty.cols() == 0));
  const Eigen::MatrixXf some = Eigen::MatrixXf::Ones(3, 2);
  const auto no_columns = lora::delta_weight(lora::adapter<float>{tall, some, {.alpha = 2}});
  CHECK((no_columns.rows() == 3 && no_columns.cols() == 0));
}

TEST_CASE("adapters of different shapes, or none, are refused", "[delta]") {
  const Eigen::MatrixXf A = Eigen::MatrixXf::Ones(2, 5), B = Eigen::MatrixXf::Ones(3, 2),
                        C = Eigen::MatrixXf::Ones(2, 4);
  const lora::adapter<float> l{A, B, {.alpha = 3}}, other{C, B, {.alpha = 3}};
  CHECK(mentions(refusal<lora::shape_error>([&] { (void)lora::delta_weight(l, other); }),
                 {"lora::delta_weight", "3x4", "3x5"}));
  CHECK(mentions(
      refusal<lora::shape_error>([&] { (void)lora::delta_weight(l, lora::scaled(0, other)); }),
      {"3x4", "3x5"}));
  CHECK(mentions(refusal<lora::shape_error>([&] {
                   (void)lora::delta_weight(std::vector{l, l, other});
                 }),
                 {"lora::delta_weight", "3x4", "3x5"}));
  CHECK(mentions(refusal<lora::value_error>([&] {
                   (void)lora::delta_weight(l, lora::scaled(1e308, lora::scaled(10, l)));
                 }),
                 {"lora::delta_weight", "scaling is not finite"}));
  const std::vector<lora::adapter<float>> none;
  CHECK(mentions(refusal<lora::value_error>([&] { (void)lora::delta_weight(none); }),
                 {"lora::delta_weight", "no adapter"}));
}
