// SPDX-License-Identifier: Apache-2.0
//
// The corpus of tests/io/corpus (written by make.py there): every file gets its verdict, every
// refusal its words. errors.txt holds the whole text of each refusal; LORA_UPDATE_ERRORS=1 writes
// it anew, to be read before it is committed.
#include <sys/resource.h>

#include <cstdlib>
#include <sstream>

#include "io/build.hpp"
#include "lora/io/detail/json.hpp"
#include "lora/io/peft.hpp"
#include "lora/io/safetensors_write.hpp"
#include "support/catch.hpp"

namespace {

namespace fs = std::filesystem;
namespace st = lora::safetensors;
const fs::path corpus = fs::path(LORA_SOURCE_DIR) / "tests/io/corpus";

std::string slurp(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

struct verdict {
  std::string name, says;
  bool accepted;
};

std::vector<verdict> verdicts() {
  std::vector<verdict> result;
  std::ifstream lines(corpus / "verdicts.txt");
  for (std::string line; std::getline(lines, line);) {
    const auto space = line.find(' '), bar = line.find(" | ");
    const auto name = line.substr(space + 1, bar == std::string::npos ? bar : bar - space - 1);
    result.push_back(
        {name, bar == std::string::npos ? "" : line.substr(bar + 3), line.starts_with("accept")});
  }
  return result;
}

/// The message of a refusal, with the file's name alone; empty when there is none.
std::string refusal(const std::function<void()>& act) {
  try {
    act();
    return "";
  } catch (const lora::format_error& e) {
    std::string text = e.what();
    const auto folder = text.find(corpus.string());
    if (folder != std::string::npos) text.erase(folder, (corpus / "files/").string().size());
    return text;
  }
}

/// Handles no event.
struct nothing {
  void key(std::string_view, std::uint64_t) {}
  void scalar(const lora::io_detail::json_scalar&, std::uint64_t) {}
  void begin(lora::io_detail::json_kind, std::uint64_t) {}
  void end(lora::io_detail::json_kind, std::uint64_t) {}
};

/// Refusals of the PEFT reader, by a config and tensors.
std::vector<std::pair<std::string, std::string>> peft_refusals() {
  std::vector<std::pair<std::string, std::string>> result;
  const auto config = [&](const std::string& name, const std::string& text) {
    result.emplace_back("config " + name, refusal([&] {
                          (void)lora::peft::parse_config(text, "adapter_config.json");
                        }));
  };
  config("with a comma left out", R"({"peft_type":"LORA","r":2 "lora_alpha":6})");
  config("with a key twice", R"({"peft_type":"LORA","r":2,"r":2})");
  config("\"r\":0", R"({"peft_type":"LORA","r":0,"lora_alpha":6})");
  for (const std::string line :
       {R"("use_qalora":true)", R"("alora_invocation_tokens":[1])", R"("arrow_config":{"top_k":2})",
        R"("enable_lora":[true])", R"("init_lora_weights":"pissa_niter_16")",
        R"("init_lora_weights":"corda")", R"("bias":"some")", R"("unknown_key":7)",
        R"("lora_bias":true,"use_dora":true)", R"("rank_pattern":{"(?<=a)b":2})",
        R"("layer_replication":[[2,1]])", R"("trainable_token_indices":["a"])",
        R"("use_bdlora":true)", R"("use_bdlora":{"later":1})", R"("task_type":"CHAT")",
        R"("layers_pattern":["h"])", R"("modules_to_save":["a|b"])"})
    config(line, R"({"peft_type":"LORA","r":2,"lora_alpha":6,)" + line + "}");
  const auto file = [&](const std::string& name, const std::string& more,
                        const build::file& tensors) {
    result.emplace_back(
        name, refusal([&] {
          const auto bytes = build::to_bytes(tensors.text());
          const auto c = lora::peft::parse_config(
              R"({"peft_type":"LORA","r":2,"lora_alpha":6)" + more + "}", "adapter_config.json");
          (void)lora::peft::assemble(c, st::parse(bytes, "adapter_model.safetensors"));
        }));
  };
  const std::string p = "base_model.model.";
  const auto pair = [&] {
    return build::file().add(p + "m.lora_A.weight", {2, 4}).add(p + "m.lora_B.weight", {3, 2});
  };
  file("file without lora_B", "", build::file().add(p + "m.lora_A.weight", {2, 4}));
  file("file of another rank", "",
       build::file().add(p + "m.lora_A.weight", {3, 4}).add(p + "m.lora_B.weight", {3, 3}));
  file("file with a magnitude", "", pair().add(p + "m.lora_magnitude_vector", {3}));
  file("file without its magnitude", R"(,"use_dora":true)", pair());
  file("file with a base tensor", "", pair().add(p + "score.weight", {2, 2}));
  file("file with LoKr", "", pair().add(p + "m.lokr_w1", {2, 2}));
  file("file of a sharded save", "",
       build::file().add(p + "m.lora_A.weight", {0}).add(p + "m.lora_B.weight", {0}));
  file("file with and without prefix", "", pair().add("n.lora_A.weight", {2, 4}));
  file("file with an untargeted module", R"(,"target_modules":["q"])", pair());
  file("file with rows and no ids", "",
       pair().add(p + "e.token_adapter.trainable_tokens_delta", {1, 2}));
  file("file with two parameters", R"(,"target_parameters":["m.a","m.b"])",
       pair()
           .add(p + "m.base_layer.lora_A.weight", {2, 4})
           .add(p + "m.base_layer.lora_B.weight", {3, 2}));
  file("file with a saved module under PEFT's inner name alone", R"(,"modules_to_save":["score"])",
       pair().add(p + "score.modules_to_save.weight", {2, 2}));
  file("file with a letter beyond ASCII", R"(,"rank_pattern":{"\\w+":2})",
       build::file()
           .add(p + "caf\xC3\xA9.lora_A.weight", {2, 4})
           .add(p + "caf\xC3\xA9.lora_B.weight", {3, 2}));
  file("file with a layer too many", R"(,"layer_replication":[[0,2]])",
       build::file()
           .add(p + "layers.2.q.lora_A.weight", {2, 4})
           .add(p + "layers.2.q.lora_B.weight", {3, 2}));
  file("file with nothing", "", build::file());
  const auto factors = [](const std::string& name, std::initializer_list<int> A,
                          std::initializer_list<int> B, build::file into = {}) {
    return into.add(name + ".lora_A.weight", A).add(name + ".lora_B.weight", B);
  };
  file("file with a wrapper in its names", "", factors(p + "_orig_mod.m", {2, 4}, {3, 2}));
  file("file of nested PeftModels", "",
       factors(p + p + "m.base_layer", {2, 4}, {3, 2}, factors(p + "m", {2, 4}, {3, 2})));
  file("file of two state dicts", "",
       factors("a." + p + "m", {2, 4}, {3, 2}, factors("b." + p + "m", {2, 4}, {3, 2})));
  file("file with a stack of experts", "", factors(p + "m", {3, 2, 4}, {3, 6, 2}));
  file("file with a square stack of an old version",
       R"(,"target_parameters":["m.w"],"peft_version":"0.18.1")", factors(p + "m", {6, 4}, {4, 6}));
  file("file with a layout for no stack",
       R"(,"unsloth_fused_expert_lora":{"parameters":{"x":{"lora_B_layout":"grouped_by_expert"}}})",
       factors(p + "m", {2, 4}, {3, 2}));
  file("file with a placeholder", "", factors(p + "n", {0}, {0}, factors(p + "m", {2, 4}, {3, 2})));
  file("file with several factors in a module", "",
       factors(p + "m", {2, 4}, {3, 2}).add(p + "m.lora_B0.weight", {3, 2}));
  file("file with a base tensor that PEFT drops", "",
       factors(p + "m", {2, 4}, {3, 2}).add(p + "m.weight", {3, 4}));
  return result;
}

}  // namespace

TEST_CASE("corpus: every file gets its verdict and every refusal its words", "[corpus]") {
  const auto all = verdicts();
  CHECK(all.size() >= 120);
  std::ostringstream errors;
  for (const auto& v : all) {
    INFO(v.name);
    const auto path = corpus / "files" / (v.name + ".safetensors");
    const auto read = refusal([&] { (void)st::read(path); });
    CHECK(read.empty() == v.accepted);
    CHECK(build::has(read, v.says));
    CHECK(refusal([&] { (void)st::open(path); }) == read);
    const auto bytes = build::to_bytes(slurp(path));
    const auto parsed = refusal([&] { (void)st::parse(bytes, v.name + ".safetensors"); });
    CHECK(build::has(parsed, v.says));
    CHECK(parsed.empty() == v.accepted);
    if (!read.empty()) errors << v.name << "\n    " << read << "\n";
    if (v.accepted) {
      // Written again in our order, it reads as the same tensors, and from then on as the same
      // bytes.
      const auto file = st::read(path);
      std::vector<st::tensor> tensors;
      for (const auto& t : file) tensors.push_back(st::tensor_of(t));
      const auto once = st::to_bytes(tensors, file.metadata());
      const auto again = st::parse(once, "again");
      REQUIRE(again.size() == file.size());
      std::vector<st::tensor> second;
      for (const auto& t : again) {
        const auto& before = file.at(t.name);
        CHECK(t.dtype == before.dtype);
        CHECK(t.shape == before.shape);
        CHECK(std::equal(t.bytes.begin(), t.bytes.end(), before.bytes.begin(), before.bytes.end()));
        second.push_back(st::tensor_of(t));
      }
      CHECK(st::to_bytes(second, again.metadata()) == once);
    }
  }
  for (const auto& [name, text] : peft_refusals()) {
    INFO(name);
    CHECK_FALSE(text.empty());
    errors << name << "\n    " << text << "\n";
  }
  if (std::getenv("LORA_UPDATE_ERRORS") != nullptr)
    std::ofstream(corpus / "errors.txt") << errors.str();
  const bool as_committed = errors.str() == slurp(corpus / "errors.txt");
  if (!as_committed) UNSCOPED_INFO("run with LORA_UPDATE_ERRORS=1 and read the difference");
  CHECK(as_committed);
}

TEST_CASE("corpus: JSON is accepted and refused as RFC 8259 has it", "[corpus]") {
  std::ifstream lines(corpus / "json_cases.txt");
  std::size_t count = 0;
  for (std::string line; std::getline(lines, line); ++count) {
    const auto space = line.find(' ');
    std::string text;
    for (std::size_t k = space + 1; k + 1 < line.size(); k += 2)
      text += static_cast<char>(std::stoi(line.substr(k, 2), nullptr, 16));
    INFO(line);
    nothing ignore;
    const auto refused =
        refusal([&] { lora::io_detail::parse_json({.text = text, .path = "text"}, ignore); });
    CHECK(refused.empty() == line.starts_with("accept"));
    if (!refused.empty()) CHECK(build::has(refused, "text: byte "));
  }
  CHECK(count >= 300);
}

TEST_CASE(
    "corpus: every truncation of every file is refused, and no flipped bit is more than refused",
    "[corpus]") {
  std::size_t flips = 0;
  for (const auto& v : verdicts()) {
    if (!v.accepted) continue;
    const std::string whole = slurp(corpus / "files" / (v.name + ".safetensors"));
    INFO(v.name);
    for (std::size_t length = 0; length < whole.size(); ++length) {
      const auto bytes = build::to_bytes(whole.substr(0, length));
      CHECK_FALSE(refusal([&] { (void)st::parse(bytes, "cut"); }).empty());
    }
    const std::size_t header = std::min<std::size_t>(whole.size(), 256);
    for (std::size_t at = 0; at < header; ++at)
      for (int bit = 0; bit < 8; ++bit, ++flips) {
        std::string flipped = whole;
        flipped[at] = static_cast<char>(flipped[at] ^ (1 << bit));
        const auto bytes = build::to_bytes(flipped);
        (void)refusal([&] {
          const auto file = st::parse(bytes, "flipped");
          std::size_t total = 0;
          for (const auto& t : file) total += t.bytes.size();
          if (total > bytes.size()) throw std::logic_error("more bytes than the file has");
        });
      }
  }
  CHECK(flips > 30'000);
}

TEST_CASE("tolerances read what they name, and report it", "[safetensors][tolerances]") {
  const std::string json = R"({"t":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}})";
  const std::string good = build::safetensors(json, 8);
  const auto parse = [](const std::string& text, const st::tolerances& tolerate) {
    const auto bytes = build::to_bytes(text);
    const auto file = st::parse(bytes, "f", {}, tolerate);
    return std::pair(file.copy<std::uint8_t>("t"), file.tolerated());
  };
  const std::vector<std::uint8_t> values{0, 1, 2, 3, 4, 5, 6, 7};
  const st::tolerances trailing{.trailing_bytes = true}, nul{.nul_padding = true},
      uncounted{.uncounted_padding = true};
  for (const auto& t : {trailing, nul, uncounted})
    CHECK(parse(good, t) == std::pair(values, std::vector<std::string>()));
  // trailing bytes
  const auto more = parse(good + "abcdefghi", trailing);
  CHECK(more.first == values);
  CHECK(more.second == std::vector<std::string>{"9 bytes behind the last tensor"});
  build::refused([&] { parse(good + "abcdefghi", nul); },
                 {"9 bytes too many", "tolerances::trailing_bytes"});
  build::refused([&] { parse(good.substr(0, good.size() - 1), trailing); }, {"1 bytes missing"});
  // NUL padding that is counted
  const std::string padded = build::safetensors(json + std::string(3, '\0'), 8);
  CHECK(parse(padded, nul) ==
        std::pair(values,
                  std::vector<std::string>{"3 NUL bytes of header padding in place of spaces"}));
  build::refused([&] { parse(padded, trailing); }, {"NUL"});
  // padding that is not counted: 53 bytes of JSON, and 3 more before the data
  const std::string shifted = build::length_field(json.size()) + json +
                              std::string((8 - json.size() % 8) % 8, '\0') +
                              good.substr(8 + json.size());
  CHECK(parse(shifted, uncounted).first == values);
  CHECK(build::has(parse(shifted, uncounted).second.at(0), "not counted"));
  build::refused([&] { parse(shifted, trailing); }, {"uncounted header padding"});
  const build::directory dir;
  const auto path = dir.write("shifted.safetensors", shifted);
  CHECK(st::read(path, {}, uncounted).copy<std::uint8_t>("t") == values);
  CHECK(st::read(dir.write("more.safetensors", good + "abcdefghi"), {}, trailing)
            .copy<std::uint8_t>("t") == values);
}

TEST_CASE("a file is written whole, sorted, and again the same", "[safetensors][write]") {
  const std::vector<float> b{1, 2};
  const std::vector<std::uint8_t> a{7};
  const std::vector<double> c{3};
  const std::vector<st::tensor> tensors{
      st::tensor_of<std::uint8_t>("z", {1}, a), st::tensor_of<float>("b", {2}, b),
      st::tensor_of<float>("a", {1, 2}, b), st::tensor_of<double>("c", {}, c)};
  const build::directory dir;
  const auto path = dir.path() / "out.safetensors";
  st::write(path, tensors, {{"k2", "v"}, {"k1", "\"\n"}});
  const std::string text = slurp(path);
  CHECK(text.substr(8).starts_with(
      R"({"__metadata__":{"k1":"\"\n","k2":"v"},"c":{"dtype":"F64","shape":[],"data_offsets":[0,8]},"a":)"));
  const auto file = st::read(path);
  std::vector<std::string> order;
  for (const auto& t : file) order.emplace_back(t.name);
  CHECK(order == std::vector<std::string>{"c", "a", "b", "z"});
  CHECK(file.at("c").offset % 8 == 0);
  const auto reversed = std::vector<st::tensor>(tensors.rbegin(), tensors.rend());
  CHECK(st::to_bytes(reversed, {{"k1", "\"\n"}, {"k2", "v"}}) == build::to_bytes(text));
  // Over a file that is being read: what was read stays, the name has the new content, and nothing
  // else is left.
  const std::vector<st::tensor> copy{st::tensor_of(file.at("a"))};
  st::write(path, copy);
  CHECK(st::read(path).size() == 1);
  CHECK(file.copy<float>("a") == b);
  CHECK(std::distance(fs::directory_iterator(dir.path()), fs::directory_iterator()) == 1);
  // Refusals leave the file.
  const auto refused = [&](const std::vector<st::tensor>& bad, const st::metadata_map& metadata,
                           const char* says) {
    CHECK_THROWS_WITH(st::write(path, bad, metadata), Catch::Contains(says));
    CHECK(st::read(path).size() == 1);
  };
  refused({tensors[1], tensors[1]}, {}, "two tensors are called");
  refused({st::tensor_of<float>("x", {3}, b)}, {}, "takes 12 bytes, but has 8");
  refused({st::tensor_of<float>("__metadata__", {2}, b)}, {}, "must not be called");
  refused({st::tensor_of<float>("\xff", {2}, b)}, {}, "not UTF-8");
  refused({}, {{"a", "\xc0\xaf"}}, "not UTF-8");
  CHECK_THROWS_AS(st::write(dir.path() / "no" / "folder.safetensors", tensors), lora::format_error);
  CHECK_THROWS_AS(st::write(dir.path(), tensors), lora::format_error);
  fs::permissions(path, fs::perms::owner_read | fs::perms::owner_write | fs::perms::group_read);
  st::write(path, tensors, {}, {.durability = st::durability::process});
  CHECK(fs::status(path).permissions() ==
        (fs::perms::owner_read | fs::perms::owner_write | fs::perms::group_read));
}

TEST_CASE("a hundred megabytes of header", "[safetensors][.large]") {
  std::string json = "{";
  std::size_t count = 0;
  while (true) {
    const auto name = std::to_string(count);
    const std::string entry = (count == 0 ? "\"" : ",\"") +
                              std::string(8 - std::min<std::size_t>(8, name.size()), '0') + name +
                              R"(":{"dtype":"U8","shape":[1],"data_offsets":[)" +
                              std::to_string(count) + "," + std::to_string(count + 1) + "]}";
    if (json.size() + entry.size() + 1 > 100'000'000) break;
    json += entry;
    ++count;
  }
  json += '}';
  json.resize(100'000'000, ' ');
  const auto bytes = build::to_bytes(build::safetensors(json, count));
  json = {};
  rusage before{}, after{};
  getrusage(RUSAGE_SELF, &before);
  const auto file = st::parse(bytes, "large");
  getrusage(RUSAGE_SELF, &after);
  CHECK(file.size() == count);
  CHECK(count > 1'200'000);
  CHECK(after.ru_maxrss - before.ru_maxrss < 400 * 1024);
}
