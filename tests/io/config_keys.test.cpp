// SPDX-License-Identifier: Apache-2.0
//
// The keys of a PEFT config: what the readers take, what the tables list and what docs/formats.md
// says are the same.
#include <algorithm>
#include <array>
#include <fstream>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "io/peft_file.hpp"
#include "lora/io/peft_config.hpp"
#include "support/catch.hpp"

namespace {

namespace io = lora::io_detail;
namespace peft = lora::peft;
using names = std::set<std::string>;

names of(const std::vector<std::string_view>& keys) { return {keys.begin(), keys.end()}; }

names fixed_keys_of(const io::config_kind& kind) {
  names result;
  for (const auto& key : io::common_fixed_keys) CHECK(result.emplace(key.name).second);
  for (const auto& key : kind.fixed) CHECK(result.emplace(key.name).second);
  return result;
}

/// The words in backquotes of a table's first column, in the section of a title.
names documented_keys(const std::string& title) {
  std::ifstream page(LORA_SOURCE_DIR "/docs/formats.md");
  names result;
  bool inside = false;
  for (std::string line; std::getline(page, line);) {
    if (line.starts_with('#')) inside = line == title;
    if (!inside || !line.starts_with("| `")) continue;
    const std::string cell = line.substr(1, line.find('|', 1) - 1);
    for (auto from = cell.find('`'); from != std::string::npos;) {
      const auto to = cell.find('`', from + 1);
      result.insert(cell.substr(from + 1, to - from - 1));
      from = cell.find('`', to + 1);
    }
  }
  return result;
}

/// A config with these keys, all null but peft_type.
std::shared_ptr<const io::json_node> config_with(const names& keys, std::string_view peft_type) {
  std::string text = R"({"peft_type":")" + std::string(peft_type) + '"';
  for (const auto& key : keys)
    if (key != "peft_type") text += ",\"" + key + "\":null";
  return std::make_shared<const io::json_node>(
      io::parse_json_tree({.text = text + "}", .path = "c"}));
}

// A kind as another file would define it.
constexpr std::array<io::fixed_key, 1> other_fixed{
    {{"other_seed", io::fixed_key::rule::refused, "it is a test"}}};
void read_other_keys(io::config_object& keys, peft::config& c) {
  io::read_module_keys(keys, c);
  if (const auto* r = keys.take("other_rank")) c.r = keys.positive_in(*r, "other_rank");
}
constexpr std::array<io::config_kind, 2> with_other{
    {io::lora_kind, {"OTHER", read_other_keys, other_fixed}}};

peft::config read_other(const std::string& more, const peft::read_options& options = {}) {
  const std::string text = R"({"peft_type":"OTHER")" + more + "}";
  const auto root =
      std::make_shared<const io::json_node>(io::parse_json_tree({.text = text, .path = "c"}));
  return io::read_config_tree(root, "c", options, with_other);
}

}  // namespace

TEST_CASE("every key that the page lists is read or in a table, and no other", "[peft][keys]") {
  names known = of(io::keys_read(io::lora_kind));
  const auto fixed = fixed_keys_of(io::lora_kind);
  for (const auto& key : fixed) {
    INFO(key);
    CHECK(known.insert(key).second);  // a key is read or fixed, not both
  }
  CHECK(known == documented_keys("### The config"));
}

TEST_CASE("a reader takes the same keys from every config", "[peft][keys]") {
  for (const auto& kind : with_other) {
    const auto known = of(io::keys_read(kind));
    const peft::read_options options;
    for (const auto& each : known) {
      INFO(kind.peft_type << " " << each);
      const auto root = config_with({each}, kind.peft_type);
      io::config_object keys(*root, "c", options);
      peft::config c;
      // r and lora_alpha have no null.
      if (each == "r" || each == "lora_alpha" || each == "other_rank") continue;
      io::read_keys(kind, keys, c);
      CHECK(of(keys.taken()) == known);
    }
  }
  // The values of which one decides what another may be.
  const std::string all = build::config(
      R"("use_dora":true,"alpha":6,"target_modules":["q"],"layers_to_transform":[1],"layers_pattern":"h",)"
      R"("bias":"all","init_lora_weights":"pissa","kasa_config":null,"use_bdlora":{"nblocks":2},)"
      R"("lora_B_layout":"rank_major","unsloth_fused_expert_lora":{"num_experts":2},"task_type":"SEQ_CLS",)"
      R"("layer_replication":[[0,2]],"trainable_token_indices":[1],"target_parameters":["w"])");
  const auto root = io::parse_json_tree({.text = all, .path = "c"});
  for (const auto& options : {peft::read_options{}, peft::read_options{.fan_in_fan_out = true}}) {
    io::config_object keys(root, "c", options);
    peft::config c;
    io::read_keys(io::lora_kind, keys, c);
    CHECK(of(keys.taken()) == of(io::keys_read(io::lora_kind)));
  }
}

TEST_CASE("a key that is read is never listed as unknown", "[peft][keys]") {
  auto known = of(io::keys_read(io::lora_kind));
  known.erase("r");
  known.erase("lora_alpha");
  const auto c = io::read_config_tree(config_with(known, "LORA"), "c", {});
  CHECK(c.ignored_keys.empty());
  CHECK(c.peft_type == "LORA");
}

TEST_CASE("another kind is a reader, a table and one line", "[peft][keys]") {
  const auto c = read_other(
      R"(,"other_rank":3,"target_modules":["q"],"task_type":"CAUSAL_LM","inference_mode":true)");
  CHECK(c.peft_type == "OTHER");
  CHECK(c.r == 3);
  CHECK(peft::matches_target(c, "m.q"));
  CHECK(c.ignored_keys.empty());
  // What only LORA has, it does not know.
  build::refused([] { (void)read_other(R"(,"lora_alpha":3)"); },
                 {"lora_alpha", "this version knows"});
  build::refused([] { (void)read_other(R"(,"other_seed":3)"); },
                 {"other_seed", "null or false", "it is a test"});
  build::refused([] { (void)read_other(R"(,"other_rank":0)"); }, {"other_rank", "above 0"});
  CHECK(read_other(R"(,"lora_alpha":3)", {.lenient = true}).ignored_keys ==
        std::vector<std::string>{"lora_alpha"});
  // LORA does not know the other's.
  build::refused([] { (void)build::parse(build::config(R"("other_rank":3)")); },
                 {"other_rank", "this version knows"});
}

TEST_CASE("unknown keys are said before what is wrong with known ones", "[peft][keys]") {
  build::refused([] { (void)build::parse(build::config(R"("bias":"some","later":1)")); },
                 {"later"});
  build::refused([] { (void)build::parse(build::config(R"("later":1,"use_qalora":true)")); },
                 {"later"});
  build::refused([] { (void)build::parse(build::config(R"("use_qalora":true,"later":1)")); },
                 {"use_qalora"});
  const auto c =
      build::parse(build::config(R"("use_bdlora":{"inner":1},"later":1)"), {.lenient = true});
  CHECK(c.ignored_keys == std::vector<std::string>{"later", "use_bdlora.inner"});
}
