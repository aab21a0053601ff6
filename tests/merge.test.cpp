// SPDX-License-Identifier: Apache-2.0
//
// merge, unmerge, merged and merge_checked. On whole numbers the sum is exact and only the store
// rounds, so the bits that must come out are known for every scalar and every layout.
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "lora/merge.hpp"
#include "support/adapters.hpp"
#include "support/catch.hpp"
#include "support/mdspan.hpp"
#include "support/random.hpp"
#include "support/refused.hpp"

using lora::index_t;
using lora::scaling_rule;
using test::mentions;
using test::refusal;
using test::same_bits;

namespace {

using Eigen::MatrixXf;

template <class T, class M>
test::matrix<T> in_format(const M& m) {
  return test::rounded<T>(test::exact(m));
}

/// A weight and adapters of whole numbers; their sum needs more bits than the 16-bit formats have.
template <class T, class F>
struct sample {
  test::matrix<T> W;
  std::vector<lora::adapter<F>> all;
  test::matrix<T> plus, minus;  ///< rounded once

  explicit sample(test::random& g) {
    const index_t out = g.integer(1, 45), in = g.integer(1, 60);
    W = g.integers<T>(out, in, 200);
    const test::whole_adapters<F> adapters(g, out, in, 1, 4);
    all = adapters.all;
    plus = test::rounded<T>(test::exact(W) + adapters.delta);
    minus = test::rounded<T>(test::exact(W) - adapters.delta);
  }
};

template <class T, class F>
void check_layouts(std::uint64_t seed) {
  test::random g(seed);
  CAPTURE(g.seed());
  for (int trial = 0; trial < 25; ++trial) {
    const sample<T, F> t(g);
    const index_t out = t.W.rows(), in = t.W.cols();
    CAPTURE(trial, out, in, t.all.size());
    {
      test::matrix<T> W = t.W;
      CHECK(lora::merge(W, t.all).became_nonfinite == 0);
      CHECK(same_bits(W, t.plus));
      W = t.W;
      CHECK(lora::unmerge(W, t.all).became_nonfinite == 0);
      CHECK(same_bits(W, t.minus));
      W = t.W;
      lora::merge_checked(W, t.all);
      CHECK(same_bits(W, t.plus));
    }
    {
      test::col_matrix<T> W = t.W;
      lora::merge(W, t.all);
      CHECK(same_bits(W, t.plus));
      W = t.W;
      lora::unmerge(W, t.all);
      CHECK(same_bits(W, t.minus));
      W = t.W;
      lora::merge_checked(W, t.all);
      CHECK(same_bits(W, t.plus));
    }
    {  // stored in_features x out_features
      test::matrix<T> W = t.W.transpose();
      lora::merge(W.transpose(), t.all);
      CHECK(same_bits(W, test::matrix<T>(t.plus.transpose())));
      test::col_matrix<T> V = t.W.transpose();
      lora::merge_checked(V.transpose(), t.all);
      CHECK(same_bits(V, test::matrix<T>(t.plus.transpose())));
    }
    // Parts of a larger matrix, the rest of which must not change.
    const auto inside = [&](auto large) {
      const auto around = large;
      auto expected = large;
      large.block(3, 2, out, in) = t.W;
      expected.block(3, 2, out, in) = t.plus;
      lora::merge(large.block(3, 2, out, in), t.all);
      const bool block = same_bits(large, expected);
      large = around;
      large.block(3, 2, out, in) = t.W;
      lora::merge(lora::as_matrix(large).block(3, 2, out, in), t.all);
      const bool view = same_bits(large, expected);
      large = around;
      large.block(3, 2, out, in) = t.W;
      const auto kept = large.block(3, 2, out, in);
      lora::merge(kept, t.all);  // a const Block of mutable data: shallow
      const bool shallow = same_bits(large, expected);
      large = around;
      large.block(3, 2, out, in) = t.W;
      Eigen::Ref<decltype(large)> ref(large.block(3, 2, out, in));
      lora::merge_checked(ref, t.all);
      return std::array{block, view, shallow, same_bits(large, expected)};
    };
    constexpr std::array all_true{true, true, true, true};
    CHECK(inside(g.integers<T>(out + 5, in + 4, 9)) == all_true);
    CHECK(inside(test::col_matrix<T>(g.integers<T>(out + 5, in + 4, 9))) == all_true);
    {
      using extents = test::md::dextents<>;
      test::col_matrix<T> W = t.W;
      lora::merge(
          test::md::mdspan<T, extents, test::md::layout_left>(
              W.data(), extents(static_cast<std::size_t>(out), static_cast<std::size_t>(in))),
          t.all);
      CHECK(same_bits(W, t.plus));
    }
    // merged reads only, and keeps the storage order.
    const test::matrix<T> before = t.W;
    const auto result = lora::merged(t.W, t.all);
    static_assert(decltype(result)::IsRowMajor &&
                  std::is_same_v<typename decltype(result)::Scalar, T>);
    CHECK(same_bits(result, t.plus));
    CHECK(same_bits(t.W, before));
    const test::col_matrix<T> by_cols = t.W;
    static_assert(!decltype(lora::merged(by_cols, t.all))::IsRowMajor);
    CHECK(same_bits(lora::merged(by_cols, t.all), t.plus));
    CHECK(same_bits(lora::merged(by_cols.transpose().transpose(), t.all), t.plus));
  }
}

lora::adapter<float> rank_one(const MatrixXf& b, const MatrixXf& a, double s = 0.5) {
  return {a, b / static_cast<float>(s), {.alpha = s, .rule = scaling_rule::fixed}};
}
MatrixXf constant(index_t rows, index_t cols, float v) { return MatrixXf::Constant(rows, cols, v); }

/// A 1 x 1 adapter whose delta is v, with s = 1/2.
lora::adapter<float> adds(float v) { return rank_one(constant(1, 1, v), constant(1, 1, 1)); }

constexpr float nan_float = std::numeric_limits<float>::quiet_NaN();
constexpr float infinity = std::numeric_limits<float>::infinity();

}  // namespace

TEST_CASE("an example computed by hand", "[merge]") {
  MatrixXf W(2, 3), A(1, 3), B(2, 1), expected(2, 3), back(2, 3);
  W << 10, 20, 30,  //
      40, 50, 60;
  A << 1, 2, 3;
  B << 1, -2;
  const lora::adapter<float> l{
      A, B, {.alpha = 4, .rule = scaling_rule::rank_stabilized}};  // s = 4 / sqrt(1)
  expected << 14, 28, 42,                                          //
      32, 34, 36;
  back = W;
  lora::merge(W, l);
  CHECK(W == expected);
  lora::unmerge(W, l);
  CHECK(W == back);
  // Two adapters at their strengths, one of them against the other.
  lora::merge(W, lora::scaled(0.5, l), lora::scaled(-0.25, l));
  CHECK(W == back + (expected - back) / 4);
  CHECK(lora::merged(back, l) == expected);
}

TEST_CASE("whole numbers merge to the exact sum, stored once, in every layout", "[merge]") {
  SECTION("float, float") { check_layouts<float, float>(71); }
  SECTION("double, float") { check_layouts<double, float>(72); }
  SECTION("float, double") { check_layouts<float, double>(73); }
  SECTION("bfloat16, bfloat16") { check_layouts<lora::bfloat16, lora::bfloat16>(74); }
  SECTION("float16, double") { check_layouts<lora::float16, double>(75); }
  SECTION("bfloat16, double") { check_layouts<lora::bfloat16, double>(76); }
  SECTION("float16, float") { check_layouts<lora::float16, float>(77); }
  SECTION("Eigen::half, float16") { check_layouts<Eigen::half, lora::float16>(78); }
  SECTION("Eigen::bfloat16, Eigen::half") { check_layouts<Eigen::bfloat16, Eigen::half>(79); }
  SECTION("double, bfloat16") { check_layouts<double, lora::bfloat16>(80); }
}

TEMPLATE_TEST_CASE("a rank whose factors pass in several strips", "[merge]", float, double,
                   lora::float16, lora::bfloat16) {
  // 300 ranks of 533 inputs are 640 KB of floats; a strip has 256.
  test::random g(83);
  CAPTURE(g.seed());
  const test::matrix<TestType> W = g.integers<TestType>(45, 533, 200);
  const auto of_rank = [&](index_t rank, double s) {
    return lora::adapter<float>{g.integers<float>(rank, 533, 1),
                                g.integers<float>(45, rank, 1),
                                {.alpha = s, .rule = scaling_rule::fixed}};
  };
  const auto one = of_rank(170, 2), other = of_rank(130, -3);
  const auto want =
      test::rounded<TestType>(test::exact(W) + test::exact_delta(one) + test::exact_delta(other));
  test::matrix<TestType> merged = W;
  CHECK(lora::merge(merged, one, other).became_nonfinite == 0);
  CHECK(same_bits(merged, want));
  merged = W;
  lora::merge_checked(merged, one, other);
  CHECK(same_bits(merged, want));
  CHECK(same_bits(lora::merged(W, one, other), want));
  lora::packed_weight<TestType> panels{W};
  CHECK(lora::merge(panels, one, other).became_nonfinite == 0);
  CHECK(same_bits(panels.matrix(), want));
  test::matrix<TestType> across = W.transpose();
  lora::merge(across.transpose(), one, other);
  CHECK(same_bits(across, test::matrix<TestType>(want.transpose())));
  CHECK(test::exact(lora::delta_weight(one, other)) ==
        test::exact_delta(one) + test::exact_delta(other));
}

TEST_CASE("fixed-size matrices and vectors of weights", "[merge]") {
  Eigen::Matrix<float, 3, 2> A;
  A << 1, 2, 3, 4, 5, 6;
  Eigen::Matrix<float, 5, 3> B;
  B.setConstant(2);
  const lora::basic_adapter l(A, B, lora::scaling{.alpha = 6});  // s = 2
  Eigen::Matrix<double, 5, 2, Eigen::RowMajor> W = Eigen::Matrix<double, 5, 2>::Ones();
  lora::merge(W, l);
  CHECK(W.col(0) == Eigen::Matrix<double, 5, 1>::Constant(1 + 4 * 9));
  CHECK(W.col(1) == Eigen::Matrix<double, 5, 1>::Constant(1 + 4 * 12));
  // A row of a column-major weight: elements a stride apart.
  MatrixXf large = MatrixXf::Zero(4, 2);
  const lora::adapter<float> one_row{A, B.topRows(1), {.alpha = 6}};
  lora::merge(large.row(2), one_row);
  CHECK(large.row(2) == Eigen::RowVector2f(36, 48));
  CHECK((large.topRows(2).isZero(0) && large.row(3).isZero(0)));
}

TEST_CASE("one call rounds once, two calls round twice", "[merge]") {
  // Above 256 bfloat16 steps by 2: 256 + 0.75 is 256 again, 256 + 1.5 is 258.
  using small = Eigen::Matrix<lora::bfloat16, 1, 1>;
  const auto W = [] { return small::Constant(lora::bfloat16(256)); };
  small together = W(), apart = W();
  lora::merge(together, adds(0.75F), adds(0.75F));
  lora::merge(apart, adds(0.75F));
  lora::merge(apart, adds(0.75F));
  CHECK(together(0, 0) == lora::bfloat16(258));
  CHECK(apart(0, 0) == lora::bfloat16(256));
  // Nor is there a rounding through float on the way from a double sum: 257 + 2^-30 is above the
  // tie, in float it is on it.
  small base = W();
  const lora::adapter<double> above{
      Eigen::MatrixXd::Ones(1, 1), Eigen::MatrixXd::Constant(1, 1, 1 + 0x1p-30), {.alpha = 1}};
  lora::merge(base, above);
  CHECK(base(0, 0) == lora::bfloat16(258));
}

TEST_CASE("the deltas are summed apart from the weight, in the order given", "[merge]") {
  const auto merged_in_order = [](float w, auto... deltas) {
    MatrixXf W = constant(1, 1, w);
    lora::merge(W, adds(deltas)...);
    return W(0, 0);
  };
  // 2^25 swallows 1 when 1 comes second: the order of the list is the order of the chain.
  CHECK(merged_in_order(0, 0x1p25F, -0x1p25F, 1.0F) == 1);
  CHECK(merged_in_order(0, 1.0F, 0x1p25F, -0x1p25F) == 0);
  const std::vector<lora::adapter<float>> range{adds(1), adds(0x1p25F)};
  MatrixXf W = constant(1, 1, 0);
  lora::merge(W, range, adds(-0x1p25F), std::vector<lora::scaled_adapter<lora::adapter<float>>>{});
  CHECK(W(0, 0) == 0);
  // A chain that started at W = 2^25 would lose both ones.
  CHECK(merged_in_order(0x1p25F, 1.0F, 1.0F, 2.0F) == 0x1p25F + 4);
}

TEST_CASE("double factors on a float base are added in double", "[merge]") {
  // 1 + 2^-24 + 2^-50 is above the tie between 1 and the next float; a delta rounded to float would
  // sit on it and give 1.
  const lora::adapter<double> l{Eigen::MatrixXd::Ones(1, 1),
                                Eigen::MatrixXd::Constant(1, 1, 0x1p-25 + 0x1p-51),
                                {.alpha = 2}};
  MatrixXf W = constant(1, 1, 1);
  lora::merge(W, l);
  CHECK(W(0, 0) == 1 + 0x1p-23F);
  MatrixXf floats = constant(1, 1, 1);
  lora::merge(floats, lora::adapter<float>{
                          constant(1, 1, 1), constant(1, 1, 0x1p-25F + 0x1p-51F), {.alpha = 2}});
  CHECK(floats(0, 0) == 1);
  MatrixXf mixed = constant(1, 1, 1);
  lora::merge(mixed, adds(0), l);
  CHECK(mixed(0, 0) == 1 + 0x1p-23F);
}

TEMPLATE_TEST_CASE("an element whose delta is zero keeps its bits", "[merge]", float, double,
                   lora::float16, lora::bfloat16, Eigen::half, Eigen::bfloat16) {
  using bits =
      std::conditional_t<sizeof(TestType) == 2, std::uint16_t,
                         std::conditional_t<sizeof(TestType) == 4, std::uint32_t, std::uint64_t>>;
  // -0, infinities, quiet and signaling NaN with payloads, the smallest subnormal; row 1 has a
  // delta, the others do not.
  const bits top = bits(bits(1) << (8 * sizeof(bits) - 1));
  const auto infinite =
      std::bit_cast<bits>(test::stored<TestType>(std::numeric_limits<double>::infinity()));
  const auto quiet =
      std::bit_cast<bits>(test::stored<TestType>(std::numeric_limits<double>::quiet_NaN()));
  const bits patterns[] = {top,
                           0,
                           infinite,
                           bits(infinite | top),
                           bits(quiet | 5),
                           bits(infinite | 3),
                           bits(quiet | top),
                           bits(infinite | top | 9),
                           1,
                           bits(top | 1)};
  test::matrix<TestType> W(3, 10);
  for (index_t j = 0; j < 10; ++j)
    W(0, j) = W(2, j) = std::bit_cast<TestType>(patterns[j]), W(1, j) = test::stored<TestType>(2);
  const auto before = test::bytes(W);
  MatrixXf B(3, 2);
  B << 0, 0, 3, 5, -0.0F, 0;
  const lora::adapter<float> l{MatrixXf::Ones(2, 10), B, {.alpha = 3}};
  const auto check = [&](const auto& result) {
    CHECK(test::bytes(result.row(0)) == test::bytes(W.row(0)));
    CHECK(test::bytes(result.row(2)) == test::bytes(W.row(2)));
    CHECK(test::value(result(1, 7)) == 14);
  };
  test::matrix<TestType> merged = W;
  CHECK(lora::merge(merged, l).became_nonfinite == 0);
  check(merged);
  check(lora::merged(W, l));
  test::col_matrix<TestType> by_cols = W;
  lora::merge(by_cols, l);
  check(by_cols);
  // An adapter whose deltas cancel adds zero too.
  merged = W;
  lora::merge(merged, l, lora::scaled(-1, l));
  CHECK(test::bytes(merged) == before);
  // No adapter, rank 0, strength 0: nothing to add.
  const lora::adapter<float> nothing{
      MatrixXf(0, 10), MatrixXf(3, 0), {.alpha = 2, .rule = scaling_rule::fixed}};
  lora::merge(merged);
  lora::merge(merged, nothing, lora::scaled(0, l));
  lora::unmerge(merged, std::vector<lora::adapter<float>>{});
  CHECK(test::bytes(merged) == before);
  CHECK(test::bytes(lora::merged(W)) == before);
  const lora::adapter<float> one_row{MatrixXf::Ones(1, 10), MatrixXf::Ones(1, 1), {.alpha = 3}};
  CHECK(test::bytes(lora::merged(by_cols.topRows(1), lora::scaled(0, one_row))) ==
        test::bytes(W.row(0)));
}

TEST_CASE("an adapter at strength 0 is checked and not read", "[merge]") {
  const lora::adapter<float> poison{
      constant(2, 5, nan_float), constant(4, 2, infinity), {.alpha = 7}};
  const lora::adapter<float> good{constant(1, 5, 1), constant(4, 1, 3), {.alpha = 2}};
  MatrixXf W = constant(4, 5, 1);
  CHECK(
      lora::merge(W, lora::scaled(0, poison), good, lora::scaled(-0.0, poison)).became_nonfinite ==
      0);
  CHECK(W == constant(4, 5, 7));
  const lora::adapter<float> zero_scaling{
      constant(2, 5, nan_float), constant(4, 2, nan_float), {.alpha = 0}};
  lora::merge_checked(W, zero_scaling);
  CHECK(W == constant(4, 5, 7));
  const lora::adapter<float> wrong{constant(2, 6, 1), constant(4, 2, 1), {.alpha = 7}};
  CHECK_THROWS_AS(lora::merge(W, lora::scaled(0, wrong)), lora::shape_error);
}

TEST_CASE("became_nonfinite counts what was finite and no longer is", "[merge]") {
  // Row 0 of B overflows float16 in the columns where A is 2, row 1 has a NaN, row 2 is fine.
  test::matrix<lora::float16> W =
      test::matrix<lora::float16>::Constant(3, 37, lora::float16(60000.0F));
  W(0, 0) = std::numeric_limits<lora::float16>::infinity();
  W(1, 1) = std::numeric_limits<lora::float16>::quiet_NaN();
  MatrixXf A = constant(1, 37, 1), B(3, 1);
  A.leftCols(20).setConstant(2);
  B << 1500, nan_float, -1;
  const lora::adapter<float> l{A, B, {.alpha = 2}};
  // Row 0: 60000 + 6000 overflows in 20 columns, one of which was infinite before; 60000 + 3000
  // does not. Row 1: 36 finite.
  test::matrix<lora::float16> merged = W;
  CHECK(lora::merge(merged, l).became_nonfinite == 19 + 36);
  test::col_matrix<lora::float16> by_cols = W;
  CHECK(lora::merge(by_cols, l).became_nonfinite == 19 + 36);
  CHECK(same_bits(merged.row(2), test::matrix<lora::float16>(by_cols.row(2))));
  CHECK(merged(0, 20) == lora::float16(63000.0F));
  CHECK(merged(2, 3) == lora::float16(59996.0F));
  CHECK(lora::unmerge(merged, l).became_nonfinite ==
        0);  // nothing that is finite now overflows downwards
  // In float nothing but the NaN is lost; already broken elements are not counted again.
  test::matrix<float> wide = in_format<float>(W.bottomRows(1));
  CHECK(
      lora::merge(wide, lora::adapter<float>{A, B.bottomRows(1), {.alpha = 2}}).became_nonfinite ==
      0);
  MatrixXf broken = constant(2, 3, infinity);
  CHECK(lora::merge(broken, rank_one(constant(2, 1, -infinity), constant(1, 3, 1)))
            .became_nonfinite == 0);
  // float overflows as well: s B A is 2^127, W is 2^127.
  MatrixXf large = constant(2, 3, 0x1p127F);
  CHECK(lora::merge(large, rank_one(constant(2, 1, 0x1p63F), constant(1, 3, 0x1p64F)))
            .became_nonfinite == 6);
  CHECK(large == constant(2, 3, infinity));
}

TEST_CASE("became_nonfinite counts across threads and tiles", "[merge]") {
  test::random g(81);
  CAPTURE(g.seed());
  test::matrix<lora::bfloat16> W = g.reals<lora::bfloat16>(301, 403, 2);
  MatrixXf A = g.reals<float>(4, 403, 1);
  const MatrixXf B = g.reals<float>(301, 4, 1);
  std::size_t columns = 0;
  for (index_t j = 0; j < 403; ++j)
    if (g.one_in(11)) A(g.integer(0, 3), j) = nan_float, ++columns;
  REQUIRE(columns > 10);
  const lora::adapter<float> l{A, B, {.alpha = 3}};
  const test::matrix<lora::bfloat16> before = W;
  CHECK(mentions(
      refusal<lora::value_error>([&] { lora::merge_checked(W, l); }),
      {"merge_checked", std::to_string(301 * columns).c_str(), std::to_string(301 * 403).c_str()}));
  CHECK(same_bits(W, before));
  CHECK(lora::merge(W, l).became_nonfinite == 301 * columns);
}

TEMPLATE_TEST_CASE("-0 stays -0 in whole tiles where no adapter contributes", "[merge]", float,
                   double, lora::float16, lora::bfloat16) {
  test::matrix<TestType> W = test::matrix<TestType>::Constant(37, 83, test::stored<TestType>(-0.0));
  const auto before = test::bytes(W);
  MatrixXf B = constant(37, 5, 0);
  B.col(1).setConstant(-0.0F);
  test::random g(82);
  CAPTURE(g.seed());
  const MatrixXf A = g.reals<float>(5, 83, 2);
  const lora::adapter<float> zero{A, B, {.alpha = 5}};
  test::col_matrix<TestType> by_cols = W;
  lora::packed_weight<TestType> panels{W};
  lora::merge(by_cols, zero);
  lora::merge(panels, zero);
  CHECK(test::bytes(test::matrix<TestType>(by_cols)) == before);
  CHECK(test::bytes(test::matrix<TestType>(panels.matrix())) == before);
  lora::unmerge(W, zero);
  CHECK(test::bytes(lora::merged(W, zero)) == before);
  CHECK(test::bytes(W) == before);
  // Factors of bfloat16, which may have another way; beside others, too.
  const lora::adapter<lora::bfloat16> short_zero{
      in_format<lora::bfloat16>(A), in_format<lora::bfloat16>(B), {.alpha = 5}};
  lora::merge(W, short_zero);
  lora::unmerge(W, short_zero);
  lora::merge(W, short_zero, zero, short_zero);
  lora::merge(panels, short_zero);
  CHECK(test::bytes(W) == before);
  CHECK(test::bytes(test::matrix<TestType>(panels.matrix())) == before);
  // What adapters cancel is zero as well.
  const lora::adapter<float> l{constant(3, 83, 2), constant(37, 3, 5), {.alpha = 9}};
  lora::merge(W, l, lora::scaled(-1, l));
  CHECK(test::bytes(W) == before);
}

TEMPLATE_TEST_CASE("a NaN of any bits in a factor becomes a NaN in the weight, and is counted",
                   "[merge]", float, lora::float16, lora::bfloat16) {
  test::matrix<TestType> W = test::matrix<TestType>::Constant(37, 83, test::stored<TestType>(1));
  MatrixXf A = constant(2, 83, 0.5F);
  const std::uint32_t nans[] = {0x7fff'ffff, 0xffff'ffff, 0x7f80'0001, 0xffff'8000, 0x7fc0'0000};
  for (index_t n = 0; n < 5; ++n)
    A(n % 2, 19 * n + 3) = std::bit_cast<float>(nans[n]);             // in either vector of a tile
  const lora::adapter<float> l{A, constant(37, 2, 2), {.alpha = 3}};  // s = 3/2: 1 + 3/2 * 2
  test::col_matrix<TestType> by_cols = W;
  lora::packed_weight<TestType> panels{W};
  CHECK(lora::merge(W, l).became_nonfinite == 5 * 37);
  CHECK(lora::merge(by_cols, l).became_nonfinite == 5 * 37);
  CHECK(lora::merge(panels, l).became_nonfinite == 5 * 37);
  index_t wrong = 0;
  const auto in_panels = panels.matrix();
  for (index_t i = 0; i < 37; ++i)
    for (index_t j = 0; j < 83; ++j)
      for (const double value :
           {test::value(W(i, j)), test::value(by_cols(i, j)), test::value(in_panels(i, j))})
        wrong += j % 19 == 3 ? !std::isnan(value) : value != 4;
  CHECK(wrong == 0);
}

TEST_CASE("which NaN of two is kept does not depend on the layout", "[merge]") {
  using lora::bfloat16;
  const auto W = test::matrix<bfloat16>::Constant(37, 83, bfloat16(1.0F)).eval();
  test::matrix<bfloat16> A = test::matrix<bfloat16>::Constant(4, 83, bfloat16(0.5F));
  test::matrix<bfloat16> B = test::matrix<bfloat16>::Constant(37, 4, bfloat16(2.0F));
  A(1, 7) = bfloat16::from_bits(0x7fc1);
  A(2, 70) = bfloat16::from_bits(0x7f81);
  B(3, 1) = bfloat16::from_bits(0xffd5);
  B(30, 2) = bfloat16::from_bits(0xff95);
  const lora::adapter<bfloat16> l{A, B, {.alpha = 3}};
  test::matrix<bfloat16> rows = W;
  test::col_matrix<bfloat16> cols = W;
  lora::packed_weight panels{W};
  CHECK(lora::merge(rows, l).became_nonfinite == 2 * 37 + 2 * 83 - 4);
  lora::merge(cols, l);
  lora::merge(panels, l);
  CHECK(test::same_bits(test::matrix<bfloat16>(cols), rows));
  CHECK(test::same_bits(panels.matrix(), rows));
  // Factors and weights of double.
  test::matrix<double> C = test::matrix<double>::Constant(4, 83, 0.5),
                       D = test::matrix<double>::Constant(37, 4, 2.0);
  C(1, 7) = std::bit_cast<double>(0x7ff9'0000'0000'0000u);
  D(3, 1) = std::bit_cast<double>(0xffff'0000'0000'0000u);
  const lora::adapter<double> wide{C, D, {.alpha = 3}};
  test::matrix<double> wide_rows = test::matrix<double>::Constant(37, 83, 1.0);
  test::col_matrix<double> wide_cols = wide_rows;
  CHECK(lora::merge(wide_rows, wide).became_nonfinite == 37 + 83 - 1);
  lora::merge(wide_cols, wide);
  CHECK(test::same_bits(test::matrix<double>(wide_cols), wide_rows));
}

TEMPLATE_TEST_CASE(
    "factors of bfloat16: what one of a pair of ranks does to a tile of common weights", "[merge]",
    float, lora::float16, lora::bfloat16) {
  using lora::bfloat16;
  for (const index_t odd : {0, 1})
    for (const double value : {static_cast<double>(nan_float), 0x1p120, 0x1p121}) {
      test::matrix<TestType> W =
          test::matrix<TestType>::Constant(37, 83, test::stored<TestType>(1));
      test::matrix<bfloat16> A = test::matrix<bfloat16>::Constant(4, 83, bfloat16(0.5F));
      A(2 + odd, 9) = bfloat16(static_cast<float>(value));
      const lora::adapter<bfloat16> l{
          A, test::matrix<bfloat16>::Constant(37, 4, bfloat16(256.0F)), {.alpha = 3}};
      lora::packed_weight<TestType> panels{W};
      CAPTURE(odd, value);
      // 256 * 2^120 is infinite as a sum of dot products, and finite where s = 3/4 is folded into
      // lora_B first.
      const bool folded = lora::flush_threshold_of_delta<float, lora::adapter<bfloat16>>() == 0;
      const bool finite = value == 0x1p120 && folded && !std::is_same_v<TestType, lora::float16>;
      CHECK(lora::merge(panels, l).became_nonfinite == (finite ? 0 : 37));
      CHECK(lora::merge(W, l).became_nonfinite == (finite ? 0 : 37));
      W.col(9).setConstant(test::stored<TestType>(385));
      CHECK((W.array() == test::stored<TestType>(385)).all());
    }
}

TEST_CASE("factors of bfloat16 at a scaling far from 1", "[merge]") {
  using lora::bfloat16;
  const auto constant_16 = [](index_t rows, index_t cols, double v) {
    return test::matrix<bfloat16>::Constant(rows, cols, bfloat16(static_cast<float>(v))).eval();
  };
  // Without s the sum of the products is beyond float, or below its normal numbers.
  for (const double s : {0x1p-40, 0x1p-9, 0x1p17, 0x1p40}) {
    const double factor = s < 1 ? 0x1p64 : 0x1p-64;
    const lora::adapter<bfloat16> l{constant_16(4, 83, factor),
                                    constant_16(37, 4, factor),
                                    {.alpha = s, .rule = scaling_rule::fixed}};
    test::matrix<bfloat16> W = constant_16(37, 83, 0);
    CAPTURE(s);
    CHECK(lora::merge(W, l).became_nonfinite == 0);
    CHECK(test::same_bits(W, constant_16(37, 83, 4 * factor * factor * s)));
  }
}

TEMPLATE_TEST_CASE("subnormal weights and results keep their bits among common ones", "[merge]",
                   float, lora::float16, lora::bfloat16) {
  const double least = static_cast<double>(std::numeric_limits<TestType>::denorm_min());
  test::matrix<TestType> W = test::matrix<TestType>::Constant(37, 83, test::stored<TestType>(0.5));
  for (index_t i = 0; i < 37; ++i)
    W(i, 5 * i % 83) = test::stored<TestType>(least * static_cast<double>(i - 18));
  for (index_t i = 0; i < 37; ++i)
    W(i, (5 * i + 1) % 83) = test::stored<TestType>(least * 1024 * static_cast<double>(i));
  // The delta of an even row is one unit of the smallest, in columns beside which 0.5 does not see
  // it; of an odd one zero.
  MatrixXf B = constant(37, 1, 0);
  for (index_t i = 0; i < 37; i += 2)
    B(i, 0) = std::is_same_v<TestType, lora::float16> ? 0x1p-20F : 0x1p-80F;
  const lora::adapter<float> l{
      constant(1, 83, static_cast<float>(least / static_cast<double>(B(0, 0)))), B, {.alpha = 1}};
  test::matrix<TestType> expected = W;
  for (index_t i = 0; i < 37; i += 2)
    for (index_t j = 0; j < 83; ++j)
      expected(i, j) = test::stored<TestType>(test::value(W(i, j)) + least);
  lora::packed_weight<TestType> panels{W};
  lora::merge(panels, l);
  lora::merge(W, l);
  CHECK(test::same_bits(W, expected));
  CHECK(test::same_bits(test::matrix<TestType>(panels.matrix()), expected));
}

TEMPLATE_TEST_CASE("weights next to the largest number stay finite", "[merge]", float, double,
                   lora::float16, lora::bfloat16) {
  // Their sum does not: what is looked at must be each.
  const TestType largest = std::numeric_limits<TestType>::max();
  test::matrix<TestType> W = test::matrix<TestType>::Constant(37, 83, largest);
  W.rightCols(40).setConstant(test::stored<TestType>(-test::value(largest)));
  const auto before = test::bytes(W);
  const lora::adapter<float> l{constant(1, 83, 1), constant(37, 1, 1), {.alpha = 3}};
  lora::merge_checked(W, l);
  CHECK(test::bytes(W) == before);
  lora::packed_weight<TestType> panels{W};
  CHECK(lora::merge(panels, l).became_nonfinite == 0);
  CHECK(test::bytes(test::matrix<TestType>(panels.matrix())) == before);
  // Half a unit of the largest: the tie goes to infinity.
  using factor = lora::accumulator_t<TestType, float>;
  const double step = std::is_same_v<TestType, lora::float16>    ? 16
                      : std::is_same_v<TestType, lora::bfloat16> ? 0x1p119
                      : std::is_same_v<TestType, float>          ? 0x1p103
                                                                 : 0x1p970;
  const lora::adapter<factor> far{
      test::matrix<factor>::Constant(1, 83, static_cast<factor>(step / 4)),
      test::matrix<factor>::Constant(37, 1, 1),
      {.alpha = 4}};
  CHECK(lora::unmerge(panels, far).became_nonfinite == 37 * 40);
  test::matrix<TestType> copy = W;
  CHECK(lora::unmerge(copy, far).became_nonfinite == 37 * 40);
  CHECK(lora::merge(W, far).became_nonfinite == 37 * 43);
}

TEST_CASE("merge_checked changes all or nothing", "[merge]") {
  const auto big = rank_one(constant(3, 1, 3e38F), constant(1, 4, 1), 2);
  MatrixXf W = constant(3, 4, 0);
  W(2, 3) = 1e38F;
  const auto before = test::bytes(W);
  const auto text = refusal<lora::value_error>([&] { lora::merge_checked(W, big); });
  CHECK(mentions(text,
                 {"lora::merge_checked", "1 of 12", "(1 of them are finite now)", "untouched"}));
  CHECK(test::bytes(W) == before);
  // A weight that is broken already is refused as well, even where nothing is added to it.
  W.setOnes();
  W(1, 1) = nan_float;
  const auto broken = test::bytes(W);
  const auto other = refusal<lora::value_error>(
      [&] { lora::merge_checked(W, rank_one(Eigen::Vector3f(1, 0, 1), constant(1, 4, 1))); });
  CHECK(mentions(other, {"1 of 12", "(0 of them are finite now)"}));
  CHECK(test::bytes(W) == broken);
  // In 16 bits what overflows is the stored value.
  test::col_matrix<lora::float16> small =
      test::col_matrix<lora::float16>::Constant(3, 4, lora::float16(65504));
  const auto full = test::bytes(small);
  lora::merge_checked(small,
                      rank_one(constant(3, 1, 15), constant(1, 4, 1)));  // rounds back to 65504
  CHECK(test::bytes(small) == full);
  CHECK_THROWS_AS(lora::merge_checked(small, rank_one(constant(3, 1, 16), constant(1, 4, 1))),
                  lora::value_error);
  CHECK(test::bytes(small) == full);
  lora::merge_checked(small, rank_one(constant(3, 1, -32), constant(1, 4, 1)));
  CHECK(small(2, 2) == lora::float16(65472));
}

TEST_CASE("weights without elements, and of one", "[merge]") {
  MatrixXf no_rows(0, 5), no_cols(4, 0);
  const lora::adapter<float> rows{constant(2, 5, 1), MatrixXf(0, 2), {.alpha = 3}};
  const lora::adapter<float> cols{MatrixXf(2, 0), constant(4, 2, 1), {.alpha = 3}};
  CHECK(lora::merge(no_rows, rows).became_nonfinite == 0);
  CHECK(lora::unmerge(no_cols, cols).became_nonfinite == 0);
  lora::merge_checked(no_rows, rows);
  CHECK((lora::merged(no_rows, rows).rows() == 0 && lora::merged(no_cols, cols).rows() == 4));
  // In every layout, so that each side of a tile has been the empty one.
  const auto all_verbs = [](auto W, const auto& l) {
    CHECK(lora::merge(W, l).became_nonfinite == 0);
    lora::merge_checked(W, l);
    lora::merge_checked(W);
    CHECK(lora::merged(W, l).size() == 0);
  };
  all_verbs(test::matrix<float>(no_rows), rows);
  all_verbs(test::matrix<float>(no_cols), cols);
  all_verbs(no_rows, rows);
  all_verbs(no_cols, cols);
  for (const MatrixXf& W : {no_rows, no_cols}) {
    lora::packed_weight<float> panels{W};
    const auto& l = W.rows() == 0 ? rows : cols;
    CHECK(lora::merge(panels, l).became_nonfinite == 0);
    lora::merge_checked(panels, l);
    CHECK(lora::merged(panels, l).matrix().size() == 0);
  }
  MatrixXf one = constant(1, 1, 2);
  lora::merge(one, lora::adapter<float>{constant(3, 1, 2), constant(1, 3, 5), {.alpha = 1.5}});
  CHECK(one(0, 0) == 2 + 0.5F * 30);
}

namespace {

/// Each of the verbs that write W, by its name in messages; merged reads W only.
template <class W, class... L>
void every_merge_refuses(const W& before, W& weight, std::initializer_list<const char*> words,
                         const L&... l) {
  const auto refuses = [&](const char* operation, const auto& call) {
    const std::string text = refusal<lora::shape_error>(call);
    CAPTURE(text);
    CHECK(mentions(text, {operation}));
    CHECK(mentions(text, words));
    CHECK(same_bits(weight, before));
  };
  refuses("lora::merge:", [&] { lora::merge(weight, l...); });
  refuses("lora::unmerge:", [&] { lora::unmerge(weight, l...); });
  refuses("lora::merge_checked:", [&] { lora::merge_checked(weight, l...); });
  refuses("lora::merged:", [&] { (void)lora::merged(weight, l...); });
}

}  // namespace

TEST_CASE("a weight of another shape is refused, and keeps its bits", "[merge]") {
  const lora::adapter<float> good{constant(2, 5, 1), constant(4, 2, 1), {.alpha = 3}},
      other{constant(2, 6, 1), constant(4, 2, 1), {.alpha = 3}};
  const auto check = [&](auto before, std::initializer_list<const char*> words, const auto&... l) {
    auto weight = before;
    every_merge_refuses(before, weight, words, l...);
  };
  check(MatrixXf(constant(4, 6, 7)),
        {"delta weight is 4x5", "weight is 4x6", "out_features x in_features"}, good);
  check(
      test::matrix<lora::bfloat16>(test::matrix<lora::bfloat16>::Constant(3, 5, lora::bfloat16(7))),
      {"delta weight is 4x5", "weight is 3x5"}, good);
  check(Eigen::Matrix<double, 4, 4>(Eigen::Matrix<double, 4, 4>::Ones()), {"4x5", "4x4"}, good);
  check(MatrixXf(0, 5), {"4x5", "0x5"}, good);
  check(MatrixXf(4, 0), {"4x5", "4x0"}, good);
  // The other way round there is a hint.
  check(MatrixXf(constant(5, 4, 7)), {"4x5", "5x4", "transpose", "fan_in_fan_out"}, good);
  // The last one of several, also in a range, at strength 0 and with rank 0: nothing of the others
  // is merged.
  check(MatrixXf(constant(4, 5, 7)), {"4x6", "4x5"}, good, lora::scaled(0.5, good), other);
  check(MatrixXf(constant(4, 5, 7)), {"4x6", "4x5"}, std::vector{good, good, other});
  check(MatrixXf(constant(4, 5, 7)), {"4x6", "4x5"}, good, lora::scaled(0, other));
  check(MatrixXf(constant(4, 5, 7)), {"4x6", "4x5"}, good,
        lora::adapter<float>{
            MatrixXf(0, 6), MatrixXf(4, 0), {.alpha = 3, .rule = scaling_rule::fixed}});
  // Views of every kind say the same.
  std::vector<float> six(6, 7);
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::merge(lora::row_major(six, 2, 3), good); }),
                 {"4x5", "2x3"}));
  using extents = test::md::dextents<>;
  CHECK(mentions(refusal<lora::shape_error>([&] {
                   lora::merge(test::md::mdspan<float, extents>(six.data(), extents(2, 3)), good);
                 }),
                 {"4x5", "2x3"}));
  CHECK(six == std::vector<float>(6, 7));
}

TEST_CASE("a scaling that is not finite is refused, and W keeps its bits", "[merge]") {
  const lora::adapter<float> l{constant(2, 5, 1), constant(4, 2, 1), {.alpha = 200}};
  const MatrixXf before = constant(4, 5, 7);
  MatrixXf W = before;
  const auto infinite = lora::scaled(1e307, l);
  const auto refuses = [&](const char* operation, const auto& call) {
    CHECK(mentions(refusal<lora::value_error>(call), {operation, "scaling is not finite"}));
    CHECK(same_bits(W, before));
  };
  refuses("lora::merge:", [&] { lora::merge(W, l, infinite); });
  refuses("lora::unmerge:", [&] { lora::unmerge(W, l, infinite); });
  refuses("lora::merge_checked:", [&] { lora::merge_checked(W, l, infinite); });
  refuses("lora::merged:", [&] { (void)lora::merged(W, l, infinite); });
}

TEST_CASE("W may not share memory with a factor", "[merge]") {
  // A 4 x 5 weight, lora_A 2 x 5 and lora_B 4 x 2 in one buffer; only one of the two lies in W.
  std::vector<float> buffer(100, 2);
  const std::vector<float> before = buffer;
  const auto W = lora::row_major(buffer.data(), 4, 5);
  const auto refuses = [&](const auto& weight, const float* A, const float* B, const char* factor) {
    const lora::adapter_view<float> l{
        lora::row_major(A, 2, 5), lora::row_major(B, 4, 2), {.alpha = 3}};
    const auto one = [&](const char* operation, const auto& call) {
      CHECK(mentions(refusal<lora::shape_error>(call),
                     {operation, "W is written and overlaps", factor}));
      CHECK(buffer == before);
    };
    one("lora::merge:", [&] { lora::merge(weight, l); });
    one("lora::unmerge:", [&] { lora::unmerge(weight, l); });
    one("lora::merge_checked:", [&] { lora::merge_checked(weight, l); });
    one("lora::merge:", [&] { lora::merge(weight, std::vector{lora::scaled(0, l)}); });
  };
  const float* const data = buffer.data();
  refuses(W, data, data + 50, "lora_A");
  refuses(W, data + 19, data + 50, "lora_A");  // one element
  refuses(W, data + 50, data + 12, "lora_B");
  refuses(lora::col_major(buffer.data(), 4, 5), data + 19, data + 50, "lora_A");
  refuses(lora::row_major(buffer.data(), 5, 4).transpose(), data + 50, data + 19, "lora_B");
  refuses(Eigen::Map<MatrixXf>(buffer.data() + 12, 4, 5), data + 3, data + 50, "lora_A");
  // Beside it, and between its rows, is no overlap: merged reads both at once, so it may be asked
  // for the numbers.
  const lora::adapter_view<float> beside{
      lora::row_major(data + 20, 2, 5), lora::row_major(data + 30, 4, 2), {.alpha = 3}};
  const MatrixXf expected = lora::merged(W, beside);
  lora::merge(W, beside);
  CHECK(lora::merged(W) == expected);
  test::matrix<float> wide = test::matrix<float>::Constant(4, 12, 2);  // W | lora_A above nothing
  const auto left = lora::as_matrix(wide).middle_cols(0, 5);
  const lora::adapter_view<float> right{
      lora::as_matrix(wide).block(1, 6, 2, 5), lora::row_major(data + 30, 4, 2), {.alpha = 3}};
  lora::merge(left, right);
  CHECK(wide.leftCols(5) == constant(4, 5, 2 + 1.5F * 8));
  CHECK(wide.rightCols(7) == constant(4, 7, 2));
  // merged writes elsewhere.
  const lora::adapter_view<float> inside{
      lora::row_major(data, 2, 5), lora::row_major(data + 30, 4, 2), {.alpha = 3}};
  CHECK_NOTHROW((void)lora::merged(W, inside));
}
