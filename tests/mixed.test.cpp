// SPDX-License-Identifier: Apache-2.0
//
// Mixed forms: every sort of step, alone and in lists, against a dense oracle in long double with a
// bound; the same bits for a token alone and among others, from a matrix and from panels; no
// allocation in the second call.
#include "lora/mixed.hpp"

#include <array>
#include <memory>
#include <vector>

#include "lora/lora.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/openmp.hpp"
#include "support/random.hpp"
#include "support/recipe.hpp"
#include "support/refused.hpp"
#include "support/sanitized.hpp"

namespace {

using lora::index_t;
using test::exact_matrix;
using test::mentions;
using test::recipe;
using test::refusal;
using test::same_bits;

template <class T, class F, class X>
void check_forms(std::uint64_t seed, int trials) {
  test::random g(seed);
  CAPTURE(g.seed());
  using acc = lora::accumulator_t<T, F, X>;
  lora::workspace space;
  for (int trial = 0; trial < test::trials(trials); ++trial) {
    const index_t out = g.integer(1, 75), in = g.one_in(5) ? g.integer(91, 1300) : g.integer(1, 90);
    const index_t tokens = g.one_in(5) ? g.integer(71, 210) : g.integer(1, 70);
    CAPTURE(trial, out, in, tokens);
    const test::matrix<T> W = g.reals<T>(out, in, 1);
    const test::col_matrix<X> x = g.reals<X>(in, tokens, 1);
    const auto l = recipe<F>::drawn(g, out, in, g.integer(1, 5));
    CAPTURE(l.text());
    const auto form = lora::mixed<acc>(W, l);
    const lora::packed_weight<T> packed{W};
    const bool biased = g.one_in(2);
    const test::matrix<F> b = g.reals<F>(out, 1, 1);
    test::col_matrix<X> y(out, tokens), unpacked(out, tokens), one(out, 1);
    if (biased) {
      lora::forward(space, lora::with_bias(packed, b.col(0)), x, y, form);
      lora::forward(lora::with_bias(W, b.col(0)), x, unpacked, form);
    } else {
      lora::forward(space, packed, x, y, form);
      lora::forward(W, x, unpacked, form);
    }
    CHECK(same_bits(y, unpacked));
    for (const index_t t : {index_t{0}, tokens / 2, tokens - 1}) {
      if (biased)
        lora::forward(lora::with_bias(packed, b.col(0)), x.col(t), one, form);
      else
        lora::forward(packed, x.col(t), one, form);
      CHECK(same_bits(one, y.col(t)));
    }
    const auto want = l.oracle(W, biased ? test::exact(b) : exact_matrix::Zero(out, 1).eval(), x);
    CHECK(want.template holds<acc>(y));
    // Steps applied to W x of an engine's own.
    test::col_matrix<acc> own(out, tokens);
    const auto input = form.input(x);
    lora::forward(W, input.matrix(), own);
    lora::apply(input, own, form);
    if (!biased) CHECK(want.template holds<acc>(own));
    if (form.has_input_map()) {
      CHECK(mentions(refusal<lora::value_error>([&] { lora::apply(x, own, form); }),
                     {"apply", "form.input(x)"}));
    } else {
      test::col_matrix<acc> again(out, tokens);
      lora::forward(W, input.matrix(), again);
      lora::apply(x, again, form);
      CHECK(same_bits(again, own));
    }
  }
}

}  // namespace

TEST_CASE("a form is its steps, in every format", "[mixed]") {
  SECTION("float") { check_forms<float, float, float>(2101, 150); }
  SECTION("bfloat16") { check_forms<lora::bfloat16, lora::bfloat16, lora::bfloat16>(2102, 80); }
  SECTION("bfloat16 base, float factors") { check_forms<lora::bfloat16, float, float>(2103, 60); }
  SECTION("float16") { check_forms<lora::float16, lora::float16, float>(2104, 60); }
  SECTION("double") { check_forms<double, double, double>(2105, 80); }
  SECTION("a float base and doubles") { check_forms<float, float, double>(2106, 40); }
}

TEST_CASE("a form of low-rank adapters has the bits of forward with them", "[mixed]") {
  test::random g(2107);
  CAPTURE(g.seed());
  const test::matrix<float> W = g.reals<float>(45, 77, 1);
  const test::col_matrix<float> x = g.reals<float>(77, 40, 1);
  const lora::adapter<float> a{g.reals<float>(5, 77, 1), g.reals<float>(45, 5, 1), {.alpha = 3}};
  const std::vector<lora::adapter<float>> more{
      {g.reals<float>(40, 77, 1), g.reals<float>(45, 40, 1), {.alpha = 3}}, a};
  const auto form = lora::mixed(W, lora::scaled(0.3, a), more, lora::scaled(0, a));
  CHECK(form.additive());
  CHECK(form.steps().size() == 3);
  test::col_matrix<float> y(45, 40), want(45, 40);
  lora::forward(W, x, y, form);
  lora::forward(W, x, want, lora::scaled(0.3, a), more);
  CHECK(same_bits(y, want));
  y = want = g.reals<float>(45, 40, 1);
  lora::apply(x, y, form);
  lora::apply(x, want, lora::scaled(0.3, a), more);
  CHECK(same_bits(y, want));
  const auto nothing = lora::mixed(W);
  CHECK(nothing.changes_nothing());
  lora::apply(x, y, nothing);
  CHECK(same_bits(y, want));
}

TEST_CASE("kinds go to forward and apply without a form, too", "[mixed]") {
  test::random g(2108);
  CAPTURE(g.seed());
  const test::matrix<float> W = g.reals<float>(33, 20, 1);
  const std::vector<float> b(33, 0.5F);
  const test::col_matrix<float> x = g.reals<float>(20, 9, 1);
  const auto one = recipe<float>::drawn(g, 33, 20, 4), other = recipe<float>::drawn(g, 33, 20, 4);
  const lora::adapter<float> plain{
      g.reals<float>(2, 20, 1), g.reals<float>(33, 2, 1), {.alpha = 3}};
  const std::vector<recipe<float>> both{one, other};
  const auto form = lora::mixed(W, both, lora::scaled(0.5, plain), lora::scaled(0.25, one));
  test::col_matrix<float> y(33, 9), want(33, 9);
  lora::forward(lora::with_bias(W, b), x, want, form);
  lora::forward(lora::with_bias(W, b), x, y, both, lora::scaled(0.5, plain),
                lora::scaled(0.25, one));
  CHECK(same_bits(y, want));
  const auto added = recipe<float>().low_rank(g, 33, 20, 3).delta(g, 33, 20).gain(g, 33, false);
  y = want = g.reals<float>(33, 9, 1);
  lora::apply(x, y, added);
  lora::apply(x, want, lora::mixed(33, 20, added));
  CHECK(same_bits(y, want));
}

TEST_CASE("a double bias is added in double, to a form of float", "[mixed]") {
  const test::matrix<float> W = test::matrix<float>::Ones(1, 1), x = W;
  const auto form = lora::mixed(W);
  const std::vector<double> b{-1 + 0x1p-40};  // -1 as a float
  test::matrix<float> y(1, 1);
  lora::forward(lora::with_bias(W, b), x, y, form);
  CHECK(y(0, 0) == 0x1p-40F);
}

TEST_CASE("a form takes W as it is stored", "[mixed]") {
  test::random g(2109);
  CAPTURE(g.seed());
  const test::matrix<float> stored = g.reals<float>(20, 33, 1);  // in x out
  const std::vector<float> b(33, 0.5F);
  const test::col_matrix<float> x = g.reals<float>(20, 9, 1);
  const auto l = recipe<float>::drawn(g, 33, 20, 5);
  const auto form = lora::mixed(stored.transpose(), l).for_in_out();
  CHECK(form.stored_in_out());
  test::col_matrix<float> y(33, 9), want(33, 9), packed(33, 9);
  lora::forward(lora::with_bias(stored.transpose(), b), x, want,
                lora::mixed(stored.transpose(), l));
  lora::forward(lora::with_bias(stored, b, form), x, y, form);
  CHECK(same_bits(y, want));
  const lora::packed_weight panels{stored.transpose()};
  lora::forward(lora::with_bias(panels, b), x, packed, form);
  CHECK(same_bits(packed, want));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::forward(stored.transpose(), x, y, form); }),
                 {"forward", "20x33"}));
}

TEST_CASE("threads change no bit of a form", "[mixed][threads]") {
  test::random g(2110);
  CAPTURE(g.seed());
  const index_t out = 300, in = 200, tokens = 130;
  const test::matrix<float> W = g.reals<float>(out, in, 1);
  const test::col_matrix<float> x = g.reals<float>(in, tokens, 1);
  const auto l = recipe<float>()
                     .delta(g, out, in)
                     .low_rank(g, out, in, 9)
                     .gain(g, out, true)
                     .map(g, in)
                     .low_rank(g, out, in, 40)
                     .shift(g, out);
  const auto form = lora::mixed(W, l);
  test::col_matrix<float> want(out, tokens), y(out, tokens);
  const int before = omp_get_max_threads();
  omp_set_num_threads(1);
  lora::forward(W, x, want, form);
  for (const int threads : {2, 3, 7}) {
    omp_set_num_threads(threads);
    lora::forward(W, x, y, form);
    CHECK(same_bits(y, want));
  }
  omp_set_num_threads(before);
}

TEST_CASE("a form allocates nothing in the second call", "[mixed]") {
  test::random g(2111);
  CAPTURE(g.seed());
  const lora::packed_weight W{g.reals<float>(33, 65, 1)};
  const test::col_matrix<float> x = g.reals<float>(65, 12, 1);
  const auto l = recipe<float>()
                     .low_rank(g, 33, 65, 4)
                     .gain(g, 33, true)
                     .map(g, 65)
                     .low_rank(g, 33, 65, 3)
                     .shift(g, 33);
  const auto form = lora::mixed(W, l);
  test::col_matrix<float> y(33, 12);
  lora::workspace space;
  lora::forward(space, W, x, y, form);
  test::allocations::start(0);
  lora::forward(space, W, x, y, form);
  test::allocations::stop();
  CHECK(test::allocations::now.count == 0);
  CHECK(y.allFinite());
}

TEST_CASE("what a form cannot mean is refused, and nothing is written", "[mixed]") {
  test::random g(2112);
  CAPTURE(g.seed());
  const test::matrix<float> W = g.reals<float>(5, 6, 1);
  const auto l = recipe<float>().low_rank(g, 5, 6, 2).gain(g, 5, false);
  CHECK(mentions(refusal<lora::shape_error>([&] { (void)lora::mixed(W.transpose(), l); }),
                 {"mixed", "5x6", "6x5"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { (void)lora::mixed(-1, 6); }), {"mixed"}));
  using steps = std::vector<lora::step<float>>;
  const auto made = [](steps s) {
    return refusal<lora::value_error>([&] { (void)lora::mixed_form<float>("mixed", 5, 6, s); });
  };
  CHECK(
      mentions(made({lora::gain_step<float>{{1, 1, NAN, 1, 1}}}), {"mixed", "gains", "output 2"}));
  CHECK(
      mentions(made({lora::shift_step{{1, 1, 1, 1, INFINITY}}}), {"mixed", "shifts", "output 4"}));
  CHECK(mentions(made({lora::gain_step<float>{{1e30F, 1, 1, 1, 1}},
                       lora::gain_step<float>{{1e30F, 1, 1, 1, 1}}}),
                 {"mixed", "product of the gains", "output 0"}));
  CHECK(mentions(made({lora::delta_step<float>{}}), {"mixed", "no source"}));
  CHECK(mentions(made({lora::input_step<float>{}}), {"mixed", "no map"}));
  CHECK_THROWS_AS(lora::mixed_form<float>("mixed", 5, 6, steps{lora::gain_step<float>{{1, 1}}}),
                  lora::shape_error);
  const auto form = lora::mixed(W, l);
  test::col_matrix<float> y = g.reals<float>(5, 2, 1), x = g.reals<float>(6, 2, 1);
  const auto before = y;
  CHECK(mentions(
      refusal<lora::shape_error>([&] { lora::forward(W.topRows(4), x, y.topRows(4), form); }),
      {"forward", "5x6"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::apply(x.topRows(4), y, form); }),
                 {"apply", "5x6"}));
  CHECK_THROWS_AS(lora::forward(W, x, x, form), lora::shape_error);
  CHECK_THROWS_AS(
      lora::forward(W.leftCols(5), x.topRows(5), x.bottomRows(5), lora::mixed(W.leftCols(5))),
      lora::shape_error);
  const auto other = lora::mixed(W, l);
  CHECK(mentions(refusal<lora::value_error>([&] { lora::apply(other.input(x), y, form); }),
                 {"apply", "another form"}));
  CHECK(same_bits(y, before));
}
