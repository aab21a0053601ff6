// SPDX-License-Identifier: Apache-2.0
//
// apply(x, y, l...): y := round(y + sum of s B (A x)). On whole numbers the result is known bit for
// bit.
#include <array>
#include <initializer_list>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "lora/apply.hpp"
#include "support/adapters.hpp"
#include "support/catch.hpp"
#include "support/mdspan.hpp"
#include "support/random.hpp"
#include "support/refused.hpp"

using Eigen::MatrixXf;
using lora::index_t;
using lora::scaling_rule;
using test::mentions;
using test::refusal;
using test::same_bits;

namespace {

template <class X, class Y, class F>
void check_layouts(std::uint64_t seed) {
  test::random g(seed);
  CAPTURE(g.seed());
  for (int trial = 0; trial < 30; ++trial) {
    const index_t out = g.integer(1, 45), in = g.integer(1, 50);
    const index_t tokens = g.one_in(8) ? g.integer(250, 300) : g.integer(1, 20);
    const test::whole_adapters<F> adapters(g, out, in, 1, 3);
    const auto& all = adapters.all;
    const auto& delta = adapters.delta;
    const test::matrix<X> x = g.integers<X>(in, tokens, 2);
    const test::matrix<Y> before = g.integers<Y>(out, tokens, 50);
    const test::matrix<Y> expected =
        test::rounded<Y>(test::exact(before) + test::times(delta, test::exact(x)));
    CAPTURE(trial, out, in, tokens, all.size());
    const test::col_matrix<X> x_cols = x;
    const auto run = [&](const auto& from, auto& whole, auto&& part) {
      lora::apply(from, part, all);
      return same_bits(whole, expected);
    };
    test::matrix<Y> y = before;
    CHECK(run(x, y, y));
    y = before;
    CHECK(run(x_cols, y, lora::as_matrix(y)));
    test::col_matrix<Y> y_cols = before;
    CHECK(run(x_cols, y_cols, y_cols));
    y_cols = before;
    CHECK(run(lora::row_major(x.data(), in, tokens), y_cols,
              lora::col_major(y_cols.data(), out, tokens)));
    using extents = test::md::dextents<>;
    y = before;
    CHECK(run(
        x_cols, y,
        test::md::mdspan<Y, extents>(y.data(), extents(std::size_t(out), std::size_t(tokens)))));
    // Parts of larger matrices: the rest stays.
    test::col_matrix<Y> large = g.integers<Y>(out + 3, tokens + 4, 9);
    test::col_matrix<Y> after = large;
    large.block(2, 1, out, tokens) = before;
    after.block(2, 1, out, tokens) = expected;
    test::matrix<X> large_x = g.integers<X>(in + 2, tokens + 3, 2);
    large_x.block(1, 2, in, tokens) = x;
    lora::apply(large_x.block(1, 2, in, tokens), large.block(2, 1, out, tokens), all);
    CHECK(same_bits(large, after));
    // One token as a vector of every kind.
    const test::matrix<Y> one = expected.col(0);
    const std::vector<X> x_vector(x_cols.data(), x_cols.data() + in);
    std::vector<Y> y_vector(static_cast<std::size_t>(out));
    const auto reset = [&] {
      for (index_t i = 0; i < out; ++i) y_vector[static_cast<std::size_t>(i)] = before(i, 0);
    };
    reset();
    lora::apply(x_vector, y_vector, all);
    CHECK(same_bits(lora::col_major(y_vector, out, 1), one));
    reset();
    lora::apply(std::span(x_vector), std::span(y_vector), all);
    CHECK(same_bits(lora::col_major(y_vector, out, 1), one));
    y = before;
    lora::apply(x.col(0), y.col(0), all);  // elements a stride apart
    CHECK(same_bits(y.col(0), one));
    CHECK(same_bits(y.rightCols(tokens - 1), before.rightCols(tokens - 1)));
  }
}

}  // namespace

TEST_CASE("an example computed by hand", "[apply]") {
  MatrixXf A(1, 3), B(2, 1);
  A << 1, 2, 3;
  B << 1, -2;
  const lora::adapter<float> l{A, B, {.alpha = 3}};
  MatrixXf x(3, 2), y(2, 2), expected(2, 2);
  x << 1, 0, 0, 1, 1, 0;  // A x = (4, 2)
  y << 100, 200, 300, 400;
  expected << 112, 206, 276, 388;
  lora::apply(x, y, l);
  CHECK(y == expected);
  lora::apply(x, y, lora::scaled(-1, l));
  CHECK(y == (MatrixXf(2, 2) << 100, 200, 300, 400).finished());
  lora::apply(x, y, lora::scaled(0.5, l), lora::scaled(0.5, l));
  CHECK(y == expected);
}

TEST_CASE("whole numbers give the exact sum, stored once, in every layout", "[apply]") {
  SECTION("float, float, float") { check_layouts<float, float, float>(201); }
  SECTION("double, double, float") { check_layouts<double, double, float>(202); }
  SECTION("float, float, double") { check_layouts<float, float, double>(203); }
  SECTION("bfloat16, bfloat16, bfloat16") {
    check_layouts<lora::bfloat16, lora::bfloat16, lora::bfloat16>(204);
  }
  SECTION("float16, float, bfloat16") { check_layouts<lora::float16, float, lora::bfloat16>(205); }
  SECTION("float, bfloat16, float16") { check_layouts<float, lora::bfloat16, lora::float16>(206); }
  SECTION("Eigen::half, Eigen::bfloat16, double") {
    check_layouts<Eigen::half, Eigen::bfloat16, double>(207);
  }
  SECTION("double, float16, float") { check_layouts<double, lora::float16, float>(208); }
}

TEST_CASE("an x that is an expression, or has an inner stride, is evaluated first", "[apply]") {
  test::random g(209);
  const lora::adapter<float> l{
      g.integers<float>(2, 6, 3), g.integers<float>(4, 2, 3), {.alpha = 3}};
  const MatrixXf x = g.integers<float>(6, 5, 3), z = g.integers<float>(6, 5, 3);
  const auto expected = [&](const MatrixXf& from) {
    return test::rounded<float>(test::times(test::exact_delta(l), test::exact(from)));
  };
  MatrixXf y = MatrixXf::Zero(4, 5);
  lora::apply(2 * x - z, y, l);
  CHECK(same_bits(y, expected(2 * x - z)));
  y.setZero();
  lora::apply(x.cwiseMax(0), y, l);
  CHECK(same_bits(y, expected(x.cwiseMax(0))));
  y.setZero();
  lora::apply(MatrixXf::Ones(6, 5), y, l);
  CHECK(same_bits(y, expected(MatrixXf::Ones(6, 5))));
  const Eigen::Map<const MatrixXf, 0, Eigen::InnerStride<2>> every_other(x.data(), 6, 2);
  y.setZero();
  lora::apply(every_other, y.leftCols(2), l);
  CHECK(same_bits(y.leftCols(2), expected(every_other)));
  CHECK(y.rightCols(3).isZero(0));
  // An expression of y itself is evaluated before y changes.
  const lora::adapter<float> square{
      g.integers<float>(2, 4, 3), g.integers<float>(4, 2, 3), {.alpha = 3}};
  y = g.integers<float>(4, 5, 3);
  const auto want = test::rounded<float>(
      test::exact(y) + 2 * test::times(test::exact_delta(square), test::exact(y)));
  lora::apply(2 * y, y, square);
  CHECK(same_bits(y, want));
}

TEST_CASE("y in 16 bits rounds once for all adapters", "[apply]") {
  // Above 256 bfloat16 steps by 2.
  const MatrixXf one = MatrixXf::Ones(1, 1);
  const lora::adapter<float> l{one, one * 1.5F, {.alpha = 0.5}};
  const Eigen::VectorXf x = Eigen::VectorXf::Ones(1);
  Eigen::Matrix<lora::bfloat16, Eigen::Dynamic, 1> y(1);
  y(0) = lora::bfloat16(256);
  lora::apply(x, y, l, l);
  CHECK(y(0) == lora::bfloat16(258));
  y(0) = lora::bfloat16(256);
  lora::apply(x, y, l);
  lora::apply(x, y, l);
  CHECK(y(0) == lora::bfloat16(256));
}

TEST_CASE("double anywhere makes the sum double", "[apply]") {
  const MatrixXf one = MatrixXf::Ones(1, 1);
  const lora::adapter<float> l{one, one, {.alpha = 3}};
  const double fine = 1 + 0x1p-40;
  Eigen::VectorXd x = Eigen::VectorXd::Constant(1, fine), y = Eigen::VectorXd::Zero(1);
  lora::apply(x, y, l);
  CHECK(y(0) == 3 * fine);
  // x float, y double: y + 3 in double.
  y(0) = fine;
  const Eigen::VectorXf narrow = Eigen::VectorXf::Ones(1);
  lora::apply(narrow, y, l);
  CHECK(y(0) == fine + 3);
  // Double factors, float outside: 3 (1 + 2^-24) 1 is no float, rounded once from the double sum
  // with y.
  const lora::adapter<double> d{
      one.cast<double>(), Eigen::MatrixXd::Constant(1, 1, 0x1p-25 + 0x1p-51), {.alpha = 2}};
  Eigen::VectorXf z = Eigen::VectorXf::Ones(1);
  lora::apply(narrow, z, d);
  CHECK(z(0) == 1 + 0x1p-23F);
}

TEST_CASE("an adapter at strength 0 is not read, and without adapters y keeps its bits",
          "[apply]") {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  const MatrixXf bad = MatrixXf::Constant(2, 2, nan), two = MatrixXf::Constant(2, 2, 2);
  const lora::adapter<float> poison{bad, bad, {.alpha = 3}}, good{two, two, {.alpha = 3}};
  MatrixXf x = MatrixXf::Ones(2, 3), y = MatrixXf::Ones(2, 3);
  lora::apply(x, y, lora::scaled(0, poison), good);
  CHECK(y == MatrixXf::Constant(2, 3, 1 + 1.5F * 16));
  x.setConstant(nan);
  y.setConstant(-0.0F);
  const auto before = test::bytes(y);
  lora::apply(x, y);
  lora::apply(x, y, lora::scaled(0, good));
  lora::apply(x, y, std::vector<lora::adapter<float>>{});
  CHECK(test::bytes(y) == before);
}

TEST_CASE("no tokens, no features, one by one", "[apply]") {
  const MatrixXf A = MatrixXf::Ones(2, 3), B = MatrixXf::Ones(4, 2);
  const lora::adapter<float> l{A, B, {.alpha = 3}}, no_in{A.leftCols(0), B, {.alpha = 3}},
      no_out{A, B.topRows(0), {.alpha = 3}};
  MatrixXf none_x(3, 0), none_y(4, 0), y = MatrixXf::Ones(4, 2), x = MatrixXf::Ones(3, 2),
                                       empty(0, 2);
  lora::apply(none_x, none_y, l);
  CHECK(none_y.size() == 0);
  lora::apply(empty, y, no_in);
  CHECK(y == MatrixXf::Ones(4, 2));
  MatrixXf nothing(0, 2);
  lora::apply(x, nothing, no_out);
  CHECK(nothing.rows() == 0);
  const lora::adapter<float> scalar{
      MatrixXf::Constant(3, 1, 2), MatrixXf::Constant(1, 3, 5), {.alpha = 1.5}};
  std::array<float, 1> in{7}, result{1};
  lora::apply(in, result, scalar);
  CHECK(result[0] == 1 + 0.5F * 30 * 7);
}

TEST_CASE("shapes that do not fit are refused, and y keeps its bits", "[apply]") {
  const lora::adapter<float> l{MatrixXf::Ones(2, 3), MatrixXf::Ones(4, 2), {.alpha = 3}};
  const auto refuses = [](index_t in, index_t x_tokens, index_t out, index_t y_tokens,
                          std::initializer_list<const char*> words, const auto&... adapters) {
    const MatrixXf x = MatrixXf::Ones(in, x_tokens), before = MatrixXf::Constant(out, y_tokens, 7);
    MatrixXf y = before;
    const std::string text = refusal<lora::shape_error>([&] { lora::apply(x, y, adapters...); });
    CAPTURE(text);
    CHECK(mentions(text, {"lora::apply:"}));
    CHECK(mentions(text, words));
    CHECK(same_bits(y, before));
  };
  refuses(3, 2, 5, 2, {"4x3", "5x3"}, l);
  refuses(5, 2, 4, 2, {"4x3", "4x5"}, l);
  refuses(4, 2, 3, 2, {"4x3", "3x4"}, l);  // x and y exchanged
  refuses(0, 2, 4, 2, {"4x3", "4x0"}, l);
  refuses(3, 2, 0, 2, {"4x3", "0x3"}, l);
  refuses(3, 2, 4, 3, {"x is 3x2", "y is 4x3", "one column for each token"}, l);
  refuses(3, 0, 4, 1, {"x is 3x0", "y is 4x1"}, l);
  refuses(3, 2, 4, 3, {"x is 3x2", "y is 4x3"});  // also without adapters
  refuses(3, 2, 4, 3, {"x is 3x2", "y is 4x3"}, lora::scaled(0, l));
  // The last of several, in a range, at strength 0: nothing of the others is added.
  const lora::adapter<float> other{MatrixXf::Ones(2, 5), MatrixXf::Ones(4, 2), {.alpha = 3}};
  refuses(3, 2, 4, 2, {"4x5", "4x3"}, l, lora::scaled(0.5, l), other);
  refuses(3, 2, 4, 2, {"4x5", "4x3"}, std::vector{l, l, other});
  refuses(3, 2, 4, 2, {"4x5", "4x3"}, l, lora::scaled(0, other));
  // A row vector is one feature of many tokens.
  const Eigen::RowVectorXf row = Eigen::RowVectorXf::Ones(3);
  std::vector<float> y(4, 7);
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::apply(row, y, l); }),
                 {"lora::apply", "4x3", "4x1"}));
  // Empty spans.
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::apply(std::span<const float>(), y, l); }),
                 {"4x3", "4x0"}));
  CHECK(mentions(
      refusal<lora::shape_error>([&] { lora::apply(row.transpose(), std::span<float>(), l); }),
      {"4x3", "0x3"}));
  CHECK(y == std::vector<float>(4, 7));
}

TEST_CASE("a scaling that is not finite is refused, rank 0 adds nothing", "[apply]") {
  const lora::adapter<float> l{MatrixXf::Ones(2, 3), MatrixXf::Ones(4, 2), {.alpha = 200}};
  const MatrixXf x = MatrixXf::Ones(3, 2), before = MatrixXf::Constant(4, 2, -0.0F);
  MatrixXf y = before;
  CHECK(mentions(refusal<lora::value_error>([&] { lora::apply(x, y, l, lora::scaled(1e307, l)); }),
                 {"lora::apply:", "scaling is not finite"}));
  CHECK(same_bits(y, before));
  const lora::adapter<float> nothing{
      MatrixXf(0, 3), MatrixXf(4, 0), {.alpha = 3, .rule = scaling_rule::fixed}};
  lora::apply(x, y, nothing, nothing);
  CHECK(same_bits(y, before));
  lora::apply(x, y, nothing, l);
  CHECK(y == MatrixXf::Constant(4, 2, 600));
}

TEST_CASE("y may not share memory with x or a factor", "[apply]") {
  std::vector<float> buffer(60, 2);
  const std::vector<float> before = buffer;
  float* const data = buffer.data();
  const auto refuses = [&](const char* with, const auto& x, const auto& y, const auto& l) {
    CHECK(mentions(refusal<lora::shape_error>([&] { lora::apply(x, y, l); }),
                   {"lora::apply:", "y is written and overlaps", with}));
    CHECK(buffer == before);
  };
  const lora::adapter<float> square{MatrixXf::Ones(2, 4), MatrixXf::Ones(4, 2), {.alpha = 3}};
  refuses(" x ", lora::col_major(data, 4, 3), lora::col_major(data, 4, 3), square);  // in place
  refuses(" x ", lora::col_major(data, 4, 3), lora::col_major(data + 11, 4, 3), square);
  refuses(" x ", std::span(data, 4), std::span(data + 3, 4), square);
  refuses(" x ", lora::row_major(data, 4, 3), lora::col_major(data + 11, 4, 3),
          lora::scaled(0, square));
  const auto with_factors = [&](index_t A, index_t B) {
    return lora::adapter_view<float>{
        lora::row_major(data + A, 2, 4), lora::row_major(data + B, 4, 2), {.alpha = 3}};
  };
  refuses("lora_A", lora::col_major(data + 48, 4, 3), lora::col_major(data, 4, 3),
          with_factors(11, 20));
  refuses("lora_B", lora::col_major(data + 48, 4, 3), lora::col_major(data, 4, 3),
          with_factors(20, 5));
  // Beside each other, and row blocks of one matrix, are apart.
  lora::apply(lora::col_major(data, 4, 3), lora::col_major(data + 12, 4, 3), with_factors(24, 32));
  CHECK(std::vector(data + 12, data + 24) == std::vector<float>(12, 2 + 1.5F * 4 * 16));
  MatrixXf both = MatrixXf::Constant(8, 3, 2);
  lora::apply(both.topRows(4), both.bottomRows(4), square);
  CHECK(both.topRows(4) == MatrixXf::Constant(4, 3, 2));
  CHECK(both.bottomRows(4) == MatrixXf::Constant(4, 3, 2 + 1.5F * 16));
}
