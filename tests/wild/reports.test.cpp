// SPDX-License-Identifier: Apache-2.0
//
// Situations from public reports, in miniature, each against what its README expects. The inputs
// are written by the reference files' own scripts; tests/io has the same families with inputs of
// ours.
#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "io/build.hpp"
#include "lora/io/peft_inventory.hpp"
#include "lora/io/peft_write.hpp"
#include "lora/io/safetensors.hpp"
#include "support/catch.hpp"
#include "support/refused.hpp"

namespace {

namespace fs = std::filesystem;
namespace peft = lora::peft;
using reason = peft::replacement::reason;

const fs::path inputs = LORA_WILD_DIR;
const peft::read_options strict{}, lenient{.lenient = true};

/// The message with which an input is refused; it never has one of the false words.
std::string says(const fs::path& input, const peft::read_options& options,
                 std::initializer_list<std::string_view> words,
                 std::initializer_list<std::string_view> never = {}) {
  const auto message = build::refusal([&] { (void)peft::read(inputs / input, options); });
  INFO(input.string() << ": " << message);
  for (const auto word : words) {
    INFO("must say: " << word);
    CHECK(build::has(message, word));
  }
  for (const auto word : never) {
    INFO("must not say: " << word);
    CHECK_FALSE(build::has(message, word));
  }
  return message;
}

std::vector<double> numbers(const nlohmann::json& list) { return list.get<std::vector<double>>(); }
nlohmann::json expected(const fs::path& folder) {
  return nlohmann::json::parse(std::ifstream(inputs / folder / "expected.json"));
}

/// The stack of a base after merging the file's only entry. Factors are multiples of 1/8 below 2,
/// of two ranks: exact in float.
std::vector<double> merged_stack(const peft::adapter_file<float>& file, const fs::path& base) {
  const auto tensors = lora::safetensors::read(inputs / base);
  const auto& e = file.begin()->second;
  const auto& t = tensors.at(e.weight_name());
  auto values = tensors.copy<float>(e.weight_name());
  const auto extent = [&](std::size_t k) { return static_cast<lora::index_t>(t.shape[k]); };
  lora::merge(lora::tensor_view<float, 3>(values, {extent(0), extent(1), extent(2)}), e);
  return {values.begin(), values.end()};
}
/// Written again, the file reads as the same adapter.
void written_again(const peft::adapter_file<float>& file, const peft::read_options& options = {}) {
  const build::directory dir;
  peft::write(dir.path(), file);
  const auto again = peft::read(dir.path(), options);
  CHECK(again.names() == file.names());
  CHECK(again.replacements().size() == file.replacements().size());
}

}  // namespace

TEST_CASE("every folder of reports has a test", "[wild]") {
  const std::set<std::string> known{"eva-patterns-many",
                                    "experts-stacked-3d",
                                    "init-case",
                                    "key-drift",
                                    "lenient-drops-base-tensors",
                                    "misleading-names",
                                    "moe-lora-b-layout",
                                    "moe-square-old-peft",
                                    "resized-vocab-trainable-tokens",
                                    "seqcls-head-unnamed",
                                    "silent-settings",
                                    "target-selects-nothing",
                                    "wrapper-prefix",
                                    "zero3-saved-empty"};
  std::size_t found = 0;
  for (const auto& folder : fs::directory_iterator(inputs)) {
    const auto name = folder.path().filename().string();
    if (known.contains(name))
      ++found;
    else
      WARN("no test here for the reports in " << name);
  }
  CHECK(found == known.size());
}

TEST_CASE("eva-patterns-many", "[wild]") {
  for (const std::string count : {"5000", "18432"}) {
    const auto file = peft::read(inputs / "eva-patterns-many" / ("eva_" + count));
    CHECK(std::to_string(file.size()) == count);
    for (const auto& [name, e] : file)
      if (e.rank() != 1 || e.scaling() != 2.0) FAIL(name);
  }
}

TEST_CASE("experts-stacked-3d", "[wild]") {
  const fs::path folder = "experts-stacked-3d";
  for (const auto* name : {"by_expert", "experts_equal_rank", "expert_last_b", "shared_outer"})
    for (const auto& options : {strict, lenient})
      says(folder / name, options, {"a stack of experts", "not read yet"},
           {"rank_pattern", "kernel"});
  says(folder / "flat_without_target_parameters", strict, {"several experts", "target_parameters"});
  says(folder / "two_named_one_saved", strict, {"parameter_order"});
  const auto file =
      peft::read(inputs / folder / "two_named_one_saved", {.parameter_order = {"gate_up_proj"}});
  CHECK(file.at("model.layers.0.mlp.experts.gate_up_proj").experts() == 3);
}

TEST_CASE("init-case", "[wild]") {
  const fs::path folder = "init-case";
  for (const auto* name : {"gaussian", "gaussian_cased_Gaussian", "mica", "mica_cased_MiCA"})
    CHECK(peft::read(inputs / folder / name).begin()->second.change() == peft::base_change::none);
  for (const auto* name : {"olora", "olora_cased_OLoRA"})
    CHECK(peft::read(inputs / folder / name).begin()->second.change() == peft::base_change::olora);
  for (const auto& options : {strict, lenient}) {
    says(folder / "pissa_cased_PiSSA", options, {"\"PiSSA\"", "\"pissa\""}, {"random"});
    says(folder / "eva_cased_Eva", options, {"\"Eva\"", "\"eva\""}, {"random"});
  }
}

TEST_CASE("key-drift", "[wild]") {
  const fs::path folder = inputs / "key-drift";
  const auto base = lora::safetensors::read(folder / "base.safetensors");
  const std::vector<std::pair<std::string, peft::moved_prefix>> moves{
      {"old", {"language_model.model.", "model.language_model."}},
      {"middle", {"", ""}},
      {"wrapped", {"model.model.", "model."}},
      {"text_only", {"model.", "model.language_model."}},
      {"thinker", {"thinker.model.", "model.language_model."}}};
  for (const auto& [name, move] : moves) {
    INFO(name);
    const auto file = peft::read(folder / name).renamed(move);
    CHECK(base.contains(file.begin()->second.weight_name()));
    written_again(file);
  }
}

TEST_CASE("lenient-drops-base-tensors", "[wild]") {
  for (const std::string name : {"norm", "mlp", "unknown"}) {
    const auto input = fs::path("lenient-drops-base-tensors") / name;
    says(input, strict, {"PEFT loads it", "replacement"});
    const auto file = peft::read(inputs / input, lenient);
    REQUIRE(file.replacements().size() == 1);
    CHECK(file.replacements()[0].why == reason::unasked);
    CHECK(file.passed_over().empty());
    if (name == "norm")
      CHECK(file.replacements()[0].values<float>() == std::vector<float>{3, 4, 5, 6});
  }
}

TEST_CASE("misleading-names", "[wild]") {
  const fs::path folder = "misleading-names";
  const auto never = {std::string_view("tensor of the base model")};
  says(folder / "adapter_named_lora", strict, {"before 0.18", "\"lora\""}, never);
  says(folder / "numbered_factor", strict, {"several factors", "diffusers"}, never);
  says(folder / "hydra_b0_b1", strict, {"several factors", "route"}, never);
  says(folder / "packed_factor", strict, {"quantized"}, {"name of an adapter"});
  says(folder / "torchtune_lower_case", strict, {"torchtune"}, {"MLX"});
  says(folder / "alpha_buffer", strict, {"buffer of alpha"}, {"MLX"});
  says(folder / "dora_default", strict, {"magnitude", "save_pretrained"}, never);
  says(folder / "placeholder_w3", strict, {"placeholder"}, {"sharded"});
  says(folder / "no_tensors", strict, {"no tensor at all"}, {"not of its base"});
  for (const auto* name :
       {"adapter_named_lora", "numbered_factor", "hydra_b0_b1", "torchtune_lower_case"})
    says(folder / name, lenient, {"none", "after passing over"}, {"not of its base"});
}

TEST_CASE("moe-lora-b-layout", "[wild]") {
  const fs::path folder = "moe-lora-b-layout";
  const auto want = expected(folder);
  const auto stack = [&](const std::string& name, const peft::read_options& options) {
    const auto file = peft::read(inputs / folder / name, options);
    std::vector<float> values(3 * 6 * 4, 0.0F);
    lora::merge(lora::tensor_view<float, 3>(values, {3, 6, 4}), file.begin()->second);
    written_again(file);
    return std::vector<double>(values.begin(), values.end());
  };
  for (const auto& options : {strict, lenient}) {
    CHECK((stack("unmarked", options)) == numbers(want["rank_major"]));
    CHECK((stack("rank_major", options)) == numbers(want["rank_major"]));
    CHECK((stack("grouped_by_expert", options)) == numbers(want["grouped_by_expert"]));
  }
  CHECK((stack("unmarked", {.experts_grouped_b = true})) == numbers(want["grouped_by_expert"]));
}

TEST_CASE("moe-square-old-peft", "[wild]") {
  const fs::path folder = "moe-square-old-peft", base = folder / "base4x4.safetensors";
  const auto want = expected(folder);
  std::vector<double> plain, turned;
  for (const auto& [key, list] : want.items())
    (key.starts_with("0.19.1 and later, not") ? plain : turned) = numbers(list);
  REQUIRE(plain.size() == 48);
  REQUIRE(turned.size() == 48);
  for (const std::string version : {"0.18.1", "0.19.0", "unsaid"}) {
    for (const auto& options : {strict, lenient})
      says(folder / ("peft_" + version), options,
           {"parameters_in_out", version == "unsaid" ? "no peft_version" : version});
    CHECK((merged_stack(
              peft::read(inputs / folder / ("peft_" + version), {.parameters_in_out = false}),
              base)) == plain);
    CHECK((merged_stack(
              peft::read(inputs / folder / ("peft_" + version), {.parameters_in_out = true}),
              base)) == turned);
  }
  for (const std::string version : {"0.19.1", "0.21.2"}) {
    CHECK((merged_stack(peft::read(inputs / folder / ("peft_" + version)), base)) == plain);
    CHECK((merged_stack(
              peft::read(inputs / folder / ("peft_" + version), {.parameters_in_out = true}),
              base)) == turned);
  }
  const auto rectangle = peft::read(inputs / folder / "rect_018");
  CHECK_THROWS_WITH(merged_stack(rectangle, folder / "base6x4.safetensors"),
                    Catch::Contains("before 0.19.1"));
  CHECK_NOTHROW(merged_stack(peft::read(inputs / folder / "rect_018", {.parameters_in_out = true}),
                             folder / "base6x4.safetensors"));
  // Mixing: the function of an expert is what its merged slice does.
  const auto file = peft::read(inputs / folder / "peft_0.18.1", {.parameters_in_out = true});
  const Eigen::VectorXf x = Eigen::VectorXf::LinSpaced(4, 1, 4);
  for (int k = 0; k < 3; ++k) {
    const Eigen::MatrixXf slice =
        Eigen::Map<const Eigen::Matrix<double, 4, 4, Eigen::RowMajor>>(turned.data() + 16 * k)
            .cast<float>();
    Eigen::VectorXf y = Eigen::VectorXf::Zero(4);
    lora::apply(x, y, file.begin()->second.expert(k));
    CHECK(y == slice * x);
  }
}

TEST_CASE("resized-vocab-trainable-tokens", "[wild]") {
  for (const std::string name : {"auto", "no_head", "list_form"}) {
    const auto file = peft::read(inputs / "resized-vocab-trainable-tokens" / name);
    const auto& all = file.replacements();
    const auto table = std::find_if(all.begin(), all.end(), [](const auto& r) {
      return r.name == "model.embed_tokens.weight";
    });
    REQUIRE(table != all.end());
    CHECK(table->why == reason::embedding);
    CHECK(table->shape == std::vector<std::uint64_t>{13, 4});
    CHECK(file.token_rows().at("model.embed_tokens").ids() == std::vector<lora::index_t>{11, 12});
    CHECK(all.size() == (name == "auto" ? 2 : 1));
    written_again(file);
  }
}

TEST_CASE("seqcls-head-unnamed", "[wild]") {
  const fs::path folder = "seqcls-head-unnamed";
  for (const auto& [name, count] : std::vector<std::pair<std::string, std::size_t>>{
           {"seq_cls_score", 1}, {"seq_cls_classifier", 2}, {"token_cls", 1}}) {
    const auto file = peft::read(inputs / folder / name);
    CHECK(file.replacements().size() == count);
    for (const auto& each : file.replacements()) CHECK(each.why == reason::saved_module);
    written_again(file);
  }
  says(folder / "seq_cls_other", strict, {"pooler.weight"});
}

TEST_CASE("silent-settings", "[wild]") {
  const fs::path folder = inputs / "silent-settings";
  const auto text = [&](const char* name) {
    return peft::inventory_of(peft::read(folder / name)).text();
  };
  CHECK_THAT(text("pattern_fits_nothing"),
             Catch::Contains("not used  rank_pattern \"^q_proj\"") &&
                 Catch::Contains("not used  alpha_pattern \"qproj\""));
  CHECK_THAT(text("metadata_alpha"), Catch::Contains("metadata") && Catch::Contains("64") &&
                                         Catch::Contains("lora_alpha 4"));
  CHECK_THAT(text("metadata_config"), Catch::Contains("metadata") && Catch::Contains("64") &&
                                          Catch::Contains("lora_alpha 4"));
  CHECK_THAT(text("other_trained_file"), Catch::Contains("non_lora_trainables.bin"));
  CHECK_THAT(text("new_embeddings"), Catch::Contains("new_embeddings.safetensors"));
  CHECK_THAT(text("all_nan"), Catch::Contains("14 of 14 values are not finite"));
  const auto base = lora::safetensors::read(folder / "base.safetensors");
  auto values = base.copy<float>("lm_head.weight");
  const auto file = peft::read(folder / "new_embeddings");
  CHECK_THROWS_WITH(lora::merge(lora::row_major(values, 7, 4), file.at("lm_head")),
                    Catch::Contains("vocabulary was resized"));
}

TEST_CASE("target-selects-nothing", "[wild]") {
  for (const std::string name : {"auto_list", "auto", "python_set", "empty", "all_linear_in_list",
                                 "regex_in_list", "full_weight_name"}) {
    const auto input = fs::path("target-selects-nothing") / name;
    for (const auto& options : {strict, lenient})
      says(input, options, {"target_modules", "selects none of the 1", "PEFT loads none of these"},
           {"PEFT would ignore", "save the adapter again"});
    const auto file = peft::read(inputs / input, {.select_by_tensors = true});
    CHECK(file.size() == 1);
    written_again(file);
  }
}

TEST_CASE("wrapper-prefix", "[wild]") {
  const fs::path folder = "wrapper-prefix";
  const auto base = lora::safetensors::read(inputs / folder / "base.safetensors");
  for (const auto& [name, wrapper] :
       std::vector<std::pair<std::string, std::string>>{{"compile_front", "_orig_mod"},
                                                        {"compile_inside", "_orig_mod"},
                                                        {"compile_layer", "_orig_mod"},
                                                        {"ddp_front", "module."},
                                                        {"dict_front", "transformer."},
                                                        {"peft_twice", "base_model.model."},
                                                        {"fsdp_inside", "_fsdp_wrapped_module"}}) {
    says(folder / name, strict,
         {wrapper, "unwrapped", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"});
    for (const auto& options :
         {lenient, peft::read_options{.wrappers = peft::wrapper_names::strip}}) {
      const auto file = peft::read(inputs / folder / name, options);
      CHECK(base.contains(file.begin()->second.weight_name()));
      written_again(file);
    }
  }
  for (const auto& options : {strict, lenient})
    says(folder / "nested_two", options, {"a PeftModel inside a PeftModel", "save each by itself"},
         {"target_parameters"});
}

TEST_CASE("zero3-saved-empty", "[wild]") {
  for (const std::string name : {"saved_module", "embedding_base_layer", "bias", "factors"})
    for (const auto& options : {strict, lenient})
      says(fs::path("zero3-saved-empty") / name, options,
           {"F32 [0]", "sharded model", "gathering"});
}
