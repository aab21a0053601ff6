// SPDX-License-Identifier: Apache-2.0
//
// Adapters of some rows of a larger weight: these rows get the bits that the adapter gives a weight
// of its own, and all other rows, and their outputs, keep theirs.
#include "lora/in_rows.hpp"

#include <limits>
#include <string>
#include <vector>

#include "lora/adapter_set.hpp"
#include "lora/dora.hpp"
#include "lora/embed.hpp"
#include "lora/kinds/ia3.hpp"
#include "lora/kinds/oft.hpp"
#include "lora/lora.hpp"
#include "lora/mixed_bounds.hpp"
#include "lora/model.hpp"
#include "lora/prepared_merge.hpp"
#include "lora/rounding.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/recipe.hpp"
#include "support/refused.hpp"
#include "support/within_bound.hpp"

namespace {

using lora::index_t;
using test::mentions;
using test::recipe;
using test::refusal;
using test::same_bits;

/// A kind with one low-rank step of a 21 x 5 weight.
struct one_step {
  using value_type = float;
  lora::low_rank_step step;
  index_t out_features() const { return 21; }
  index_t in_features() const { return 5; }
  template <class Acc>
  std::vector<lora::step<Acc>> steps(const lora::step_request<Acc>&) const {
    return {step};
  }
};

/// Two slices of a weight, whose rows are others, and the rows between and around them.
template <class F>
struct two_slices {
  index_t in, rest_before, count_a, rest_between, count_b, rest_after;
  recipe<F> a, b;

  static two_slices drawn(test::random& g, bool maps) {
    two_slices s{g.integer(1, 70),
                 g.integer(0, 40),
                 g.integer(1, 70),
                 g.integer(0, 40),
                 g.integer(1, 70),
                 g.integer(0, 40),
                 {},
                 {}};
    s.a = recipe<F>::drawn(g, s.count_a, s.in, g.integer(1, 3), maps);
    s.b = recipe<F>::drawn(g, s.count_b, s.in, g.integer(1, 3), maps);
    return s;
  }
  index_t first_b() const { return rest_before + count_a + rest_between; }
  index_t out() const { return first_b() + count_b + rest_after; }
  auto slice_a() const { return lora::in_rows(rest_before, out(), a); }
  auto slice_b() const { return lora::in_rows(first_b(), out(), b); }

  /// visit(first row, rows, adapter or null).
  template <class Visit>
  void each_block(const Visit& visit) const {
    const recipe<F>* const none = nullptr;
    visit(index_t{0}, rest_before, none);
    visit(rest_before, count_a, &a);
    visit(rest_before + count_a, rest_between, none);
    visit(first_b(), count_b, &b);
    visit(first_b() + count_b, rest_after, none);
  }
};

template <class T>
using any_matrix = test::matrix<T>;

/// Every way to merge, against the same on the blocks.
template <class T, class F>
void check_merges(std::uint64_t seed, int trials) {
  test::random g(seed);
  CAPTURE(g.seed());
  using acc = lora::accumulator_t<T, F>;
  for (int trial = 0; trial < trials; ++trial) {
    const auto s = two_slices<F>::drawn(g, true);
    CAPTURE(trial, s.out(), s.in, s.a.text(), s.b.text());
    const any_matrix<T> W = g.reals<T>(s.out(), s.in, 1);
    const any_matrix<acc> bias = g.reals<acc>(s.out(), 1, 1);
    any_matrix<T> want = W;
    any_matrix<acc> want_bias = bias;
    s.each_block([&](index_t first, index_t count, const recipe<F>* l) {
      if (l == nullptr) return;
      auto rows = want.middleRows(first, count);
      auto own = want_bias.middleRows(first, count);
      lora::merge(rows, own, *l);
    });
    any_matrix<T> got = W;
    any_matrix<acc> got_bias = bias;
    lora::merge(got, got_bias, s.slice_a(), s.slice_b());
    CHECK(same_bits(got, want));
    CHECK(same_bits(got_bias, want_bias));

    test::col_matrix<T> in_columns = W;
    lora::merge(in_columns, got_bias, s.slice_b(), s.slice_a());
    CHECK(same_bits(in_columns, want));

    lora::packed_weight<T> packed{W};
    lora::merge(packed, got_bias, s.slice_a(), s.slice_b());
    CHECK(same_bits(packed.matrix(), want));
  }
}

}  // namespace

TEST_CASE("merged slices have the bits of merged blocks", "[in_rows]") {
  SECTION("float") { check_merges<float, float>(4101, 60); }
  SECTION("bfloat16") { check_merges<lora::bfloat16, lora::bfloat16>(4102, 30); }
  SECTION("float16, float factors") { check_merges<lora::float16, float>(4103, 30); }
  SECTION("double") { check_merges<double, double>(4104, 30); }
}

TEST_CASE("low-rank slices and an adapter of all rows are one chain, rounded once", "[in_rows]") {
  test::random g(4105);
  CAPTURE(g.seed());
  using lora::bfloat16;
  for (int trial = 0; trial < 30; ++trial) {
    const index_t in = g.integer(1, 70), count = g.integer(1, 60), first = g.integer(0, 40);
    const index_t out = first + count + g.integer(0, 40);
    CAPTURE(trial, out, in, first, count);
    const lora::adapter<bfloat16> all{
        g.reals<bfloat16>(5, in, 1), g.reals<bfloat16>(out, 5, 1), {.alpha = 3}};
    const lora::adapter<float> some{
        g.reals<float>(3, in, 1), g.reals<float>(count, 3, 1), {.alpha = 7}};
    const lora::adapter<bfloat16> of_rows{
        all.lora_A(), all.lora_B().middleRows(first, count), {.alpha = 3}};
    const test::matrix<bfloat16> W = g.reals<bfloat16>(out, in, 1);
    const auto slice = lora::in_rows(first, out, lora::scaled(0.5, some));
    test::matrix<bfloat16> want = lora::merged(W, all);
    want.middleRows(first, count) = test::matrix<bfloat16>(
        lora::merged(W.middleRows(first, count), of_rows, lora::scaled(0.5, some)));
    CHECK(same_bits(test::matrix<bfloat16>(lora::merged(W, all, slice)), want));
    CHECK(same_bits(lora::merged(lora::packed_weight{W}, all, slice).matrix(), want));
    test::matrix<bfloat16> checked = W;
    lora::merge_checked(checked, all, slice);
    CHECK(same_bits(checked, want));
    test::matrix<bfloat16> in_blocks = W;
    const lora::prepared_merge<bfloat16> prepared(out, in, all, slice);
    for (index_t i = 0, n = 0; i < out; i += n) {
      n = std::min(g.integer(1, 40), out - i);
      prepared.rows(i, in_blocks.middleRows(i, n));
    }
    CHECK(same_bits(in_blocks, want));
    lora::unmerge(want, all, slice);
    test::matrix<bfloat16> undone = in_blocks;
    lora::unmerge(undone, all);
    undone.middleRows(first, count) = in_blocks.middleRows(first, count);
    auto rows = undone.middleRows(first, count);
    lora::unmerge(rows, of_rows, lora::scaled(0.5, some));
    CHECK(same_bits(want, undone));
  }
}

TEST_CASE("a merge of a slice leaves the other rows, and reports of its own", "[in_rows]") {
  test::random g(4106);
  test::matrix<float> W = g.reals<float>(40, 9, 1);
  W(2, 3) = std::numeric_limits<float>::infinity();
  const lora::adapter<float> l{g.reals<float>(2, 9, 1), g.reals<float>(7, 2, 1), {.alpha = 3}};
  const lora::merge_report seen = lora::merge(W, lora::in_rows(11, 40, l));
  CHECK(seen.elements == 40 * 9);
  CHECK(seen.nonfinite_after == 0);
  CHECK_THROWS_AS(lora::merge_checked(W, lora::in_rows(11, 40, l)), lora::value_error);
}

TEST_CASE("slices are merged as PEFT rounds", "[in_rows]") {
  test::random g(4107);
  for (int trial = 0; trial < 20; ++trial) {
    const auto s = two_slices<lora::bfloat16>::drawn(g, true);
    CAPTURE(trial, s.out(), s.in, s.a.text(), s.b.text());
    if ((s.a.text() + s.b.text()).find('s') != std::string::npos) continue;  // a shift needs a bias
    test::matrix<lora::bfloat16> W = g.reals<lora::bfloat16>(s.out(), s.in, 1), want = W;
    lora::merge(lora::rounding::as_peft, W, s.slice_a(), s.slice_b());
    s.each_block([&](index_t first, index_t count, const auto* l) {
      if (l != nullptr) lora::merge(lora::rounding::as_peft, want.middleRows(first, count), *l);
    });
    CHECK(same_bits(W, want));
  }
}

namespace {

/// forward and apply with a form of two slices, against the same on the blocks. `mapped`: all rows
/// have an input map before.
template <class T, class F, class X>
void check_mixes(std::uint64_t seed, int trials, bool mapped) {
  test::random g(seed);
  CAPTURE(g.seed());
  using acc = lora::accumulator_t<T, F, X>;
  for (int trial = 0; trial < trials; ++trial) {
    const auto s = two_slices<F>::drawn(g, false);
    const index_t tokens = g.integer(1, 40);
    CAPTURE(trial, s.out(), s.in, tokens, s.a.text(), s.b.text());
    const test::matrix<T> W = g.reals<T>(s.out(), s.in, 1);
    const test::col_matrix<X> x = g.reals<X>(s.in, tokens, 1),
                              before = g.reals<X>(s.out(), tokens, 1);
    const std::uint64_t of_map = g.bits();
    const auto map_for = [&](index_t out) {
      test::random same(of_map);
      return recipe<F>().low_rank(same, out, s.in, 0).map(same, s.in);
    };
    const auto form_of = [&](const auto& weight, const auto&... l) {
      return mapped ? lora::mixed<acc>(weight, map_for(weight.rows()), l...)
                    : lora::mixed<acc>(weight, l...);
    };
    const auto form = form_of(W, s.slice_a(), s.slice_b());
    test::col_matrix<X> y(s.out(), tokens), packed_y = y, want = y, added = before,
                                            want_added = before, alone(s.out(), 1);
    lora::forward(W, x, y, form);
    lora::forward(lora::packed_weight<T>{W}, x, packed_y, form);
    if (!mapped) lora::apply(x, added, form);
    s.each_block([&](index_t first, index_t count, const recipe<F>* l) {
      if (count == 0) return;
      const auto block = W.middleRows(first, count);
      test::col_matrix<X> own(count, tokens);
      const auto of_block = l == nullptr ? form_of(block) : form_of(block, *l);
      lora::forward(block, x, own, of_block);
      want.middleRows(first, count) = own;
      if (mapped) return;
      own = before.middleRows(first, count);
      lora::apply(x, own, of_block);
      want_added.middleRows(first, count) = own;
    });
    CHECK(same_bits(y, want));
    CHECK(same_bits(packed_y, want));
    CHECK(same_bits(added, want_added));
    for (index_t t = 0; t < std::min<index_t>(tokens, 3); ++t) {
      lora::forward(W, x.col(t), alone, form);
      CHECK(same_bits(alone, y.col(t)));
    }
  }
}

}  // namespace

TEST_CASE("mixed slices have the bits of mixed blocks", "[in_rows]") {
  SECTION("float") { check_mixes<float, float, float>(4111, 60, false); }
  SECTION("bfloat16") {
    check_mixes<lora::bfloat16, lora::bfloat16, lora::bfloat16>(4112, 40, false);
  }
  SECTION("bfloat16 base, float factors") {
    check_mixes<lora::bfloat16, float, float>(4113, 30, false);
  }
  SECTION("double") { check_mixes<double, double, double>(4114, 30, false); }
  SECTION("behind an input map of all rows") { check_mixes<float, float, float>(4115, 40, true); }
}

TEST_CASE("what overflows in a slice does not reach the other outputs of a panel", "[in_rows]") {
  test::random g(4116);
  const test::matrix<float> W = g.reals<float>(50, 12, 1);
  const lora::adapter<float> l{
      test::matrix<float>::Constant(3, 12, std::numeric_limits<float>::max()),
      g.reals<float>(5, 3, 1),
      {.alpha = 7}};
  for (const index_t tokens : {1, 2, 5, 33}) {
    const test::col_matrix<float> x = test::col_matrix<float>::Constant(12, tokens, 2);
    test::col_matrix<float> y(50, tokens), want(50, tokens);
    const auto form = lora::mixed(W, lora::in_rows(19, 50, l));
    lora::forward(W, x, y, form);
    lora::forward(W, x, want);
    CHECK(!y.middleRows(19, 5).array().isFinite().any());
    CHECK(same_bits(y.topRows(19), want.topRows(19)));
    CHECK(same_bits(y.bottomRows(26), want.bottomRows(26)));
    test::col_matrix<float> added = test::col_matrix<float>::Constant(50, tokens, -0.0F),
                            zeros = added;
    lora::apply(x, added, form);
    CHECK(same_bits(added.topRows(19), zeros.topRows(19)));
    CHECK(same_bits(added.bottomRows(26), zeros.bottomRows(26)));
  }
}

TEST_CASE("tokens of a batch have slices of their own", "[in_rows]") {
  test::random g(4117);
  CAPTURE(g.seed());
  for (int trial = 0; trial < 15; ++trial) {
    const index_t out = g.integer(60, 150), in = g.integer(1, 60), tokens = g.integer(1, 50);
    const test::matrix<float> W = g.reals<float>(out, in, 1);
    const lora::packed_weight packed{W};
    std::vector<lora::mixed_form<float>> forms;
    for (const index_t rank : {4, 4, 4, 4, 4, 4, 4, 19}) {
      const index_t count = forms.size() < 5 ? 45 : g.integer(1, 50),
                    first = forms.size() < 5 ? 7 : g.integer(0, 10);
      const lora::adapter<float> l{
          g.reals<float>(rank, in, 1), g.reals<float>(count, rank, 1), {.alpha = 5}};
      forms.push_back(lora::mixed(W, lora::in_rows(first, out, l)));
    }
    const test::col_matrix<float> x = g.reals<float>(in, tokens, 1),
                                  before = g.reals<float>(out, tokens, 1);
    lora::batch who{forms};
    for (index_t t = 0; t < tokens; ++t) who.add({{t % 8, 0.5}, {(t + 3) % 8, -1.5}});
    test::col_matrix<float> y(out, tokens), one(out, 1), added = before;
    lora::forward(packed, x, y, who);
    lora::apply(x, added, who);
    for (index_t t = 0; t < tokens; ++t) {
      lora::batch alone{forms};
      alone.add({{t % 8, 0.5}, {(t + 3) % 8, -1.5}});
      lora::forward(packed, x.col(t), one, alone);
      CHECK(same_bits(one, y.col(t)));
      one = before.col(t);
      lora::apply(x.col(t), one, alone);
      CHECK(same_bits(one, added.col(t)));
      const test::exact_matrix sum = test::exact(before.col(t)) - test::exact(added.col(t));
      for (index_t i = 0; i < out; ++i) {
        bool any = false;
        for (const index_t k : {t % 8, (t + 3) % 8})
          for (const auto& step : forms[static_cast<std::size_t>(k)].steps()) {
            const auto& rows = std::get<lora::low_rank_step>(step).rows;
            any = any || (rows.first <= i && i < rows.end());
          }
        CHECK((sum(i, 0) != 0) == any);
      }
    }
  }
}

TEST_CASE("rows of an embedding, and a convolution, take slices", "[in_rows]") {
  test::random g(4118);
  CAPTURE(g.seed());
  for (int trial = 0; trial < 25; ++trial) {
    const auto s = two_slices<float>::drawn(g, false);
    CAPTURE(trial, s.out(), s.in, s.a.text(), s.b.text());
    if ((s.a.text() + s.b.text()).find('s') != std::string::npos)
      continue;                                                      // an embedding has no bias
    const test::matrix<float> W = g.reals<float>(s.in, s.out(), 1);  // vocabulary x features
    std::vector<int> ids;
    for (int t = 0; t < 9; ++t) ids.push_back(static_cast<int>(g.integer(0, s.in - 1)));
    const auto form = lora::mixed(W.transpose(), s.slice_a(), s.slice_b());
    test::col_matrix<float> y(s.out(), 9), z(s.out(), 9), want(s.out(), 9),
        want_z = g.reals<float>(s.out(), 9, 1);
    z = want_z;
    const test::matrix<float> input = g.reals<float>(s.in, 9, 1);
    const auto down = [&](const auto& lora_A) -> test::matrix<float> {
      test::matrix<float> result = test::matrix<float>::Zero(lora_A.rows(), 9);
      for (index_t i = 0; i < lora_A.rows(); ++i)
        for (index_t k = 0; k < s.in; ++k)
          result.row(i) += static_cast<float>(lora_A(i, k)) * input.row(k);
      return result;
    };
    const bool factors = (s.a.text() + s.b.text()).find('d') == std::string::npos;
    lora::embed(W, ids, y, form);
    if (factors) lora::apply_through(down, z, form);
    s.each_block([&](index_t first, index_t count, const recipe<float>* l) {
      if (count == 0) return;
      const test::matrix<float> block = W.middleCols(first, count);
      test::col_matrix<float> own(count, 9);
      const auto of_block =
          l == nullptr ? lora::mixed(block.transpose()) : lora::mixed(block.transpose(), *l);
      lora::embed(block, ids, own, of_block);
      want.middleRows(first, count) = own;
      if (!factors) return;
      own = want_z.middleRows(first, count);
      lora::apply_through(down, own, of_block);
      want_z.middleRows(first, count) = own;
    });
    CHECK(same_bits(y, want));
    CHECK(same_bits(z, want_z));
  }
}

TEST_CASE("a slice keeps what it was made of, and nests", "[in_rows]") {
  test::random g(4121);
  const test::matrix<float> W = g.reals<float>(30, 11, 1);
  const lora::adapter<float> l{g.reals<float>(3, 11, 1), g.reals<float>(8, 3, 1), {.alpha = 5}};
  const std::vector<float> m(8, 1.5F);
  const auto want = [&](const auto& adapter, index_t first) {
    test::matrix<float> result = W;
    result.middleRows(first, 8) =
        test::matrix<float>(lora::merged(W.middleRows(first, 8), adapter));
    return result;
  };
  const auto made = [&] { return lora::in_rows(5, 30, lora::adapter<float>(l)); };
  CHECK(same_bits(test::matrix<float>(lora::merged(W, made())), want(l, 5)));
  CHECK(same_bits(test::matrix<float>(lora::merged(W, lora::any_kind(made()))), want(l, 5)));
  const lora::dora_adapter<float> dora(l, m);
  const lora::any_kind kept = lora::in_rows(9, 30, lora::scaled(0.5, dora));
  CHECK(same_bits(test::matrix<float>(lora::merged(W, kept)), want(lora::scaled(0.5, dora), 9)));
  const auto nested = lora::in_rows(4, 30, lora::in_rows(3, 20, dora));
  CHECK(nested.rows().first == 4);
  CHECK(same_bits(test::matrix<float>(lora::merged(W, nested)), want(dora, 7)));
  const auto all = lora::in_rows(0, 8, l);
  CHECK(same_bits(test::matrix<float>(lora::merged(W.topRows(8), all)),
                  test::matrix<float>(lora::merged(W.topRows(8), l))));
  const std::vector list{lora::in_rows(0, 30, l), lora::in_rows(21, 30, l)};
  test::matrix<float> both = want(l, 0);
  both.middleRows(21, 8) = want(l, 21).middleRows(21, 8);
  CHECK(same_bits(test::matrix<float>(lora::merged(W, list)), both));
  CHECK(same_bits(
      test::matrix<float>(lora::merged(test::matrix<float>(W.transpose()).transpose(), list)),
      both));
}

TEST_CASE("double in a slice is accumulated in double", "[in_rows]") {
  test::random g(4122);
  const test::matrix<float> W = g.reals<float>(30, 11, 1);
  const lora::adapter<double> l{g.reals<double>(3, 11, 1), g.reals<double>(8, 3, 1), {.alpha = 5}};
  const auto slice = lora::in_rows(12, 30, l);
  static_assert(std::is_same_v<lora::accumulator_t<float, decltype(slice)>, double>);
  test::matrix<float> want = W;
  want.middleRows(12, 8) = test::matrix<float>(lora::merged(W.middleRows(12, 8), l));
  CHECK(same_bits(test::matrix<float>(lora::merged(W, slice)), want));
}

TEST_CASE("q and v of a fused layer are attached, merged and mixed", "[in_rows][linear]") {
  test::random g(4123);
  const index_t heads = 13, in = 21;
  const test::matrix<lora::bfloat16> W = g.reals<lora::bfloat16>(3 * heads, in, 1);
  const lora::adapter<float> a{g.reals<float>(3, in, 1), g.reals<float>(heads, 3, 1), {.alpha = 5}};
  const lora::adapter<lora::bfloat16> b{
      g.reals<lora::bfloat16>(2, in, 1), g.reals<lora::bfloat16>(heads, 2, 1), {.alpha = 7}};
  const auto q = lora::in_rows(0, 3 * heads, a);
  const auto v = lora::in_rows(2 * heads, 3 * heads, b);
  const test::col_matrix<float> x = g.reals<float>(in, 5, 1);
  test::col_matrix<float> y(3 * heads, 5), want(3 * heads, 5);
  lora::linear<lora::bfloat16> layer{W};
  layer.attach("q", q);
  layer.attach("v", lora::scaled(0.5, v));
  layer.forward(x, y);
  lora::forward(W, x, want, q, lora::scaled(0.5, v));
  CHECK(same_bits(y, want));
  layer.merge();
  CHECK(same_bits(layer.weight(),
                  test::matrix<lora::bfloat16>(lora::merged(W, q, lora::scaled(0.5, v)))));
  layer.unmerge("q");
  CHECK(same_bits(layer.weight(),
                  test::matrix<lora::bfloat16>(lora::merged(W, lora::scaled(0.5, v)))));
  CHECK(layer.at("v").additive);
  layer.unmerge();
  CHECK(same_bits(layer.weight(), W));

  // A set names the rows; the adapter stays what it was.
  lora::adapter_set set;
  set.add(lora::module_adapter(
      {.module = "attn.c_attn", .first_row = 2 * heads, .weight_rows = 3 * heads}, b));
  const auto& one = set.at("attn.c_attn");
  CHECK(one.out_features() == 3 * heads);
  CHECK(same_bits(test::matrix<lora::bfloat16>(lora::merged(W, one)),
                  test::matrix<lora::bfloat16>(lora::merged(W, v))));
  const auto renamed = set.renamed([](const std::string& name) { return "model." + name; });
  CHECK(renamed.at("model.attn.c_attn").out_features() == 3 * heads);
  CHECK(one.moved_to({"attn.v_proj"}).out_features() == heads);
  lora::model<lora::bfloat16> net;
  net.add("attn.c_attn", lora::linear<lora::bfloat16>(W));
  net.attach("style", set);
  net.merge("style");
  CHECK(
      same_bits(net.at("attn.c_attn").weight(), test::matrix<lora::bfloat16>(lora::merged(W, v))));
  const auto refused =
      refusal<lora::value_error>([&] { lora::module_adapter({.module = "m", .first_row = 2}, b); });
  CHECK(mentions(refused, {"m has a first row"}));
}

TEST_CASE("an any_kind has the bound of the kind that it holds, or none", "[in_rows][bound]") {
  test::random g(4140);
  const test::matrix<float> W = g.reals<float>(20, 9, 1);
  const lora::dora_adapter<float> dora{
      g.reals<float>(2, 9, 1), g.reals<float>(7, 2, 1), {.alpha = 3}, std::vector<float>(7, 1.5F)};
  const test::col_matrix<float> x = g.reals<float>(9, 3, 1), y = g.reals<float>(20, 3, 1);
  const auto of = [&](const auto& l) {
    return lora::forward_bound(W, x, y, lora::mixed_bound(W, l)).eval();
  };
  const lora::any_kind held(dora);
  CHECK(of(lora::in_rows(4, 20, held)) == of(lora::in_rows(4, 20, dora)));
  CHECK(of(lora::in_rows(4, 20, lora::scaled(0.5, held))) ==
        of(lora::in_rows(4, 20, lora::scaled(0.5, dora))));
  const lora::module_adapter whole({.module = "m"}, lora::any_kind(lora::in_rows(4, 20, dora)));
  CHECK(mentions(refusal<lora::value_error>([&] { of(whole); }), {"mixed_bound", "in_rows"}));
  const test::matrix<float> own = W.topRows(7);
  const lora::module_adapter module({.module = "m"}, lora::any_kind(dora));
  CHECK(mentions(
      refusal<lora::value_error>([&] { static_cast<void>(lora::mixed_bound(own, module)); }),
      {"mixed_bound", "gains"}));
}

TEST_CASE("rows that a weight does not have are refused", "[in_rows]") {
  test::random g(4131);
  const lora::adapter<float> l{g.reals<float>(2, 5, 1), g.reals<float>(7, 2, 1), {.alpha = 3}};
  for (const auto& [first, out] : std::vector<std::pair<index_t, index_t>>{
           {-1, 20}, {14, 20}, {0, 6}, {std::numeric_limits<index_t>::max(), 20}, {0, -1}})
    CHECK(mentions(refusal<lora::shape_error>([&l, at = first, rows = out] {
                     static_cast<void>(lora::in_rows(at, rows, l));
                   }),
                   {"in_rows", "7 outputs"}));
  const auto slice = lora::in_rows(13, 20, l);
  test::matrix<float> W = g.reals<float>(21, 5, 1), before = W;
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::merge(W, slice); }),
                 {"rows 13 ... 19", "20 outputs", "21"}));
  test::matrix<float> wide = g.reals<float>(20, 6, 1);
  CHECK_THROWS_AS(lora::merge(wide, slice), lora::shape_error);
  CHECK(same_bits(W, before));

  // Steps of a kind of one's own.
  const lora::any_factors factors = lora::any_factors::copy_of(l);
  const one_step beyond{{factors, 1.0, {15, 7}}}, of_more{{factors, 1.0, {3, 8}}},
      of_none{{factors, 1.0}};
  for (const auto* k : {&beyond, &of_more, &of_none}) {
    CHECK_THROWS_AS(lora::merge(W, *k), lora::shape_error);
    CHECK_THROWS_AS(static_cast<void>(lora::mixed(W, *k)), lora::shape_error);
  }
}

TEST_CASE("a slice that changes the inputs is merged, and not mixed", "[in_rows]") {
  test::random g(4132);
  const test::matrix<float> W = g.reals<float>(20, 6, 1);
  const auto l = lora::ia3_adapter<float>::of_inputs({0.5F, 2, 3, 1, -1, 4}, 7);
  const auto slice = lora::in_rows(9, 20, l);
  test::matrix<float> want = W;
  want.middleRows(9, 7) = test::matrix<float>(lora::merged(W.middleRows(9, 7), l));
  const test::matrix<float> merged = lora::merged(W, slice);
  CHECK(same_bits(merged, want));
  CHECK(mentions(refusal<lora::value_error>([&] { static_cast<void>(lora::mixed(W, slice)); }),
                 {"inputs", "rows 9 ... 15 of 20", "merge it"}));
  test::matrix<float> back = merged;
  lora::unmerge(back, slice);
  CHECK(same_bits(back.topRows(9), W.topRows(9)));
  CHECK(same_bits(back.bottomRows(4), W.bottomRows(4)));
  // Of all rows it is the adapter.
  CHECK(lora::mixed(
            W, lora::in_rows(0, 20, lora::ia3_adapter<float>::of_inputs({1, 2, 3, 4, 5, 6}, 20)))
            .has_input_map());
}

TEST_CASE("slices stay within their bounds, and the bounds are those of the block",
          "[in_rows][bounds]") {
  test::random g(4141);
  CAPTURE(g.seed());
  for (int trial = 0; trial < 25; ++trial) {
    const index_t in = g.integer(2, 60), count = g.integer(1, 40), first = g.integer(0, 20);
    const index_t out = first + count + g.integer(0, 20);
    CAPTURE(trial, out, in, first, count);
    const test::matrix<float> W = g.reals<float>(out, in, 1);
    const lora::adapter<float> plain{
        g.reals<float>(3, in, 1), g.reals<float>(count, 3, 1), {.alpha = 5}};
    std::vector<float> m;
    for (index_t i = 0; i < count; ++i) m.push_back(static_cast<float>(g.uniform(0.5, 2)));
    const lora::dora_adapter<float> dora(
        lora::adapter<float>{g.reals<float>(2, in, 1), g.reals<float>(count, 2, 1), {.alpha = 3}},
        m);
    const auto a = lora::in_rows(first, out, lora::scaled(0.7, plain));
    const auto b = lora::in_rows(first, out, dora);
    test::exact_matrix exact = test::exact(W);
    {
      const auto of = [](const auto& l, long double s) -> test::exact_matrix {
        return s * test::times(test::exact(l.lora_B()), test::exact(l.lora_A()));
      };
      auto rows = exact.middleRows(first, count);
      const test::exact_matrix own = rows + of(dora.factors(), dora.factors().scaling());
      rows += of(plain, 0.7L * static_cast<long double>(plain.scaling())) +
              of(dora.factors(), dora.factors().scaling());
      for (index_t i = 0; i < count; ++i)
        rows.row(i) *= static_cast<long double>(m[static_cast<std::size_t>(i)]) / own.row(i).norm();
    }
    const auto sure = lora::mixed_bound(W, a, b);
    CHECK(test::within(test::matrix<float>(lora::merged(W, a, b)), exact,
                       lora::merge_bound(W, sure)));
    const test::col_matrix<float> x = g.reals<float>(in, 4, 1);
    test::col_matrix<float> y(out, 4);
    lora::forward(W, x, y, lora::mixed(W, a, b));
    const auto bound = lora::forward_bound(W, x, y, sure);
    CHECK(test::within(y, test::times(exact, test::exact(x)), bound));
    // The bound is not a wide one: of the slice it is that of the block.
    const auto block = W.middleRows(first, count);
    const test::matrix<float> y_block(count, 4);
    const auto alone = lora::forward_bound(
        block, x, y_block, lora::mixed_bound(block, lora::scaled(0.7, plain), dora));
    CHECK(bound.middleRows(first, count).isApprox(alone));
    const auto at_half = lora::mixed_bound(W, lora::scaled(0.5, a)),
               same = lora::mixed_bound(W, lora::in_rows(first, out, lora::scaled(0.35, plain)));
    CHECK(lora::forward_bound(W, x, y, at_half).isApprox(lora::forward_bound(W, x, y, same)));
  }
}
