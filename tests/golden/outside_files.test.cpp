// SPDX-License-Identifier: Apache-2.0
//
// Files that other people wrote: what an inventory says of them, real adapters that are read, and
// files of other tools and kinds, each refused for its own reason.
#include <algorithm>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "io/build.hpp"
#include "lora/io/peft.hpp"
#include "lora/io/peft_inventory.hpp"
#include "support/golden.hpp"

namespace fs = std::filesystem;
namespace peft = lora::peft;
namespace st = lora::safetensors;

TEST_CASE("an inventory names everything that a file holds", "[peft][inventory]") {
  const auto sift = peft::inventory_of(peft::read(golden::outside("adapters/sift-opf-zh")));
  REQUIRE(sift.modules.size() == 32);
  CHECK(sift.norm == Approx(6.63313578).epsilon(1e-8));
  CHECK(sift.replaced == std::vector<std::string>{"score.bias", "score.weight"});
  CHECK(sift.not_used.empty());
  const auto& q = *std::find_if(sift.modules.begin(), sift.modules.end(), [](const auto& row) {
    return row.module.find("layers.0") != std::string::npos && row.module.ends_with("q_proj");
  });
  CHECK(q.norm == Approx(0.984632082).epsilon(1e-8));
  CHECK(q.rank == 16);
  CHECK(q.scaling == 2.0);
  CHECK(q.dtype == "F32");
  CHECK(q.kind == peft::entry_kind::linear);
  CHECK(build::has(sift.text(), "replaces  score.bias"));
  const auto biases = peft::inventory_of(peft::read(golden::root() / "modules_to_save_bias_all/a"));
  CHECK(biases.replaced ==
        std::vector<std::string>{"lin0.bias", "lin1.bias", "score.bias", "score.weight"});
  CHECK(biases.not_used.size() == 2);
  const auto left = peft::inventory_of(
      peft::read(golden::root() / "modules_to_save/a", {.leave_out_saved_modules = true}));
  CHECK(left.not_used.size() == 2);
  const auto tokens = peft::inventory_of(peft::read(golden::root() / "trainable_tokens/a"));
  CHECK(tokens.replaced == std::vector<std::string>{"embed.weight, 3 rows"});
}

TEST_CASE("outside: every adapter of adapters/ is read or refused for its reason",
          "[outside][peft]") {
  const fs::path folder = golden::outside("adapters");
  CHECK(peft::read(folder / "sift-opf-zh").replacements().size() == 2);
  const auto gradience =
      peft::inventory_of(peft::read(folder / "gradience-tiny-lora", {.fan_in_fan_out = true}));
  CHECK(gradience.norm == Approx(212.209005).epsilon(1e-8));
  const auto refused = [](const fs::path& tensors, std::initializer_list<std::string_view> parts) {
    const auto config =
        peft::parse_config(R"({"peft_type":"LORA","r":4,"lora_alpha":4})", "adapter_config.json");
    build::refused([&] { (void)peft::assemble(config, st::read(tensors)); }, parts);
  };
  std::size_t files = 0;
  for (const auto& each : fs::recursive_directory_iterator(folder)) {
    if (each.path().extension() != ".safetensors") continue;
    ++files;
    const std::string name = each.path().parent_path().filename();
    if (name == "lycoris-lokr") refused(each.path(), {"lokr_", "LoKr"});
    if (name == "diffusers-sd-pokemon") refused(each.path(), {".lora.", "diffusers"});
    if (name == "mlx-lm-dpo") refused(each.path(), {"lora_a", "MLX"});
    if (name == "sam-lora") refused(each.path(), {"w_a_000", "not a file that PEFT wrote"});
    if (name == "cloneofsimo-lora") refused(each.path(), {"<s1>", "not a file that PEFT wrote"});
  }
  CHECK(files == 8);
  build::refused([&] { (void)peft::read(folder / "mlx-lm-dpo"); }, {"adapter_config.json"});
}

TEST_CASE("outside: PEFT's configs parse, other kinds are refused by their type",
          "[outside][peft]") {
  const fs::path configs = golden::outside("configs");
  const auto dora = peft::read_config(configs / "llama-3.2-3B-rank32-dora/adapter_config.json");
  CHECK(dora.use_dora);
  CHECK(peft::read_config(configs / "llama-3.2-3B-rank64-rslora/adapter_config.json").rule ==
        lora::scaling_rule::rank_stabilized);
  const auto bd =
      peft::read_config(configs / "llama-3.2-3B-rank14-target-mlp-bdlora/adapter_config.json");
  REQUIRE(bd.bd);
  CHECK(bd.bd->blocks == 2);
  CHECK(peft::read_config(configs / "llama-3.2-3B-rank10-target-mlp/adapter_config.json").r == 10);
  for (const char* name : {"ia3_mlp", "ia3_conv2d"})
    build::refused([&] { (void)peft::read(golden::outside("refuse") / name); },
                   {"peft_type", "IA3", "LORA"});
}
