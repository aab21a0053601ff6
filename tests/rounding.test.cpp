// SPDX-License-Identifier: Apache-2.0
//
// PEFT's roundings on numbers small enough to follow by hand; golden/peft_rounding compares them
// with PEFT's own.
#include "lora/rounding.hpp"

#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

using lora::bfloat16;
using lora::float16;
using lora::index_t;
using test::same_bits;
template <class T>
using matrix = test::matrix<T>;

TEST_CASE("peft rounds the sum once, peft_safe the delta first", "[rounding]") {
  // bfloat16 has 8 bits: 256 + 1.5 is 258, a tie between 256 and 258 is 256; 1.5 + 2^-8 rounds to
  // 1.5 first.
  const matrix<float> A = matrix<float>::Ones(1, 2);
  matrix<float> B(2, 1);
  B << 1.50390625F, 1.0F;
  const lora::adapter<float> l{A, B, {.alpha = 1}};
  const auto base =
      matrix<float>::Constant(2, 2, 255.5F).cast<bfloat16>().eval();  // 256, the tie's even side
  auto W = base, S = base;
  lora::merge(lora::rounding::as_peft, W, l);
  lora::merge(lora::rounding::as_peft_safe, S, l);
  CHECK(static_cast<float>(W(0, 0)) == 258.0F);
  CHECK(static_cast<float>(S(0, 0)) == 258.0F);
  CHECK(static_cast<float>(W(1, 0)) == 256.0F);
  CHECK(static_cast<float>(S(1, 0)) == 256.0F);
  // 128 + (0.5 + 2^-9): above the tie of 128 and 129; the delta rounds to 0.5 first and the tie
  // goes to 128.
  matrix<float> tie(2, 1);
  tie << 0.5F + 0x1p-9F, 0.25F;
  const lora::adapter<float> t{A, tie, {.alpha = 1}};
  W = S = matrix<float>::Constant(2, 2, 128).cast<bfloat16>().eval();
  lora::merge(lora::rounding::as_peft, W, t);
  lora::merge(lora::rounding::as_peft_safe, S, t);
  CHECK(static_cast<float>(W(0, 1)) == 129.0F);
  CHECK(static_cast<float>(S(0, 1)) == 128.0F);
}

TEST_CASE("a rounding policy checks what merge checks and writes nothing before", "[rounding]") {
  matrix<float> W = matrix<float>::Constant(3, 4, 1), A = matrix<float>::Ones(2, 4),
                B = matrix<float>::Ones(3, 2);
  const lora::adapter<float> l{A, B, {.alpha = 4}};
  matrix<float> wrong = matrix<float>::Constant(4, 3, 1);
  CHECK_THROWS_AS(lora::merge(lora::rounding::as_peft, wrong, l), lora::shape_error);
  CHECK(wrong == matrix<float>::Constant(4, 3, 1));
  lora::merge(lora::rounding::as_peft, W, l, lora::scaled(0.5, l));
  CHECK(W == matrix<float>::Constant(3, 4, 1 + 4 + 2));
  lora::unmerge(lora::rounding::as_peft_safe, W, l, lora::scaled(0.5, l));
  CHECK(W == matrix<float>::Constant(3, 4, 1));
  matrix<float16> H = matrix<float16>::Constant(3, 4, float16(60000.0F));
  const lora::adapter<float> big{A, B, {.alpha = 40000}};
  CHECK(lora::merge(lora::rounding::as_peft, H, big).became_nonfinite == 12);
}

namespace {

/// One adapter goes through register tiles, two through the row pass; the second one adds 0.
template <class T, class F, class M>
void check_both_ways(test::random& g, index_t out, index_t in, index_t rank) {
  const lora::adapter<F> l{g.reals<F>(rank, in, 0.5), g.reals<F>(out, rank, 0.5), {.alpha = 2.7}};
  const lora::adapter<F> zero{g.reals<F>(1, in, 1), test::matrix<F>::Zero(out, 1), {.alpha = 1}};
  const M W = g.reals<T>(out, in, 1);
  const auto check = [&](const auto& verb) {
    M one = W, two = W;
    const auto of_one = verb(one, l);
    const auto of_two = verb(two, l, zero);
    CHECK(same_bits(one, two));
    CHECK(of_one.changed == of_two.changed);
  };
  CAPTURE(out, in, rank);
  using namespace lora::rounding;
  check([](M& to, const auto&... k) { return lora::merge(as_peft, to, k...); });
  check([](M& to, const auto&... k) { return lora::merge(as_peft_safe, to, k...); });
  check([](M& to, const auto&... k) { return lora::unmerge(as_peft, to, k...); });
  check([](M& to, const auto&... k) { return lora::unmerge(as_peft_safe, to, k...); });
}

template <class T, class F>
void check_both_ways_in_each_order(std::uint64_t seed) {
  test::random g(seed);
  CAPTURE(g.seed());
  for (const index_t out : {3, 17, 40})
    for (const index_t in : {5, 33, 70})
      for (const index_t rank : {1, 6}) {
        check_both_ways<T, F, test::matrix<T>>(g, out, in, rank);
        check_both_ways<T, F, test::col_matrix<T>>(g, out, in, rank);
      }
}

}  // namespace

TEST_CASE("register tiles have the bits and the count of the row pass", "[rounding]") {
  SECTION("float, float") { check_both_ways_in_each_order<float, float>(5101); }
  SECTION("float, double") { check_both_ways_in_each_order<float, double>(5102); }
  SECTION("double, float") { check_both_ways_in_each_order<double, float>(5103); }
  SECTION("double, double") { check_both_ways_in_each_order<double, double>(5104); }
  SECTION("float, bfloat16") { check_both_ways_in_each_order<float, lora::bfloat16>(5105); }
  SECTION("float, float16") { check_both_ways_in_each_order<float, lora::float16>(5106); }
  SECTION("bfloat16, float") { check_both_ways_in_each_order<lora::bfloat16, float>(5107); }
  SECTION("bfloat16, double") { check_both_ways_in_each_order<lora::bfloat16, double>(5108); }
  SECTION("bfloat16, bfloat16") {
    check_both_ways_in_each_order<lora::bfloat16, lora::bfloat16>(5109);
  }
  SECTION("float16, bfloat16") {
    check_both_ways_in_each_order<lora::float16, lora::bfloat16>(5110);
  }
  SECTION("float16, float16") { check_both_ways_in_each_order<lora::float16, lora::float16>(5111); }
}
