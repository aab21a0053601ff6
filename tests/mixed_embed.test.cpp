// SPDX-License-Identifier: Apache-2.0
//
// Mixed forms where an embedding is looked up (rows) and where a convolution multiplies by lora_A
// (apply_through).
#include <vector>

#include "lora/embed.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/recipe.hpp"
#include "support/refused.hpp"

namespace {

using lora::index_t;
using test::exact_matrix;
using test::mentions;
using test::recipe;
using test::refusal;
using test::same_bits;

/// A recipe without what embed and apply_through refuse.
template <class F>
recipe<F> drawn(test::random& g, index_t out, index_t in, bool through) {
  recipe<F> l;
  l.low_rank(g, out, in, g.integer(1, 5));
  for (index_t n = g.integer(0, 4); n > 0; --n) switch (g.integer(0, 2)) {
      case 0: l.low_rank(g, out, in, g.integer(1, 5)); break;
      case 1: l.gain(g, out, g.one_in(2)); break;
      default: through ? l.shift(g, out) : l.delta(g, out, in);
    }
  return l;
}

template <class T, class F>
void check(std::uint64_t seed) {
  test::random g(seed);
  CAPTURE(g.seed());
  using acc = lora::accumulator_t<T, F>;
  for (int trial = 0; trial < 60; ++trial) {
    const index_t out = g.integer(1, 40), in = g.integer(1, 30), tokens = g.integer(1, 20);
    CAPTURE(trial, out, in, tokens);
    const test::matrix<T> embedding = g.reals<T>(in, out, 1);  // vocabulary x features
    std::vector<index_t> ids;
    for (index_t t = 0; t < tokens; ++t) ids.push_back(g.integer(0, in - 1));
    exact_matrix chosen = exact_matrix::Zero(in, tokens);
    for (index_t t = 0; t < tokens; ++t) chosen(ids[static_cast<std::size_t>(t)], t) = 1;
    const exact_matrix none = exact_matrix::Zero(out, 1);
    const auto l = drawn<F>(g, out, in, false);
    const auto form = lora::mixed(embedding.transpose(), l);
    const auto want = l.oracle(embedding.transpose(), none, chosen.cast<double>().eval());
    test::col_matrix<acc> y(out, tokens), direct(out, tokens);
    lora::embed(embedding, ids, y, form);
    CHECK(want.template holds<acc>(y));
    lora::embed(embedding, ids, direct, l);
    CHECK(same_bits(y, direct));
    auto twice = want;
    twice.y *= 2;
    twice.size *= 2;
    lora::embed(lora::scaled_embedding(embedding, 2), ids, y, form);
    CHECK(twice.template holds<acc>(y));

    // apply_through, where down is a product.
    const auto m = drawn<F>(g, out, in, true);
    const test::matrix<T> W = g.reals<T>(out, in, 1);
    const test::col_matrix<acc> x = g.reals<acc>(in, tokens, 1);
    const auto down = [&](const auto& A) {
      const exact_matrix U = test::times(test::exact(A), test::exact(x));
      return U.template cast<acc>().eval();
    };
    const exact_matrix product = test::times(test::exact(W), test::exact(x));
    y = product.template cast<acc>();
    direct = y;
    lora::apply_through(down, y, lora::mixed(out, in, m));
    CHECK(m.oracle(W, none, x).template holds<acc>(y));
    lora::apply_through(down, direct, m);
    CHECK(same_bits(y, direct));
  }
}

}  // namespace

TEST_CASE("embed and apply_through of forms", "[mixed][rows]") {
  SECTION("float") { check<float, float>(2301); }
  SECTION("bfloat16") { check<lora::bfloat16, float>(2302); }
  SECTION("double") { check<double, double>(2303); }
}

TEST_CASE("low-rank forms have the bits of embed and apply_through with the adapters",
          "[mixed][rows]") {
  test::random g(2304);
  CAPTURE(g.seed());
  const test::matrix<float> embedding = g.reals<float>(30, 20, 1);
  const std::vector<int> ids{3, 29, 0, 3};
  const lora::adapter<float> a{g.reals<float>(5, 30, 1), g.reals<float>(20, 5, 1), {.alpha = 3}};
  const auto form = lora::mixed(embedding.transpose(), a, lora::scaled(0.5, a));
  test::col_matrix<float> y(20, 4), want(20, 4);
  lora::embed(embedding, ids, y, form);
  lora::embed(embedding, ids, want, a, lora::scaled(0.5, a));
  CHECK(same_bits(y, want));
  const auto down = [&](const auto& A) {
    return test::col_matrix<float>::Ones(A.rows(), 4).eval();
  };
  lora::apply_through(down, y, form);
  lora::apply_through(down, want, a, lora::scaled(0.5, a));
  CHECK(same_bits(y, want));
}

TEST_CASE("embed and apply_through refuse what they cannot do, and write nothing",
          "[mixed][rows]") {
  test::random g(2305);
  CAPTURE(g.seed());
  const test::matrix<float> embedding = g.reals<float>(6, 5, 1);
  const std::vector<int> ids{3};
  test::col_matrix<float> y = g.reals<float>(5, 1, 1);
  const auto before = y;
  const auto in_rows = [&](const auto& l) {
    return refusal<lora::value_error>(
        [&] { lora::embed(embedding, ids, y, lora::mixed(5, 6, l)); });
  };
  CHECK(mentions(in_rows(recipe<float>().map(g, 6).shift(g, 5)), {"embed", "merge it"}));
  CHECK(mentions(in_rows(recipe<float>().shift(g, 5).low_rank(g, 5, 6, 1)),
                 {"embed", "bias of its own"}));
  const auto low = lora::mixed(5, 6, recipe<float>().low_rank(g, 5, 6, 1));
  CHECK(
      mentions(refusal<lora::shape_error>([&] { lora::embed(embedding.transpose(), ids, y, low); }),
               {"embed", "transpose"}));
  const auto down = [](const auto& A) { return test::col_matrix<float>::Ones(A.rows(), 1).eval(); };
  const auto through = [&](const auto& l) {
    return refusal<lora::value_error>([&] { lora::apply_through(down, y, lora::mixed(5, 6, l)); });
  };
  CHECK(mentions(through(recipe<float>().low_rank(g, 5, 6, 1).map(g, 6)),
                 {"apply_through", "merge it"}));
  CHECK(mentions(through(recipe<float>().delta(g, 5, 6)),
                 {"apply_through", "no factors", "merge it"}));
  test::col_matrix<float> short_y = y.topRows(4);
  CHECK_THROWS_AS(lora::apply_through(down, short_y, low), lora::shape_error);
  CHECK(same_bits(y, before));
}
