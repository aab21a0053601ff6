// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "lora/scaling.hpp"
#include "support/catch.hpp"
#include "support/refused.hpp"

using lora::resolve;
using lora::scaling;
using lora::scaling_rule;
using test::mentions;
using test::refusal;

TEST_CASE("the rules", "[scaling]") {
  CHECK(resolve({.alpha = 16}, 8) == 2.0);
  CHECK(resolve({.alpha = 16, .rule = scaling_rule::standard}, 32) == 0.5);
  CHECK(resolve({.alpha = 16, .rule = scaling_rule::rank_stabilized}, 64) == 2.0);
  CHECK(resolve({.alpha = 16, .rule = scaling_rule::fixed}, 64) == 16.0);
  // In double, one division, one square root: what PEFT computes in Python.
  CHECK(resolve({.alpha = 1}, 3) == 1.0 / 3.0);
  CHECK(resolve({.alpha = 7, .rule = scaling_rule::rank_stabilized}, 5) == 7.0 / std::sqrt(5.0));
  CHECK(resolve({.alpha = 16, .rule = scaling_rule::rank_stabilized}, 8) == 5.65685424949238);
  CHECK(resolve({.alpha = -3}, 4) == -0.75);
  CHECK(resolve({.alpha = 0}, 4) == 0.0);
  CHECK(resolve({.alpha = 1e-300}, 1000) == 1e-300 / 1000);
}

TEST_CASE("alpha of any arithmetic type", "[scaling]") {
  CHECK(resolve({.alpha = 6u}, 4) == 1.5);
  CHECK(resolve({.alpha = std::int64_t{-6}}, 4) == -1.5);
  CHECK(resolve({.alpha = 0.1F}, 1) == static_cast<double>(0.1F));
  CHECK(resolve({.alpha = 0.1}, 1) == 0.1);
  CHECK(resolve({.alpha = 1.5L}, 1) == 1.5);
  const int rank = 4;
  CHECK(resolve({.alpha = 2 * rank}, rank) == 2.0);
  // alpha has no default; compile_fail/ shows what the compiler says to {} and {.rule = ...}.
  static_assert(!std::is_default_constructible_v<scaling>);
  static_assert(!std::is_constructible_v<lora::detail::required_number, const char*>);
}

TEST_CASE("rank 0 has a scaling only where the rule does not divide by it", "[scaling]") {
  for (const auto rule : {scaling_rule::standard, scaling_rule::rank_stabilized}) {
    const auto text = refusal<lora::value_error>([&] { resolve({.alpha = 16, .rule = rule}, 0); });
    CHECK(mentions(text, {"lora::scaling", "rank 0", "fixed"}));
  }
  CHECK(resolve({.alpha = 3, .rule = scaling_rule::fixed}, 0) == 3.0);
  for (const auto rule :
       {scaling_rule::standard, scaling_rule::rank_stabilized, scaling_rule::fixed})
    CHECK(mentions(refusal<lora::value_error>([&] { resolve({.alpha = 16, .rule = rule}, -2); }),
                   {"rank -2", "negative"}));
}

TEST_CASE("an alpha that is not finite is refused under every rule", "[scaling]") {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  for (const double alpha : {infinity, -infinity, std::numeric_limits<double>::quiet_NaN(),
                             static_cast<double>(std::numeric_limits<float>::infinity())})
    for (const auto rule :
         {scaling_rule::standard, scaling_rule::rank_stabilized, scaling_rule::fixed})
      CHECK(
          mentions(refusal<lora::value_error>([&] { resolve({.alpha = alpha, .rule = rule}, 4); }),
                   {"lora::scaling", "alpha", "not finite"}));
  // A long double beyond double.
  CHECK(mentions(refusal<lora::value_error>([&] { resolve({.alpha = 1e4000L}, 4); }),
                 {"lora::scaling", "not finite"}));
  CHECK(resolve({.alpha = std::numeric_limits<double>::max()}, 1) ==
        std::numeric_limits<double>::max());
}
