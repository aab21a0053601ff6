// SPDX-License-Identifier: Apache-2.0
//
// Names in PEFT files: what a config's patterns and lists say of them, what they are called in the
// base, and that looking them up is bounded in time and memory.
#include <sys/resource.h>

#include <string>
#include <vector>

#include "io/peft_file.hpp"
#include "lora/io/peft_inventory.hpp"
#include "support/catch.hpp"
#include "support/refused.hpp"
#include "support/sanitized.hpp"

namespace {

namespace peft = lora::peft;
namespace st = lora::safetensors;
using build::prefix;
using build::refused;
using reason = peft::replacement::reason;

// Of a config, only what it says more than every one.
peft::config parse(const std::string& more, const peft::read_options& options = {}) {
  return build::parse(build::config(more), options);
}
peft::adapter_file<float> assemble_with(const std::string& more, const build::file& tensors,
                                        const peft::read_options& options = {}) {
  return build::assemble(build::config(more), tensors, options);
}
void refused_with(const std::string& more, const build::file& tensors,
                  std::initializer_list<std::string_view> parts) {
  build::file_refused(build::config(more), tensors, parts);
}

/// Rank-2 adapters of 3 x 4 layers.
build::file pairs(const std::vector<std::string>& modules) {
  build::file result;
  for (const auto& name : modules)
    result.add(prefix + name + ".lora_A.weight", {2, 4}, 0.5F)
        .add(prefix + name + ".lora_B.weight", {3, 2}, 0.25F);
  return result;
}

/// What the tensors beside adapters replace, as "name:reason" by the order of their keys.
std::vector<std::string> replaced(const peft::adapter_file<float>& file) {
  std::vector<std::string> result;
  for (const auto& each : file.replacements())
    result.push_back(each.name + ":" + std::to_string(static_cast<int>(each.why)));
  return result;
}
std::string with(const std::string& name, reason why) {
  return name + ":" + std::to_string(static_cast<int>(why));
}

/// KiB that freed memory may keep: AddressSanitizer holds it back for a while.
constexpr long held_back = LORA_TEST_ASAN ? 256 * 1024 : 0;

}  // namespace

// ---- layer_replication
// -----------------------------------------------------------------------------------------------

TEST_CASE("replicated layers are found where the number is the second segment", "[peft][names]") {
  for (const std::string path : {"layers.", "h.", "model.layers.", "bert.encoder.layer."}) {
    INFO(path);
    const auto file =
        assemble_with(R"("layer_replication":[[0,2],[1,2]])", pairs({path + "0.q", path + "2.q"}));
    CHECK(file.at(path + "0.q").shared_with().empty());
    CHECK(file.at(path + "2.q").shared_with() == path + "1.q");
    refused_with(R"("layer_replication":[[0,2]])", pairs({path + "2.q"}),
                 {"lora_A", "a layer of the 2", "layer 2"});
    refused_with(R"("layer_replication":[[0,2]])", pairs({path + "99999999999999999999.q"}),
                 {"a layer of the 2"});
  }
  // The container is PEFT's choice, not that of layers_pattern, and the number may be the last
  // segment.
  const auto file = assemble_with(
      R"("layer_replication":[[1,2],[1,2]],"layers_to_transform":[1],"layers_pattern":["blocks"])",
      pairs({"layers.1", "norm"}));
  CHECK(file.at("layers.1").shared_with() == "layers.1");
  CHECK(file.at("norm").shared_with().empty());
}

TEST_CASE("a replicated layer with a weight of its own has its name in the base", "[peft][names]") {
  const auto file = assemble_with(R"("layer_replication":[[0,1],[2,3]])",
                                  pairs({"layers.0.q", "layers.1.q", "layers.01.k"}));
  CHECK(file.at("layers.0.q").weight_name() == "layers.0.q.weight");
  const auto& moved = file.at("layers.1.q");
  CHECK(moved.name() == "layers.1.q");
  CHECK(moved.shared_with().empty());
  CHECK(moved.weight_name() == "layers.2.q.weight");
  CHECK(moved.bias_name() == "layers.2.q.bias");
  CHECK(moved.what_else().empty());
  CHECK(file.at("layers.01.k").weight_name() == "layers.2.k.weight");
  CHECK(peft::inventory_of(file).modules[2].module == "layers.1.q");
  CHECK(peft::inventory_of(file).modules[2].weight == "layers.2.q.weight");
  Eigen::MatrixXf W = Eigen::MatrixXf::Zero(3, 4);
  CHECK_NOTHROW(lora::merge(W, moved));
  // So has what replaces a tensor of the base; a head's numbers are no layers.
  const auto biases = assemble_with(
      R"("layer_replication":[[0,1],[2,3]],"bias":"all","modules_to_save":["classifier"])",
      pairs({"layers.1.q", "mlp.7"})
          .add(prefix + "layers.1.q.base_layer.bias", {3})
          .add(prefix + "classifier.3.weight", {2, 2}));
  CHECK(replaced(biases) ==
        std::vector<std::string>{with("classifier.3.weight", reason::saved_module),
                                 with("layers.2.q.bias", reason::bias)});
  CHECK(biases.at("mlp.7").weight_name() == "mlp.7.weight");
  const auto shared = assemble_with(R"("layer_replication":[[0,2],[1,2]])", pairs({"layers.2.q"}));
  CHECK(shared.at("layers.2.q").weight_name() == "layers.1.q.weight");
}

// ---- letters beyond ASCII
// --------------------------------------------------------------------------------------------

TEST_CASE("a class of characters on a letter beyond ASCII is refused with the key and the module",
          "[peft][names]") {
  const std::string cafe = "caf\xC3\xA9";
  const auto tensors = pairs({"m." + cafe});
  for (const std::string key : {"rank_pattern", "alpha_pattern"})
    refused_with('"' + key + R"(":{"\\w+":2})", tensors,
                 {"adapter_config.json", '"' + key + '"', "\"\\w+\"", "m.caf\\xc3\\xa9",
                  "the module's name"});
  refused_with(R"("target_modules":["caf)"
               "\xC3\xA9"
               R"("],"exclude_modules":"\\d+")",
               tensors,
               {"adapter_config.json", "\"exclude_modules\"", "\"\\d+\"", "m.caf\\xc3\\xa9"});
  // An earlier key that fits decides, and so does an expression without classes.
  CHECK(assemble_with(R"("rank_pattern":{".*":2,"\\w+":3})", tensors).at("m." + cafe).rank() == 2);
  CHECK_NOTHROW(assemble_with(R"("target_modules":".*caf.","exclude_modules":"n.*")", tensors));
  refused_with(R"("target_modules":"n.*")", tensors, {"target_modules selects"});
  CHECK_NOTHROW(assemble_with(R"("target_modules":"\\w.*")", tensors));  // the tensors tell
  CHECK_THROWS_AS(peft::matches_target(parse(R"("target_modules":"\\w.*")"), cafe),
                  lora::value_error);
}

// ---- what replaces tensors of the base
// -------------------------------------------------------------------------------

TEST_CASE("a trained bias has its name in the base, whatever wraps the module", "[peft][names]") {
  const auto tensors = build::file()
                           .add(prefix + "a.lora_A.weight", {2, 3})
                           .add(prefix + "a.lora_B.weight", {9, 2})
                           .add(prefix + "a.base_layer.out_proj.lora_A.weight", {2, 3})
                           .add(prefix + "a.base_layer.out_proj.lora_B.weight", {3, 2})
                           .add(prefix + "a.base_layer.out_proj.base_layer.bias", {3});
  for (const std::string bias : {"all", "lora_only"})
    CHECK(replaced(assemble_with("\"bias\":\"" + bias + '"', tensors)) ==
          std::vector<std::string>{with("a.out_proj.bias", reason::bias)});
}

TEST_CASE("a saved module is not read from PEFT's inner name for it", "[peft][names]") {
  const std::string saved = R"("modules_to_save":["score"])";
  const auto pair = [] { return pairs({"m"}); };
  for (const std::string inner : {"modules_to_save", "original_module"}) {
    INFO(inner);
    const std::string key = "score." + inner + ".weight";
    refused_with(saved, pair().add(prefix + key, {2, 2}),
                 {key, "\"score.weight\" beside it", "none", "incomplete"});
    const auto lenient = assemble_with(saved, pair().add(prefix + key, {2, 2}), {.lenient = true});
    CHECK(lenient.replacements().empty());
    REQUIRE(lenient.passed_over().size() == 1);
    CHECK(build::has(lenient.passed_over()[0], key));
    const auto both = pair().add(prefix + key, {2, 2}).add(prefix + "score.weight", {2, 2});
    CHECK(replaced(assemble_with(saved, both)) ==
          std::vector<std::string>{with("score.weight", reason::unused_copy),
                                   with("score.weight", reason::saved_module)});
    CHECK_NOTHROW(assemble_with(saved, both, {.leave_out_saved_modules = true}));
  }
  // Inside a module of modules the name of the adapter stays in the key.
  const std::string bias = "score.dense.bias", copy = "score.modules_to_save.default.dense.bias";
  const auto inside = pair()
                          .add(prefix + bias, {2})
                          .add(prefix + copy, {2})
                          .add(prefix + "score.original_module.dense.bias", {2}, 3);
  CHECK(replaced(assemble_with(saved, inside)) ==
        std::vector<std::string>{with(bias, reason::saved_module), with(bias, reason::unused_copy),
                                 with(bias, reason::unused_copy)});
  refused_with(saved, pair().add(prefix + bias, {2}, 2).add(prefix + copy, {2}),
               {copy, "the values of"});
  refused_with(saved, pair().add(prefix + copy, {2}), {copy, "incomplete"});
  const auto other = pair()
                         .add(prefix + "score.modules_to_save.weight", {2, 2}, 2)
                         .add(prefix + "score.weight", {2, 2});
  refused_with(saved, other,
               {"score.modules_to_save.weight", "the values of", "others", "remove the copy"});
  refused([&] { (void)assemble_with(saved, other, {.leave_out_saved_modules = true}); },
          {"the values of"});
  CHECK_NOTHROW(assemble_with(saved, pair()
                                         .add(prefix + "score.original_module.weight", {2, 2}, 2)
                                         .add(prefix + "score.weight", {2, 2})));
}

TEST_CASE("PEFT saves each module whose name ends in an entry of modules_to_save",
          "[peft][names]") {
  const std::string saved = R"("modules_to_save":["head"])";
  const auto file = assemble_with(
      saved,
      pairs({"m"}).add(prefix + "qa_head.weight", {2, 2}).add(prefix + "x.qa_head.out.bias", {2}));
  CHECK(replaced(file) ==
        std::vector<std::string>{with("qa_head.weight", reason::saved_module),
                                 with("x.qa_head.out.bias", reason::saved_module)});
  // A part of the end is not the end, and the last segment of a tensor's name is no module.
  refused_with(saved, pairs({"m"}).add(prefix + "head_2.weight", {2, 2}), {"head_2.weight"});
  refused_with(saved, pairs({"m"}).add(prefix + "x.head", {2, 2}), {"x.head"});
  // An adapter in it is one that PEFT loads: it excludes by whole segments.
  CHECK(peft::matches_target(parse(R"("target_modules":["q"],"modules_to_save":["head"])"),
                             "qa_head.q"));
  CHECK_FALSE(peft::matches_target(parse(R"("target_modules":["q"],"modules_to_save":["a.head"])"),
                                   "a-head.q"));
}

TEST_CASE("an embedding is saved with its bias", "[peft][names]") {
  for (const std::string wrapper : {"", ".base_layer"}) {
    const auto tensors = pairs({"m"})
                             .add(prefix + "lm_head" + wrapper + ".bias", {2})
                             .add(prefix + "lm_head" + wrapper + ".weight", {2, 2});
    CHECK(replaced(assemble_with("", tensors)) ==
          std::vector<std::string>{with("lm_head.bias", reason::embedding),
                                   with("lm_head.weight", reason::embedding)});
  }
  refused_with("", pairs({"m"}).add(prefix + "lm_head.base_layer.bias", {2}),
               {"lm_head.base_layer.bias"});
  refused_with("", pairs({"m"}).add(prefix + "m.base_layer.bias", {2}), {"m.base_layer.bias"});
}

// ---- what a config selects
// -------------------------------------------------------------------------------------------

TEST_CASE("lists that PEFT reads as regular expressions must be plain", "[peft][names]") {
  for (const std::string entry : {"a|b", "score(_2)?", "^score", "a+", "caf\xC3\xA9", ""}) {
    refused([&] { (void)parse(R"("modules_to_save":[")" + entry + "\"]"); },
            {"\"modules_to_save\"", "plain names", "list the"});
    refused(
        [&] {
          (void)parse(R"("layers_to_transform":[1],"layers_pattern":["h",")" + entry + "\"]");
        },
        {"\"layers_pattern\"", "plain names"});
  }
  const auto layers = parse(
      R"("target_modules":["q"],"layers_to_transform":[1],"layers_pattern":["x.h","layers"])");
  CHECK(peft::matches_target(layers, "layers.1.q"));
  CHECK(peft::matches_target(layers, "m.x.h.1.q"));
  CHECK(peft::matches_target(layers, "m.x-h.1.q"));  // a dot is any character
  CHECK_FALSE(peft::matches_target(layers, "m.ax.h.1.q"));
  CHECK(peft::matches_target(layers, "\xC3\xA9.layers.1.q"));
  CHECK_FALSE(peft::matches_target(layers, "m.layers.2.layers.1.q"));
  CHECK_FALSE(peft::matches_target(layers, "m.1.q"));
}

TEST_CASE("a wrapper of parameters without the outer ones is incomplete", "[peft][names]") {
  const auto inner = build::file()
                         .add(prefix + "m.base_layer.lora_A.weight", {2, 4})
                         .add(prefix + "m.base_layer.lora_B.weight", {3, 2});
  const std::string version = R"("target_modules":null,"peft_version":"0.21.0",)";
  refused_with(version + R"("target_parameters":["w"])", inner,
               {"m.base_layer.lora_A.weight", "2 wrappers of \"m\"", "incomplete"});
  auto gap =
      build::file().add(prefix + "m.lora_A.weight", {2, 4}).add(prefix + "m.lora_B.weight", {3, 2});
  gap.add(prefix + "m.base_layer.base_layer.lora_A.weight", {2, 4})
      .add(prefix + "m.base_layer.base_layer.lora_B.weight", {3, 2});
  refused(
      [&] {
        (void)assemble_with(version + R"("target_parameters":["a","b"])", gap,
                            {.parameter_order = {"a"}});
      },
      {"3 wrappers of \"m\"", "incomplete"});
}

TEST_CASE("without target_modules, target_parameters adapt no module", "[peft][names]") {
  const std::string parameters = R"("target_parameters":["experts.w"])";
  const auto tensors = pairs({"experts", "q"});
  refused_with(parameters, tensors,
               {"q.lora_A.weight", "target_modules selects", "PEFT would ignore"});
  refused_with(parameters + R"(,"target_modules":null)", tensors, {"q.lora_A.weight"});
  CHECK(assemble_with(parameters, tensors, {.lenient = true}).names() ==
        std::vector<std::string>{"experts.w"});
  CHECK(assemble_with(parameters + R"(,"target_modules":["q"])", tensors).size() == 2);
  CHECK_FALSE(peft::matches_target(parse(parameters), "q"));
  // What is excluded is excluded, also where PEFT would choose the targets.
  refused_with(
      R"("exclude_modules":["q"])", pairs({"q"}),
      {"q.lora_A.weight", "with exclude_modules [\"q\"]", "PEFT loads none of these adapters"});
}

TEST_CASE("an unknown key of use_bdlora is listed", "[peft][names]") {
  const std::string later = R"("use_bdlora":{"match_strict":false,"later":1,"empty":null})";
  refused([&] { (void)parse(later); },
          {"\"use_bdlora\"", "\"later\"", "ignore_keys", "use_bdlora.later"});
  const std::vector<std::string> listed{"use_bdlora.later", "use_bdlora.empty"};
  CHECK(parse(later, {.lenient = true}).ignored_keys == listed);
  CHECK(parse(later, {.ignore_keys = {"use_bdlora.later"}}).ignored_keys == listed);
}

// ---- bounds
// -------------------------------------------------------------------------------------------------

TEST_CASE("the patterns of a table have one budget of steps", "[peft][names]") {
  std::string keys;
  for (int k = 0; k < 2000; ++k)
    keys += (k == 0 ? "\"" : ",\"") + std::string("((a{99}){99})") + std::to_string(k) + "\":2";
  rusage before{}, after{};
  getrusage(RUSAGE_SELF, &before);
  refused([&] { (void)parse("\"rank_pattern\":{" + keys + "}"); },
          {"rank_pattern", "((a{99}){99})", "more steps", "module's name"});
  getrusage(RUSAGE_SELF, &after);
  CHECK(after.ru_maxrss - before.ru_maxrss < 150 * 1024 + held_back);
  // Classes count with their parts.
  std::string classes;
  for (int k = 0; k < 3000; ++k)
    classes += (k == 0 ? "\"" : ",\"") + std::to_string(k) + "[" + std::string(2000, 'a') + "]\":2";
  refused([&] { (void)parse("\"alpha_pattern\":{" + classes + "}"); },
          {"alpha_pattern", "more steps"});
  peft::pattern_table<int> table;
  const auto fill = [&] {
    for (int k = 0; k < 2000; ++k) table.add("((a{99}){99})" + std::to_string(k), k);
  };
  CHECK(test::mentions(test::refusal<lora::value_error>(fill),
                       {"peft::pattern_table", "more steps"}));
  CHECK(table.rows().size() > 300);
  CHECK(table.find("x." + std::string(99 * 99, 'a') + "7") == 7);
}

TEST_CASE("a plain key is compared with any name, without an automaton", "[peft][names]") {
  struct row {
    const char* key;
    const char* module;
    bool fits;
  };
  // As re.match(rf"(.*\.)?({key})$", module) of Python 3.11 says.
  const std::vector<row> rows{
      {"q", "\xC3\xA9.q", true}, {"q", "\xC3\xA9q", false}, {"a.q", "a\xE2\x82\xACq", true},
      {"..", "\xC3\xA9", false}, {"q", "a\n.q", false},     {"q", "a.q\n", true},
      {"q", "q\n\n", false},     {"a.q", "a\nq", false},    {"", "\n", true},
      {"", "a.\n", true},        {".", "\n", false},        {".", "a\n", true},
      {"q", " .q", true},        {"q", "a b.c.q", true},    {"a.q", "\xC3\xA9.a.q", true}};
  for (const auto& r : rows) {
    INFO(r.key << " on " << r.module);
    peft::pattern_table<int> table;
    table.add(r.key, 1);
    CHECK(table.find(r.module).has_value() == r.fits);
  }
  peft::pattern_table<int> table;
  for (int k = 0; k < 100'000; ++k) table.add("q" + std::to_string(k), k);
  for (int k = 0; k < 20; ++k) CHECK(table.find("\xC3\xA9.q99999") == 99'999);
}

// Without the bounds this would run for hours.
TEST_CASE("looking up many names takes no more work than a reader may take", "[peft][names]") {
  std::string list;
  for (int k = 0; k < 100'000; ++k)
    list += (k == 0 ? "\"" : ",\"") + std::string("x") + std::to_string(k) + '"';
  build::file others = pairs({"m"}), modules;
  for (int k = 0; k < 20'000; ++k) others.add(prefix + "score.a.b.c.d." + std::to_string(k), {});
  for (int k = 0; k < 6'000; ++k) {
    const std::string name = prefix + "layers." + std::to_string(k) + ".q";
    modules.add(name + ".lora_A.weight", {2, 1}).add(name + ".lora_B.weight", {1, 2});
  }
  refused_with("\"modules_to_save\":[" + list + "]", others, {"modules_to_save", "more work"});
  refused_with("\"layers_to_transform\":[1],\"target_modules\":[" + list +
                   "],\"layers_pattern\":[" + list + "]",
               modules, {"target_modules", "more work"});
  // A class has its whole length as cost.
  refused_with("\"target_modules\":\"([" + std::string(3000, 'a') + "]?){1000}\"", modules,
               {"target_modules", "more work"});
  // Origins of layers are made once, not for each module.
  std::string ranges;
  for (int k = 0; k < 10; ++k) ranges += (k == 0 ? "[0,100000]" : ",[0,100000]");
  CHECK(assemble_with("\"layer_replication\":[" + ranges + "]", modules).size() == 6'000);
}
