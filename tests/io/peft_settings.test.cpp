// SPDX-License-Identifier: Apache-2.0
//
// Settings that select nothing, are spelt otherwise, have no effect or are said twice; directories
// that lack a file; single files; names of a base that has moved. Each gets a true sentence, and
// what can be read is.
#include <cstddef>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "io/peft_file.hpp"
#include "lora/delta.hpp"
#include "lora/io/peft_inventory.hpp"
#include "lora/io/peft_write.hpp"
#include "support/catch.hpp"
#include "support/refused.hpp"

namespace {

namespace peft = lora::peft;
using build::assemble;
using build::config;
using build::file_refused;
using build::has;
using build::lenient;
using build::parse;
using build::prefix;
using build::refused;

build::file named(const std::string& module, build::file into = {}) {
  return build::factors_of(prefix + module, std::move(into));
}
const peft::read_options by_tensors{.select_by_tensors = true};

/// A file with metadata, which is text already.
std::string with_metadata(const std::string& metadata, const std::string& whole = prefix + "m.q") {
  const std::string a = whole + ".lora_A.weight", b = whole + ".lora_B.weight";
  return build::safetensors(R"({"__metadata__":)" + metadata + R"(,")" + a +
                                R"(":{"dtype":"F32","shape":[2,4],"data_offsets":[0,32]},")" + b +
                                R"(":{"dtype":"F32","shape":[3,2],"data_offsets":[32,56]}})",
                            56);
}

}  // namespace

// ---- target_modules

TEST_CASE("target_modules that select nothing are quoted, strictly and leniently",
          "[peft][targets]") {
  const std::string module = "model.layers.0.self_attn.q_proj";
  const std::vector<std::pair<std::string, std::string>> rows{
      {R"(["auto"])", R"(["auto"])"},
      {R"("auto")", R"("auto")"},
      {R"("{'q_proj', 'v_proj'}")", "q_proj', 'v_proj"},
      {"[]", "[]"},
      {R"(["all-linear"])", R"(["all-linear"])"},
      {R"([".*\\.0.*q_proj"])", R"(.*\.0.*q_proj)"},
      {'"' + module + ".weight\"", module + ".weight"},
      {R"(["q"])", R"(["q"])"}};
  for (const auto& [value, quoted] : rows) {
    INFO(value);
    const std::string json = config("\"target_modules\":" + value);
    for (const auto& options : {peft::read_options{}, lenient})
      refused([&] { (void)assemble(json, named(module), options); },
              {"target_modules", quoted, "selects none of the 1 modules",
               "PEFT loads none of these", "select_by_tensors"});
    const auto file = assemble(json, named(module), by_tensors);
    CHECK(file.names() == std::vector<std::string>{module});
    // Written so that PEFT loads it, and read without the option.
    const build::directory dir;
    peft::write(dir.path(), file);
    CHECK(peft::read(dir.path()).names() == std::vector<std::string>{module});
  }
  file_refused(config(R"("target_modules":["q_proj"],"exclude_modules":["q_proj"])"), named(module),
               {R"(["q_proj"] with exclude_modules ["q_proj"])"});
  const std::string layers = config(R"("target_modules":["q_proj"],"layers_to_transform":[7])");
  file_refused(layers, named(module),
               {"[\"q_proj\"] with layers_to_transform", "none of the 1 modules"});
  const build::directory dir;
  peft::write(dir.path(), assemble(layers, named(module), by_tensors));
  CHECK(peft::read(dir.path()).size() == 1);
  // Where some are selected, the others are what PEFT ignores.
  file_refused(config(R"("target_modules":["q_proj"])"), named("m.k_proj", named(module)),
               {"m.k_proj", "PEFT would ignore"});
}

// ---- init_lora_weights

TEST_CASE("initializations are compared as PEFT compares them", "[peft][init]") {
  const auto read = [](const std::string& value) {
    return parse(config(R"("init_lora_weights":")" + value + '"'));
  };
  for (const std::string value :
       {"gaussian", "Gaussian", "GAUSSIAN", "mica", "MiCA", "eva", "orthogonal"})
    CHECK(read(value).change == peft::base_change::none);
  for (const std::string value : {"olora", "OLoRA", "OLORA"})
    CHECK(read(value).change == peft::base_change::olora);
  for (const auto& [value, known] :
       std::vector<std::pair<std::string, std::string>>{{"PiSSA", "pissa"},
                                                        {"Eva", "eva"},
                                                        {"Orthogonal", "orthogonal"},
                                                        {"CorDA", "corda"},
                                                        {"PiSSA_niter_4", "pissa_niter_4"}})
    for (const bool strict : {true, false}) {
      INFO(value);
      const auto message = build::refusal([&, &value = value] {
        (void)parse(config(R"("init_lora_weights":")" + value + '"'), {.lenient = !strict});
      });
      CHECK(has(message, '"' + value + '"'));
      CHECK(has(message, "PEFT knows \"" + known + "\" in lower case only"));
      CHECK_FALSE(has(message, "random"));
    }
  CHECK(has(build::refusal([&] { (void)read("lucky"); }), "PEFT knows no such initialization"));
  for (const std::string value : {"true", "True", "FALSE"})
    CHECK(has(build::refusal([&] { (void)read(value); }), "without quotes"));
  for (const std::string value : {"corda", "loftq", "lora_ga", "pissa_niter_16"})
    CHECK(has(build::refusal([&] { (void)read(value); }), "random numbers, data"));
}

// ---- patterns of many modules

namespace {
std::string expert(int k) {
  const char* projections[] = {"gate_proj", "up_proj", "down_proj"};
  return "model.layers." + std::to_string(k / 384) + ".mlp.experts." + std::to_string(k / 3 % 128) +
         "." + projections[k % 3];
}
/// One key for every module, as searches for ranks write them.
std::string for_all(const char* key, int count, const std::string& before,
                    const std::string& value) {
  std::string result = std::string("\"") + key + "\":{";
  for (int k = 0; k < count; ++k) {
    std::string name = before.empty() ? "" : "^";
    for (const char c : expert(k)) name += before != "^" || c != '.' ? std::string(1, c) : "\\\\.";
    result += (k == 0 ? "\"" : ",\"") + name + "\":" + value;
  }
  return result + "}";
}
}  // namespace

TEST_CASE("one key for each of 30,000 modules is a look-up", "[peft][patterns]") {
  constexpr int count = 30'000;
  std::string header, targets;
  for (int k = 0; k < count; ++k) {
    const auto at = static_cast<std::size_t>(k) * 16;
    for (const char factor : {'A', 'B'}) {
      const auto from = at + (factor == 'B' ? 8 : 0);
      header += (header.empty() ? "\"" : ",\"") + prefix + expert(k) + ".lora_" + factor +
                ".weight\":{\"dtype\":\"F32\",\"shape\":" + (factor == 'A' ? "[1,2]" : "[2,1]") +
                ",\"data_offsets\":[" + std::to_string(from) + "," + std::to_string(from + 8) +
                "]}";
    }
    targets += (k == 0 ? "\"" : ",\"") + expert(k) + '"';
  }
  const auto content =
      build::to_bytes(build::safetensors("{" + header + "}", static_cast<std::size_t>(count) * 16));
  const auto tensors = lora::safetensors::parse(content, "adapter_model.safetensors");
  // Plain names, and whole names behind ^ as peft::write writes them; r = 2 of the config is the
  // rank of none. The third form has dots that are not escaped, as diffusers writes it.
  for (const std::string before : {"", "^", "^."}) {
    const auto c = parse(config("\"target_modules\":[" + targets + "]," +
                                for_all("rank_pattern", count, before, "1") + "," +
                                for_all("alpha_pattern", count, before, "5")));
    const auto file = peft::assemble(c, tensors);
    CHECK(file.size() == count);
    CHECK(file.at(expert(29'999)).rank() == 1);
    CHECK(file.at(expert(29'999)).scaling() == 5.0);
    CHECK(file.unused_patterns().empty());
  }
}

TEST_CASE("looking up a key gives what trying all keys in order gives", "[peft][patterns]") {
  const std::vector<std::string> keys{"q",
                                      "a.q",
                                      "b.a.q",
                                      "^x.q",
                                      "^x\\.q",
                                      "^b\\.a\\.q$",
                                      "a.b.q",
                                      "q|k",
                                      "l\\.\\d+\\.q",
                                      "l.1.q",
                                      "^l\\.1\\.q",
                                      "..q",
                                      "",
                                      ".",
                                      "x",
                                      "a.q",
                                      "^",
                                      "^\\^",
                                      "^a.q",
                                      "^l.1.q",
                                      "^..q",
                                      "l\\.[0-3]\\.q",
                                      "^a$",
                                      "^a\\$",
                                      "k"};
  const std::vector<std::string> modules{"q",  "a.q",   "b.a.q", "x.q",     "xxq",    "a.b.q",
                                         "k",  "l.1.q", "l.7.q", "y.l.1.q", "axq",    "ab.q",
                                         "",   "a",     "x",     "b.x",     "l.12.q", "z.a.b.q",
                                         "aq", "a.",    "a.a",   "q.q"};
  // Every order of two and three keys: the first that fits wins, whatever form it has.
  // Names that are not plain take another way, with the same answers.
  const std::vector<std::string> modules_and_more = [&] {
    auto all = modules;
    for (const char* name : {"q\n", "a.q\n", "\xC3\xA9.q", "x.\xC3\xA9", "a q", "b.a.q\n\n", "^"})
      all.emplace_back(name);
    return all;
  }();
  for (const auto& first : keys)
    for (const auto& second : keys)
      for (const auto& third : {std::string("q"), std::string("^b\\.a\\.q"), std::string(".*")}) {
        peft::pattern_table<int> table;
        const std::vector<std::string> all{first, second, third};
        for (std::size_t k = 0; k < all.size(); ++k) table.add(all[k], static_cast<int>(k));
        for (const auto& module : modules_and_more) {
          // The first key whose answer is not no: it fits, or only tables of Unicode tell.
          using verdict = lora::io_detail::pattern::verdict;
          std::optional<int> want;
          verdict how = verdict::no;
          for (std::size_t k = 0; k < all.size() && how == verdict::no; ++k) {
            how = lora::io_detail::pattern::at_end_of_path(all[k]).matches_beginning(
                lora::io_detail::code_points(module));
            if (how != verdict::no) want = static_cast<int>(k);
          }
          const auto found = table.look_up(module);
          const auto* row = how == verdict::yes ? found.fits : found.unicode;
          const auto* other = how == verdict::yes ? found.unicode : found.fits;
          const std::optional<int> got =
              row == nullptr ? std::nullopt : std::optional<int>(row->value);
          if (got != want || other != nullptr) {
            CAPTURE(first, second, third, module);
            CHECK(got == want);
            CHECK(other == nullptr);
          }
        }
      }
  CHECK(peft::pattern_table<int>().find("q") == std::nullopt);
}

// ---- settings without effect, or said twice

TEST_CASE("keys that give no module its rank or alpha are listed", "[peft][notes]") {
  const auto file = assemble(
      config(R"("rank_pattern":{"^q_proj":4,"m.q":2,"q":2},"alpha_pattern":{"qproj":40,".*q":6})"),
      named("m.q"));
  CHECK(file.unused_patterns().size() == 3);
  const auto found = peft::inventory_of(file).not_used;
  REQUIRE(found.size() == 3);
  CHECK(has(found[0], "rank_pattern \"^q_proj\""));
  CHECK(has(found[1], "rank_pattern \"q\""));  // "m.q" came first
  CHECK(has(found[2], "alpha_pattern \"qproj\""));
}

TEST_CASE("metadata that says another alpha or rank is a note", "[peft][notes]") {
  const auto notes = [](const std::string& metadata) {
    const auto content = build::to_bytes(with_metadata(metadata));
    return peft::assemble(parse(config()),
                          lora::safetensors::parse(content, "adapter_model.safetensors"))
        .notes();
  };
  CHECK(notes(R"({"format":"pt"})").empty());
  CHECK(notes(R"({"lora_alpha":"6","r":"2","alpha":"6.0","other":"64"})").empty());
  for (const auto& [metadata, says] : std::vector<std::pair<std::string, std::string>>{
           {R"({"lora_alpha":"64"})", "lora_alpha 6"},
           {R"({"ss_network_alpha":"64.5"})", "64.5"},
           {R"({"r":"8"})", "r 2"},
           {R"({"ss_network_dim":"8"})", "r 2"},
           {R"({"x":"{\"transformer.lora_alpha\": 64, \"transformer.r\": 2}"})",
            "transformer.lora_alpha"},
           {R"({"x":"{\"lora_alpha\": 64.0}"})", "lora_alpha 6"}}) {
    INFO(metadata);
    const auto found = notes(metadata);
    REQUIRE(found.size() == 1);
    CHECK(has(found[0], says));
    CHECK(has(found[0], "PEFT takes the config"));
    CHECK(has(found[0], "other programs"));
  }
  std::string many;
  for (int k = 0; k < 1000; ++k)
    many += (k == 0 ? "\\\"" : ",\\\"") + std::to_string(k) + ".r\\\":9";
  CHECK(notes("{\"x\":\" {" + many + "}\"}").size() == 16);
  CHECK(notes(R"({"lora_alpha":"a lot","x":"{not json","y":"[1,2]","z":"{\"lora_alpha\":\"64\"}"})")
            .empty());
}

TEST_CASE("files beside the adapter that hold trained weights are a note", "[peft][notes]") {
  const build::directory dir;
  dir.write("adapter_config.json", config());
  dir.write("adapter_model.safetensors", named("m.q").text());
  for (const char* harmless :
       {"README.md", "training_args.bin", "optimizer.pt", "rng_state_0.pth", "tokenizer.json"})
    dir.write(harmless, "x");
  CHECK(peft::read(dir.path()).notes().empty());
  dir.write("non_lora_trainables.bin", "x");
  dir.write("new_embeddings.safetensors", "x");
  const auto found = peft::read(dir.path()).notes();
  REQUIRE(found.size() == 2);
  CHECK(has(found[0], "new_embeddings.safetensors"));
  CHECK(has(found[1], "non_lora_trainables.bin"));
  CHECK(has(peft::inventory_of(peft::read(dir.path())).text(),
            "note      file \"new_embeddings.safetensors\""));
}

TEST_CASE("a head for another vocabulary says so", "[peft][notes]") {
  const auto file = assemble(config(), build::file()
                                           .add(prefix + "lm_head.lora_A.weight", {2, 4})
                                           .add(prefix + "lm_head.lora_B.weight", {9, 2})
                                           .add(prefix + "e.lora_embedding_A", {2, 9})
                                           .add(prefix + "e.lora_embedding_B", {4, 2}));
  Eigen::MatrixXf W = Eigen::MatrixXf::Zero(7, 4);
  for (const char* name : {"lm_head", "e"})
    CHECK_THROWS_WITH(lora::merge(W, file.at(name)),
                      Catch::Contains("vocabulary was resized") && Catch::Contains("to 9 rows"));
  Eigen::MatrixXf larger = Eigen::MatrixXf::Zero(16, 4);
  CHECK_THROWS_WITH(
      lora::merge(larger, file.at("lm_head")),
      Catch::Contains("larger vocabulary, or a padded one") && !Catch::Contains("resize the base"));
  Eigen::MatrixXf other = Eigen::MatrixXf::Zero(9, 5);
  CHECK_THROWS_WITH(lora::merge(other, file.at("lm_head")), !Catch::Contains("vocabulary"));
  CHECK(W.isZero());
}

// ---- directories and single files

TEST_CASE("what a directory lacks is said with what is there", "[peft][directory]") {
  const auto says = [](const build::directory& dir, std::initializer_list<std::string_view> parts) {
    refused([&] { (void)peft::read(dir.path()); }, parts);
  };
  const build::directory named_adapters, whole_model, shards, other_name, pointer, both_names;
  std::filesystem::create_directories(named_adapters.path() / "style");
  named_adapters.write("style/adapter_config.json", config());
  says(named_adapters,
       {"adapter_config.json", "there is an adapter in \"style\"", "directory of its own name"});
  named_adapters.write("adapter_config.json", config());
  says(named_adapters, {"adapter_model.safetensors", "there is an adapter in \"style\""});

  whole_model.write("model.safetensors", "x");
  whole_model.write("config.json", "{}");
  says(whole_model, {"adapter_config.json", "a whole model"});
  whole_model.write("adapter_config.json", config());
  says(whole_model, {"adapter_model.safetensors", "model.safetensors is a whole model",
                     "adapter_model.safetensors"});

  shards.write("adapter_config.json", config());
  shards.write("adapter_model-00001-of-00002.safetensors", "x");
  says(shards, {"adapter_model-00001-of-00002.safetensors", "several files"});
  shards.write("adapter_model.safetensors.index.json", "{}");
  says(shards, {"adapter_model.safetensors.index.json", "several files"});

  other_name.write("adapter_config.json", config());
  other_name.write("pytorch_lora_weights.safetensors", "x");
  says(other_name, {"pytorch_lora_weights.safetensors", "rename it"});

  const std::string lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 40000\n";
  pointer.write("adapter_config.json", lfs);
  says(pointer, {"adapter_config.json", "Git LFS pointer", "git lfs pull"});
  pointer.write("adapter_config.json", config());
  pointer.write("adapter_model.safetensors", lfs);
  says(pointer, {"adapter_model.safetensors", "Git LFS pointer", "git lfs pull"});
}

TEST_CASE("a single file is read where its metadata holds the whole config", "[peft][directory]") {
  const build::directory dir;
  const std::string json =
      R"({\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 5, \"target_modules\": [\"q\"]})";
  const std::string component =
      R"({\"transformer.peft_type\": \"LORA\", \"transformer.r\": 2, \"transformer.lora_alpha\": 5, )"
      R"(\"transformer.alpha_pattern\": {\"^m\\\\.q\": 11}})";
  const auto one = [&](const std::string& text, const std::string& whole) {
    return dir.write(
        "one.safetensors",
        with_metadata(R"({"format":"pt","lora_adapter_metadata":")" + text + "\"}", whole));
  };
  const auto check = [&](const std::filesystem::path& path) {
    const auto file = peft::read(path);
    CHECK(file.names() == std::vector<std::string>{"transformer.m.q"});
    CHECK(file.at("transformer.m.q").scaling() == 2.5);
    CHECK(file.notes().empty());
  };
  check(one(json, "transformer.m.q"));
  // Twice the same config is one.
  check(dir.write(
      "one.safetensors",
      with_metadata("{\"x\":\"" + json + "\",\"y\":\"" + json + "\"}", "transformer.m.q")));
  // A component's config knows the names inside the component.
  const auto inside = peft::read(one(component, "transformer.m.q"));
  CHECK(inside.names() == std::vector<std::string>{"m.q"});
  CHECK(inside.at("m.q").scaling() == 5.5);  // by ^m\.q
  peft::write(dir.path() / "written", inside);
  CHECK(peft::read(dir.path() / "written").at("m.q").scaling() == 5.5);
  refused([&] { (void)peft::read(one(component, "text_encoder.m.q")); },
          {"text_encoder.m.q.lora_A.weight", "begins with \"transformer.\""});
  refused(
      [&] { (void)peft::read(dir.write("one.safetensors", with_metadata(R"({"format":"pt"})"))); },
      {"one.safetensors", "a file in place of the directory", "scaling"});
  const std::string two =
      R"({\"a.peft_type\": \"LORA\", \"a.r\": 2, \"b.peft_type\": \"LORA\", \"b.r\": 4})";
  refused(
      [&] {
        (void)peft::read(dir.write("one.safetensors", with_metadata("{\"x\":\"" + two + "\"}")));
      },
      {"the configs of 2 models"});
  const std::string dora = R"({\"peft_type\": \"LOHA\", \"r\": 2})";
  refused(
      [&] {
        (void)peft::read(dir.write("one.safetensors", with_metadata("{\"x\":\"" + dora + "\"}")));
      },
      {"one.safetensors (metadata)", "LOHA"});
  // Beside no config, the same.
  dir.write("adapter_model.safetensors",
            with_metadata(R"({"lora_adapter_metadata":")" + json + "\"}"));
  CHECK(peft::read(dir.path()).at("m.q").scaling() == 2.5);
}

TEST_CASE("a directory is read whatever else lies in it", "[peft][directory]") {
  const build::directory dir;
  for (int k = 0; k < 5000; ++k) dir.write("a" + std::to_string(k), "");
  dir.write("adapter_config.json", config());
  dir.write("adapter_model.safetensors", named("m.q").text());
  CHECK(peft::read(dir.path()).names() == std::vector<std::string>{"m.q"});
}

// ---- names of a base that has moved

TEST_CASE("a file is renamed for a base whose modules have moved", "[peft][renamed]") {
  auto tensors = named("language_model.model.layers.0.q")
                     .add(prefix + "language_model.lm_head.weight", {2, 4});
  tensors.add(prefix + "language_model.e.token_adapter.trainable_tokens_delta", {1, 3});
  const std::string more =
      R"("target_modules":["q"],"rank_pattern":{"layers.0.q":2},"trainable_token_indices":{"e":[1]})";
  const auto file =
      assemble(config(more), tensors)
          .renamed(peft::moved_prefix{"language_model.model.", "model.language_model."});
  CHECK(file.names() == std::vector<std::string>{"model.language_model.layers.0.q"});
  CHECK(file.at("model.language_model.layers.0.q").weight_name() ==
        "model.language_model.layers.0.q.weight");
  CHECK(file.replacements().at(0).name == "language_model.lm_head.weight");
  const auto all = file.renamed([](const std::string& name) { return "x." + name; });
  CHECK(all.replacements().at(0).name == "x.language_model.lm_head.weight");
  CHECK(all.token_rows().contains("x.language_model.e"));
  const build::directory dir;
  peft::write(dir.path(), all);
  const auto again = peft::read(dir.path());
  CHECK(again.names() == all.names());
  CHECK(again.at(all.names()[0]).scaling() == file.at("model.language_model.layers.0.q").scaling());
}

TEST_CASE("PEFT's derived names are renamed with their module, and no two names become one",
          "[peft][renamed]") {
  const auto attention = build::file()
                             .add(prefix + "old.a.lora_A.weight", {2, 3})
                             .add(prefix + "old.a.lora_B.weight", {9, 2})
                             .add(prefix + "old.a.base_layer.out_proj.lora_A.weight", {2, 3})
                             .add(prefix + "old.a.base_layer.out_proj.lora_B.weight", {3, 2});
  const auto file = assemble(config(), attention).renamed(peft::moved_prefix{"old.", "new.b."});
  CHECK(file.names() == std::vector<std::string>{"new.b.a.in_proj", "new.b.a.out_proj"});
  const build::directory dir;
  peft::write(dir.path(), file);
  CHECK(peft::read(dir.path()).names() == file.names());

  // Tensors under PEFT's own modules, and their order.
  auto tensors =
      named("old.q").add(prefix + "old.a.base_layer.bias", {3}).add(prefix + "old.b.bias", {3});
  tensors.add(prefix + "old.embed_tokens.token_adapter.base_layer.weight", {3, 4});
  tensors.add(prefix + "old.embed_tokens.token_adapter.trainable_tokens_delta", {1, 4});
  const auto all = assemble(config(R"("bias":"all","trainable_token_indices":[1])"), tensors);
  REQUIRE(all.replacements().size() == 3);
  const std::map<std::string, std::string> names{
      {"old.q", "z.q"},
      {"old.a.bias", "z.a.bias"},
      {"old.b.bias", "c.b.bias"},
      {"old.embed_tokens.weight", "z.embed_tokens.weight"},
      {"old.embed_tokens", "z.embed_tokens"}};
  const auto moved = all.renamed([&](const std::string& name) { return names.at(name); });
  std::vector<std::string> keys;
  for (const auto& each : moved.replacements()) keys.push_back(each.key);
  CHECK(keys == std::vector<std::string>{"c.b.bias", "z.a.base_layer.bias",
                                         "z.embed_tokens.token_adapter.base_layer.weight"});
  const build::directory moved_dir;
  peft::write(moved_dir.path(), moved);
  CHECK(peft::read(moved_dir.path()).replacements().size() == 3);

  const auto two = assemble(config(), named("m.k", named("m.q")));
  CHECK(test::mentions(test::refusal<lora::value_error>([&] {
                         (void)two.renamed([](const auto&) { return std::string("z"); });
                       }),
                       {"renamed", "gets a name that another"}));
  CHECK(test::mentions(test::refusal<lora::value_error>([&] {
                         (void)file.renamed([](const auto& name) { return name + "_2"; });
                       }),
                       {"new.b.a.in_proj", "keeps its last part"}));
}
