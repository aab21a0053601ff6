// SPDX-License-Identifier: Apache-2.0
//
// Small models with PEFT's own outputs and weights beside float64 values, in every state of
// merging.
#include <cmath>
#include <limits>

#include "golden/reference_case.hpp"
#include "support/refused.hpp"

TEST_CASE("two adapters of different rank and alpha on layers with biases", "[golden]") {
  golden::check_case(golden::root() / "linear_mlp");
}

TEST_CASE("rank-stabilized scaling with rank_pattern and alpha_pattern", "[golden]") {
  golden::check_case(golden::root() / "rslora_patterns");
}

TEST_CASE("weights stored in x out", "[golden]") {
  golden::check_case(golden::root() / "conv1d_fan_in_fan_out");
}

// PEFT's safe merge raises "NaNs detected in the merged weights"; its default merge says nothing.
TEST_CASE("a broken factor is refused by merge_checked and counted by merge", "[golden]") {
  const golden::reference_case c(golden::root() / "linear_mlp");
  const auto& good = c.adapters<float>().at("a").at("lin0").factors();
  const auto W = golden::tensor<float>(c.base(), "lin0.weight");
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    CAPTURE(bad);
    test::matrix<float> A = good.lora_A();
    A(1, 3) = bad;
    const lora::adapter<float> broken(A, good.lora_B(),
                                      {.alpha = good.scaling(), .rule = lora::scaling_rule::fixed});
    auto stored = W;
    CHECK(test::mentions(
        test::refusal<lora::value_error>([&] { lora::merge_checked(stored, broken); }),
        {"20 of 200 elements would not be finite", "W is untouched"}));
    CHECK(test::same_bits(stored, W));
    CHECK(lora::merge(stored, broken).became_nonfinite == 20);
  }
}

// The second adapter's file says fan_in_fan_out false, as PEFT saves it when it corrected the word
// only in memory.
TEST_CASE("adapters whose configs disagree on the orientation are not merged together",
          "[golden]") {
  const auto a = lora::peft::read(golden::root() / "conv1d_fan_in_fan_out" / "a");
  const auto b = lora::peft::read(golden::root() / "conv1d_fan_in_fan_out" / "b");
  const auto base =
      lora::safetensors::read(golden::root() / "conv1d_fan_in_fan_out" / "base.safetensors");
  const auto square = golden::tensor<float>(base, "c_attn.weight"),
             wide = golden::tensor<float>(base, "c_fc.weight");
  auto stored = square;
  CHECK(test::mentions(test::refusal<lora::value_error>(
                           [&] { lora::merge(stored, a.at("c_attn"), b.at("c_attn")); }),
                       {"fan_in_fan_out", "c_attn", "read_options::fan_in_fan_out"}));
  CHECK(test::same_bits(stored, square));
  stored = wide;
  CHECK(test::mentions(test::refusal<lora::shape_error>([&] { lora::merge(stored, b.at("c_fc")); }),
                       {"c_fc", "fits transposed", "{.fan_in_fan_out = true}"}));
  CHECK(test::same_bits(stored, wide));
}
