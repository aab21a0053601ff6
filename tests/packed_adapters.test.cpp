// SPDX-License-Identifier: Apache-2.0
//
// packed_adapters: many adapters in one block of memory, with the bits of each one packed alone.
// Small adapters that lie apart miss in the processor's table of addresses: 64 of them in a batch
// cost 20 % of the base product instead of 15 %.
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "lora/lora.hpp"
#include "support/allocations.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refused.hpp"

using lora::index_t;

namespace {

constexpr index_t out = 70, in = 45;

template <class F>
std::vector<lora::adapter<F>> some_adapters(test::random& g) {
  std::vector<lora::adapter<F>> all;
  for (const index_t rank : {3, 0, 17, 90, 1})
    all.push_back({g.reals<F>(rank, in, 0.3),
                   g.reals<F>(out, rank, 0.3),
                   {.alpha = 0.7, .rule = lora::scaling_rule::fixed}});
  return all;
}

}  // namespace

TEMPLATE_TEST_CASE("adapters in one block mix to the bits of adapters packed alone",
                   "[packed_adapters]", float, double, lora::float16, lora::bfloat16) {
  test::random g(3101);
  CAPTURE(g.seed());
  const auto adapters = some_adapters<TestType>(g);
  const lora::packed_adapters<TestType> served{adapters};
  REQUIRE(served.size() == adapters.size());
  const std::vector<lora::packed_adapter<TestType>> alone(adapters.begin(), adapters.end());
  const auto W = g.reals<float>(out, in, 1);
  const test::col_matrix<float> x = g.reals<float>(in, 9, 1);
  lora::batch together{served}, apart{alone};
  for (index_t t = 0; t < 9; ++t) {
    together.add({{t % 5, 0.6}, {(t + 2) % 5, -1.3}});
    apart.add({{t % 5, 0.6}, {(t + 2) % 5, -1.3}});
  }
  test::col_matrix<float> y(out, 9), expected(out, 9);
  lora::forward(W, x, y, together);
  lora::forward(W, x, expected, apart);
  CHECK(test::same_bits(y, expected));
  for (std::size_t k = 0; k < served.size(); ++k) CHECK(served[k].bytes() == alone[k].bytes());
  // As a list of adapters, too.
  lora::forward(W, x, y, served);
  lora::forward(W, x, expected, alone);
  CHECK(test::same_bits(y, expected));
}

TEST_CASE("all panels are one allocation, and a copy of one keeps it alive", "[packed_adapters]") {
  test::random g(3102);
  CAPTURE(g.seed());
  const auto adapters = some_adapters<float>(g);
  std::size_t all = 0;
  for (const auto& l : adapters) all += lora::packed_adapter<float>(l).bytes();
  test::allocations::start(all);
  std::optional<lora::packed_adapters<float>> served(adapters);
  CHECK(test::allocations::now.large_count == 1);
  CHECK(test::allocations::now.largest < all + 64 * adapters.size());
  const lora::packed_adapter<float> kept = (*served)[2];
  CHECK(test::allocations::now.large_count == 1);
  served.reset();
  CHECK(test::allocations::now.live_large == 1);
  test::allocations::stop();
  test::col_matrix<float> y = test::col_matrix<float>::Zero(out, 1), expected = y;
  const test::col_matrix<float> x = g.reals<float>(in, 1, 1);
  lora::apply(x, y, kept);
  lora::apply(x, expected, lora::packed_adapter<float>(adapters[2]));
  CHECK(test::same_bits(y, expected));
}

TEST_CASE("U in the format of the factors goes to every adapter", "[packed_adapters]") {
  test::random g(3103);
  CAPTURE(g.seed());
  const auto adapters = some_adapters<float>(g);
  const lora::packed_adapters<lora::bfloat16> served(adapters, lora::intermediate_format::factors);
  for (const auto& one : served)
    CHECK(one.intermediate_format() == lora::intermediate_format::factors);
}

TEST_CASE("an empty list, and one with an adapter that cannot be packed", "[packed_adapters]") {
  CHECK(lora::packed_adapters<float>{}.size() == 0);
  CHECK(lora::packed_adapters<float>{std::vector<lora::adapter<float>>{}}.size() == 0);
  test::random g(3104);
  CAPTURE(g.seed());
  auto adapters = some_adapters<float>(g);
  test::matrix<float> large = g.reals<float>(2, in, 1);
  large(1, 3) = 1e30F;
  adapters.push_back({large, g.reals<float>(out, 2, 1), {.alpha = 3}});
  const auto text = test::refusal<lora::value_error>(
      [&] { lora::packed_adapters<lora::float16>(adapters).size(); });
  CHECK(test::mentions(text, {"packed_adapter", "element 1, 3 of lora_A"}));
}
