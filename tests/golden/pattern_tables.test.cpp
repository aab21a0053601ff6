// SPDX-License-Identifier: Apache-2.0
//
// PEFT's tables of pattern lookup and target matching, case by case.
#include "lora/io/peft_config.hpp"
#include "support/golden.hpp"
#include "support/refused.hpp"

namespace {

using golden::json;

json table(const char* name) {
  return golden::read_json(golden::outside("golden/peft-0.21/pattern_tables/case.json")).at(name);
}

lora::peft::config config_of(json settings) {
  settings["peft_type"] = "LORA";
  return lora::peft::parse_config(settings.dump(), "case.json");
}

std::vector<std::string> selected(const lora::peft::config& c,
                                  const std::vector<std::string>& modules) {
  std::vector<std::string> result;
  for (const auto& module : modules)
    if (lora::peft::matches_target(c, module)) result.push_back(module);
  return result;
}

}  // namespace

TEST_CASE("the first key that fits gives a module's rank and alpha", "[golden]") {
  const json cases = table("pattern_lookup");
  CHECK(cases.size() == 21 * 16);  // patterns, modules
  for (const json& one : cases) {
    INFO(one.dump());
    const std::string module = one.at("module");
    const json& value = one.at("value");  // null: the default holds
    const auto by_rank =
        config_of({{"r", 99}, {"lora_alpha", 77.5}, {"rank_pattern", one.at("pattern")}});
    CHECK(by_rank.rank_of(module) == (value.is_null() ? 99 : value.get<lora::index_t>()));
    CHECK(by_rank.scaling_of(module).alpha == 77.5);
    const auto by_alpha =
        config_of({{"r", 99}, {"lora_alpha", 77.5}, {"alpha_pattern", one.at("pattern")}});
    CHECK(by_alpha.scaling_of(module).alpha == (value.is_null() ? 77.5 : value.get<double>()));
    CHECK(by_alpha.rank_of(module) == 99);
  }
}

TEST_CASE("a config selects the modules that PEFT would adapt", "[golden]") {
  const auto modules = table("module_names").get<std::vector<std::string>>();
  int matched = 0, refused = 0;
  for (const json& one : table("target_matching")) {
    INFO(one.dump());
    const json& settings = one.at("config");
    if (one.contains("matched")) {
      CHECK(selected(config_of(settings), modules) ==
            one.at("matched").get<std::vector<std::string>>());
      ++matched;
    } else {
      // PEFT accepts r = 0 in a config (error null) and refuses it when it builds the layers; a
      // file that says so is refused.
      CHECK(test::mentions(test::refusal<lora::format_error>([&] { config_of(settings); }),
                           {"case.json"}));
      ++refused;
    }
  }
  CHECK(matched == 20);
  CHECK(refused == 6);
}
