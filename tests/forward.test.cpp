// SPDX-License-Identifier: Apache-2.0
//
// forward(W, x, y, l...): y := round(W x + sum of s B (A x) (+ b)). On whole numbers the result is
// known bit for bit.
#include <array>
#include <initializer_list>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "lora/forward.hpp"
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
    const test::whole_adapters<F> adapters(g, out, in, 0, 2);
    const auto& all = adapters.all;
    const test::matrix<T> W = g.integers<T>(out, in, 9);
    const test::matrix<X> x = g.integers<X>(in, tokens, 2);
    const test::matrix<float> b = g.integers<float>(out, 1, 30);
    const test::exact_matrix product = test::times(test::exact(W) + adapters.delta, test::exact(x));
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
    CHECK(
        run(lora::with_bias(lora::as_matrix(large).block(1, 4, out, in), b), x, y_cols, with_bias));
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
  SECTION("bfloat16 all through") {
    check_layouts<lora::bfloat16, lora::bfloat16, lora::bfloat16, lora::bfloat16>(303);
  }
  SECTION("float16, x float, y float16, factors double") {
    check_layouts<lora::float16, float, lora::float16, double>(304);
  }
  SECTION("bfloat16, x float, y float, factors float") {
    check_layouts<lora::bfloat16, float, float, float>(305);
  }
  SECTION("float, x double, y bfloat16") {
    check_layouts<float, double, lora::bfloat16, lora::float16>(306);
  }
  SECTION("Eigen's 16 bits") {
    check_layouts<Eigen::bfloat16, Eigen::half, Eigen::half, Eigen::bfloat16>(307);
  }
}

TEST_CASE("a bias of every kind", "[forward]") {
  test::random g(308);
  CAPTURE(g.seed());
  const MatrixXf W = g.integers<float>(5, 3, 5), x = g.integers<float>(3, 4, 5);
  const lora::adapter<float> l{
      g.integers<float>(2, 3, 3), g.integers<float>(5, 2, 3), {.alpha = 3}};
  const Eigen::Matrix<double, 5, 1> b(1, -2, 3, -4, 500);
  const test::exact_matrix product =
      test::times(test::exact(W) + test::exact_delta(l), test::exact(x));
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
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::with_bias(W, MatrixXf(row)); }),
                 {"with_bias", "1x5", "5x3"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::with_bias(W, column.head(4)); }),
                 {"4x1", "5x3"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::with_bias(W, std::vector<float>(6)); }),
                 {"6x1", "5x3"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::with_bias(W, std::span<const float>()); }),
                 {"0x1", "5x3"}));
}

TEST_CASE("the adapters come after W x in one chain, the bias last, one rounding for all",
          "[forward]") {
  // Above 256 bfloat16 steps by 2, and 256 + 0.75 + 0.75 is 258 only if nothing is rounded on the
  // way.
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
  const lora::adapter<float> l{
      g.integers<float>(2, 4, 3), g.integers<float>(4, 2, 3), {.alpha = 3}};
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
  lora::forward(two, x, z,
                lora::adapter<float>{
                    MatrixXf::Constant(3, 1, 2), MatrixXf::Constant(1, 3, 5), {.alpha = 1.5}});
  CHECK(z[0] == 14 + 0.5F * 30 * 7);
}

TEST_CASE("shapes that do not fit are refused, and y keeps its bits", "[forward]") {
  const lora::adapter<float> l{MatrixXf::Ones(2, 3), MatrixXf::Ones(4, 2), {.alpha = 3}},
      other{MatrixXf::Ones(2, 5), MatrixXf::Ones(4, 2), {.alpha = 3}};
  const MatrixXf W = MatrixXf::Ones(4, 3);
  const std::vector<float> b(4, 5);
  const auto refuses = [&](index_t in, index_t x_tokens, index_t out, index_t y_tokens,
                           std::initializer_list<const char*> words, const auto&... adapters) {
    const MatrixXf x = MatrixXf::Ones(in, x_tokens), before = MatrixXf::Constant(out, y_tokens, 7);
    MatrixXf y = before;
    const auto one = [&](const auto& weight) {
      const std::string text =
          refusal<lora::shape_error>([&] { lora::forward(weight, x, y, adapters...); });
      CAPTURE(text);
      CHECK(mentions(text, {"lora::forward:"}));
      CHECK(mentions(text, words));
      CHECK(same_bits(y, before));
    };
    one(W);
    one(lora::with_bias(W, b));
  };
  refuses(4, 2, 4, 2,
          {"W is 4x3", "x is 4x2", "y is 4x2", "in_features rows", "out_features rows"});
  refuses(3, 2, 3, 2, {"W is 4x3", "x is 3x2", "y is 3x2"}, l);
  refuses(4, 2, 3, 2, {"W is 4x3", "x is 4x2", "y is 3x2"}, l);  // exchanged
  refuses(0, 2, 4, 2, {"W is 4x3", "x is 0x2"}, l);
  refuses(3, 2, 0, 2, {"W is 4x3", "y is 0x2"}, l);
  refuses(3, 2, 4, 3, {"x is 3x2", "y is 4x3", "one column for each token"});
  refuses(3, 0, 4, 1, {"x is 3x0", "y is 4x1"}, l);
  refuses(3, 2, 4, 2, {"4x5", "4x3"}, l, lora::scaled(0.5, l), other);
  refuses(3, 2, 4, 2, {"4x5", "4x3"}, std::vector{l, l, other});
  refuses(3, 2, 4, 2, {"4x5", "4x3"}, lora::scaled(0, other));
  // Empty spans.
  std::vector<float> y(4, 7);
  CHECK(mentions(
      refusal<lora::shape_error>([&] { lora::forward(W, std::span<const float>(), y, l); }),
      {"x is 0x1"}));
  CHECK(mentions(refusal<lora::shape_error>(
                     [&] { lora::forward(W, std::vector<float>(3), std::span<float>(), l); }),
                 {"lora::forward", "y is 0x1"}));
  CHECK(y == std::vector<float>(4, 7));
}

TEST_CASE("a scaling that is not finite is refused, rank 0 adds nothing", "[forward]") {
  const lora::adapter<float> l{MatrixXf::Ones(2, 3), MatrixXf::Ones(4, 2), {.alpha = 200}};
  const MatrixXf W = MatrixXf::Ones(4, 3), x = MatrixXf::Ones(3, 2),
                 before = MatrixXf::Constant(4, 2, 7);
  MatrixXf y = before;
  CHECK(mentions(
      refusal<lora::value_error>([&] { lora::forward(W, x, y, l, lora::scaled(1e307, l)); }),
      {"lora::forward:", "scaling is not finite"}));
  CHECK(same_bits(y, before));
  const lora::adapter<float> nothing{
      MatrixXf(0, 3), MatrixXf(4, 0), {.alpha = 3, .rule = scaling_rule::fixed}};
  lora::forward(W, x, y, nothing);
  CHECK(y == MatrixXf::Constant(4, 2, 3));
  lora::forward(W, x, y, l, nothing);
  CHECK(y == MatrixXf::Constant(4, 2, 603));
}

TEST_CASE("y may not share memory with W, x, the bias or a factor", "[forward]") {
  std::vector<float> buffer(100, 2);
  const std::vector<float> before = buffer;
  float* const data = buffer.data();
  const MatrixXf apart = MatrixXf::Ones(4, 4);
  const lora::adapter<float> l{MatrixXf::Ones(2, 4), MatrixXf::Ones(4, 2), {.alpha = 3}};
  const auto y = lora::col_major(data, 4, 3);
  const auto refuses = [&](const char* with, const auto& W, const auto& x,
                           const auto&... adapters) {
    CHECK(mentions(refusal<lora::shape_error>([&] { lora::forward(W, x, y, adapters...); }),
                   {"lora::forward:", "y is written and overlaps", with}));
    CHECK(buffer == before);
  };
  const MatrixXf x = MatrixXf::Ones(4, 3);
  refuses(" x ", apart, y, l);
  refuses(" x ", apart, lora::row_major(data + 11, 4, 3));
  refuses(" W ", lora::row_major(data, 4, 4), x, l);
  refuses(" W ", lora::col_major(data + 11, 4, 4), x);
  refuses(" W ",
          lora::with_bias(lora::row_major(data + 11, 4, 4), std::span<const float>(data + 50, 4)),
          x);
  refuses("the bias", lora::with_bias(apart, std::span<const float>(data + 11, 4)), x, l);
  refuses(
      "the bias",
      lora::with_bias(apart, Eigen::Map<Eigen::VectorXf, 0, Eigen::InnerStride<5>>(data + 4, 4)),
      x);
  const auto with_factors = [&](index_t A, index_t B) {
    return lora::adapter_view<float>{
        lora::row_major(data + A, 2, 4), lora::row_major(data + B, 4, 2), {.alpha = 3}};
  };
  refuses("lora_A", apart, x, l, with_factors(8, 50));
  refuses("lora_B", apart, x, l, lora::scaled(0, with_factors(50, 8)));
  // Side by side, everything in one buffer.
  lora::forward(
      lora::with_bias(lora::row_major(data + 12, 4, 4), std::span<const float>(data + 28, 4)),
      lora::col_major(data + 32, 4, 3), y, with_factors(44, 52));
  CHECK(std::vector(data, data + 12) == std::vector<float>(12, 16 + 2 + 1.5F * 4 * 16));
  CHECK(std::vector(data + 12, data + 100) == std::vector<float>(88, 2));
}
