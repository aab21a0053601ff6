// SPDX-License-Identifier: Apache-2.0
//
// Merge or mix: the arithmetic of the advice on a machine whose limits are round numbers, and that
// a real one has limits.
#include "lora/advise.hpp"

#include "lora/adapter.hpp"
#include "lora/delta.hpp"
#include "support/catch.hpp"
#include "support/refused.hpp"

using test::mentions;
using test::refusal;

namespace {
constexpr lora::machine_rates machine{.flops = 1e9, .read = 4e9, .read_write = 2e9, .threads = 1};
constexpr lora::layer_shape layer{.out_features = 1000, .in_features = 500};
}  // namespace

TEST_CASE("an example computed by hand", "[advise]") {
  // 0.5 M weights: 2 MB of float, 1 MFLOP a token; factors of rank 10 + 20: 45,000.
  const auto a = lora::advise<float>(machine, layer, {10, 20}, {.tokens_per_switch = 100});
  CHECK(a.merged_call == Approx(1e-3));    // FLOPs: 1e6 / 1e9; bytes: 2e6 / 4e9
  CHECK(a.mixed_call == Approx(1.09e-3));  // 2 * 545,000
  CHECK(a.merge_once == Approx(30e-3));    // FLOPs: 2 * 0.5e6 * 30 / 1e9; bytes: 4e6 / 2e9
  CHECK(a.break_even_tokens == Approx(30e-3 / 0.09e-3));  // 333
  CHECK_FALSE(a.merge);
  CHECK(lora::advise<float>(machine, layer, {10, 20}, {.tokens_per_switch = 400}).merge);
  // Eight tokens a call share a call's bytes but not its FLOPs.
  const auto eight = lora::advise<float>(machine, layer, {10, 20},
                                         {.tokens_per_switch = 100, .tokens_per_call = 8});
  CHECK(eight.break_even_tokens == Approx(a.break_even_tokens));
  // A weight of half the bytes on a machine bound by bytes: the float factors weigh twice as much.
  const lora::machine_rates slow_memory{
      .flops = 1e12, .read = 1e9, .read_write = 1e9, .threads = 1};
  const auto b =
      lora::advise<lora::bfloat16, float>(slow_memory, layer, {30}, {.tokens_per_switch = 1});
  CHECK(b.merged_call == Approx(1e-3));
  CHECK(b.mixed_call == Approx(1e-3 + 0.18e-3));
  CHECK(b.merge_once == Approx(2e-3));
  // Deltas of bfloat16 factors at twice the rate, where the build multiplies them by dot products.
  lora::machine_rates with_dots = machine;
  with_dots.dot_flops = 2e9;
  const auto c =
      lora::advise<float, lora::bfloat16>(with_dots, layer, {10, 20}, {.tokens_per_switch = 100});
  CHECK(c.merge_once ==
        Approx(lora::flush_threshold_of_delta<float, lora::adapter<lora::bfloat16>>() > 0 ? 15e-3
                                                                                          : 30e-3));
  CHECK(c.merged_call == Approx(1e-3));
  CHECK(lora::advise<float, lora::bfloat16>(with_dots, layer, {3, 3}, {.tokens_per_switch = 1})
            .merge_once == Approx(6e-3));
  // Nothing to mix: merging never pays.
  const auto none = lora::advise<float>(machine, layer, {}, {.tokens_per_switch = 1e12});
  CHECK((!none.merge && none.break_even_tokens == std::numeric_limits<double>::infinity()));
}

TEST_CASE("what is no question is refused", "[advise]") {
  const auto refused = [](const lora::machine_rates& m, const lora::layer_shape& s,
                          lora::index_t rank, const lora::usage& u) {
    return refusal<lora::value_error>([&] { lora::advise<float>(m, s, {rank}, u); });
  };
  CHECK(mentions(refused(machine, layer, -1, {.tokens_per_switch = 1}), {"advise", "negative"}));
  CHECK(mentions(
      refused(machine, {.out_features = -1, .in_features = 1}, 1, {.tokens_per_switch = 1}),
      {"advise"}));
  CHECK(mentions(refused(machine, layer, 1, {.tokens_per_switch = 1, .tokens_per_call = 0}),
                 {"tokens_per_call"}));
  CHECK(mentions(refused(machine, layer, 1, {.tokens_per_switch = NAN}), {"tokens_per_switch"}));
  CHECK(mentions(refused({}, layer, 1, {.tokens_per_switch = 1}), {"machine_limits()"}));
}

TEST_CASE("a machine has limits", "[advise]") {
  const auto m = lora::detail::limits_probe(std::size_t{8} << 20).measure(0.01);
  CHECK((m.flops > 1e7 && m.read > 1e7 && m.read_write > 1e7 && m.threads >= 1));
  CHECK(m.reading(m.flops, 0) == Approx(1));
  CHECK(m.updating(0, 2 * m.read_write) == Approx(2));
  CHECK(m.updating(m.flops, 3 * m.dot_flops, 0) == Approx(4));
}
