// SPDX-License-Identifier: Apache-2.0
//
// forward(W, x, y, l...): y := round(W x + sum of s B (A x) (+ b)). On whole numbers the result is known bit for bit.
#include <array>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

#include "lora/forward.hpp"
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

template <class T>
T garbage() {
  return test::stored<T>(std::numeric_limits<double>::quiet_NaN());
}

template <class T, class X, class Y, class F>
void check_layouts(std::uint64_t seed) {
  test::random g(seed);
  CAPTURE(g.seed());
  for (int trial = 0; trial < 30; ++trial) {
    // Depths beyond one chunk of the packed weight and tokens beyond one block, now and then.
    const index_t out = g.integer(1, 45), in = g.one_in(6) ? g.integer(250, 600) : g.integer(1, 60);
    const index_t tokens = g.one_in(8) ? g.integer(250, 300) : g.integer(1, 20);
    std::vector<lora::adapter<F>> all;
    test::exact_matrix total = test::exact_matrix::Zero(out, in);
    for (index_t n = g.integer(0, 3); n > 0; --n) {
      const index_t rank = g.integer(1, g.one_in(4) ? 2 * std::max(out, in) : 5);
      all.push_back({g.integers<F>(rank, in, 2),
                     g.integers<F>(out, rank, 2),
                     {.alpha = 0.25 * static_cast<double>(g.integer(-9, 9)), .rule = scaling_rule::fixed}});
      total += test::exact_delta(all.back());
    }
    const test::matrix<T> W = g.integers<T>(out, in, 9);
    const test::matrix<X> x = g.integers<X>(in, tokens, 2);
    const test::matrix<float> b = g.integers<float>(out, 1, 30);
    total += test::exact(W);
    const test::exact_matrix product = test::times(total, test::exact(x));
    const test::matrix<Y> expected = test::rounded<Y>(product);
    const test::exact_matrix plus_bias = product.colwise() + test::exact(b).col(0);
    const test::matrix<Y> with_bias = test::rounded<Y>(plus_bias);
    CAPTURE(trial, out, in, tokens, all.size());
    const test::col_matrix<T> W_cols = W;
    const test::col_matrix<X> x_cols = x;
    test::matrix<Y> y(out, tokens);
    test::col_matrix<Y> y_cols(out, tokens);
    const auto run = [&](const auto& weight, const auto& from, auto& into, const auto& wanted) {
      into.setConstant(garbage<Y>());  // the old content of y must not matter
      lora::forward(weight, from, into, all);
      return same_bits(into, wanted);
    };
    CHECK(run(W, x, y, expected));
    CHECK(run(W_cols, x_cols, y_cols, expected));
    CHECK(run(W, x_cols, y_cols, expected));
    CHECK(run(W_cols, x, y, expected));
    CHECK(run(lora::with_bias(W, b), x, y, with_bias));
    CHECK(run(lora::with_bias(W_cols, b), x_cols, y_cols, with_bias));
    const test::matrix<T> stored_in_out = W.transpose();
    CHECK(run(stored_in_out.transpose(), x_cols, y, expected));
    test::matrix<T> large = g.integers<T>(out + 3, in + 5, 9);
    large.block(1, 4, out, in) = W;
    CHECK(run(large.block(1, 4, out, in), x, y_cols, expected));
    CHECK(run(lora::with_bias(lora::as_matrix(large).block(1, 4, out, in), b), x, y_cols, with_bias));
    // y in a part of a larger matrix, the rest of which stays.
    test::matrix<Y> around = g.integers<Y>(out + 4, tokens + 3, 9), after = around;
    after.block(3, 1, out, tokens) = expected;
    lora::forward(W, x, around.block(3, 1, out, tokens), all);
    CHECK(same_bits(around, after));
    // One token as a vector.
    const std::vector<X> x_vector(x_cols.data(), x_cols.data() + in);
    std::vector<Y> y_vector(static_cast<std::size_t>(out), garbage<Y>());
    lora::forward(W, x_vector, y_vector, all);
    CHECK(same_bits(lora::col_major(y_vector, out, 1), expected.col(0)));
    lora::forward(lora::with_bias(W, b), x.col(tokens - 1), y.col(0), all);
    CHECK(same_bits(y.col(0), with_bias.col(tokens - 1)));
  }
}

}  // namespace

TEST_CASE("an example computed by hand", "[forward]") {
  MatrixXf W(2, 3), A(1, 3), B(2, 1), x(3, 2), y(2, 2), expected(2, 2);
  W << 1, 2, 3, 4, 5, 6;
  A << 1, 0, -1;
  B << 2, 10;
  x << 1, 0, 1, 1, 3, 0;
  const lora::adapter<float> l{A, B, {.alpha = 3}};
  // W x = (12 2; 27 5), A x = (-2 0), s B A x = (-12 0; -60 0).
  expected << 0, 2, -33, 5;
  lora::forward(W, x, y, l);
  CHECK(y == expected);
  const Eigen::Vector2f b(0.5F, -1);
  expected << 12.5F, 2.5F, 26, 4;
  lora::forward(lora::with_bias(W, b), x, y);
  CHECK(y == expected);
  lora::forward(lora::with_bias(W, b), x, y, lora::scaled(0.5, l), lora::scaled(-1, l));
  expected << 18.5F, 2.5F, 56, 4;
  CHECK(y == expected);
}

TEST_CASE("whole numbers give the exact result, stored once, in every layout", "[forward]") {
  SECTION("float all through") { check_layouts<float, float, float, float>(301); }
  SECTION("double all through") { check_layouts<double, double, double, double>(302); }
  SECTION("bfloat16 all through") { check_layouts<lora::bfloat16, lora::bfloat16, lora::bfloat16, lora::bfloat16>(303); }
  SECTION("float16, x float, y float16, factors double") { check_layouts<lora::float16, float, lora::float16, double>(304); }
  SECTION("bfloat16, x float, y float, factors float") { check_layouts<lora::bfloat16, float, float, float>(305); }
  SECTION("float, x double, y bfloat16") { check_layouts<float, double, lora::bfloat16, lora::float16>(306); }
  SECTION("Eigen's 16 bits") { check_layouts<Eigen::bfloat16, Eigen::half, Eigen::half, Eigen::bfloat16>(307); }
}

TEST_CASE("a bias of every kind", "[forward]") {
  test::random g(308);
  CAPTURE(g.seed());
  const MatrixXf W = g.integers<float>(5, 3, 5), x = g.integers<float>(3, 4, 5);
  const lora::adapter<float> l{g.integers<float>(2, 3, 3), g.integers<float>(5, 2, 3), {.alpha = 3}};
  const Eigen::Matrix<double, 5, 1> b(1, -2, 3, -4, 500);
  const test::exact_matrix product = test::times(test::exact(W) + test::exact_delta(l), test::exact(x));
  const auto expected = test::rounded<float>(product.colwise() + test::exact(b).col(0));
  const auto check = [&](const auto& bias) {
    MatrixXf y(5, 4);
    lora::forward(lora::with_bias(W, bias), x, y, l);
    return same_bits(y, expected);
  };
  const Eigen::VectorXf column = b.cast<float>();
  const Eigen::RowVectorXf row = column.transpose();
  MatrixXf grid(5, 6);
  grid.setZero();
  grid.col(2) = column;
  MatrixXf wide = MatrixXf::Zero(4, 5);
  wide.row(2) = row;
  std::vector<float> vector(column.data(), column.data() + 5);
  std::array<lora::float16, 5> half{};
  std::vector<lora::bfloat16> brain;
  float plain[5];
  for (std::size_t i = 0; i < 5; ++i) {
    half[i] = lora::float16(vector[i]);
    brain.push_back(lora::bfloat16(vector[i]));
    plain[i] = vector[i];
  }
  CHECK(check(b));
  CHECK(check(column));
  CHECK(check(row));
  CHECK(check(row.transpose()));
  CHECK(check(grid.col(2)));
  CHECK(check(wide.row(2)));
  CHECK(check(wide.transpose().col(2)));
  CHECK(check(column.head(5)));
  CHECK(check(MatrixXf(column)));
  CHECK(check(vector));
  CHECK(check(half));
  CHECK(check(std::span<const lora::bfloat16>(brain)));
  CHECK(check(plain));
  CHECK(check(lora::col_major(vector, 5, 1)));
  CHECK(check(lora::row_major(grid.data(), 6, 5).block(2, 0, 1, 5).transpose()));
  // A double bias is added in double: 2^-30 on top of 1 survives in a double y.
  const Eigen::MatrixXf one = Eigen::MatrixXf::Ones(1, 1);
  const std::vector<double> fine{0x1p-30};
  Eigen::VectorXd y(1);
  lora::forward(lora::with_bias(one, fine), Eigen::VectorXf::Ones(1), y);
  CHECK(y(0) == 1 + 0x1p-30);
  // One element: as a vector or as a matrix.
  CHECK_NOTHROW(lora::with_bias(one, one));
  // 1 x n without a vector's type is no column.
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::with_bias(W, MatrixXf(row)); }), {"with_bias", "1x5", "5x3"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::with_bias(W, column.head(4)); }), {"4x1", "5x3"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::with_bias(W, std::vector<float>(6)); }), {"6x1", "5x3"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::with_bias(W, std::span<const float>()); }), {"0x1", "5x3"}));
}

TEST_CASE("the adapters come after W x in one chain, the bias last, one rounding for all", "[forward]") {
  // Above 256 bfloat16 steps by 2, and 256 + 0.75 + 0.75 is 258 only if nothing is rounded on the way.
  const MatrixXf W = MatrixXf::Constant(1, 1, 256), one = MatrixXf::Ones(1, 1);
  const lora::adapter<float> l{one, one * 1.5F, {.alpha = 0.5}};
  const Eigen::VectorXf x = Eigen::VectorXf::Ones(1), b = Eigen::VectorXf::Constant(1, 0.75F);
  Eigen::Matrix<lora::bfloat16, 1, 1> y;
  lora::forward(lora::with_bias(W, b), x, y, l);
  CHECK(y(0) == lora::bfloat16(258));
  // 2^24 + 1 is no float: the order of the chain decides what is lost.
  const auto chain = [&](float w, float d, float bias) {
    Eigen::VectorXf z(1);
    const lora::adapter<float> m{one, one * (2 * d), {.alpha = 0.5}};
    const Eigen::VectorXf c = Eigen::VectorXf::Constant(1, bias);
    lora::forward(lora::with_bias(MatrixXf(one * w), c), x, z, m);
    return z(0);
  };
  CHECK(chain(0x1p24F, -0x1p24F, 1) == 1);  // the bias after both
  CHECK(chain(1, 0x1p24F, -0x1p24F) == 0);  // 1 + 2^24 rounds to even before the bias
  CHECK(chain(0x1p24F, 1, -0x1p24F) == 0);
}

TEST_CASE("an x that is an expression is evaluated first", "[forward]") {
  test::random g(309);
  const MatrixXf W = g.integers<float>(4, 4, 5), x = g.integers<float>(4, 3, 5);
  const lora::adapter<float> l{g.integers<float>(2, 4, 3), g.integers<float>(4, 2, 3), {.alpha = 3}};
  const test::exact_matrix total = test::exact(W) + test::exact_delta(l);
  MatrixXf y(4, 3);
  lora::forward(W, x.cwiseAbs() * 3, y, l);
  CHECK(same_bits(y, test::rounded<float>(3 * test::times(total, test::exact(x).cwiseAbs()))));
  // In place through an expression of y.
  y = x;
  lora::forward(W, -y, y, l);
  CHECK(same_bits(y, test::rounded<float>(-1 * test::times(total, test::exact(x)))));
}

TEST_CASE("an adapter at strength 0 is not read, NaN elsewhere is not hidden", "[forward]") {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  const MatrixXf bad = MatrixXf::Constant(2, 2, nan), one = MatrixXf::Ones(2, 2);
  const lora::adapter<float> poison{bad, bad, {.alpha = 3}};
  MatrixXf y(2, 3);
  lora::forward(one, MatrixXf::Ones(2, 3), y, lora::scaled(0, poison));
  CHECK(y == MatrixXf::Constant(2, 3, 2));
  lora::forward(one, MatrixXf::Ones(2, 3), y, poison);
  CHECK(y.array().isNaN().all());
  // A NaN token spoils its own column only; a NaN row of W its own row.
  MatrixXf x = MatrixXf::Ones(2, 37);
  x(1, 20) = nan;
  y.resize(2, 37);
  const lora::adapter<float> l{one, one, {.alpha = 3}};
  lora::forward(one, x, y, l);
  for (index_t t = 0; t < 37; ++t) CHECK(y.col(t).array().isNaN().any() == (t == 20));
  MatrixXf W = MatrixXf::Ones(40, 2), z(40, 5);
  W(33, 0) = nan;
  lora::forward(W, MatrixXf::Ones(2, 5), z);
  CHECK(z.row(33).array().isNaN().all());
  z.row(33).setConstant(2);
  CHECK(z == MatrixXf::Constant(40, 5, 2));
}

TEST_CASE("no tokens, no features, one by one", "[forward]") {
  const MatrixXf W = MatrixXf::Ones(4, 3), A = MatrixXf::Ones(2, 3), B = MatrixXf::Ones(4, 2);
  const lora::adapter<float> l{A, B, {.alpha = 3}}, no_in{A.leftCols(0), B, {.alpha = 3}},
      no_out{A, B.topRows(0), {.alpha = 3}};
  MatrixXf no_x(3, 0), no_y(4, 0), empty_x(0, 2), y = MatrixXf::Constant(4, 2, 9), out0(0, 2);
  lora::forward(W, no_x, no_y, l);
  CHECK(no_y.size() == 0);
  lora::forward(W.leftCols(0), empty_x, y, no_in);
  CHECK(y == MatrixXf::Zero(4, 2));  // an empty sum
  lora::forward(lora::with_bias(W.leftCols(0), Eigen::Vector4f(1, 2, 3, 4)), empty_x, y);
  CHECK(y.col(1) == Eigen::Vector4f(1, 2, 3, 4));
  lora::forward(W.topRows(0), MatrixXf::Ones(3, 2), out0, no_out);
  CHECK(out0.rows() == 0);
  std::array<float, 1> x{7}, z{0};
  const MatrixXf two = MatrixXf::Constant(1, 1, 2);
  lora::forward(two, x, z, lora::adapter<float>{MatrixXf::Constant(3, 1, 2), MatrixXf::Constant(1, 3, 5), {.alpha = 1.5}});
  CHECK(z[0] == 14 + 0.5F * 30 * 7);
}
