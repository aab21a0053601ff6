// SPDX-License-Identifier: Apache-2.0
//
// apply with a batch: after a product of the caller's, each token's own adapters, with the bits of
// apply to that token alone.
#include <limits>
#include <vector>

#include "lora/lora.hpp"
#include "support/allocations.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/recipe.hpp"
#include "support/refused.hpp"

namespace {

using lora::assignment;
using lora::index_t;
using test::mentions;
using test::recipe;
using test::refusal;
using test::same_bits;

template <class F, class Y>
void check_packed(std::uint64_t seed) {
  test::random g(seed);
  CAPTURE(g.seed());
  for (int trial = 0; trial < 20; ++trial) {
    const index_t out = g.integer(1, 75), in = g.integer(1, 90), tokens = g.integer(1, 60);
    CAPTURE(trial, out, in, tokens);
    std::vector<lora::packed_adapter<F>> adapters;
    for (const index_t rank : {3, 16, 17, 40, 3})
      adapters.emplace_back(
          lora::adapter<F>{g.reals<F>(rank, in, 1), g.reals<F>(out, rank, 1), {.alpha = 5}});
    const test::col_matrix<Y> x = g.reals<Y>(in, tokens, 1), before = g.reals<Y>(out, tokens, 1);
    test::col_matrix<Y> y = before, one(out, 1);
    lora::batch who{adapters};
    for (index_t t = 0; t < tokens; ++t)
      t % 3 == 2 ? who.add() : who.add({{t % 5, 0.5}, {(t + 1 + t % 2) % 5, -1.5}});
    lora::apply(x, y, who);
    for (index_t t = 0; t < tokens; ++t) {
      one = before.col(t);
      if (t % 3 != 2)
        lora::apply(x.col(t), one, lora::scaled(0.5, adapters[static_cast<std::size_t>(t % 5)]),
                    lora::scaled(-1.5, adapters[static_cast<std::size_t>((t + 1 + t % 2) % 5)]));
      CHECK(same_bits(one, y.col(t)));
    }
  }
}

template <class F, class Y>
void check_forms(std::uint64_t seed) {
  test::random g(seed);
  CAPTURE(g.seed());
  using acc = lora::accumulator_t<F, Y>;
  for (int trial = 0; trial < 40; ++trial) {
    const index_t out = g.integer(1, 75), in = g.integer(1, 60), tokens = g.integer(1, 30);
    CAPTURE(trial, out, in, tokens);
    std::vector<recipe<F>> list;
    std::vector<lora::mixed_form<acc>> forms;
    for (int n = 0; n < 4; ++n) {
      list.push_back(recipe<F>::drawn(g, out, in, g.integer(1, 3), false));
      forms.push_back(lora::mixed<acc>(out, in, list.back()));
    }
    const test::col_matrix<Y> x = g.reals<Y>(in, tokens, 1), before = g.reals<Y>(out, tokens, 1);
    test::col_matrix<Y> y = before, one(out, 1);
    lora::batch who{forms};
    std::vector<std::vector<assignment>> lists;
    for (index_t t = 0; t < tokens; ++t) {
      std::vector<assignment> entries;
      for (index_t n = t % 4; n > 0; --n) {
        const index_t k = g.integer(0, 3);
        entries.push_back(
            {k, forms[static_cast<std::size_t>(k)].additive() ? g.uniform(-2, 2) : 1.0});
      }
      who.add(entries);
      lists.push_back(entries);
    }
    lora::apply(x, y, who);
    for (index_t t = 0; t < tokens; ++t) {
      const auto& entries = lists[static_cast<std::size_t>(t)];
      lora::batch alone{forms};
      alone.add(entries);
      one = before.col(t);
      lora::apply(x.col(t), one, alone);
      CHECK(same_bits(one, y.col(t)));
      if (entries.empty()) CHECK(same_bits(one, before.col(t)));
      if (entries.size() == 1 && entries[0].weight == 1) {
        one = before.col(t);
        lora::apply(x.col(t), one, forms[static_cast<std::size_t>(entries[0].adapter)]);
        CHECK(same_bits(one, y.col(t)));
      }
      // What the steps make of a weight of zeros, and y times the gains.
      test::exact_matrix base = test::exact(before.col(t)), size = base.cwiseAbs();
      test::exact_matrix weight = test::exact_matrix::Zero(out, in), weight_size = weight;
      index_t roundings = in + 8;
      test::exact_matrix shift = test::exact_matrix::Zero(out, 1), shift_size = shift;
      for (const assignment& e : entries) {
        const auto& l = list[static_cast<std::size_t>(e.adapter)];
        for (const auto& step : forms[static_cast<std::size_t>(e.adapter)].steps())
          if (const auto* gain = std::get_if<lora::gain_step<acc>>(&step))
            for (index_t i = 0; i < out; ++i) {
              base(i, 0) *= static_cast<long double>(gain->gain[static_cast<std::size_t>(i)]);
              size(i, 0) *=
                  std::abs(static_cast<long double>(gain->gain[static_cast<std::size_t>(i)]));
            }
        std::tie(weight, shift) = l.merged(weight, shift, false, e.weight);
        std::tie(weight_size, shift_size) = l.merged(weight_size, shift_size, true, e.weight);
        roundings += l.roundings() + 2;
      }
      const test::exact_matrix ex = test::exact(x.col(t));
      test::expected want{base + test::times(weight, ex) + shift,
                          size + test::times(weight_size, ex.cwiseAbs()) + shift_size, roundings};
      want.least = 0x1p-126L * static_cast<long double>(2 * roundings) * (1 + want.size.maxCoeff());
      CHECK(want.template holds<acc>(y.col(t).eval()));
    }
  }
}

}  // namespace

TEST_CASE("packed adapters of a batch are added to each token's y", "[apply][batch]") {
  SECTION("float") { check_packed<float, float>(4201); }
  SECTION("bfloat16") { check_packed<lora::bfloat16, lora::bfloat16>(4202); }
  SECTION("float16 adapters, float y") { check_packed<lora::float16, float>(4203); }
  SECTION("float adapters, double y") { check_packed<float, double>(4204); }
}

TEST_CASE("forms of a batch change each token's y", "[apply][batch]") {
  SECTION("float") { check_forms<float, float>(4211); }
  SECTION("bfloat16") { check_forms<lora::bfloat16, lora::bfloat16>(4212); }
  SECTION("double") { check_forms<double, double>(4213); }
}

TEST_CASE("a token without adapters keeps every bit of y", "[apply][batch]") {
  test::random g(4221);
  const std::vector<lora::packed_adapter<float>> adapters{lora::packed_adapter<float>(
      lora::adapter<float>{g.reals<float>(2, 5, 1), g.reals<float>(7, 2, 1), {.alpha = 3}})};
  const std::vector forms{
      lora::mixed(7, 5, recipe<float>().low_rank(g, 7, 5, 2).gain(g, 7, true).shift(g, 7))};
  const test::col_matrix<float> x = g.reals<float>(5, 3, 1);
  test::col_matrix<float> y(7, 3);
  y.setConstant(-0.0F);
  y(3, 1) = std::numeric_limits<float>::quiet_NaN();
  const test::col_matrix<float> before = y;
  lora::batch packed{adapters};
  lora::batch of_forms{forms};
  for (const bool any : {true, false, true}) {
    any ? packed.add({{0}}) : packed.add();
    any ? of_forms.add({{0}}) : of_forms.add({{0, 0.0}});
  }
  lora::apply(x, y, packed);
  CHECK(same_bits(y.col(1), before.col(1)));
  CHECK(!same_bits(y.col(0), before.col(0)));
  y = before;
  lora::apply(x, y, of_forms);
  CHECK(same_bits(y.col(1), before.col(1)));
  CHECK(!same_bits(y.col(2), before.col(2)));
}

TEST_CASE("a batch that does not fit is refused, and y stays", "[apply][batch]") {
  test::random g(4231);
  const std::vector<lora::packed_adapter<float>> adapters{lora::packed_adapter<float>(
      lora::adapter<float>{g.reals<float>(2, 5, 1), g.reals<float>(7, 2, 1), {.alpha = 3}})};
  std::vector forms{lora::mixed(7, 5, recipe<float>().low_rank(g, 7, 5, 2).map(g, 5))};
  const test::col_matrix<float> x = g.reals<float>(5, 2, 1), wide = g.reals<float>(6, 2, 1);
  test::col_matrix<float> y = g.reals<float>(7, 2, 1);
  const test::col_matrix<float> before = y;
  lora::batch packed{adapters};
  packed.add({{0}});
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::apply(x, y, packed); }),
                 {"apply", "1 tokens", "2"}));
  packed.add({{0}});
  CHECK_THROWS_AS(lora::apply(wide, y, packed), lora::shape_error);
  CHECK_THROWS_AS(lora::apply(y.topRows(5), y, packed), lora::shape_error);
  lora::batch of_forms{forms};
  of_forms.add({{0}});
  of_forms.add();
  CHECK(mentions(refusal<lora::value_error>([&] { lora::apply(x, y, of_forms); }),
                 {"form 0", "form.input(x)"}));
  forms[0] = lora::mixed(7, 5, recipe<float>().low_rank(g, 7, 5, 2));
  CHECK(mentions(refusal<lora::value_error>([&] { lora::apply(x, y, of_forms); }),
                 {"form 0", "changed"}));
  CHECK(same_bits(y, before));
}

TEST_CASE("apply with a batch and a workspace allocates nothing in a steady state",
          "[apply][batch]") {
  test::random g(4241);
  const std::vector<lora::packed_adapter<float>> adapters{lora::packed_adapter<float>(
      lora::adapter<float>{g.reals<float>(2, 5, 1), g.reals<float>(7, 2, 1), {.alpha = 3}})};
  const std::vector forms{
      lora::mixed(7, 5, recipe<float>().low_rank(g, 7, 5, 2).gain(g, 7, true).shift(g, 7))};
  const test::col_matrix<float> x = g.reals<float>(5, 3, 1);
  test::col_matrix<float> y = g.reals<float>(7, 3, 1);
  lora::workspace space;
  lora::batch packed{adapters};
  lora::batch of_forms{forms};
  for (int t = 0; t < 3; ++t) {
    packed.add({{0}});
    of_forms.add({{0}, {0}});
  }
  const auto call = [&] {
    lora::apply(space, x, y, packed);
    lora::apply(space, x, y, of_forms);
  };
  call();
  test::allocations::start(0);
  call();
  test::allocations::stop();
  CHECK(test::allocations::now.count == 0);
}
