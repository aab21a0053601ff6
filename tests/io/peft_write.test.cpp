// SPDX-License-Identifier: Apache-2.0
//
// Adapters made here become PEFT directories that read as the same function; what would read as
// anything else is refused before a file is touched; whatever call of the system fails, the
// directory is the old adapter, or the error says what it is.
#include <cerrno>
#include <cmath>
#include <cstdio>

#include "io/build.hpp"
#include "lora/io/peft_write.hpp"
#include "support/refused.hpp"

#if defined(__unix__)
#include <sys/resource.h>
#include <sys/stat.h>
#include <csignal>
#endif
#if defined(__GLIBC__)
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

// The calls that a write makes, as this program links them: each goes to the system, and one of
// them can be made to fail.
namespace faults {
namespace {
std::string_view call;  // which one
int left = 0;           // how many of them until the one that fails
int code = 0;           // what it says; 0 for a write that takes only a part
bool now(std::string_view name) {
  if (name != call || --left != 0) return false;
  errno = code;
  return true;
}
}  // namespace
}  // namespace faults

extern "C" {
ssize_t write(int file, const void* bytes, std::size_t count) {
  if (faults::now("write")) {
    if (faults::code != 0) return -1;
    count = (count + 1) / 2;
  }
  return ::syscall(SYS_write, file, bytes, count);
}
int fsync(int file) {
  return faults::now("fsync") ? -1 : static_cast<int>(::syscall(SYS_fsync, file));
}
int close(int file) {
  const auto result =
      static_cast<int>(::syscall(SYS_close, file));  // the file is closed also where that fails
  return faults::now("close") ? -1 : result;
}
int rename(const char* from, const char* to) noexcept {
  return faults::now("rename") ? -1 : ::renameat(AT_FDCWD, from, AT_FDCWD, to);
}
}
#endif

namespace {

namespace fs = std::filesystem;
namespace peft = lora::peft;
namespace st = lora::safetensors;
using build::slurp;
using matrix = lora::detail::row_major_matrix<float>;

lora::adapter<float> made(lora::index_t rank, double alpha,
                          lora::scaling_rule rule = lora::scaling_rule::standard) {
  return {matrix::Constant(rank, 5, 0.25F),
          matrix::Constant(4, rank, 0.5F),
          {.alpha = alpha, .rule = rule}};
}
peft::adapter_file<float> file_of(const std::string& name, lora::adapter<float> a) {
  return peft::make_file<float>({{name, std::move(a), false}});
}

std::size_t files_in(const fs::path& folder) {
  return static_cast<std::size_t>(
      std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

TEST_CASE("an adapter made here is written as PEFT has it", "[peft][write]") {
  std::vector<peft::entry<float>> entries;
  entries.emplace_back("m.0.q", made(2, 3), false);
  entries.emplace_back("m.0.q.z", made(3, 1.1, lora::scaling_rule::rank_stabilized), false);
  entries.emplace_back("x.m.0.q", made(2, 0.7, lora::scaling_rule::fixed), false);
  entries.emplace_back("m.0.k", made(2, -0.3), false);
  const auto file = peft::make_file<float>(entries, "base", "CAUSAL_LM");
  const build::directory out;
  peft::write(out.path(), file);
  const auto again = peft::read(out.path());
  for (const auto& e : entries) {
    INFO(e.name());
    CHECK(again.at(e.name()).scaling() == e.scaling());
    CHECK(again.at(e.name()).rank() == e.rank());
    CHECK(again.at(e.name()).factors().lora_A() == e.factors().lora_A());
    CHECK(again.at(e.name()).factors().lora_B() == e.factors().lora_B());
  }
  CHECK(again.config().base_model_name_or_path == "base");
  CHECK(build::has(slurp(out.path() / "adapter_config.json"), R"("^m\\.0\\.q\\.z": 3)"));
  entries.push_back(entries.front());
  CHECK_THROWS_AS(peft::make_file<float>(entries), lora::value_error);
}

TEST_CASE("values of every kind keep their bits", "[peft][write]") {
  matrix A = matrix::Constant(1, 5, std::nanf("7")), B = matrix::Constant(4, 1, -0.0F);
  A(0, 1) = HUGE_VALF;
  A(0, 2) = 1e-45F;
  const build::directory out;
  peft::write(out.path(),
              file_of("m.q", {A, B, {.alpha = 1e-300, .rule = lora::scaling_rule::fixed}}));
  const auto again = peft::read(out.path());
  CHECK(std::memcmp(again.at("m.q").factors().lora_A().data(), A.data(), 5 * sizeof(float)) == 0);
  CHECK(std::memcmp(again.at("m.q").factors().lora_B().data(), B.data(), 4 * sizeof(float)) == 0);
  CHECK(again.at("m.q").scaling() == 1e-300);
}

TEST_CASE("what no reader would take for the same adapter is refused before it is written",
          "[peft][write]") {
  const build::directory out;
  const auto folder = out.path() / "new";
  const auto refused = [&](const peft::adapter_file<float>& file,
                           std::initializer_list<const char*> says) {
    const auto message = test::refusal<lora::value_error>([&] { peft::write(folder, file); });
    INFO(message);
    CHECK(test::mentions(message, says));
    CHECK_FALSE(fs::exists(folder));
  };
  refused(peft::make_file<float>({}), {"peft::write", "lora_A"});
  refused(file_of("m.q", made(0, 1, lora::scaling_rule::fixed)), {"peft::write", "\"r\""});
  // alpha = s * r is no double.
  refused(file_of("m.q", made(4, 1e308, lora::scaling_rule::fixed)), {"peft::write"});
  refused(file_of("m.\xff", made(2, 1)), {"UTF-8"});
  refused(peft::make_file<float>({{"m.q", made(2, 1), false}}, "caf\xe9"), {"peft::write"});
  for (const char* name : {"", "m.lora_A.weight", "m.q.base_layer"}) {
    INFO('"' << name << '"');
    refused(file_of(name, made(2, 1)), {"peft::write"});
  }
  // A map whose keys are not the entries' names.
  peft::adapter_file<float>::entry_map map;
  map.emplace("m.k", peft::entry<float>("m.q", made(2, 1), false));
  refused({file_of("m.q", made(2, 1)).config(), map}, {"m.k", "m.q"});
  // A config that does not select the module.
  map.clear();
  map.emplace("m.v", peft::entry<float>("m.v", made(2, 1), false));
  const auto other = peft::parse_config(
      R"({"peft_type":"LORA","r":2,"lora_alpha":1,"target_modules":["q"]})", "config");
  refused({other, map}, {"target_modules"});
}

// ---- what is compared before a file is written

TEST_CASE("every difference of two entries is seen", "[peft][write]") {
  using parts = peft::entry_parts<float>;
  parts given;
  given.name = "m.q";
  given.experts = {made(2, 3)};
  given.bias = given.magnitude = {1, 2, 3, 4};
  given.diagonal = {1, 0};
  given.shared_with = "m.k";
  const auto differ = [](const parts& one, const auto& change) {
    parts other = one;
    change(other);
    return peft::write_detail::difference(peft::entry<float>(one), peft::entry<float>(other));
  };
  const auto seen = [&](const auto& change) { return differ(given, change); };
  const auto scaled_to = [](double s) {
    return [s](parts& p) {
      const auto& l = p.experts.front();
      p.experts.front() = {l.lora_A(), l.lora_B(), {.alpha = s, .rule = lora::scaling_rule::fixed}};
    };
  };
  CHECK(seen([](parts&) {}).empty());
  CHECK(seen([](parts& p) { p.kind = peft::entry_kind::embedding; }) ==
        "kind: embedding for linear");
  CHECK(seen([](parts& p) {
          p.experts.front() = made(3, 4.5);
          p.diagonal.push_back(0);
        }) == "factors");
  CHECK(seen([](parts& p) {
          p.experts.front() = {
              matrix::Constant(2, 5, 0.5F), p.experts.front().lora_B(), {.alpha = 3}};
        }) == "factors");
  CHECK(seen([](parts& p) {
          p.experts.front() = {
              p.experts.front().lora_A(), matrix::Constant(4, 2, 0.25F), {.alpha = 3}};
        }) == "factors");
  CHECK(seen(scaled_to(std::nextafter(1.5, 2.0))).empty());
  CHECK(seen(scaled_to(1.5 + 1e-14)) == "scaling");
  CHECK(seen([](parts& p) { p.bias[3] = 5; }) == "bias of lora_B");
  CHECK(seen([](parts& p) { p.magnitude.clear(); }) == "magnitude");
  CHECK(seen([](parts& p) { p.diagonal[1] = -0.0F; }) == "diagonal");
  CHECK(seen([](parts& p) { p.fan_in_fan_out = true; }) == "fan_in_fan_out");
  CHECK(seen([](parts& p) { p.change = peft::base_change::olora; }) == "change of the base");
  CHECK(seen([](parts& p) { p.shared_with.clear(); }) == "module whose weight it shares");

  parts stack = given;
  stack.kind = peft::entry_kind::parameter;
  stack.experts = {made(2, 3), made(2, 3)};
  CHECK(differ(stack, [](parts& p) { p.experts.push_back(p.experts.front()); }) ==
        "number of experts");
  CHECK(differ(stack, [](parts& p) { p.stored_transposed = true; }) == "orientation of slices");

  parts kernel = given;  // of 5 inputs
  kernel.kind = peft::entry_kind::convolution;
  kernel.in_channels = 5;
  kernel.kernel = {1};
  CHECK(differ(kernel, [](parts&) {}).empty());
  CHECK(differ(kernel, [](parts& p) {
          p.in_channels = 1;
          p.kernel = {5};
        }) == "kernel or groups");
  CHECK(differ(kernel, [](parts& p) { p.groups = 2; }) == "kernel or groups");
}

TEST_CASE("every difference of two files is seen", "[peft][write]") {
  using file = peft::adapter_file<float>;
  using reason = peft::replacement::reason;
  file::rest given;
  given.replacements.push_back({"h.weight",
                                "h.weight",
                                reason::saved_module,
                                st::dtype::f16,
                                {1, 2},
                                build::to_bytes("abcd")});
  given.token_rows.emplace(
      "e", lora::replaced_rows<float>({1, 7}, matrix(matrix::Constant(2, 3, 0.5F))));
  given.row_dtypes.emplace("e", st::dtype::f16);
  const file::entry_map entries{{"m.q", peft::entry<float>("m.q", made(2, 3), false)}};
  const auto message = [&](const file& a, const file& b) {
    return test::refusal<lora::value_error>([&] { peft::write_detail::compare(a, b); });
  };
  const auto seen = [&](const auto& change, const char* says) {
    file::rest other = given;
    change(other);
    const auto text = message({peft::config{}, entries, given}, {peft::config{}, entries, other});
    INFO(text);
    CHECK(test::mentions(text, {"peft::write", says}));
  };
  CHECK(message({peft::config{}, entries, given}, {peft::config{}, entries, given}) ==
        "(no exception)");
  using rest = file::rest;
  seen([](rest& r) { r.replacements.clear(); }, "the number of tensors that replace");
  seen([](rest& r) { r.replacements[0].name = "g.weight"; }, "the name of \"h.weight\"");
  seen([](rest& r) { r.replacements[0].key = "g.weight"; }, "the name of \"h.weight\"");
  seen([](rest& r) { r.replacements[0].why = reason::embedding; }, "the reason of \"h.weight\"");
  seen([](rest& r) { r.replacements[0].dtype = st::dtype::bf16; },
       "the dtype or shape of \"h.weight\"");
  seen([](rest& r) { r.replacements[0].shape = {2, 1}; }, "the dtype or shape of \"h.weight\"");
  seen([](rest& r) { r.replacements[0].bytes[3] = {}; }, "the values of \"h.weight\"");
  seen([](rest& r) { r.token_rows.clear(); }, "the number of embeddings");
  const auto rows = [&](const char* name, std::vector<lora::index_t> ids, float value) {
    seen(
        [&](rest& r) {
          r.token_rows.clear();
          r.token_rows.emplace(
              name, lora::replaced_rows<float>(ids, matrix(matrix::Constant(2, 3, value))));
        },
        "the trained rows of \"e\"");
  };
  rows("f", {1, 7}, 0.5F);
  rows("e", {1, 8}, 0.5F);
  rows("e", {1, 7}, 0.25F);
  seen([](rest& r) { r.row_dtypes.clear(); }, "the trained rows of \"e\"");

  const auto holds = [&](const char* key, const char* name, double alpha) {
    auto more = entries;
    more.insert_or_assign(key, peft::entry<float>(name, made(2, alpha), false));
    return file(peft::config{}, more, given);
  };
  const file plain(peft::config{}, entries, given);
  CHECK(test::mentions(message(holds("m.k", "m.k", 3), plain), {"it has no \"m.k\""}));
  CHECK(test::mentions(message(plain, holds("m.k", "m.k", 3)), {"more modules"}));
  CHECK(test::mentions(message(holds("m.q", "m.k", 3), plain), {"\"m.q\" is called \"m.k\""}));
  CHECK(test::mentions(message(holds("m.q", "m.q", 4), plain), {"the scaling of \"m.q\""}));
}

// ---- the config

TEST_CASE("a file that was read with options is the same for a reader without them",
          "[peft][write]") {
  const build::directory from, to, attention, doubled;
  peft::write(from.path(), file_of("m.q", made(2, 3)));
  peft::write(to.path(), peft::read(from.path(), {.fan_in_fan_out = true}));
  CHECK(peft::read(to.path()).at("m.q").fan_in_fan_out());
  peft::write(to.path(), peft::read(to.path(), {.fan_in_fan_out = false}));
  CHECK_FALSE(peft::read(to.path()).at("m.q").fan_in_fan_out());

  // A key that the caller vouched for is kept, and its reader must vouch for it; one that nobody
  // vouched for is refused.
  from.write("adapter_config.json",
             R"({"peft_type":"LORA","r":2,"lora_alpha":3,"target_modules":["q"],"newer":1})");
  const peft::read_options vouched{.ignore_keys = {"newer"}};
  peft::write(to.path(), peft::read(from.path(), vouched));
  CHECK(peft::read(to.path(), vouched).at("m.q").scaling() == 1.5);
  build::refused([&] { (void)peft::read(to.path()); }, {"newer", "ignore_keys"});
  const auto lenient = peft::read(from.path(), {.lenient = true});
  const auto message = test::refusal<lora::value_error>([&] { peft::write(to.path(), lenient); });
  INFO(message);
  CHECK(test::mentions(message, {"newer", "ignore_keys"}));

  // What the reader let pass would be lost.
  from.write("adapter_model.safetensors", build::file()
                                              .add("base_model.model.m.q.lora_A.weight", {2, 5})
                                              .add("base_model.model.m.q.lora_B.weight", {4, 2})
                                              .add("base_model.model.stray.lora_alpha", {})
                                              .text());
  const auto passed = peft::read(from.path(), {.ignore_keys = {"newer"}, .lenient = true});
  CHECK(test::mentions(test::refusal<lora::value_error>([&] { peft::write(to.path(), passed); }),
                       {"stray", "lost"}));

  // What no file can say stays with the reader.
  const std::string out = "base_model.model.m.base_layer.out_proj.";
  attention.write("adapter_model.safetensors", build::file()
                                                   .add("base_model.model.m.lora_A.weight", {1, 2})
                                                   .add("base_model.model.m.lora_B.weight", {6, 1})
                                                   .add(out + "lora_A.weight", {1, 2})
                                                   .add(out + "lora_B.weight", {2, 1})
                                                   .text());
  attention.write("adapter_config.json",
                  R"({"peft_type":"LORA","r":1,"lora_alpha":3,"target_modules":["m"]})");
  const peft::read_options twice{.attention_out_proj_twice = true};
  peft::write(doubled.path(), peft::read(attention.path(), twice));
  CHECK(peft::read(doubled.path(), twice).at("m.out_proj").scaling() == 6);
  CHECK(peft::read(doubled.path()).at("m.out_proj").scaling() == 3);
}

TEST_CASE("patterns that still say every rank and alpha are written as they were read",
          "[peft][write]") {
  // Named one by one, these modules would be more work than a reader does.
  const std::string layers = "base_model.model." + std::string(150, 'm') + '.';
  const auto numbered = [&](const char* module, int rank, int count) {
    build::file file;
    for (int k = 0; k < count; ++k) {
      file.add(layers + std::to_string(k) + ".k.lora_A.weight", {4, 3})
          .add(layers + std::to_string(k) + ".k.lora_B.weight", {2, 4});
      const std::string path = layers + std::to_string(k) + '.' + module;
      file.add(path + ".lora_A.weight", {rank, 3}).add(path + ".lora_B.weight", {2, rank});
    }
    return file.text();
  };
  const build::directory from, to;
  from.write("adapter_config.json",
             R"({"peft_type":"LORA","r":4,"lora_alpha":6,"target_modules":["q","k"],)"
             R"("rank_pattern":{"q":2},"alpha_pattern":{"(0|1)\\.k":3.5,"k":2.5}})");
  from.write("adapter_model.safetensors", numbered("q", 2, 300));
  const auto file = peft::read(from.path());
  peft::write(to.path(), file, {st::durability::process});
  const auto again = peft::read(to.path());
  REQUIRE(again.size() == 600);
  for (const auto& [name, e] : file) {
    INFO(name);
    CHECK(again.at(name).rank() == e.rank());
    CHECK(again.at(name).scaling() == e.scaling());
  }
  const auto text = slurp(to.path() / "adapter_config.json");
  CHECK(build::has(text, "\"rank_pattern\": {\n    \"q\": 2\n  }"));
  CHECK(build::has(text, "\"alpha_pattern\": {\n    \"(0|1)\\\\.k\": 3.5,\n    \"k\": 2.5\n  }"));

  // They no longer do when an entry has another rank, or another scaling.
  from.write("adapter_model.safetensors", numbered("q", 2, 2));
  const auto few = peft::read(from.path());
  const std::string q = few.names().back();
  for (const auto& other : {made(3, 9), made(2, 5)}) {
    peft::adapter_file<float>::entry_map map(few.begin(), few.end());
    map.insert_or_assign(q, peft::entry<float>(q, other, false));
    peft::write(to.path(), peft::adapter_file<float>(few.config(), map), {st::durability::process});
    const auto changed = peft::read(to.path());
    CHECK(changed.at(q).rank() == other.rank());
    CHECK(changed.at(q).scaling() == other.scaling());
    CHECK(build::has(slurp(to.path() / "adapter_config.json"),
                     "\"^" + q.substr(0, q.find('.')) + "\\\\."));
  }
}

TEST_CASE("keys that were read keep every digit", "[peft][write]") {
  const build::directory from, to;
  peft::write(from.path(), file_of("m.q", made(2, 3)));
  const std::initializer_list<const char*> numbers{"-9007199254740993",
                                                   "340282366920938463463374607431768211457",
                                                   "18446744073709551615", "-1e-07", "1.0"};
  std::string list;
  for (const char* number : numbers) list += std::string(list.empty() ? "" : ",") + number;
  from.write(
      "adapter_config.json",
      R"({"peft_type":"LORA","r":2,"lora_alpha":3,"target_modules":["q"],"runtime_config":[)" +
          list + "]}");
  peft::write(to.path(), peft::read(from.path()));
  for (const char* number : numbers)
    CHECK(build::has(slurp(to.path() / "adapter_config.json"), "    " + std::string(number)));
}

TEST_CASE("make_file takes what a config can say, and names the rest", "[peft][write]") {
  using parts = peft::entry_parts<float>;
  const auto entry = [](const char* name, const auto& change) {
    parts p;
    p.name = name;
    p.experts = {made(2, 3)};
    change(p);
    return peft::entry<float>(p);
  };
  // Only linear layers have a fan_in_fan_out.
  const auto embedding = entry("e", [](parts& p) { p.kind = peft::entry_kind::embedding; });
  const auto conv1d = entry("q", [](parts& p) { p.fan_in_fan_out = true; });
  const build::directory out;
  peft::write(out.path(), peft::make_file<float>({embedding, conv1d}));
  CHECK(peft::read(out.path()).at("q").fan_in_fan_out());
  CHECK(peft::read(out.path()).at("e").kind() == peft::entry_kind::embedding);

  const auto refused = [&](std::vector<peft::entry<float>> entries,
                           std::initializer_list<const char*> says) {
    const auto message =
        test::refusal<lora::value_error>([&] { (void)peft::make_file<float>(entries); });
    INFO(message);
    CHECK(test::mentions(message, {"peft::make_file"}));
    CHECK(test::mentions(message, says));
  };
  refused({conv1d, entry("k", [](parts&) {})}, {"\"k\"", "fan_in_fan_out", "two directories"});
  refused({conv1d, conv1d}, {"\"q\"", "two entries"});
  refused({entry("x", [](parts& p) { p.kind = peft::entry_kind::parameter; })},
          {"\"x\"", "target_parameters"});
  refused({entry("x", [](parts& p) { p.packed = peft::packed_factor::A; })},
          {"\"x\"", "use_bdlora"});
  refused({entry("x", [](parts& p) { p.twice = true; })}, {"\"x\"", "attention_out_proj_twice"});
  refused({entry("x", [](parts& p) { p.change = peft::base_change::pissa; })},
          {"\"x\"", "PiSSA", "converted()"});
  refused({entry("x", [](parts& p) { p.shared_with = "y"; })}, {"\"x\"", "layer_replication"});
}

TEST_CASE("no safetensors file is written that the default reader refuses",
          "[safetensors][write]") {
  const auto at_most = [](const auto& written, std::initializer_list<const char*> says) {
    const auto bytes = written(std::size_t{0});
    CHECK(st::parse(bytes, "at the limit").size() == 1);
    const auto message = test::refusal<lora::value_error>([&] { (void)written(std::size_t{1}); });
    INFO(message);
    CHECK(test::mentions(message, {"safetensors::write"}));
    CHECK(test::mentions(message, says));
  };
  using tensors = std::vector<st::tensor>;
  const auto one = build::to_bytes("a");
  at_most(
      [&](std::size_t more) {
        return st::to_bytes(tensors{{std::string(65536 + more, 'n'), st::dtype::u8, {1}, one}});
      },
      {"65537", "65536"});
  at_most(
      [&](std::size_t more) {
        return st::to_bytes(
            tensors{{"t", st::dtype::u8, std::vector<std::uint64_t>(64 + more, 1), one}});
      },
      {"dimensions of \"t\"", "65"});
  at_most(
      [&](std::size_t more) {
        return st::to_bytes(
            tensors{{"t", st::dtype::u8, {0, (std::uint64_t{1} << 63) - 1 + more}, {}}});
      },
      {"a dimension of \"t\"", "9223372036854775808"});
  at_most(
      [&](std::size_t more) {
        st::metadata_map pairs;
        for (std::size_t k = 0; k < 65536 + more; ++k) pairs.emplace(std::to_string(k), "");
        return st::to_bytes(tensors{{"t", st::dtype::u8, {1}, one}}, pairs);
      },
      {"__metadata__", "65537"});
}

// ---- the system

#if defined(__unix__)
TEST_CASE("an adapter for which there is no room leaves the old files", "[peft][write][faults]") {
  const build::directory out;
  peft::write(out.path(), file_of("m.q", made(2, 3)));
  const auto weights = slurp(out.path() / "adapter_model.safetensors"),
             config = slurp(out.path() / "adapter_config.json");
  const auto large = peft::make_file<float>(
      {{"m.q", {matrix::Constant(64, 50, 1), matrix::Constant(40, 64, 1), {.alpha = 2}}, false}});

  ::rlimit old{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &old) == 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  for (const auto durability : {st::durability::process, st::durability::power}) {
    const ::rlimit limit{4096, old.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
    const auto message =
        test::refusal<lora::format_error>([&] { peft::write(out.path(), large, {durability}); });
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &old) == 0);
    INFO(message);
    CHECK(test::mentions(message, {"adapter_model.safetensors", "not changed"}));
    CHECK(slurp(out.path() / "adapter_model.safetensors") == weights);
    CHECK(slurp(out.path() / "adapter_config.json") == config);
    CHECK(files_in(out.path()) == 2);  // no part of a file is left
  }
  std::signal(SIGXFSZ, handler);

  // A folder where the second file should be: the first one is not renamed either.
  const build::directory blocked;
  peft::write(blocked.path(), file_of("m.q", made(2, 3)));
  fs::remove(blocked.path() / "adapter_config.json");
  fs::create_directory(blocked.path() / "adapter_config.json");
  CHECK_THROWS_AS(peft::write(blocked.path(), large), lora::format_error);
  CHECK(slurp(blocked.path() / "adapter_model.safetensors") == weights);
  CHECK(files_in(blocked.path()) == 2);

  // What cannot be replaced: a file in place of the directory, a pipe in place of a file.
  build::refused([&] { peft::write(out.path() / "adapter_config.json", large); },
                 {"a directory", "nothing was written"});
  fs::remove(blocked.path() / "adapter_config.json");
  REQUIRE(::mkfifo((blocked.path() / "adapter_config.json").c_str(), 0600) == 0);
  build::refused([&] { peft::write(blocked.path(), large); },
                 {"adapter_config.json", "a pipe", "not changed"});
  CHECK(slurp(blocked.path() / "adapter_model.safetensors") == weights);
}
#endif

#if defined(__GLIBC__)
TEST_CASE("whichever call of the system fails, no adapter is a mixture in silence",
          "[peft][write][faults]") {
  struct fault {
    const char* call;
    int nth, code;
  };
  const auto before = file_of("m.q", made(2, 3)), after = file_of("m.q", made(3, 7));
  struct state {
    std::string weights, config;
    bool operator==(const state&) const = default;
  };
  const auto state_of = [](const build::directory& d) {
    CHECK(files_in(d.path()) == 2);  // no part of a file is left
    return state{slurp(d.path() / "adapter_model.safetensors"),
                 slurp(d.path() / "adapter_config.json")};
  };
  // Of writing `after` over `before` with one failure: what the error says, and the directory then.
  const auto written = [&](const fault& f) {
    const build::directory out;
    peft::write(out.path(), before);
    const auto message = test::refusal<lora::format_error>([&] {
      faults::call = f.call;
      faults::left = f.nth;
      faults::code = f.code;
      peft::write(out.path(), after, {st::durability::power});
    });
    faults::call = "";
    CHECK(faults::left <= 0);  // it came to that call
    return std::pair(message, state_of(out));
  };
  const build::directory a, b;
  peft::write(a.path(), before);
  peft::write(b.path(), after);
  const state old = state_of(a), changed = state_of(b);

  // Until both files are whole, and one has its name, the adapter is the old one.
  for (const fault f : {fault{"write", 1, ENOSPC}, fault{"write", 2, ENOSPC},
                        fault{"fsync", 1, EIO}, fault{"fsync", 2, EIO}, fault{"close", 1, EIO},
                        fault{"close", 2, EIO}, fault{"rename", 1, EACCES}}) {
    INFO(f.call << ' ' << f.nth);
    const auto [message, found] = written(f);
    INFO(message);
    CHECK(test::mentions(message,
                         {f.nth == 1 ? "adapter_model.safetensors" : "adapter_config.json",
                          "was not changed", std::generic_category().message(f.code).c_str()}));
    CHECK(found == old);
  }
  // Between the two names it is neither, and the error says so.
  const auto [half, mixture] = written({"rename", 2, EACCES});
  INFO(half);
  CHECK(test::mentions(
      half, {"adapter_config.json", "adapter_model.safetensors", "already the new one"}));
  CHECK(mixture == state{changed.weights, old.config});
  // Then it is the new one, whatever becomes of the folder.
  const auto [folder, complete] = written({"fsync", 3, EIO});
  INFO(folder);
  CHECK(test::mentions(folder, {"folder", "may vanish"}));
  CHECK(complete == changed);
  // What is no failure: an interrupted call, a part at a time, a folder that cannot be flushed.
  for (const fault f : {fault{"write", 1, EINTR}, fault{"write", 1, 0}, fault{"write", 2, 0},
                        fault{"fsync", 3, EINVAL}}) {
    INFO(f.call << ' ' << f.nth << ' ' << f.code);
    CHECK(written(f) == std::pair(std::string("(no exception)"), changed));
  }
}
#endif

}  // namespace
