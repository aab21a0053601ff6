// SPDX-License-Identifier: Apache-2.0
//
// Reading PEFT adapters: every config key, every name of a tensor, the patterns, the merges that
// honour how the base is stored, and adapters that other projects wrote.
#include "lora/io/peft.hpp"

#include <cmath>
#include <initializer_list>
#include <string>
#include <vector>

#include "io/peft_file.hpp"
#include "lora/delta.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/outside.hpp"
#include "support/refused.hpp"

namespace {

namespace peft = lora::peft;
namespace st = lora::safetensors;
using build::assemble;
using build::config;
using build::file_refused;
using build::has;
using build::parse;
using build::refused;

void config_refused(const std::string& text, std::initializer_list<std::string_view> parts) {
  INFO(text);
  refused([&] { (void)parse(text); }, parts);
}

/// A rank-2 adapter of a 3 x 4 layer named m.
build::file small(const std::string& prefix = "base_model.model.") {
  return build::file()
      .add(prefix + "m.lora_A.weight", {2, 4}, 0.5F)
      .add(prefix + "m.lora_B.weight", {3, 2}, 0.25F);
}

}  // namespace

// ---- the config
// -------------------------------------------------------------------------------------------------

TEST_CASE("a config says rank, alpha and rule", "[peft][config]") {
  const auto c = parse(config(
      R"("use_rslora":true,"fan_in_fan_out":true,"base_model_name_or_path":"b","peft_version":"0.21.2")"));
  CHECK(c.r == 2);
  CHECK(c.lora_alpha == 6.0);
  CHECK(c.rule == lora::scaling_rule::rank_stabilized);
  CHECK(c.fan_in_fan_out);
  CHECK(c.base_model_name_or_path == "b");
  CHECK(c.peft_version == "0.21.2");
  CHECK(c.ignored_keys.empty());
  const auto defaults = parse(R"({"peft_type":"LORA"})");
  CHECK(defaults.r == 8);
  CHECK(defaults.lora_alpha == 8.0);
  CHECK(defaults.rule == lora::scaling_rule::standard);
  CHECK(parse(config(), {.fan_in_fan_out = true}).fan_in_fan_out);
  CHECK_FALSE(parse(config(R"("fan_in_fan_out":true)"), {.fan_in_fan_out = false}).fan_in_fan_out);
}

TEST_CASE("other kinds of adapters are refused by their type", "[peft][config]") {
  for (const std::string type : {"IA3", "ADALORA", "LOHA", "lora", ""})
    config_refused(R"({"peft_type":")" + type + R"("})",
                   {"adapter_config.json", "peft_type", "LORA", '"' + type + '"'});
  config_refused("{}", {"peft_type", "none"});
  config_refused(R"({"peft_type":null})", {"peft_type", "null"});
  config_refused(R"({"peft_type":["LORA"]})", {"peft_type", "an array"});
  config_refused(R"({"lora_parameters":{"rank":8,"scale":20.0}})", {"MLX"});
  config_refused("[]", {"a JSON object"});
}

TEST_CASE("what changes the arithmetic is refused by name, and passes when it asks for nothing",
          "[peft][config]") {
  struct row {
    const char* key;
    std::vector<const char*> bad, good;
  };
  const std::vector<row> rows{
      {"use_dora", {"1", "\"yes\""}, {"true", "false", "null"}},
      {"lora_bias", {"7"}, {"true", "false", "null"}},
      {"use_qalora", {"true"}, {"false", "null"}},
      {"ensure_weight_tying", {"[]"}, {"true", "false", "null"}},
      {"use_bdlora",
       {"true", "[]", "{\"nblocks\":0}", "{\"nblocks\":2.5}", "{\"match_strict\":1}",
        "{\"target_modules_bd_a\":7}", "{\"later\":1}"},
       {"{\"nblocks\":2,\"target_modules_bd_a\":[\"q\"],\"target_modules_bd_b\":null,\"match_"
        "strict\":true}",
        "{}", "null", "false"}},
      {"kasa_config", {}, {"{\"beta\":1}", "{}", "null"}},
      {"arrow_config", {"{\"top_k\":1}", "{}"}, {"null"}},
      {"alora_invocation_tokens", {"[1,2]", "7"}, {"null", "[]"}},
      {"layer_replication",
       {"[[0,2],[3]]", "[[2,2]]", "[0,1]", "7", "[[0,-1]]", "[[0,1e3]]", "[[0,200000]]"},
       {"[[0,2],[1,3]]", "null", "[]"}},
      {"target_parameters", {"[1]", "7"}, {"[\"experts.w\"]", "null", "[]"}},
      {"trainable_token_indices",
       {"7", "[\"a\"]", "[-1]", "{\"e\":7}", "[4294967296]"},
       {"[1]", "{\"e\":[1]}", "null", "[]", "{}"}},
      {"enable_lora", {"[true,false]"}, {"null"}},
      {"bias", {"true", "\"some\""}, {"\"all\"", "\"lora_only\"", "\"none\"", "null"}},
      {"init_lora_weights",
       {"\"pissa_niter_16\"", "\"corda\"", "\"loftq\"", "\"lora_ga\"", "\"kasa\"", "\"later\"",
        "5"},
       {"\"pissa\"", "\"olora\"", "true", "false", "null", "\"gaussian\"", "\"eva\"",
        "\"orthogonal\"", "\"mica\""}}};
  for (const auto& r : rows) {
    for (const auto* value : r.bad)
      config_refused(config('"' + std::string(r.key) + "\":" + value),
                     {'"' + std::string(r.key) + '"', "expected", "found"});
    for (const auto* value : r.good) {
      INFO(r.key << ": " << value);
      CHECK_NOTHROW(parse(config('"' + std::string(r.key) + "\":" + value)));
    }
  }
}

TEST_CASE("keys without effect pass with any value", "[peft][config]") {
  for (const std::string key :
       {"auto_mapping", "inference_mode", "lora_dropout", "megatron_config", "megatron_core",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
        "monteclora_config", "qalora_group_size", "runtime_config"}) {
    const auto c = parse(config('"' + key + R"(":{"a":[1,"b",0.5]})"));
    CHECK(c.ignored_keys.empty());
  }
}

TEST_CASE("an unknown key is refused unless it asks for nothing or the caller vouches for it",
          "[peft][config]") {
  for (const std::string value : {"1", "true", "0.5", "\"x\"", "[1]", "{\"a\":1}", "0"})
    config_refused(config("\"use_new\":" + value), {"\"use_new\"", "knows", "ignore_keys"});
  for (const std::string value : {"null", "false", "\"\"", "[]", "{}"})
    CHECK(parse(config("\"use_new\":" + value)).ignored_keys ==
          std::vector<std::string>{"use_new"});
  CHECK(parse(config("\"use_new\":7"), {.ignore_keys = {"use_new"}}).ignored_keys ==
        std::vector<std::string>{"use_new"});
  refused([] { (void)parse(config("\"use_qalora\":true"), {.ignore_keys = {"use_qalora"}}); },
          {"use_qalora"});
}

TEST_CASE("alpha beside lora_alpha must say the same", "[peft][config]") {
  CHECK_NOTHROW(parse(config("\"alpha\":6")));
  CHECK_NOTHROW(parse(config("\"alpha\":6.0")));
  CHECK_NOTHROW(parse(config("\"alpha\":null")));
  config_refused(config("\"alpha\":16"), {"\"alpha\"", "lora_alpha", "16"});
  config_refused(R"({"peft_type":"LORA","r":2,"alpha":16})", {"\"alpha\"", "lora_alpha"});
}

TEST_CASE("numbers of the wrong kind are refused", "[peft][config]") {
  for (const std::string value : {"0", "-1", "2.0", "2e0", "\"2\"", "null", "true", "[2]",
                                  "4294967296", "18446744073709551616"})
    config_refused(R"({"peft_type":"LORA","r":)" + value + "}", {"\"r\"", "a rank above 0"});
  for (const std::string value : {"\"6\"", "null", "true", "[6]"})
    config_refused(R"({"peft_type":"LORA","lora_alpha":)" + value + "}",
                   {"\"lora_alpha\"", "a finite number"});
  for (const std::string value : {"NaN", "Infinity", "1e999", "06"})
    config_refused(R"({"peft_type":"LORA","lora_alpha":)" + value + "}", {"adapter_config.json"});
  CHECK(parse(R"({"peft_type":"LORA","lora_alpha":8.485281374238571})").lora_alpha ==
        8.485281374238571);
  CHECK(parse(R"({"peft_type":"LORA","lora_alpha":-2})").lora_alpha == -2.0);
  for (const std::string key : {"use_rslora", "fan_in_fan_out"}) {
    for (const std::string value : {"1", "\"true\"", "{}"})
      config_refused(config('"' + key + "\":" + value), {key});
    CHECK_NOTHROW(parse(config('"' + key + "\":null")));
  }
  config_refused(config("\"task_type\":\"NOPE\""), {"task_type", "CAUSAL_LM", "NOPE"});
  config_refused(config("\"task_type\":3"), {"task_type"});
  config_refused(config("\"base_model_name_or_path\":3"), {"base_model_name_or_path"});
}

TEST_CASE("a config is strict JSON within limits", "[peft][config]") {
  config_refused(config("\"r\":3"), {"\"r\"", "twice"});
  config_refused(config("\"\\u0072\":3"), {"\"r\"", "twice"});
  config_refused(config("\"rank_pattern\":{\"a\":1,\"a\":2}"), {"\"a\"", "twice"});
  config_refused("{\"peft_type\":\"LORA\"", {"ends too early"});
  config_refused(config() + " x", {"strict JSON"});
  config_refused("\xEF\xBB\xBF" + config(), {"byte order mark"});
  config_refused(config() + std::string(1, '\0'), {"NUL"});
  config_refused("{\"peft_type\":\"LORA\",\"x\":\"\xC3\x28\"}", {"strict JSON"});
  const auto nested = [](int depth) {
    return config("\"auto_mapping\":" + std::string(static_cast<std::size_t>(depth), '[') +
                  std::string(static_cast<std::size_t>(depth), ']'));
  };
  CHECK_NOTHROW(parse(nested(31)));
  config_refused(nested(32), {"nested more than 32"});
  config_refused(nested(100'000), {"nested more than 32"});
  std::string many = "0";
  many.reserve(2'200'000);
  for (int k = 0; k < (1 << 20); ++k) many += ",0";
  config_refused(config("\"auto_mapping\":[" + many + "]"), {"at most 1048576 values"});
  const build::directory dir;
  const auto large = dir.write("adapter_config.json", config() + std::string(16u << 20, ' '));
  refused([&] { (void)peft::read_config(large); }, {"at most 16777216 bytes"});
}

// ---- patterns
// -------------------------------------------------------------------------------------------------

TEST_CASE("rank_pattern and alpha_pattern are looked up apart, the first key that fits wins",
          "[peft][patterns]") {
  const auto c = parse(config(
      R"("use_rslora":true,"rank_pattern":{"b":9,"a.b":4},"alpha_pattern":{"^a.b$":5,"b":7})"));
  CHECK(c.rank_of("a.b") == 9);
  CHECK(c.rank_of("x.b") == 9);
  CHECK(c.rank_of("xb") == 2);
  CHECK(static_cast<double>(c.scaling_of("a.b").alpha) == 5.0);
  CHECK(static_cast<double>(c.scaling_of("x.a.b").alpha) == 7.0);
  CHECK(static_cast<double>(c.scaling_of("c").alpha) == 6.0);
  CHECK(c.scaling_of("c").rule == lora::scaling_rule::rank_stabilized);
  CHECK(parse(config("\"rank_pattern\":null,\"alpha_pattern\":{}")).rank_pattern.empty());
  for (const std::string value : {"0", "-1", "1.5", "null", "\"3\""})
    config_refused(config("\"rank_pattern\":{\"a\":" + value + "}"), {"rank_pattern"});
  for (const std::string value : {"null", "\"3\"", "[1]"})
    config_refused(config("\"alpha_pattern\":{\"a\":" + value + "}"), {"alpha_pattern"});
  config_refused(config("\"rank_pattern\":[1]"), {"rank_pattern", "an object of patterns"});
}

namespace {
bool fits(const std::string& key, const std::string& module) {
  peft::pattern_table<int> table;
  table.add(key, 1);
  return table.find(module).has_value();
}
}  // namespace

TEST_CASE("the supported regular expressions mean what they mean in Python", "[peft][patterns]") {
  struct row {
    const char* key;
    const char* module;
    bool fits;
  };
  // As re.match(rf"(.*\.)?({key})$", module) of Python 3.11 says.
  const std::vector<row> rows{{"q", "q", true},
                              {"q", "a.q", true},
                              {"q", "aq", false},
                              {"q", "a.qq", false},
                              {"a.q", "axq", true},
                              {"a\\.q", "axq", false},
                              {"a\\.q", "b.a.q", true},
                              {"l\\.\\d+\\.q", "l.12.q", true},
                              {"l\\.\\d+\\.q", "l.x.q", false},
                              {"l\\.\\d{1,2}\\.q", "l.12.q", true},
                              {"l\\.\\d{1,2}\\.q", "l.123.q", false},
                              {"l\\.\\d{2}\\.q", "l.1.q", false},
                              {"x{2,}", "xxxxx", true},
                              {"x{2,}", "x", false},
                              {"x{,2}y", "xxy", true},
                              {"x{,2}y", "xxxy", false},
                              {"x{,2}y", "y", true},
                              {"x{a}", "x{a}", true},
                              {"x{}", "x{}", true},
                              {"x{", "x{", true},
                              {"[02]\\.q", "0.q", true},
                              {"[02]\\.q", "1.q", false},
                              {"[0-3]x", "2x", true},
                              {"[^0-3]x", "2x", false},
                              {"[^0-3]x", "5x", true},
                              {"[]a]", "]", true},
                              {"[a-]", "-", true},
                              {"[\\d_]+", "1_2", true},
                              {"[\\]x]+", "]x]", true},
                              {"(q|k)_proj", "k_proj", true},
                              {"(q|k)_proj", "v_proj", false},
                              {"q|k", "k", true},
                              {"q|k", "a.k", true},
                              {"(?:q|k)+", "qkkq", true},
                              {"(?P<n>q)", "q", true},
                              {"^a", "a", true},
                              {"^a", "b.a", false},
                              {"a$", "b.a", true},
                              {"a$b", "ab", false},
                              {"\\Aa", "a", true},
                              {"\\Aa", "b.a", false},
                              {"a\\Z", "a", true},
                              {".*", "", true},
                              {".+", "", false},
                              {"", "", true},
                              {"", "a.", true},
                              {"", "a", false},
                              {"a?b", "b", true},
                              {"a??b", "ab", true},
                              {"a*?b", "aab", true},
                              {"a+?b", "b", false},
                              {"\\w+", "a_1", true},
                              {"\\w+", "a-1", false},
                              {"\\W", "-", true},
                              {"\\D+", "ab", true},
                              {"\\D+", "a1", false},
                              {"\\S+", "ab", true},
                              {"a\\sb", "a b", true},
                              {"\\bq", "q", true},
                              {"x\\b.*", "x.y", true},
                              {"x\\b.*", "xy", false},
                              {"x\\B.*", "xy", true},
                              {"(a|b)*c", "abbac", true},
                              {"(a*)*b", "aaab", true},
                              {"(a|)*b", "aab", true},
                              {"()", "", true},
                              {"a|", "a", true},
                              {"a|", "x.", true},
                              {"x\\-y", "x-y", true},
                              {"\\_x", "_x", true},
                              {"h\\.[0-9]*[02468]\\..*", "h.14.q", true},
                              {"h\\.[0-9]*[02468]\\..*", "h.13.q", false},
                              {"(.*)\\.q", "a.b.q", true},
                              {"a.b", "a\nb", false},
                              {"a", "a\n", true}};
  for (const auto& r : rows) {
    INFO(r.key << " on " << r.module);
    CHECK(fits(r.key, r.module) == r.fits);
  }
  CHECK(fits("\xC3\xA9", "\xC3\xA9"));
  CHECK(fits("a.b",
             "a\xE2\x82\xAC"
             "b"));  // a dot is one character, however many bytes
  CHECK_THROWS_AS(fits("\\w", "\xC3\xA9"), lora::value_error);
}

TEST_CASE("expressions that are not supported are refused by name", "[peft][patterns]") {
  const std::vector<std::pair<const char*, const char*>> rows{
      {"(?=a)", "(?"},
      {"(?!a)b", "(?"},
      {"(?<=a)b", "(?"},
      {"(?i)a", "(?"},
      {"(?P=n)", "(?"},
      {"(a)\\\\1", "a reference to a group"},
      {"a++", "possessive"},
      {"(?>a)", "(?"},
      {"a**", "a repetition of a repetition"},
      {"a{2}{3}", "a repetition of a repetition"},
      {"*a", "a repetition of nothing"},
      {"(*a)", "a repetition of nothing"},
      {"(a", "'(' without ')'"},
      {"a)", "')' without '('"},
      {"a)(b", "')' without '('"},
      {"[a", "'[' without ']'"},
      {"[b-a]", "a range"},
      {"[a-\\\\d]", "a range"},
      {"\\\\x41", "the escape"},
      {"\\\\p", "the escape"},
      {"^*", "a repetition of a position"},
      {"a{3,2}", "n below m"},
      {"a\\\\", "a backslash at the end"},
      {"(?P<n", "a group name"},
      {"((a{100}){100}){100}", "multiply"},
      {"((){9999}){9999}", "multiply"}};
  for (const auto& [key, says] : rows)
    config_refused(config("\"rank_pattern\":{\"" + std::string(key) + "\":1}"),
                   {"rank_pattern", says});
  config_refused(
      config("\"alpha_pattern\":{\"" + std::string(40, '(') + "a" + std::string(40, ')') + "\":1}"),
      {"nested"});
  config_refused(config("\"alpha_pattern\":{\"(" + std::string(5000, 'a') + ")\":1}"),
                 {"longer than 4096"});
  // A table built by hand: nothing is added.
  peft::pattern_table<int> table;
  CHECK(test::mentions(test::refusal<lora::value_error>([&] { table.add("(?=a)", 1); }),
                       {"peft::pattern_table", "\"(?=a)\"", "(?"}));
  CHECK(table.empty());
}

TEST_CASE("a hostile pattern neither hangs nor recurses", "[peft][patterns]") {
  const std::string name(20'000, 'a');
  for (const char* key : {"(a+)+b", "(a*)*b", "(a|a)*b", "(a|aa)+b", "(.*)*b", "(.*.*.*.*.*.*)b",
                          "([a-z]+)*b", "(a?){50}a{50}b"})
    CHECK_FALSE(fits(key, name));
  CHECK(fits("(a|b)*", std::string(200'000, 'a')));
}

TEST_CASE("patterns and modules may not multiply without bound", "[peft][patterns]") {
  std::string patterns;
  for (int k = 0; k < 2000; ++k)
    patterns += (k == 0 ? "\"" : ",\"") + std::to_string(k) + "(a|b){400}\":2";
  build::file tensors;
  for (int k = 0; k < 300; ++k) {
    const std::string name = "base_model.model.layers." + std::to_string(k) + ".q";
    tensors.add(name + ".lora_A.weight", {2, 1}).add(name + ".lora_B.weight", {1, 2});
  }
  file_refused(config("\"rank_pattern\":{" + patterns + "}"), tensors,
               {"rank_pattern", "more work"});
}

TEST_CASE("targets that a name does not decide are refused", "[peft][targets]") {
  const auto undecided = [](const std::string& more, std::initializer_list<const char*> words) {
    const auto c = parse(config(more));
    const std::string text =
        test::refusal<lora::value_error>([&] { (void)peft::matches_target(c, "q"); });
    INFO(text);
    CHECK(test::mentions(text, {"peft::matches_target"}));
    CHECK(test::mentions(text, words));
  };
  undecided("", {"target_modules is null"});
  undecided("\"target_modules\":\"All-Linear\"", {"all-linear"});
  undecided("\"target_modules\":\"(?!x)q\"", {"target_modules \"(?!x)q\"", "not supported"});
  undecided("\"target_modules\":[\"q\"],\"exclude_modules\":\"(?!x)q\"",
            {"exclude_modules \"(?!x)q\"", "not supported"});
  CHECK_FALSE(peft::matches_target(parse(config("\"target_modules\":[]")), "q"));
  CHECK_FALSE(peft::matches_target(
      parse(config("\"target_modules\":[\"q\"],\"modules_to_save\":[\"score\"]")), "a.score.q"));
  CHECK(peft::matches_target(
      parse(config("\"target_modules\":[\"q\"],\"modules_to_save\":[\"core\"]")), "a.score.q"));
  const auto layers =
      parse(config("\"target_modules\":[\"q\"],\"layers_to_transform\":[18446744073709551615]"));
  CHECK(peft::matches_target(layers, "m.l.018446744073709551615.q"));
  CHECK_FALSE(peft::matches_target(layers, "m.l.118446744073709551615.q"));
  config_refused(config("\"target_modules\":[1]"), {"target_modules"});
  config_refused(config("\"target_modules\":{}"), {"target_modules"});
  config_refused(config("\"layers_to_transform\":[-1]"), {"layers_to_transform"});
}

// ---- the tensors
// -------------------------------------------------------------------------------------------------

TEST_CASE("an adapter is read with its factors and scaling", "[peft]") {
  const auto file = assemble(config(), small());
  REQUIRE(file.size() == 1);
  CHECK(file.names() == std::vector<std::string>{"m"});
  const auto& e = file.at("m");
  CHECK(e.name() == "m");
  CHECK(e.factors().rank() == 2);
  CHECK(e.factors().scaling() == 3.0);
  CHECK(e.in_features() == 4);
  CHECK(e.out_features() == 3);
  CHECK(e.factors().lora_A()(1, 3) == 4.0F);
  CHECK(e.factors().lora_B()(2, 1) == 1.5F);
  CHECK(&e.plain() == &e.factors());
  CHECK(assemble(config("\"use_rslora\":true"), small()).at("m").factors().scaling() ==
        6.0 / std::sqrt(2.0));
  CHECK(assemble(config("\"alpha_pattern\":{\"m\":1}"), small()).at("m").factors().scaling() ==
        0.5);
  for (const auto& [name, entry] : file) CHECK(name == entry.name());
}

TEST_CASE("names with and without the prefix are read, but not mixed", "[peft]") {
  CHECK(assemble(config(), small("")).contains("m"));
  file_refused(config(), small().add("n.lora_A.weight", {2, 4}).add("n.lora_B.weight", {3, 2}),
               {"n.lora_A.weight", "prefix"});
  // Byte order: the names without prefix may also come first.
  file_refused(config(), small().add("a.lora_A.weight", {2, 4}).add("a.lora_B.weight", {3, 2}),
               {"base_model.model.m.lora_A", "prefix"});
}

TEST_CASE("a module that is not there is named with its neighbours", "[peft]") {
  const auto file = assemble(config(), small()
                                           .add("base_model.model.n.lora_A.weight", {2, 4})
                                           .add("base_model.model.n.lora_B.weight", {3, 2}));
  try {
    (void)file.at("base_model.model.m");
    FAIL("found");
  } catch (const lora::value_error& e) {
    CHECK(has(e.what(), "\"base_model.model.m\""));
    CHECK(has(e.what(), "near: \"m\", \"n\""));
  }
}

TEST_CASE("factors that do not belong together are refused", "[peft]") {
  const std::string p = "base_model.model.";
  file_refused(config(), build::file().add(p + "m.lora_A.weight", {2, 4}),
               {"m.lora_A.weight", "m.lora_B.weight", "incomplete"});
  file_refused(config(), build::file().add(p + "m.lora_B.weight", {3, 2}),
               {"m.lora_B.weight", "m.lora_A.weight", "incomplete"});
  file_refused(config(),
               build::file().add(p + "m.lora_A.weight", {3, 4}).add(p + "m.lora_B.weight", {3, 2}),
               {"m.lora_A.weight", "rank 2", "F32 [3, 4]"});
  file_refused(config(),
               build::file().add(p + "m.lora_A.weight", {2, 4}).add(p + "m.lora_B.weight", {3, 3}),
               {"m.lora_B.weight", "rank 2", "F32 [3, 3]"});
  file_refused(config("\"rank_pattern\":{\"m\":3}"), small(), {"m.lora_A.weight", "rank 3"});
  CHECK_NOTHROW(assemble(config("\"rank_pattern\":{\"n\":3}"), small()));
  file_refused(config(), build::file(), {"lora_A.weight", "none"});
}

TEST_CASE("tensors that are not plain factors are refused by what they are", "[peft]") {
  const std::vector<std::pair<const char*, const char*>> rows{
      {"m.lora_magnitude_vector", "use_dora"},
      {"m.lora_magnitude_vector.weight", "use_dora"},
      {"e.lora_embedding_A", "lora_embedding_B"},
      {"e.lora_embedding_B", "lora_embedding_A"},
      {"m.lora_embedding_A", "one adapter for a module"},
      {"m.lora_B.bias", "lora_bias"},
      {"m.lora_A.bias", "bias of lora_A"},
      {"m.lora_diag", "kasa_config"},
      {"m.lora_E", "AdaLoRA"},
      {"m.ranknum", "AdaLoRA"},
      {"m.token_adapter.trainable_tokens_delta", "trainable_token_indices"},
      {"m.modules_to_save.weight", "modules_to_save"},
      {"m.base_layer.weight", "weight of the base"},
      {"m.base_layer.bias", "weight of the base"},
      {"m.base_layer.lora_A.weight", "neither an attention nor named by target_parameters"},
      {"experts.base_layer.lora_B.weight", "target_parameters"},
      {"m.lora_A.default.weight", "save_pretrained"},
      {"m.lora_B.default.weight", "save_pretrained"},
      {"score.weight", "base model"},
      {"m.bias", "base model"},
      {"unet.lora_down.weight", "kohya"},
      {"m.lora.up.weight", "diffusers"},
      {"m.lora_a", "MLX"},
      {"m.lokr_w1", "LoKr"},
      {"m.hada_w1_a", "LoHa"},
      {"w_a_000", "not a file that PEFT wrote"},
      {"lora_A.weight", "under the name of an adapter"},
      {".lora_A.weight", ""},
      {"m.lora_C.weight", "a part of an adapter under a name that PEFT does not write"},
      {"", "not a file"}};
  for (const auto& [name, says] : rows) {
    INFO(name);
    file_refused(config(), small().add("base_model.model." + std::string(name), {2, 2}),
                 {"adapter_model.safetensors", name, says});
  }
  const auto saved = assemble(config("\"modules_to_save\":[\"score\"]"),
                              small().add("base_model.model.head.score.dense.weight", {2, 2}));
  REQUIRE(saved.replacements().size() == 1);
  CHECK(saved.replacements()[0].name == "head.score.dense.weight");
  CHECK(saved.replacements()[0].why == peft::replacement::reason::saved_module);
  CHECK(saved.replacements()[0].values<float>() == std::vector<float>{1, 2, 3, 4});
  CHECK_THROWS_AS(saved.replacements()[0].values<lora::bfloat16>(), lora::value_error);
  CHECK_NOTHROW(assemble(config("\"modules_to_save\":[\"score\",\"classifier\"]"), small()));
  const auto rest = assemble(config("\"modules_to_save\":[\"score\"]"),
                             small().add("base_model.model.score.weight", {2, 2}),
                             {.leave_out_saved_modules = true});
  CHECK(rest.size() == 1);
  CHECK(rest.left_out() == std::vector<std::string>{"base_model.model.score.weight"});
  refused(
      [] {
        (void)assemble(config("\"modules_to_save\":[\"score\"]"),
                       small().add("base_model.model.other.weight", {2, 2}),
                       {.leave_out_saved_modules = true});
      },
      {"other.weight"});
}

TEST_CASE("shapes that are no matrices are refused with a hint", "[peft]") {
  const std::string A = "base_model.model.m.lora_A.weight", B = "base_model.model.m.lora_B.weight";
  file_refused(config(), build::file().add(A, {0}).add(B, {0}),
               {"m.lora_A.weight", "F32 [0]", "ZeRO-3"});
  file_refused(config(), build::file().add(A, {2, 4}).add(B, {0}), {"m.lora_B.weight", "ZeRO-3"});
  file_refused(config(), build::file().add(A, {2, 0}).add(B, {3, 2}),
               {"m.lora_A.weight", "ZeRO-3"});
  CHECK_NOTHROW(assemble(config(), build::file().add(A, {2, 4, 3, 3}).add(B, {3, 2, 1, 1})));
  file_refused(config(), build::file().add(A, {2, 4, 3, 3}).add(B, {3, 2}),
               {"m.lora_B.weight", "4 dimensions"});
  file_refused(config(), build::file().add(A, {2, 4, 3, 3}).add(B, {3, 2, 3, 1}),
               {"m.lora_B.weight", "kernel of 1"});
  file_refused(config(), build::file().add(A, {3, 4, 3, 3}).add(B, {3, 2, 1, 1}),
               {"m.lora_A.weight", "rank 2"});
  file_refused(config(), build::file().add(A, {2, 4, 3, 3}).add(B, {3, 3, 1, 1}),
               {"m.lora_B.weight", "divides the rank"});
  file_refused(config(), build::file().add(A, {2, 4, 3, 3}).add(B, {3, 1, 1, 1}),
               {"m.lora_B.weight", "2 groups divide"});
  file_refused(config(), build::file().add(A, {2, 1, 1, 1, 1, 1}).add(B, {3, 2, 1, 1, 1, 1}),
               {"m.lora_A.weight", "3 to 5"});
  file_refused(config(), build::file().add(A, {2}).add(B, {3, 2}),
               {"m.lora_A.weight", "two dimensions"});
  file_refused(config(), build::file().add(A, {2, 4}).add(B, {}),
               {"m.lora_B.weight", "two dimensions"});
}

TEST_CASE("factors are widened exactly and never narrowed", "[peft]") {
  const std::string A = "base_model.model.m.lora_A.weight", B = "base_model.model.m.lora_B.weight";
  const std::string one = R"({"peft_type":"LORA","r":1,"lora_alpha":2})";
  const auto half = build::file()
                        .add<std::uint16_t>(A, "F16", {1, 2}, {0x3c00, 0x0001})
                        .add<std::uint16_t>(B, "F16", {1, 1}, {0xc000});
  const auto brain =
      build::file().add<std::uint16_t>(A, "BF16", {1, 2}, {0x3f80, 0x0001}).add(B, {1, 1}, 0.1F);
  const auto wide =
      build::file().add<double>(A, "F64", {1, 1}, {0.1}).add<double>(B, "F64", {1, 1}, {3.0});
  CHECK(assemble<float>(one, half).at("m").factors().lora_A()(0, 1) == 0x1p-24F);
  CHECK(assemble<lora::float16>(one, half).at("m").factors().lora_A()(0, 1).bits == 1);
  CHECK(assemble<double>(one, brain).at("m").factors().lora_A()(0, 1) == 0x1p-133);
  CHECK(assemble<double>(one, brain).at("m").factors().lora_B()(0, 0) == static_cast<double>(0.1F));
  CHECK(assemble<double>(one, wide).at("m").factors().lora_A()(0, 0) == 0.1);
  refused([&] { (void)assemble<float>(one, wide); }, {"m.lora_A.weight", "F64", "read<double>()"});
  refused([&] { (void)assemble<lora::bfloat16>(one, half); }, {"m.lora_A.weight", "F16"});
  refused([&] { (void)assemble<lora::bfloat16>(one, brain); }, {"m.lora_B.weight", "F32"});
  file_refused(one, build::file().add<std::int8_t>(A, "I8", {1, 1}, {1}).add(B, {1, 1}),
               {"m.lora_A.weight", "I8"});
  // NaN is a value like any other here.
  const auto nan = build::file().add<std::uint32_t>(A, "F32", {1, 1}, {0x7fc00000}).add(B, {1, 1});
  CHECK_NOTHROW(assemble(one, nan));
}

// ---- directories
// -------------------------------------------------------------------------------------------------

TEST_CASE("a directory is read, and what it lacks is said", "[peft]") {
  const build::directory dir;
  refused([&] { (void)peft::read(dir.path()); }, {"adapter_config.json", "no such file"});
  refused([&] { (void)peft::read(dir.path() / "none"); }, {"adapter_config.json"});
  const auto weights = dir.write("adapter_model.safetensors", small().text());
  refused([&] { (void)peft::read(dir.path()); }, {"adapter_config.json", "scaling"});
  refused([&] { (void)peft::read(weights); }, {"a file in place of the directory"});
  dir.write("adapter_config.json", config());
  const auto file = peft::read(dir.path());
  CHECK(file.at("m").factors().scaling() == 3.0);
  CHECK(file.config().path == (dir.path() / "adapter_config.json").string());
  CHECK(peft::read<double>(dir.path()).size() == 1);
  std::filesystem::remove(weights);
  refused([&] { (void)peft::read(dir.path()); }, {"adapter_model.safetensors", "no such file"});
  dir.write("adapter_model.bin", "x");
  refused([&] { (void)peft::read(dir.path()); }, {"adapter_model.safetensors", "PyTorch file"});
  dir.write("adapter_config.json", R"({"peft_type":"IA3"})");
  refused([&] { (void)peft::read(dir.path()); }, {"IA3", "LORA"});
}

// ---- merging with the orientation that the file says
// -----------------------------------------------------------------

static_assert(!lora::low_rank<peft::entry<float>>);
static_assert(!lora::low_rank<peft::scaled_entry<double>>);

TEST_CASE("merging an entry takes W as the base stores it", "[peft][merge]") {
  const auto out_in = assemble(config(), small());
  const auto in_out = assemble(config("\"fan_in_fan_out\":true"), small());
  const Eigen::MatrixXf W = Eigen::MatrixXf::Random(3, 4);
  const Eigen::MatrixXf expected = lora::merged(W, out_in.at("m").factors());
  const Eigen::MatrixXf half = lora::merged(W, lora::scaled(-0.5, out_in.at("m").factors()));

  Eigen::MatrixXf stored = W;
  lora::merge(stored, out_in.at("m"));
  CHECK(stored == expected);
  CHECK(lora::merged(W, out_in.at("m")) == expected);
  stored = W;
  lora::merge_checked(stored, out_in.at("m"));
  CHECK(stored == expected);

  Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> turned = W.transpose();
  lora::merge(turned, in_out.at("m"));
  CHECK(turned.transpose() == expected);
  turned = W.transpose();
  lora::merge(lora::row_major(turned.data(), 4, 3),
              lora::scaled(-1.0, lora::scaled(0.5, in_out.at("m"))));
  CHECK(turned.transpose() == half);
  CHECK(lora::merged(W.transpose().eval(), in_out.at("m")).transpose() == expected);
  turned = expected.transpose();
  lora::unmerge(turned, in_out.at("m"));
  CHECK(turned.transpose() == [&] {
    Eigen::MatrixXf back = expected;
    lora::unmerge(back, out_in.at("m"));
    return back;
  }());
  turned = W.transpose();
  lora::merge_checked(turned, in_out.at("m"), lora::scaled(2, in_out.at("m")));
  CHECK(turned.transpose() ==
        lora::merged(W, out_in.at("m").factors(), lora::scaled(2, out_in.at("m").factors())));
}

TEST_CASE("an orientation that does not fit is an error that says so", "[peft][merge]") {
  const auto out_in = assemble(config(), small());
  const auto in_out = assemble(config("\"fan_in_fan_out\":true"), small());
  const auto message = [](auto act) -> std::string {
    try {
      act();
    } catch (const lora::error& e) {
      return e.what();
    }
    return "accepted";
  };
  Eigen::MatrixXf W = Eigen::MatrixXf::Zero(4, 3);
  const auto turned = message([&] { lora::merge(W, out_in.at("m")); });
  CHECK(has(turned, "4x3"));
  CHECK(has(turned, "3x4"));
  CHECK(has(turned, "fan_in_fan_out = true"));
  Eigen::MatrixXf straight = Eigen::MatrixXf::Zero(3, 4);
  CHECK(has(message([&] { lora::unmerge(straight, in_out.at("m")); }), "fan_in_fan_out = false"));
  CHECK(has(message([&] { (void)lora::merged(straight, out_in.at("m"), in_out.at("m")); }),
            "one weight is stored one way"));
  Eigen::MatrixXf other = Eigen::MatrixXf::Zero(5, 5);
  CHECK_FALSE(has(message([&] { lora::merge_checked(other, out_in.at("m")); }), "fan_in_fan_out"));
  CHECK(other.isZero());
  CHECK(W.isZero());
  CHECK(has(message([&] { (void)in_out.at("m").plain(); }),
            "m as in_features x out_features (fan_in_fan_out)"));
  CHECK(has(message([&] { (void)lora::scaled(INFINITY, lora::scaled(2, out_in.at("m"))); }),
            "lora::scaled: the strength"));
  CHECK_THROWS_AS(in_out.at("m").plain(), lora::value_error);
  CHECK_THROWS_AS(lora::merge(W, out_in.at("m")), lora::shape_error);
  CHECK_THROWS_AS((void)lora::scaled(std::nan(""), out_in.at("m")), lora::value_error);
}

TEST_CASE("entries that do not fit are refused by every merge, and W keeps its bits",
          "[peft][merge]") {
  const auto out_in = assemble(config(), small());
  const auto& fits = out_in.at("m");
  const auto other = assemble(config(), build::file()
                                            .add("base_model.model.n.lora_A.weight", {2, 5})
                                            .add("base_model.model.n.lora_B.weight", {3, 2}));
  const auto in_out = assemble(config("\"fan_in_fan_out\":true"), small());
  const Eigen::MatrixXf before = Eigen::MatrixXf::Constant(3, 4, 7);
  Eigen::MatrixXf W = before;
  const auto every_merge_refuses = [&]<class Error>(Error, std::initializer_list<const char*> words,
                                                    const auto& last) {
    const auto refuses = [&](const char* operation, const auto& call) {
      const std::string text = test::refusal<Error>(call);
      INFO(text);
      CHECK(test::mentions(text, {operation}));
      CHECK(test::mentions(text, words));
      CHECK(test::same_bits(W, before));
    };
    refuses("lora::merge:", [&] { lora::merge(W, fits, last); });
    refuses("lora::unmerge:", [&] { lora::unmerge(W, fits, last); });
    refuses("lora::merge_checked:", [&] { lora::merge_checked(W, fits, last); });
    refuses("lora::merge", [&] { (void)lora::merged(W, fits, last); });
  };
  const lora::shape_error shape("");
  const lora::value_error value("");
  every_merge_refuses(shape, {"the weight of n is 3x4", "the adapter is for 3x5"}, other.at("n"));
  every_merge_refuses(shape, {"n is 3x4", "3x5"}, lora::scaled(0, other.at("n")));
  every_merge_refuses(value, {"fan_in_fan_out", "m and m", "one weight is stored one way"},
                      in_out.at("m"));
  every_merge_refuses(value, {"scaling is not finite"}, lora::scaled(1e308, fits));
}

// ---- files of other projects
// -----------------------------------------------------------------------------------------

namespace {

using test::have_outside;
using test::outside;

/// Reference values are printed with nine digits, so they are half a unit of the ninth away from
/// the number.
void check_nine_digits(double value, double printed) {
  INFO(value << " against " << printed);
  CHECK(std::abs(value - printed) <= 5.0e-9 * std::abs(printed));
}

struct delta_row {
  const char* module;
  double norm, first, last;
};

void check_deltas(const peft::adapter_file<double>& file, const std::vector<delta_row>& rows,
                  double whole) {
  for (const auto& row : rows) {
    INFO(row.module);
    const Eigen::MatrixXd delta = lora::delta_weight(file.at(row.module).factors());
    check_nine_digits(delta.norm(), row.norm);
    check_nine_digits(delta(0, 0), row.first);
    check_nine_digits(delta(delta.rows() - 1, delta.cols() - 1), row.last);
  }
  double sum = 0;
  for (const auto& each : file) sum += lora::delta_weight(each.second.factors()).squaredNorm();
  check_nine_digits(std::sqrt(sum), whole);
}

}  // namespace

TEST_CASE("outside: a trained adapter with a whole module beside it", "[peft][outside]") {
  if (!have_outside()) return;
  const auto dir = outside / "adapters" / "sift-opf-zh";
  CHECK(peft::read(dir).replacements().size() == 2);
  const auto file = peft::read<double>(dir, {.leave_out_saved_modules = true});
  CHECK(file.size() == 32);
  CHECK(file.left_out() ==
        std::vector<std::string>{"base_model.model.score.bias", "base_model.model.score.weight"});
  CHECK(file.ignored_keys().empty());
  CHECK(file.config().peft_version == "0.19.1");
  CHECK(file.config().base_model_name_or_path == "openai/privacy-filter");
  CHECK(file.at("model.layers.3.self_attn.o_proj").factors().scaling() == 2.0);
  CHECK(peft::matches_target(file.config(), "model.layers.3.self_attn.o_proj"));
  CHECK_FALSE(peft::matches_target(file.config(), "score"));
  check_deltas(file,
               {{"model.layers.0.self_attn.q_proj", 0.984632082, -1.07994901e-3, -3.10465154e-4},
                {"model.layers.7.self_attn.v_proj", 0.449611710, -1.07961971e-3, -3.63754684e-4}},
               6.63313578);
}

TEST_CASE("outside: an adapter for GPT-2 whose config does not say how the base stores",
          "[peft][outside]") {
  if (!have_outside()) return;
  const auto dir = outside / "adapters" / "gradience-tiny-lora";
  const auto file = peft::read<double>(dir);
  CHECK(file.size() == 12);
  CHECK(file.at("transformer.h.2.attn.c_proj").factors().scaling() == 2.0);
  check_deltas(file,
               {{"transformer.h.0.attn.c_attn", 75.1351475, -1.62757065e-2, 3.58790559e-2},
                {"transformer.h.5.attn.c_proj", 44.0288877, -0.170986647, 2.61150468e-2}},
               212.209005);
  // GPT-2 stores [in, out]: c_attn is 768 x 2304 there, and the shapes tell.
  Eigen::MatrixXf W = Eigen::MatrixXf::Zero(768, 2304);
  const auto as_the_config_says = peft::read(dir);
  try {
    lora::merge(W, as_the_config_says.at("transformer.h.0.attn.c_attn"));
    FAIL("merged");
  } catch (const lora::shape_error& e) {
    CHECK(has(e.what(), "768x2304"));
    CHECK(has(e.what(), "fan_in_fan_out = true"));
  }
  const auto corrected = peft::read(dir, {.fan_in_fan_out = true});
  CHECK_NOTHROW(lora::merge(W, corrected.at("transformer.h.0.attn.c_attn")));
  // Every element of a merge into zero is the delta, rounded: 2^-24 of each, and gamma_{8+2} of
  // sums that are not larger than 100 times it.
  CHECK(std::abs(W.cast<double>().norm() - 75.1351475) < 75.2 * 1000 * 0x1p-24);
}

TEST_CASE("outside: rank_pattern and alpha_pattern of every module", "[peft][outside]") {
  if (!have_outside()) return;
  const auto c = peft::read_config(outside / "adapters" / "gradience-rank-pattern-config" /
                                   "adapter_config.json");
  CHECK(c.r == 4);
  CHECK(c.rank_pattern.rows().size() == 24);
  int sixteen = 0, eight = 0, four = 0;
  for (const auto& row : c.rank_pattern.rows()) {
    const auto rank = c.rank_of(row.key);
    sixteen += rank == 16;
    eight += rank == 8;
    four += rank == 4;
    CHECK(lora::resolve(c.scaling_of(row.key), rank) == 1.0);
  }
  CHECK(sixteen == 19);
  CHECK(eight == 3);
  CHECK(four == 2);
}

TEST_CASE("outside: PEFT's own configs", "[peft][outside]") {
  if (!have_outside()) return;
  const auto path = [](const char* name) {
    return outside / "configs" / name / "adapter_config.json";
  };
  const auto plain = peft::read_config(path("llama-3.2-3B-rank10-target-mlp"));
  CHECK(lora::resolve(plain.scaling_of("x"), plain.rank_of("x")) == 2.0);
  CHECK(plain.target_modules.names->size() == 3);
  const auto stabilized = peft::read_config(path("llama-3.2-3B-rank64-rslora"));
  CHECK(lora::resolve(stabilized.scaling_of("x"), stabilized.rank_of("x")) == 8.0);
  CHECK(peft::read_config(path("llama-3.2-3B-rank32-dora")).use_dora);
  CHECK(peft::read_config(path("llama-3.2-3B-rank14-target-mlp-bdlora")).bd->blocks == 2);
}

TEST_CASE("outside: what is not LoRA is refused from its config", "[peft][outside]") {
  if (!have_outside()) return;
  for (const char* name : {"ia3_mlp", "ia3_conv2d"})
    refused([&] { (void)peft::read(outside / "refuse" / name); },
            {"adapter_config.json", "\"IA3\"", "LORA"});
  const auto golden = outside / "golden" / "peft-0.6.1";
  refused([&] { (void)peft::read(golden / "adalora_mlp"); }, {"ADALORA"});
  for (const char* name : {"lora_conv2d", "lora_emb_conv1d", "lora_mlp_modules_to_save"})
    CHECK_NOTHROW(peft::read(golden / name));
  CHECK(peft::read(golden / "lora_mlp").at("lin0").factors().scaling() == 1.0);
  refused([&] { (void)peft::read(outside / "adapters" / "mlx-lm-dpo"); }, {"MLX"});
}

TEST_CASE("outside: files of other formats are refused by their first name", "[peft][outside]") {
  if (!have_outside()) return;
  const auto file_is_refused = [](const char* path, std::initializer_list<std::string_view> parts) {
    refused([&] { (void)peft::assemble(parse(config()), st::read(outside / "adapters" / path)); },
            parts);
  };
  file_is_refused("lycoris-lokr/smart_falcon_4_lokr.safetensors",
                  {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"});
  file_is_refused("sam-lora/lora_rank2.safetensors", {"\"w_a_000\""});
  file_is_refused("cloneofsimo-lora/lora_disney_inpainting.safetensors", {"\"<s1>\""});
  file_is_refused("diffusers-sd-pokemon/pytorch_lora_weights.safetensors", {"diffusers"});
  file_is_refused("mlx-lm-dpo/adapters.safetensors", {"lora_a", "MLX"});
}

TEST_CASE("outside: every adapter of PEFT 0.21 is read or refused for a reason",
          "[peft][outside]") {
  if (!have_outside()) return;
  std::size_t read = 0, refused_count = 0;
  for (const auto& found :
       std::filesystem::recursive_directory_iterator(outside / "golden" / "peft-0.21")) {
    if (found.path().filename() != "adapter_config.json") continue;
    INFO(found.path().string());
    try {
      const auto file = peft::read<double>(found.path().parent_path());
      CHECK(file.size() > 0);
      CHECK(file.ignored_keys().empty());
      ++read;
    } catch (const lora::format_error& e) {
      CHECK_FALSE(e.item().empty());
      CHECK_FALSE(e.expected().empty());
      CHECK_FALSE(e.found().empty());
      ++refused_count;
    }
  }
  CHECK(read > 130);
  CHECK(refused_count >
        20);  // the other kinds, an unconverted pissa_niter, parameters without their order
}

// ---- variants
// -------------------------------------------------------------------------------------------------

namespace {

using build::prefix;

/// Every verb refuses the call with value_error that says `part`, and W keeps its values.
template <class E>
void merge_refused(const E& e, lora::index_t rows, lora::index_t cols, const char* part) {
  Eigen::MatrixXf W = Eigen::MatrixXf::Constant(rows, cols, 1);
  CHECK_THROWS_WITH(lora::merge(W, e), Catch::Contains(part));
  CHECK_THROWS_AS(lora::merge_checked(W, e), lora::value_error);
  CHECK_THROWS_AS((void)lora::merged(W, e), lora::value_error);
  CHECK(W == Eigen::MatrixXf::Constant(rows, cols, 1));
}

}  // namespace

TEST_CASE("a bias of an adapter goes into the base's bias", "[peft][variants]") {
  const auto file =
      assemble(config("\"lora_bias\":true"), small().add(prefix + "m.lora_B.bias", {3}));
  const auto& e = file.at("m");
  CHECK(e.lora_bias() == std::vector<float>{1, 2, 3});
  CHECK(e.what_else() == "a bias (lora_bias)");
  CHECK_THROWS_AS(e.plain(), lora::value_error);
  merge_refused(e, 3, 4, "pass the base's bias");
  Eigen::MatrixXf W = Eigen::MatrixXf::Zero(3, 4), y = Eigen::MatrixXf::Constant(3, 1, 10);
  std::vector<float> b{10, 10, 10};
  lora::merge(W, b, lora::scaled(0.5, e));
  CHECK(b == std::vector<float>{11.5F, 13, 14.5F});  // s = 3
  CHECK(W == Eigen::MatrixXf(0.5F * lora::delta_weight(e.factors())));
  const Eigen::MatrixXf x = Eigen::MatrixXf::Constant(4, 1, 2);
  lora::apply(x, y, lora::scaled(0.5, e));
  CHECK(y == Eigen::MatrixXf(W * x + Eigen::Map<Eigen::VectorXf>(b.data(), 3)));
  lora::unmerge(W, b, lora::scaled(0.5, e));
  CHECK(b == std::vector<float>{10, 10, 10});
  std::vector<float> short_bias{1, 2};
  CHECK_THROWS_AS(lora::merge(W, short_bias, e), lora::shape_error);
  file_refused(config("\"lora_bias\":true"), small(),
               {"m.lora_A.weight", "lora_B.bias", "incomplete"});
  file_refused(config("\"lora_bias\":true"), small().add(prefix + "m.lora_B.bias", {2}),
               {"m.lora_B.bias", "3 values"});
  file_refused(config("\"lora_bias\":true,\"use_dora\":true"), small(), {"lora_bias", "use_dora"});
}

TEST_CASE("DoRA is merged with its magnitude, and never without", "[peft][variants]") {
  const auto file =
      assemble(config("\"use_dora\":true"), small().add(prefix + "m.lora_magnitude_vector", {3}));
  const auto& e = file.at("m");
  Eigen::MatrixXf W = Eigen::MatrixXf::Random(3, 4);
  const Eigen::MatrixXf sum = W + lora::delta_weight(e.factors()),
                        x = Eigen::MatrixXf::Random(4, 2);
  Eigen::MatrixXf y = W * x;
  CHECK_THROWS_WITH(lora::apply(x, y, e), Catch::Contains("mixed(W"));
  lora::apply(x, y, lora::mixed(W, e));
  Eigen::MatrixXf checked = W;
  CHECK(lora::merge_checked(checked, e).changed == 12);
  CHECK_THROWS_WITH(lora::unmerge(W, e), Catch::Contains("keep what lora::mixed"));
  lora::merge(W, e);
  CHECK(W == checked);
  for (int i = 0; i < 3; ++i) CHECK(W.row(i).norm() == Approx(i + 1).epsilon(1e-6));
  CHECK(
      (W - Eigen::Vector3f(1, 2, 3).cwiseQuotient(sum.rowwise().norm()).asDiagonal() * sum).norm() <
      1e-5);
  CHECK((W * x - y).norm() < 1e-4);
  file_refused(config("\"use_dora\":true"), small(), {"lora_magnitude_vector", "incomplete"});
}

TEST_CASE("embeddings are looked up and merged as they are stored", "[peft][variants]") {
  const auto file = assemble(config(), build::file()
                                           .add(prefix + "e.lora_embedding_A", {2, 5}, 0.5F)
                                           .add(prefix + "e.lora_embedding_B", {3, 2}, 0.25F));
  const auto& e = file.at("e");
  CHECK(e.kind() == peft::entry_kind::embedding);
  CHECK(e.weight_name() == "e.weight");
  Eigen::MatrixXf W = Eigen::MatrixXf::Zero(5, 3), y(3, 3);
  lora::embed(W, std::vector<int>{4, 0, 4}, y, e);
  CHECK_THROWS_AS(lora::apply(Eigen::MatrixXf(5, 1), y, e), lora::value_error);
  CHECK_THROWS_AS(e.plain(), lora::value_error);
  lora::merge(W, e);
  CHECK(y.col(0) == W.row(4).transpose());
  CHECK(y.col(1) == W.row(0).transpose());
  CHECK(W == Eigen::MatrixXf(lora::delta_weight(e.factors()).transpose()));
  Eigen::MatrixXf wrong = Eigen::MatrixXf::Zero(3, 5);
  CHECK_THROWS_AS(lora::merge(wrong, e), lora::shape_error);
}

TEST_CASE("trained rows replace rows, and are refused beside an adapter of the same embedding",
          "[peft][variants]") {
  const std::string json = config("\"trainable_token_indices\":{\"e\":[4,1]}");
  const auto tensors = small().add(prefix + "e.token_adapter.trainable_tokens_delta", {2, 3});
  const auto file = assemble(json, tensors);
  Eigen::MatrixXf W = Eigen::MatrixXf::Zero(5, 3), y = Eigen::MatrixXf::Constant(3, 2, 9);
  lora::assign_rows(W, file.token_rows().at("e"));
  CHECK(W.row(4) == Eigen::RowVector3f(1, 2, 3));
  CHECK(W.row(1) == Eigen::RowVector3f(4, 5, 6));
  CHECK(W.row(0).isZero());
  lora::overwrite_rows(std::vector<long>{0, 1}, y, file.token_rows().at("e"));
  CHECK(y.col(0) == Eigen::Vector3f(9, 9, 9));
  CHECK(y.col(1) == Eigen::Vector3f(4, 5, 6));
  Eigen::MatrixXf small_W = Eigen::MatrixXf::Zero(4, 3);
  CHECK_THROWS_AS(lora::assign_rows(small_W, file.token_rows().at("e")), lora::value_error);
  file_refused(config("\"trainable_token_indices\":{\"e\":[4]}"), tensors,
               {"trainable_tokens_delta", "each of the 1 tokens"});
  file_refused(config("\"trainable_token_indices\":{\"e\":[4,4]}"), tensors,
               {"trainable_tokens_delta", "one twice"});
  file_refused(config("\"trainable_token_indices\":{\"f\":[4,1]}"), tensors,
               {"trainable_token_indices"});
  auto both = tensors;
  file_refused(
      json,
      both.add(prefix + "e.lora_embedding_A", {2, 5}).add(prefix + "e.lora_embedding_B", {3, 2}),
      {"trained rows or with an adapter"});
}

TEST_CASE("grouped convolutions mix and do not merge", "[peft][variants]") {
  const auto file = assemble(config(), build::file()
                                           .add(prefix + "c.lora_A.weight", {2, 4, 1}, 0.5F)
                                           .add(prefix + "c.lora_B.weight", {6, 1, 1}, 0.25F));
  const auto& e = file.at("c");
  CHECK(e.groups() == 2);
  merge_refused(e, 6, 4, "groups whose lora_A sees all channels");
  Eigen::MatrixXf y = Eigen::MatrixXf::Zero(6, 1), x = Eigen::MatrixXf::Ones(4, 1);
  lora::apply(x, y, e);
  const float u0 = 0.5F * (1 + 2 + 3 + 4), u1 = 0.5F * (5 + 6 + 7 + 8);
  for (int o = 0; o < 6; ++o)
    CHECK(y(o, 0) == 3 * 0.25F * static_cast<float>(o + 1) * (o < 3 ? u0 : u1));
}

TEST_CASE("parameters need their names and their order", "[peft][variants]") {
  const auto two = build::file()
                       .add(prefix + "x.experts.lora_A.weight", {4, 3})
                       .add(prefix + "x.experts.lora_B.weight", {5, 4})
                       .add(prefix + "x.experts.base_layer.lora_A.weight", {4, 5})
                       .add(prefix + "x.experts.base_layer.lora_B.weight", {3, 4});
  const std::string json = config("\"target_parameters\":[\"experts.up\",\"experts.down\"]");
  file_refused(json, two, {"in which order", "\"up\", \"down\"", "parameter_order"});
  const auto file = assemble(json, two, {.parameter_order = {"up", "gate", "down"}});
  CHECK(file.names() == std::vector<std::string>{"x.experts.down", "x.experts.up"});
  const auto& down = file.at("x.experts.down");
  CHECK(down.experts() == 2);
  CHECK(down.in_features() == 3);
  CHECK(down.weight_name() == "x.experts.down");
  CHECK(down.expert(1).lora_A()(0, 0) == 7);  // row 2 of 4
  CHECK(down.expert(1).lora_B()(0, 1) == 4);  // column 1 * 2 + 1
  CHECK_THROWS_AS(down.expert(2), lora::value_error);
  CHECK_THROWS_AS(down.factors(), lora::value_error);
  std::vector<float> values(2 * 5 * 3, 0.0F);
  const lora::tensor_view<float, 3> stack(values, {2, 5, 3});
  lora::merge(stack, down);
  const Eigen::MatrixXf want = lora::delta_weight(down.expert(1));
  for (int i = 0; i < 5; ++i)
    for (int j = 0; j < 3; ++j)
      CHECK(values[static_cast<std::size_t>(15 + i * 3 + j)] == want(i, j));
  const lora::tensor_view<float, 3> wrong(values, {3, 5, 2});
  CHECK_THROWS_AS(lora::merge(wrong, down), lora::shape_error);
  file_refused(config("\"target_parameters\":[\"experts.up\"]"), two,
               {"1 adapters inside", "found 2"});
  refused([&] { (void)assemble(json, two, {.parameter_order = {"up"}}); }, {"without all of them"});
}

TEST_CASE("attention is exact, and twice under PEFT's name for it", "[peft][variants]") {
  const auto tensors = build::file()
                           .add(prefix + "a.lora_A.weight", {2, 3})
                           .add(prefix + "a.lora_B.weight", {9, 2})
                           .add(prefix + "a.base_layer.out_proj.lora_A.weight", {2, 3})
                           .add(prefix + "a.base_layer.out_proj.lora_B.weight", {3, 2});
  const auto file = assemble(config(), tensors);
  CHECK(file.names() == std::vector<std::string>{"a.in_proj", "a.out_proj"});
  CHECK(file.at("a.in_proj").weight_name() == "a.in_proj_weight");
  CHECK(file.at("a.in_proj").bias_name() == "a.in_proj_bias");
  CHECK(file.at("a.out_proj").weight_name() == "a.out_proj.weight");
  CHECK(file.at("a.out_proj").scaling() == 3.0);
  const auto twice = assemble(config(), tensors, {.attention_out_proj_twice = true});
  CHECK(twice.at("a.out_proj").scaling() == 6.0);
  CHECK(twice.at("a.in_proj").scaling() == 3.0);
}

TEST_CASE("block-diagonal factors are expanded where the config says so", "[peft][variants]") {
  const auto json = [](const char* a, const char* b, const char* strict) {
    return config(std::string(R"("use_bdlora":{"nblocks":2,"target_modules_bd_a":)") + a +
                  R"(,"target_modules_bd_b":)" + b + R"(,"match_strict":)" + strict + "}");
  };
  const auto A = assemble(json("[\"m\"]", "[]", "true"), small()).at("m").factors().lora_A();
  CHECK(A.cols() == 8);
  CHECK(A(0, 0) == 0.5F);
  CHECK(A(0, 4) == 0.0F);
  CHECK(A(1, 0) == 0.0F);
  CHECK(A(1, 4) == 2.5F);
  const auto packed_B =
      build::file().add(prefix + "m.lora_A.weight", {2, 4}).add(prefix + "m.lora_B.weight", {4, 1});
  const auto B = assemble(json("[]", "[\"m\"]", "true"), packed_B).at("m").factors().lora_B();
  CHECK(B.cols() == 2);
  CHECK(B(1, 0) == 2.0F);
  CHECK(B(2, 1) == 3.0F);
  CHECK(B(2, 0) == 0.0F);
  file_refused(json("[]", "[]", "true"), small(), {"one in neither"});
  file_refused(json("[\"m\"]", "[\"m\"]", "false"), small(), {"one in both"});
  CHECK(assemble(json("[]", "[]", "false"), small()).at("m").in_features() == 4);
  file_refused(
      json("[]", "[\"m\"]", "true"),
      build::file().add(prefix + "m.lora_A.weight", {2, 4}).add(prefix + "m.lora_B.weight", {3, 1}),
      {"2 blocks divide"});
}

TEST_CASE("an adapter beside a changed base is not merged into the published one",
          "[peft][variants]") {
  for (const auto& [key, name] : std::vector<std::pair<std::string, const char*>>{
           {"\"init_lora_weights\":\"pissa\"", "PiSSA"},
           {"\"init_lora_weights\":\"olora\"", "OLoRA"}}) {
    const auto file = assemble(config(key), small());
    merge_refused(file.at("m"), 3, 4, name);
    Eigen::MatrixXf y = Eigen::MatrixXf::Zero(3, 1), x = Eigen::MatrixXf::Ones(4, 1);
    CHECK_THROWS_WITH(lora::apply(x, y, file.at("m")), Catch::Contains("peft_convert.hpp"));
  }
}

TEST_CASE("replicated layers share a weight, except where they do not", "[peft][variants]") {
  auto tensors = build::file();
  for (const std::string layer : {"0", "1", "2"})
    tensors.add(prefix + "m.layers." + layer + ".q.lora_A.weight", {2, 4})
        .add(prefix + "m.layers." + layer + ".q.lora_B.weight", {3, 2});
  const auto file = assemble(config("\"layer_replication\":[[0,2],[1,2]]"), tensors);
  CHECK(file.at("m.layers.0.q").shared_with().empty());
  CHECK(file.at("m.layers.1.q").shared_with() == "m.layers.1.q");
  CHECK(file.at("m.layers.2.q").shared_with() == "m.layers.1.q");
  merge_refused(file.at("m.layers.2.q"), 3, 4, "share the weight of");
  file_refused(config("\"layer_replication\":[[0,2]]"), tensors, {"layers.2", "a layer of the 2"});
}

TEST_CASE("a module that target_modules does not select is not PEFT's to load",
          "[peft][variants]") {
  auto two =
      small().add(prefix + "q.lora_A.weight", {2, 4}).add(prefix + "q.lora_B.weight", {3, 2});
  file_refused(config("\"target_modules\":[\"q\"]"), two,
               {"m.lora_A.weight", "target_modules", "PEFT would ignore"});
  CHECK_NOTHROW(assemble(config("\"target_modules\":[\"m\"]"), small()));
  CHECK_NOTHROW(assemble(config("\"target_modules\":\"all-linear\""), small()));
  CHECK_NOTHROW(assemble(config("\"target_modules\":\"m\""), small()));
  file_refused(config("\"target_modules\":[\"m\"],\"exclude_modules\":[\"m\"]"), small(),
               {"m.lora_A.weight"});
}

TEST_CASE("lenient follows PEFT and lists what it let pass", "[peft][variants]") {
  const peft::read_options lenient{.lenient = true};
  auto more =
      small().add(prefix + "n.lora_A.weight", {2, 4}).add(prefix + "n.lora_B.weight", {3, 2});
  more.add(prefix + "x.lora_alpha", {}).add(prefix + "m.lora_magnitude_vector", {3});
  const auto file = assemble(config("\"target_modules\":[\"m\"],\"later\":1"), more, lenient);
  CHECK(file.names() == std::vector<std::string>{"m"});
  CHECK(file.at("m").magnitude().empty());
  CHECK(file.ignored_keys() == std::vector<std::string>{"later"});
  REQUIRE(file.passed_over().size() == 3);
  CHECK(has(file.passed_over()[0], "x.lora_alpha"));
  CHECK(has(file.passed_over()[1] + file.passed_over()[2], "lora_magnitude_vector"));
  CHECK(has(file.passed_over()[1] + file.passed_over()[2], "\"n\""));
  const auto zero = assemble(config(), small().add(prefix + "n.lora_A.weight", {2, 4}), lenient);
  CHECK(zero.size() == 1);
  CHECK(has(zero.passed_over().at(0), "zero"));
  // A missing lora_A would be random, and what changes the arithmetic stays an error.
  refused(
      [&] {
        (void)assemble(config(), small().add(prefix + "n.lora_B.weight", {3, 2}), lenient);
      },
      {"incomplete"});
  refused([&] { (void)parse(config("\"use_qalora\":true"), lenient); }, {"use_qalora"});
  refused([&] { (void)parse(config("\"init_lora_weights\":\"corda\""), lenient); }, {"corda"});
}
