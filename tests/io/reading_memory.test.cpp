// SPDX-License-Identifier: Apache-2.0
//
// What reading an adapter allocates: each tensor's values once, where the adapter keeps them. A
// second copy, for a moment or for long, and a buffer for the whole file are one large block more.
#include <cstddef>
#include <string>
#include <vector>

#include "io/build.hpp"
#include "lora/io/peft_adapters.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"

namespace {

namespace peft = lora::peft;
const std::string prefix = "base_model.model.";

/// Tensors of at least 40,000 bytes, so that nothing else is as large.
constexpr std::size_t large = 40'000;

template <class T = float>
void add(build::file& f, const std::string& name, const std::string& dtype, int rows, int cols) {
  const auto count = static_cast<std::size_t>(rows) * static_cast<std::size_t>(cols);
  REQUIRE(count * sizeof(T) >= large);
  f.add(prefix + name, dtype, {rows, cols}, std::vector<T>(count, T(0.5F)));
}

struct adapter {
  build::directory dir;
  adapter(const std::string& type, const std::string& more, const build::file& tensors) {
    dir.write("adapter_config.json",
              R"({"peft_type":")" + type + R"(","target_modules":["m","n"])" + more + "}");
    dir.write("adapter_model.safetensors", tensors.text());
  }
  /// The large blocks that a reader allocated; all of them are still held.
  template <class Read>
  std::size_t blocks(const Read& read) const {
    test::allocations::start(large);
    const auto result = read(dir.path());
    test::allocations::stop();
    CHECK(result.size() > 0);
    CHECK(test::allocations::now.most_live_large ==
          static_cast<std::ptrdiff_t>(test::allocations::now.large_count));
    return test::allocations::now.large_count;
  }
  std::size_t blocks() const {
    return blocks([](const auto& path) { return peft::adapters(path); });
  }
};

/// Two modules and a saved one: 5 tensors.
adapter lora_of_bfloat16() {
  build::file f;
  for (const std::string m : {"m", "n"}) {
    add<lora::bfloat16>(f, m + ".lora_A.weight", "BF16", 10, 2056);
    add<lora::bfloat16>(f, m + ".lora_B.weight", "BF16", 2312, 10);
  }
  add<lora::bfloat16>(f, "head.weight", "BF16", 101, 203);
  return {"LORA", R"(,"r":10,"lora_alpha":4,"modules_to_save":["head"])", f};
}

}  // namespace

TEST_CASE("LoRA: values are read to where they are kept", "[memory][peft]") {
  const auto a = lora_of_bfloat16();
  CHECK(a.blocks() == 5);
  CHECK(a.blocks([](const auto& path) { return peft::read<lora::bfloat16>(path); }) == 5);
  CHECK(a.blocks([](const auto& path) { return peft::read<float>(path); }) ==
        5);  // and widened there
  CHECK(a.blocks([](const auto& path) { return peft::read<double>(path); }) == 5);
}

TEST_CASE("LoRA: a convolution and a stack of experts", "[memory][peft]") {
  build::file convolution;
  convolution.add(prefix + "m.lora_A.weight", "F32", {4, 64, 7, 9}, std::vector<float>(4 * 64 * 63))
      .add(prefix + "m.lora_B.weight", "F32", {4096, 4, 1, 1}, std::vector<float>(4096 * 4));
  CHECK(adapter("LORA", R"(,"r":4,"lora_alpha":6)", convolution).blocks() == 2);

  // 17 experts of rank 6. B, of 1.5 MB, is divided by columns, which takes blocks of up to 1 MiB.
  build::file stack;
  add(stack, "experts.lora_A.weight", "F32", 17 * 6, 2056);
  add(stack, "experts.lora_B.weight", "F32", 3700, 17 * 6);
  const adapter experts("LORA",
                        R"(,"r":6,"lora_alpha":4,"target_parameters":["experts.w"])"
                        R"(,"peft_version":"0.21.0")",
                        stack);
  test::allocations::start(large);
  const auto set = peft::adapters(experts.dir.path());
  test::allocations::stop();
  CHECK(set.at("experts.w").experts() == 17);
  CHECK(test::allocations::now.large_count == 2 * 17 + 2);
  CHECK(test::allocations::now.live_large == 2 * 17);
  CHECK(test::allocations::now.largest <= (1 << 20) + 64);
}

TEST_CASE("other kinds: values are read to where they are kept", "[memory][peft]") {
  build::file loha, lokr, vera;
  for (const std::string w : {"1", "2"}) {
    add(loha, "m.hada_w" + w + "_a", "F32", 2312, 6);
    add(loha, "m.hada_w" + w + "_b", "F32", 6, 2056);
  }
  CHECK(adapter("LOHA", R"(,"r":6,"alpha":3)", loha).blocks() == 4);

  add(lokr, "m.lokr_w1", "F32", 101, 103);
  add(lokr, "m.lokr_w2_a", "F32", 2312, 6);
  add(lokr, "m.lokr_w2_b", "F32", 6, 2056);
  CHECK(adapter("LOKR", R"(,"r":6,"alpha":3)", lokr).blocks() == 3);

  vera.add("base_model.vera_A", "F32", {6, 2056}, std::vector<float>(6 * 2056))
      .add("base_model.vera_B", "F32", {2312, 6}, std::vector<float>(2312 * 6));
  for (const std::string m : {"m", "n"})  // they share A and B
    vera.add(prefix + m + ".vera_lambda_b", {2312}).add(prefix + m + ".vera_lambda_d", {6});
  CHECK(adapter("VERA", R"(,"r":6,"save_projection":true)", vera).blocks() == 2);
}
