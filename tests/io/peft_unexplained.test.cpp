// SPDX-License-Identifier: Apache-2.0
//
// Tensors that are no factors under a plain name: wrapped names, tensors of the base, heads of a
// task, resized vocabularies, empty placeholders, factors of other writers. Each is used, or
// refused by a sentence that is true of it; none is lost.
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "io/peft_file.hpp"
#include "lora/io/peft_inventory.hpp"
#include "lora/io/peft_write.hpp"
#include "support/catch.hpp"
#include "support/refused.hpp"

namespace {

namespace peft = lora::peft;
using build::assemble;
using build::config;
using build::factors_of;
using build::file_refused;
using build::has;
using build::lenient;
using build::prefix;
using build::refused;
using reason = peft::replacement::reason;

build::file small() { return factors_of(prefix + "m.q"); }

const peft::read_options strip{.wrappers = peft::wrapper_names::strip};

}  // namespace

// ---- wrappers

TEST_CASE("a wrapper in a name is named, and stripped on request", "[peft][wrappers]") {
  const std::vector<std::pair<std::string, std::string>> rows{
      {"_orig_mod." + prefix + "m.q", "torch.compile"},
      {prefix + "_orig_mod.m.q", "torch.compile"},
      {prefix + "m._orig_mod.q", "torch.compile"},
      {prefix + "m.q._orig_mod", "torch.compile"},
      {"module." + prefix + "m.q", "DataParallel"},
      {prefix + "module.m.q", "DataParallel"},
      {"module.module." + prefix + "m.q", "DataParallel"},
      {prefix + "m._fsdp_wrapped_module._checkpoint_wrapped_module.q", "FSDP"},
      {prefix + "_checkpoint_wrapped_module.m.q", "activation checkpointing"},
      {"_forward_module." + prefix + "m.q", "Lightning"},
      {"module._orig_mod." + prefix + "m._fsdp_wrapped_module.q", "DataParallel"},
      {"transformer." + prefix + "m.q", "dict"},
      {"model." + prefix + "m.q", "PeftModel"},
      {"base_model.module.model.m.q", "DataParallel"},
      {prefix + prefix + "m.q", "a PeftModel inside a PeftModel"},
      {prefix + "m." + prefix + "q", "a PeftModel inside a PeftModel"},
      {"state." + prefix + prefix + "m.q", "a PeftModel inside a PeftModel"}};
  for (const auto& [name, who] : rows) {
    INFO(name);
    const auto tensors = factors_of(name);
    file_refused(config(), tensors,
                 {name + ".lora_A.weight", who, prefix + "m.q.lora_A.weight",
                  "wrapper_names::strip", "unwrapped"});
    for (const auto& options : {strip, lenient}) {
      const auto file = assemble(config(), tensors, options);
      CHECK(file.names() == std::vector<std::string>{"m.q"});
      CHECK(file.at("m.q").weight_name() == "m.q.weight");
      CHECK(file.passed_over().empty());
      REQUIRE(file.notes().size() == 1);
      CHECK(has(file.notes()[0], "was taken off 2 names; PEFT loads none"));
    }
  }
  const auto unprefixed = assemble(config(), factors_of("module.m.q"), strip);
  CHECK(unprefixed.names() == std::vector<std::string>{"m.q"});
  CHECK_FALSE(unprefixed.prefixed());
}

TEST_CASE("names that only look like a wrapper are the base's", "[peft][wrappers]") {
  for (const std::string name :
       {"m.module.q", "my_orig_mod.q", "m._orig_module.q", "modules.q", "m.base_model.q"}) {
    INFO(name);
    CHECK(assemble(config(), factors_of(prefix + name)).names() == std::vector<std::string>{name});
  }
  const auto kept =
      assemble(config(), factors_of(prefix + "module.q"), {.wrappers = peft::wrapper_names::keep});
  CHECK(kept.names() == std::vector<std::string>{"module.q"});
}

TEST_CASE("two adapters of nested PeftModels are no adapter", "[peft][wrappers]") {
  const auto both = factors_of(prefix + prefix + "m.q.base_layer", factors_of(prefix + "m.q"));
  for (const auto& options : {peft::read_options{}, strip, lenient})
    refused([&] { (void)assemble(config(), both, options); },
            {"one adapter in a file", "a PeftModel inside a PeftModel", "save each by itself"});
  // Both under the outer model's names: what is inside the module is no wrapper of PEFT's either.
  const auto inner = factors_of(prefix + "m.q.base_layer", factors_of(prefix + "m.q"));
  file_refused(config(), inner, {"an adapter inside \"m.q\"", "a PeftModel around a PeftModel"});
}

TEST_CASE("a dict of several state dicts is no adapter", "[peft][wrappers]") {
  for (const std::string& other : {prefix, "text_encoder." + prefix})
    for (const auto& options : {peft::read_options{}, strip, lenient})
      refused(
          [&] {
            (void)assemble(
                config(), factors_of("unet." + prefix + "m.q", factors_of(other + "m.k")), options);
          },
          {"one adapter in a file", "save each by itself"});
}

TEST_CASE("a config knows the names that its file has", "[peft][wrappers]") {
  const auto tensors = factors_of(prefix + "_orig_mod.m.q", factors_of(prefix + "_orig_mod.m.k"));
  for (const std::string pattern : {R"("_orig_mod.m.q")", R"("^_orig_mod\\.m\\.q")",
                                    R"("^_orig_mod.m.q")", R"("_orig_mod\\..*q")"}) {
    const auto file = assemble(config("\"alpha_pattern\":{" + pattern + ":64}"), tensors, strip);
    INFO(pattern);
    CHECK(file.at("m.q").scaling() == 32.0);
    CHECK(file.at("m.k").scaling() == 3.0);
    CHECK(file.unused_patterns().empty());
    const build::directory dir;
    peft::write(dir.path(), file);
    CHECK(peft::read(dir.path()).at("m.q").scaling() == 32.0);
  }
  const auto excluded =
      R"("exclude_modules":["_orig_mod.m.q"],"target_modules":["_orig_mod.m.q","_orig_mod.m.k"])";
  CHECK(assemble(config(excluded), tensors, lenient).names() == std::vector<std::string>{"m.k"});
  const auto parameter = factors_of(prefix + "_orig_mod.m");
  const auto file = assemble(
      config(R"("target_parameters":["_orig_mod.m.w"],"peft_version":"0.21.2")"), parameter, strip);
  CHECK(file.names() == std::vector<std::string>{"m.w"});
}

TEST_CASE("two names that become one are refused", "[peft][wrappers]") {
  const auto twice = factors_of(prefix + "_orig_mod.m.q", factors_of(prefix + "m.q"));
  refused([&] { (void)assemble(config(), twice, strip); },
          {"one adapter for a module", "a second tensor"});
  const std::string rows = ".token_adapter.trainable_tokens_delta";
  auto tokens = small().add(prefix + "e" + rows, {1, 3});
  tokens.add(prefix + "_orig_mod.e" + rows, {1, 3});
  refused([&] { (void)assemble(config(R"("trainable_token_indices":{"e":[1]})"), tokens, strip); },
          {"\"e\" once", "twice"});
}

TEST_CASE("replacements and trained rows lose their wrapper, too, and are written without it",
          "[peft][wrappers]") {
  auto tensors =
      factors_of(prefix + "_orig_mod.m.q").add(prefix + "_orig_mod.score.weight", {2, 4});
  tensors.add(prefix + "_orig_mod.e.token_adapter.trainable_tokens_delta", {1, 3});
  const std::string json =
      config(R"("modules_to_save":["score"],"trainable_token_indices":{"e":[1]})");
  const auto file = assemble(json, tensors, strip);
  CHECK(file.replacements().at(0).name == "score.weight");
  CHECK(file.token_rows().contains("e"));
  const build::directory dir;
  peft::write(dir.path(), file);
  CHECK(peft::read(dir.path()).names() == std::vector<std::string>{"m.q"});
  // The order of keys is that of the names as they are written.
  auto crossed = factors_of("base_model.model.m.q")
                     .add(prefix + "_orig_mod.a.weight", {1})
                     .add(prefix + "b.weight", {1});
  const auto both = assemble(config(R"("modules_to_save":["a","b"])"), crossed, strip);
  peft::write(dir.path(), both);
  CHECK(peft::read(dir.path()).replacements().at(0).key == "a.weight");
  // A name that was kept needs the option again.
  const peft::read_options keep{.wrappers = peft::wrapper_names::keep};
  peft::write(dir.path(), assemble(config(), factors_of(prefix + "module.q"), keep));
  CHECK(peft::read(dir.path(), keep).names() == std::vector<std::string>{"module.q"});
  refused([&] { (void)peft::read(dir.path()); }, {"module."});
}

// ---- tensors of the base

TEST_CASE("lenient gives a tensor of the base that no key explains", "[peft][base]") {
  for (const std::string name :
       {"m.norm.weight", "m.up.weight", "m.up.bias", "m.q.base_layer.weight", "m.scale"}) {
    INFO(name);
    const auto tensors = small().add(prefix + name, {2, 2});
    file_refused(config(), tensors,
                 {name, "read_options::lenient gives it as a replacement", "PEFT loads it"});
    const auto file = assemble(config(), tensors, lenient);
    REQUIRE(file.replacements().size() == 1);
    const auto& found = file.replacements()[0];
    CHECK(found.why == reason::unasked);
    CHECK(found.key == name);
    CHECK(found.name == (name == "m.q.base_layer.weight" ? "m.q.weight" : name));
    CHECK(found.applies());
    CHECK(found.values<float>() == std::vector<float>{1, 2, 3, 4});
    CHECK(file.passed_over().empty());
    CHECK(has(peft::inventory_of(file).text(), "if the base has it"));
    const build::directory dir;
    CHECK(test::mentions(test::refusal<lora::value_error>([&] { peft::write(dir.path(), file); }),
                         {name.c_str(), "copy the file"}));
  }
}

TEST_CASE("a name that PEFT's model does not have is passed over for what it is", "[peft][base]") {
  // An adapted module's own weight is under base_layer there; another module's is not.
  for (const auto& [name, why] : std::vector<std::pair<std::string, std::string>>{
           {"m.q.weight", "the module is adapted"},
           {"m.up.base_layer.weight", "the module has no adapter"}}) {
    INFO(name);
    const auto tensors = small().add(prefix + name, {2, 2});
    file_refused(config(), tensors, {name, "PEFT drops it", why});
    const auto file = assemble(config(), tensors, lenient);
    CHECK(file.replacements().empty());
    REQUIRE(file.passed_over().size() == 1);
    CHECK(has(file.passed_over()[0], why));
  }
}

TEST_CASE("names of the base that look like an adapter's are the base's", "[peft][base]") {
  for (const std::string name : {"m.act.alpha", "m.alphabet.weight", "m.flora_embed.weight",
                                 "m.k.weight_scale", "m.k.weight_packed", "m.proj_A.weight",
                                 "m.loralike.weight", "m.lokr_x.weight", "m.hada_rot.weight"}) {
    INFO(name);
    auto tensors = small().add(prefix + name, {2, 2});
    if (name == "m.proj_A.weight") tensors.add(prefix + "m.proj_B.weight", {2, 3});
    CHECK_FALSE(has(build::refusal([&] { (void)assemble(config(), tensors); }), "adapter under"));
    const auto file = assemble(config(), tensors, lenient);
    CHECK(file.passed_over().empty());
    REQUIRE(file.replacements().size() >= 1);
    CHECK(file.replacements()[0].why == reason::unasked);
  }
}

TEST_CASE("two values for one tensor of the base are refused", "[peft][base]") {
  const std::string e = prefix + "m.embed_tokens.";
  auto table = small()
                   .add(e + "token_adapter.trainable_tokens_delta", {1, 4})
                   .add(e + "token_adapter.base_layer.weight", {3, 4});
  file_refused(config(R"("trainable_token_indices":[1])"), table.add(e + "weight", {3, 4}, 2),
               {"m.embed_tokens.weight", "one tensor for", "another in"});
  auto bias = small().add(prefix + "m.k.bias", {3}).add(prefix + "m.k.base_layer.bias", {3}, 2);
  file_refused(config(R"("bias":"all")"), bias, {"one tensor for \"m.k.bias\""});
  // The same values twice are no question.
  auto same = small().add(prefix + "m.k.bias", {3}).add(prefix + "m.k.base_layer.bias", {3});
  CHECK_NOTHROW(assemble(config(R"("bias":"all")"), same));
}

TEST_CASE("bias = all takes what old versions called a bias", "[peft][base]") {
  for (const std::string name :
       {"m.relative_attention_bias.weight", "m.attn.base_layer.in_proj_bias", "m.dt_bias"}) {
    INFO(name);
    const auto file = assemble(config(R"("bias":"all")"), small().add(prefix + name, {3}));
    REQUIRE(file.replacements().size() == 1);
    CHECK(file.replacements()[0].why == reason::bias);
    CHECK_THROWS_AS(assemble(config(R"("bias":"lora_only")"), small().add(prefix + name, {3})),
                    lora::format_error);
  }
}

TEST_CASE("a tensor without a name is nothing", "[peft][base]") {
  for (const std::string name : {"", "base_model.model."}) {
    auto tensors = name.empty() ? factors_of("m.q") : small();
    refused([&] { (void)assemble(config(), tensors.add(name, {1})); }, {"lora_A.weight"});
    CHECK(assemble(config(), tensors, lenient).replacements().empty());
  }
}

TEST_CASE("the head of a task is saved without a word in modules_to_save", "[peft][base]") {
  const auto with = [](const std::string& task, const std::string& name) {
    return std::pair(config(R"("modules_to_save":null,"task_type":")" + task + '"'),
                     small().add(prefix + name, {2, 2}));
  };
  for (const std::string task : {"SEQ_CLS", "TOKEN_CLS"})
    for (const std::string name :
         {"score.weight", "classifier.weight", "classifier.bias", "classifier.dense.weight",
          "pre_classifier.weight", "m.classifier.out_proj.weight"}) {
      INFO(task << " " << name);
      const auto [json, tensors] = with(task, name);
      const auto file = assemble(json, tensors);
      REQUIRE(file.replacements().size() == 1);
      CHECK(file.replacements()[0].name == name);
      CHECK(file.replacements()[0].why == reason::saved_module);
      CHECK(assemble(json, tensors, {.leave_out_saved_modules = true}).left_out().size() == 1);
      const build::directory dir;
      peft::write(dir.path(), file);
      CHECK(peft::read(dir.path()).replacements().size() == 1);
    }
  const auto [answers, tensors] = with("QUESTION_ANS", "qa_outputs.weight");
  CHECK(assemble(answers, tensors).replacements().at(0).name == "qa_outputs.weight");
  for (const auto& [task, name] :
       std::vector<std::pair<std::string, std::string>>{{"SEQ_CLS", "pooler.weight"},
                                                        {"SEQ_CLS", "qa_outputs.weight"},
                                                        {"QUESTION_ANS", "score.weight"},
                                                        {"CAUSAL_LM", "score.weight"},
                                                        {"SEQ_CLS", "scores.weight"}}) {
    const auto [json, file] = with(task, name);
    file_refused(json, file, {name, "task_type"});
  }
  // PEFT adapts no head that it saves, so it would not load an adapter of one.
  const auto head = factors_of(prefix + "classifier", small());
  file_refused(config(R"("task_type":"SEQ_CLS","target_modules":["q","classifier"])"), head,
               {"classifier", "PEFT would ignore"});
  CHECK(assemble(config(R"("task_type":"CAUSAL_LM","target_modules":["q","classifier"])"), head)
            .size() == 2);
}

TEST_CASE("a resized embedding lies under its token adapter", "[peft][base]") {
  const std::string e = prefix + "m.embed_tokens.token_adapter.";
  auto tensors =
      small().add(e + "trainable_tokens_delta", {2, 4}).add(e + "base_layer.weight", {13, 4});
  for (const std::string tokens : {R"({"embed_tokens":[11,12]})", "[11,12]"}) {
    const auto file = assemble(config("\"trainable_token_indices\":" + tokens), tensors);
    REQUIRE(file.replacements().size() == 1);
    CHECK(file.replacements()[0].name == "m.embed_tokens.weight");
    CHECK(file.replacements()[0].why == reason::embedding);
    CHECK(file.replacements()[0].shape == std::vector<std::uint64_t>{13, 4});
    const auto bytes = peft::tensor_bytes(file);
    CHECK(lora::safetensors::parse(bytes, "written").find(e + "base_layer.weight") != nullptr);
    // The table first, then its trained rows.
    const auto values = file.replacements()[0].values<float>();
    Eigen::MatrixXf W =
        Eigen::Map<const Eigen::Matrix<float, 13, 4, Eigen::RowMajor>>(values.data());
    lora::assign_rows(W, file.token_rows().at("m.embed_tokens"));
    CHECK(W.row(11) == Eigen::RowVector4f(1, 2, 3, 4));
    CHECK(W(0, 0) == 1);
  }
  // An embedding of any name, and nothing without trained tokens.
  const std::string own = prefix + "m.my_table.token_adapter.";
  const auto other =
      small().add(own + "trainable_tokens_delta", {1, 4}).add(own + "base_layer.weight", {13, 4});
  CHECK(assemble(config(R"("trainable_token_indices":{"my_table":[2]})"), other)
            .replacements()
            .size() == 1);
  file_refused(config(), small().add(own + "base_layer.weight", {13, 4}),
               {"my_table", "nothing in the config asks for"});
}

// ---- empty tensors

TEST_CASE("no replacement is empty", "[peft][empty]") {
  const std::vector<std::pair<std::string, std::string>> rows{
      {R"("modules_to_save":["score"])", "score.weight"},
      {R"("bias":"all")", "m.q.bias"},
      {"", "m.embed_tokens.weight"},
      {R"("task_type":"SEQ_CLS")", "classifier.weight"},
      {R"("lora_bias":true)", "m.q.lora_B.bias"},
      {R"("use_dora":true)", "m.q.lora_magnitude_vector"},
      {R"("kasa_config":{})", "m.q.lora_diag"}};
  for (const auto& [json, name] : rows) {
    INFO(name);
    for (const auto shape : {std::initializer_list<int>{0}, std::initializer_list<int>{0, 4}}) {
      const auto tensors = small().add(prefix + name, shape);
      for (const auto& options : {peft::read_options{}, lenient})
        refused([&, &json = json] { (void)assemble(config(json), tensors, options); },
                {name, "F32 [0", "sharded model", "gathering"});
    }
  }
  refused([] { (void)assemble(config(), small().add(prefix + "m.norm.weight", {0}), lenient); },
          {"m.norm.weight", "sharded"});
  file_refused(config(R"("trainable_token_indices":{"e":[4]})"),
               small().add(prefix + "e.token_adapter.trainable_tokens_delta", {0}),
               {"trainable_tokens_delta", "sharded"});
}

TEST_CASE("rows of no token are no values", "[peft][empty]") {
  const auto file =
      assemble(config(R"("trainable_token_indices":{"e":[]})"),
               small().add(prefix + "e.token_adapter.trainable_tokens_delta", {0, 3}));
  Eigen::MatrixXf W = Eigen::MatrixXf::Ones(5, 3);
  lora::assign_rows(W, file.token_rows().at("e"));
  CHECK(W == Eigen::MatrixXf::Ones(5, 3));
}

TEST_CASE("an empty module among whole ones is a placeholder", "[peft][empty]") {
  // A whole head beside sharded factors tells nothing of them.
  auto head =
      build::file().add(prefix + "m.q.lora_A.weight", {0}).add(prefix + "m.q.lora_B.weight", {0});
  file_refused(config(R"("modules_to_save":["score"])"), head.add(prefix + "score.weight", {2, 4}),
               {"m.q.lora_A.weight", "sharded"});
  auto tensors = small().add(prefix + "m.w3.lora_A.weight", {0});
  file_refused(config(), tensors.add(prefix + "m.w3.lora_B.weight", {0}),
               {"m.w3.lora_A.weight", "F32 [0]", "placeholder"});
  const auto all =
      build::file().add(prefix + "m.q.lora_A.weight", {0}).add(prefix + "m.q.lora_B.weight", {0});
  file_refused(config(), all, {"m.q.lora_A.weight", "sharded"});
}

// ---- names of other writers

TEST_CASE("a part of an adapter is never called a tensor of the base", "[peft][names]") {
  const std::vector<std::pair<std::string, std::string>> rows{
      {"n.lora_A_1.default_0.weight", "one of several factors in a module"},
      {"n.lora_B_2.weight", "one of several factors in a module"},
      {"n.lora_A0.weight", "a route chooses"},
      {"n.lora_B12.weight", "a route chooses"},
      {"n.lora_A.weight_packed", "quantized"},
      {"n.lora_B.weight_scale", "quantized"},
      {"n.lora_alpha", "buffer of alpha"},
      {"n.lora_alpha.default", "buffer of alpha"},
      {"n.lora_magnitude_vector.default.weight", "magnitude under the name of an adapter"},
      {"n.lora_magnitude_vector.default", "magnitude under the name of an adapter"},
      {"n.lora_A.default.weight", "factor under the name of an adapter"},
      {"n.lora_a.weight", "torchtune"},
      {"n.lora_b", "MLX"},
      {"n.lora_embedding_A.default", "a name that PEFT does not write"},
      {"n.lora_route.weight", "a name that PEFT does not write"},
      {"lora_unet_n.alpha", "kohya"},
      {"n.dora_scale", "kohya"}};
  for (const auto& [name, says] : rows) {
    INFO(name);
    const auto tensors = small().add(prefix + name, {2, 2});
    const auto message = build::refusal([&] { (void)assemble(config(), tensors); });
    INFO(message);
    CHECK(has(message, says));
    CHECK_FALSE(has(message, "base model"));
    // Passed over by PEFT, and listed for what it is.
    const auto file = assemble(config(), tensors, lenient);
    REQUIRE(file.passed_over().size() == 1);
    CHECK(has(file.passed_over()[0], says));
    CHECK(file.replacements().empty());
  }
}

TEST_CASE("a factor that lost the name of its adapter is known by its pair", "[peft][names]") {
  for (const std::string cut : {"_", "a_", "ra_", "ora_"}) {
    const auto pair = build::file()
                          .add(prefix + "m.q" + cut + "A.weight", {2, 4})
                          .add(prefix + "m.q" + cut + "B.weight", {3, 2});
    file_refused(config(), pair, {"before 0.18", "\"lora\""});
  }
  file_refused(config(), small().add(prefix + "m.q_A.weight", {2, 4}),
               {"m.q_A.weight", "a tensor of the base model"});
}

TEST_CASE("a file without an adapter says what was there", "[peft][names]") {
  refused([] { (void)assemble(config(), build::file()); },
          {"no tensor at all", "nothing was saved"});
  const auto others = build::file()
                          .add(prefix + "m.lora_A_1.weight", {2, 4})
                          .add(prefix + "m.lora_B_1.weight", {3, 2});
  const auto message = build::refusal([&] { (void)assemble(config(), others, lenient); });
  INFO(message);
  CHECK(has(message, "after passing over 2"));
  CHECK(has(message, "m.lora_A_1.weight"));
  CHECK_FALSE(has(message, "not of its base"));
}
