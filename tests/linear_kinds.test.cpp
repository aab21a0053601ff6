// SPDX-License-Identifier: Apache-2.0
//
// linear with adapters of any kind: every state is one function, the steps in the order of the
// names; what would not be is refused and changes nothing; transactions, ranges of names, copies.
#include <string>
#include <vector>

#include "lora/lora.hpp"
#include "support/allocations.hpp"
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

const std::vector<std::string> names{"a", "b", "c", "d"};

template <class T, class F>
void check_states(std::uint64_t seed, int trials) {
  test::random g(seed);
  CAPTURE(g.seed());
  using acc = lora::accumulator_t<T, F>;
  for (int trial = 0; trial < trials; ++trial) {
    const index_t out = g.integer(1, 40), in = g.integer(1, 50), tokens = g.integer(1, 9);
    CAPTURE(trial, out, in, tokens);
    const test::matrix<T> W = g.reals<T>(out, in, 1);
    using of_bias = lora::accumulator_t<T>;
    const test::matrix<of_bias> b = g.reals<of_bias>(out, 1, 1);
    const bool biased = g.one_in(2), reloads = g.one_in(2);
    const auto made = [&](const auto& base) {
      using reload = typename lora::linear<T>::reload_function;
      const reload again = [&W](std::span<T> to) { std::copy_n(W.data(), W.size(), to.begin()); };
      return lora::linear<T>(base, reloads ? again : reload());
    };
    auto q = biased ? made(lora::with_bias(W, b.col(0))) : made(W);
    std::vector<recipe<F>> list;
    std::vector<double> strengths;
    for (const auto& name : names) {
      const lora::adapter<F> low{g.reals<F>(3, in, 0.5), g.reals<F>(out, 3, 0.5), {.alpha = 2}};
      strengths.push_back(g.uniform(-1, 1));
      if (g.one_in(3)) {
        list.push_back(recipe<F>().of(low));
        q.attach(name, lora::scaled(strengths.back(), low));
      } else {
        list.push_back(recipe<F>::drawn(g, out, in, g.integer(1, 3)));
        q.attach(name, lora::scaled(strengths.back(), list.back()));
      }
    }
    const test::col_matrix<acc> x = g.reals<acc>(in, tokens, 1);
    for (int change = 0; change < 8; ++change) {
      const std::string& name = names[static_cast<std::size_t>(g.integer(0, 3))];
      const auto before = q.weight();
      const auto was = q.at(name);
      const auto changed = [&] {
        switch (g.integer(0, 4)) {
          case 0: q.merge(name); break;
          case 1: q.unmerge(name); break;
          case 2: q.activate(name); break;
          case 3: q.deactivate(name); break;
          default: {
            const double s = g.uniform(-1, 1);
            q.set_strength(name, s);
            strengths[static_cast<std::size_t>(name[0] - 'a')] = s;
          }
        }
      };
      const std::string refused = refusal<lora::value_error>(changed);
      if (refused != "(no exception)") {
        CHECK(mentions(refused, {"do not commute", "merge", "unmerge"}));
        CHECK(same_bits(q.weight(), before));
        CHECK((q.at(name).merged == was.merged && q.at(name).active == was.active));
      }
      exact_matrix weight = test::exact(W), size = weight.cwiseAbs(), inside = weight,
                   inside_size = size;
      exact_matrix bias = biased ? test::exact(b) : exact_matrix::Zero(out, 1).eval(),
                   bias_size = bias.cwiseAbs();
      index_t roundings = in + 10;
      bool any_inside = false;
      const auto add = [&](bool merged_only) {
        for (std::size_t k = 0; k < names.size(); ++k) {
          const auto is = q.at(names[k]);
          if (!is.active || (merged_only && !is.merged)) continue;
          auto& to = merged_only ? inside : weight;
          auto& to_size = merged_only ? inside_size : size;
          const auto none = exact_matrix::Zero(out, 1).eval();
          if (merged_only) {
            to = list[k].merged(to, none, false, strengths[k]).first;
            to_size = list[k].merged(to_size, none, true, strengths[k]).first;
            any_inside = true;
          } else {
            std::tie(to, bias) = list[k].merged(to, bias, false, strengths[k]);
            std::tie(to_size, bias_size) = list[k].merged(to_size, bias_size, true, strengths[k]);
            roundings += list[k].roundings() + 2;
          }
        }
      };
      add(true);
      add(false);
      const exact_matrix ex = test::exact(x);
      test::expected want{test::times(weight, ex), test::times(size, ex.cwiseAbs()),
                          roundings + in};
      want.y.colwise() += bias.col(0);
      want.size.colwise() += bias_size.col(0);
      // The merged weight is stored in T once; what is beside it multiplies that rounding, too.
      const long double u_T =
          std::is_same_v<T, acc>
              ? 0
              : static_cast<long double>(static_cast<double>(std::numeric_limits<T>::epsilon()));
      want.least =
          0x1p-120L * (1 + want.size.maxCoeff()) + (any_inside ? u_T * want.size.maxCoeff() : 0);
      test::col_matrix<acc> y(out, tokens);
      q.forward(x, y);
      CHECK(want.template holds<acc>(y));
      const test::expected stored{inside, inside_size, roundings};
      auto weight_bound = stored;
      weight_bound.least = 0x1p-120L + 0x1p-24L * (std::is_same_v<T, lora::float16> ? 1 : 0);
      if (any_inside)
        CHECK(weight_bound.template holds<acc>(q.weight()));
      else
        CHECK(same_bits(q.weight(), W));
      // Activations of double.
      test::col_matrix<double> wide(out, tokens);
      q.forward(x.template cast<double>().eval(), wide);
      CHECK(want.template holds<acc>(wide));
    }
    q.unmerge();
    CHECK(same_bits(q.weight(), W));
  }
}

}  // namespace

TEST_CASE("every state of a linear with kinds is one function", "[linear][mixed]") {
  SECTION("float") { check_states<float, float>(2401, 60); }
  SECTION("bfloat16") { check_states<lora::bfloat16, float>(2402, 30); }
  SECTION("double") { check_states<double, double>(2403, 30); }
  SECTION("double adapters on float16") { check_states<lora::float16, double>(2404, 20); }
}

TEST_CASE("a transaction is one change, or none", "[linear]") {
  test::random g(2405);
  CAPTURE(g.seed());
  const test::matrix<float> W = g.reals<float>(9, 8, 1);
  const auto low = [&] {
    return lora::adapter<float>{g.reals<float>(2, 8, 1), g.reals<float>(9, 2, 1), {.alpha = 2}};
  };
  const auto a = low(), b = low();
  const auto gain = recipe<float>().gain(g, 9, false).low_rank(g, 9, 8, 2);
  int loads = 0;
  lora::linear<float> q(W, [&](std::span<float> to) {
    ++loads;
    std::copy_n(W.data(), W.size(), to.begin());
  });
  q.change([&](auto& all) {
    all.attach("a", a);
    all.attach("b", lora::scaled(0.5, b));
    all.attach("c", gain);
    all.merge(std::vector<std::string>{"a", "b"});
    all.set_strength("a", 0.25);
  });
  CHECK(loads == 0);
  CHECK(same_bits(q.weight(), lora::merged(W, lora::scaled(0.25, a), lora::scaled(0.5, b))));
  // Merging "c" alone is refused while "a" is beside; together with others it is one rebuild.
  CHECK(mentions(refusal<lora::value_error>([&] {
                   q.change([](auto& all) {
                     all.unmerge("a");
                     all.merge("c");
                   });
                 }),
                 {"\"c\" is merged", "\"a\"", "do not commute"}));
  CHECK((q.at("a").merged && !q.at("c").merged && q.at("b").additive && !q.at("c").additive));
  CHECK(same_bits(q.weight(), lora::merged(W, lora::scaled(0.25, a), lora::scaled(0.5, b))));
  const auto before = q.weight();
  CHECK_THROWS_AS(q.change([](auto& all) {
    all.set_strength("b", 2);
    all.merge("nobody");
  }),
                  lora::value_error);
  CHECK(q.at("b").strength == 0.5);
  CHECK(same_bits(q.weight(), before));
  loads = 0;
  q.change([](auto& all) {
    all.set_strength("a", 1);
    all.set_strength("b", 1);
    all.merge();
  });
  CHECK(loads == 1);
  auto want = W;
  lora::merge(want, a, b, gain);
  CHECK(same_bits(q.weight(), want));
  // A copy of its own.
  static_assert(!std::is_copy_constructible_v<lora::linear<float>> &&
                std::is_nothrow_move_constructible_v<lora::linear<float>>);
  auto other = q.clone();
  other.detach(std::vector<std::string>{"c", "b"});
  CHECK(other.names() == std::vector<std::string>{"a"});
  CHECK(same_bits(q.weight(), want));
  const auto moved = std::move(other);
  CHECK(same_bits(moved.weight(), lora::merged(W, a)));
}

TEST_CASE("a layer is made empty, and of a packed weight without a copy", "[linear]") {
  test::random g(2406);
  CAPTURE(g.seed());
  lora::linear<float> none;
  CHECK((none.out_features() == 0 && none.in_features() == 0 && !none.has_bias()));
  const test::matrix<float> W = g.reals<float>(300, 200, 1);
  lora::packed_weight<float> packed{W};
  test::allocations::start(1 << 16);
  lora::linear q(std::move(packed));
  test::allocations::stop();
  CHECK(test::allocations::now.large_count == 0);
  CHECK(same_bits(q.weight(), W));
  none = std::move(q);
  CHECK(none.out_features() == 300);
}

TEST_CASE("what a linear cannot do with a kind is refused", "[linear][mixed]") {
  test::random g(2407);
  CAPTURE(g.seed());
  const test::matrix<float> W = g.reals<float>(5, 6, 1);
  lora::linear<float> q(W);
  const auto l = recipe<float>().gain(g, 5, false).low_rank(g, 5, 6, 1);
  q.attach("x", l);
  CHECK(mentions(refusal<lora::value_error>([&] { q.attach("x", l); }),
                 {"linear::attach", "\"x\"", "already"}));
  CHECK(
      mentions(refusal<lora::value_error>([&] { q.attach("", l); }), {"linear::attach", "empty"}));
  CHECK(mentions(
      refusal<lora::shape_error>([&] { q.attach("y", recipe<float>().low_rank(g, 6, 5, 1)); }),
      {"linear::attach", "6x5", "5x6"}));
  CHECK(mentions(refusal<lora::value_error>([&] { q.set_strength("x", NAN); }),
                 {"linear::set_strength", "\"x\"", "not finite"}));
  CHECK(mentions(refusal<lora::value_error>([&] {
                   q.merge(std::vector<std::string>{"x", "z"});
                 }),
                 {"linear::merge", "\"z\""}));
  CHECK((q.names() == std::vector<std::string>{"x"} && !q.at("x").merged));
  CHECK(same_bits(q.weight(), W));
}
