// SPDX-License-Identifier: Apache-2.0
//
// Batches of mixed forms, whose tokens have adapters of different kinds: each token gets what it
// gets alone, bit for bit, and that is what its adapters make of it; lists of pointers, which grow
// while a server runs.
#include <algorithm>
#include <memory>
#include <vector>

#include "lora/lora.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/recipe.hpp"
#include "support/refused.hpp"
#include "support/sanitized.hpp"

namespace {

using lora::assignment;
using lora::index_t;
using test::exact_matrix;
using test::mentions;
using test::recipe;
using test::refusal;
using test::same_bits;

template <class T, class F, class X>
void check_batches(std::uint64_t seed, int trials) {
  test::random g(seed);
  CAPTURE(g.seed());
  using acc = lora::accumulator_t<T, F, X>;
  lora::workspace space;
  for (int trial = 0; trial < test::trials(trials); ++trial) {
    const index_t out = g.integer(1, 75), in = g.one_in(5) ? g.integer(91, 1300) : g.integer(1, 90);
    const index_t tokens = g.one_in(4) ? g.integer(90, 210) : g.integer(1, 40);
    CAPTURE(trial, out, in, tokens);
    const test::matrix<T> W = g.reals<T>(out, in, 1);
    const test::col_matrix<X> x = g.reals<X>(in, tokens, 1);
    std::vector<recipe<F>> list;
    std::vector<lora::mixed_form<acc>> forms;
    for (index_t n = g.integer(1, 6); n > 0; --n) {
      list.push_back(recipe<F>::drawn(g, out, in, g.integer(1, 3), g.one_in(2)));
      forms.push_back(lora::mixed<acc>(W, list.back()));
    }
    lora::batch who{forms};
    std::vector<std::vector<assignment>> lists(static_cast<std::size_t>(tokens));
    for (auto& entries : lists) {
      for (index_t n = g.integer(0, 3); n > 0; --n) {
        const index_t k = g.integer(0, static_cast<index_t>(forms.size()) - 1);
        const auto& form = forms[static_cast<std::size_t>(k)];
        const double strength = g.one_in(5) ? 0.0 : form.additive() ? g.uniform(-2, 2) : 1.0;
        if (!entries.empty() &&
            forms[static_cast<std::size_t>(entries.back().adapter)].has_input_map())
          break;
        entries.push_back({k, strength});
      }
      who.add(entries);
    }
    const bool biased = g.one_in(2);
    const test::matrix<F> b = g.reals<F>(out, 1, 1);
    const lora::packed_weight<T> packed{W};
    test::col_matrix<X> y(out, tokens), unpacked(out, tokens), one(out, 1);
    const auto forward = [&](const auto& weight, const auto& from, auto& to, const auto& l) {
      if (biased)
        lora::forward(space, lora::with_bias(weight, b.col(0)), from, to, l);
      else
        lora::forward(space, weight, from, to, l);
    };
    forward(packed, x, y, who);
    forward(W, x, unpacked, who);
    CHECK(same_bits(y, unpacked));
    // The bits of every token, and what they are of about ten: the definition costs a merge in long
    // double for each.
    const index_t often = std::max<index_t>(1, tokens / 10);
    for (index_t t = 0; t < tokens; ++t) {
      const auto& entries = lists[static_cast<std::size_t>(t)];
      lora::batch alone{forms};
      alone.add(entries);
      forward(packed, x.col(t), one, alone);
      CHECK(same_bits(one, y.col(t)));
      if (entries.size() == 1 && entries[0].weight == 1) {
        forward(packed, x.col(t), one, forms[static_cast<std::size_t>(entries[0].adapter)]);
        CHECK(same_bits(one, y.col(t)));
      }
      if (t % often != 0) continue;
      exact_matrix weight = test::exact(W), size = weight.cwiseAbs();
      exact_matrix bias = biased ? test::exact(b) : exact_matrix::Zero(out, 1).eval(),
                   bias_size = bias.cwiseAbs();
      index_t roundings = in + 8;
      for (const assignment& e : entries) {
        if (e.weight == 0) continue;
        const auto& l = list[static_cast<std::size_t>(e.adapter)];
        std::tie(weight, bias) = l.merged(weight, bias, false, e.weight);
        std::tie(size, bias_size) = l.merged(size, bias_size, true, e.weight);
        roundings += l.roundings() + 2;
      }
      const exact_matrix ex = test::exact(x.col(t));
      test::expected want{test::times(weight, ex) + bias,
                          test::times(size, ex.cwiseAbs()) + bias_size, roundings};
      want.least = 0x1p-126L * static_cast<long double>(2 * roundings) * (1 + want.size.maxCoeff());
      CHECK(want.template holds<acc>(y.col(t).eval()));
    }
  }
}

}  // namespace

TEST_CASE("each token gets its forms, and its bits do not depend on the others", "[mixed][batch]") {
  SECTION("float") { check_batches<float, float, float>(2201, 60); }
  SECTION("bfloat16") { check_batches<lora::bfloat16, lora::bfloat16, lora::bfloat16>(2202, 30); }
  SECTION("bfloat16 base, float factors") { check_batches<lora::bfloat16, float, float>(2203, 20); }
  SECTION("double") { check_batches<double, double, double>(2204, 20); }
}

TEST_CASE("a batch of low-rank forms has the bits of one of packed adapters", "[mixed][batch]") {
  test::random g(2205);
  CAPTURE(g.seed());
  const lora::packed_weight W{g.reals<float>(70, 50, 1)};
  const test::col_matrix<float> x = g.reals<float>(50, 31, 1);
  std::vector<lora::packed_adapter<float>> packed;
  std::vector<lora::mixed_form<float>> forms;
  for (const index_t rank : {3, 16, 16, 40}) {
    const lora::adapter<float> l{
        g.reals<float>(rank, 50, 1), g.reals<float>(70, rank, 1), {.alpha = 3}};
    packed.emplace_back(l);
    forms.push_back(lora::mixed(70, 50, l));
  }
  lora::batch by_panels{packed};
  lora::batch by_forms{forms};
  for (index_t t = 0; t < 31; ++t) {
    const std::vector<assignment> entries{{t % 4, 0.5}, {(t / 3) % 4, -1.5}};
    by_panels.add(entries);
    by_forms.add(entries);
  }
  test::col_matrix<float> y(70, 31), want(70, 31);
  lora::forward(W, x, want, by_panels);
  lora::forward(W, x, y, by_forms);
  CHECK(same_bits(y, want));
}

TEST_CASE("a list of pointers grows while adapters stay", "[mixed][batch]") {
  test::random g(2206);
  CAPTURE(g.seed());
  const test::matrix<float> W = g.reals<float>(9, 8, 1);
  const test::col_matrix<float> x = g.reals<float>(8, 2, 1);
  test::col_matrix<float> y(9, 2), want(9, 1);
  std::vector<std::unique_ptr<const lora::mixed_form<float>>> owned;
  std::vector<const lora::mixed_form<float>*> served;
  std::vector<recipe<float>> list;
  const auto serve = [&] {
    list.push_back(recipe<float>::drawn(g, 9, 8, 3));
    owned.push_back(std::make_unique<const lora::mixed_form<float>>(lora::mixed(W, list.back())));
    served.push_back(owned.back().get());
  };
  serve();
  lora::batch who{served};
  who.add({{0}});
  for (int k = 0; k < 20; ++k) serve();
  who.assign(served);
  CHECK(who.tokens() == 0);
  who.add({{0}});
  who.add({{20}});
  lora::forward(W, x, y, who);
  for (const index_t t : {0, 1}) {
    lora::forward(W, x.col(t), want, *served[t == 0 ? 0 : 20]);
    CHECK(same_bits(want, y.col(t)));
  }
  // The same with packed adapters.
  const lora::packed_adapter<float> first{
      lora::adapter<float>{g.reals<float>(2, 8, 1), g.reals<float>(9, 2, 1), {.alpha = 3}}};
  const std::vector<const lora::packed_adapter<float>*> pointers{&first, &first};
  lora::batch packed{pointers};
  packed.add({{1, 0.5}});
  packed.add();
  lora::forward(W, x, y, packed);
  lora::forward(W, x.col(0), want, lora::scaled(0.5, first));
  CHECK(same_bits(want, y.col(0)));
  lora::forward(W, x.col(1), want);
  CHECK(same_bits(want, y.col(1)));
}

TEST_CASE("a batch of forms is refilled without allocating", "[mixed][batch]") {
  test::random g(2207);
  CAPTURE(g.seed());
  const lora::packed_weight W{g.reals<float>(33, 65, 1)};
  const std::vector<lora::mixed_form<float>> forms{
      lora::mixed(W, recipe<float>().low_rank(g, 33, 65, 4).gain(g, 33, true).shift(g, 33)),
      lora::mixed(W, recipe<float>().low_rank(g, 33, 65, 4).map(g, 65)),
      lora::mixed(W, recipe<float>().low_rank(g, 33, 65, 7))};
  const test::col_matrix<float> x = g.reals<float>(65, 12, 1);
  test::col_matrix<float> y(33, 12);
  lora::workspace space;
  lora::batch who{forms};
  const auto step = [&] {
    who.clear();
    for (index_t t = 0; t < 12; ++t) who.add({{2, 0.5}, {t % 2}});
    lora::forward(space, W, x, y, who);
  };
  step();
  test::allocations::start(0);
  step();
  test::allocations::stop();
  CHECK(test::allocations::now.count == 0);
  CHECK(y.allFinite());
}

TEST_CASE("what a batch of forms cannot mean is refused", "[mixed][batch]") {
  test::random g(2208);
  CAPTURE(g.seed());
  const test::matrix<float> W = g.reals<float>(5, 6, 1);
  std::vector<lora::mixed_form<float>> forms{
      lora::mixed(W, recipe<float>().low_rank(g, 5, 6, 2)),
      lora::mixed(W, recipe<float>().low_rank(g, 5, 6, 1).gain(g, 5, false)),
      lora::mixed(W, recipe<float>().low_rank(g, 5, 6, 1).map(g, 6))};
  lora::batch who{forms};
  const auto refused = [&](std::initializer_list<assignment> entries) {
    return refusal<lora::value_error>([&] { who.add(entries); });
  };
  CHECK(mentions(refused({{0}, {3}}), {"batch::add", "adapter 3", "of the 3"}));
  CHECK(mentions(refused({{1, 0.5}}),
                 {"batch::add", "adapter 1 of token 0", "strength 0.5", "not additive"}));
  CHECK(mentions(refused({{2, -1}}), {"batch::add", "adapter 2", "not additive"}));
  CHECK(mentions(refused({{2}, {0}}), {"batch::add", "adapter 2", "changes the input"}));
  CHECK(mentions(refused({{0, NAN}}), {"batch::add", "not finite"}));
  CHECK(who.tokens() == 0);
  who.add({{2, 0.0}, {0, 0.5}, {1, 0.0}, {2}});
  test::col_matrix<float> y = g.reals<float>(5, 1, 1);
  const test::col_matrix<float> before = y, x = g.reals<float>(6, 1, 1);
  forms[0] = lora::mixed(W, recipe<float>().low_rank(g, 5, 6, 2));
  CHECK(mentions(refusal<lora::value_error>([&] { lora::forward(W, x, y, who); }),
                 {"forward", "form 0", "changed"}));
  CHECK(same_bits(y, before));
  who.clear();
  who.add({{0}});
  lora::forward(W, x, y, who);
  CHECK_FALSE(same_bits(y, before));
  CHECK_THROWS_AS(lora::forward(W.topRows(4), x, y.topRows(4), who), lora::shape_error);
  CHECK_THROWS_AS(lora::forward(W, x.leftCols(0), y.leftCols(0), who), lora::shape_error);
}
