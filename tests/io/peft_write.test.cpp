// SPDX-License-Identifier: Apache-2.0
//
// Adapters made here become PEFT directories that read as the same function; what would read as anything else is refused
// before a file is touched; a write that the system cuts short leaves the old files.
#include <cmath>

#include "io/build.hpp"
#include "lora/io/peft_write.hpp"
#include "support/refused.hpp"

#if defined(__unix__)
#include <sys/resource.h>
#include <csignal>
#endif

namespace {

namespace fs = std::filesystem;
namespace peft = lora::peft;
namespace st = lora::safetensors;
using matrix = lora::detail::row_major_matrix<float>;

lora::adapter<float> made(lora::index_t rank, double alpha, lora::scaling_rule rule = lora::scaling_rule::standard) {
  return {matrix::Constant(rank, 5, 0.25F), matrix::Constant(4, rank, 0.5F), {.alpha = alpha, .rule = rule}};
}
peft::adapter_file<float> file_of(const std::string& name, lora::adapter<float> a) {
  return peft::make_file<float>({{name, std::move(a), false}});
}

std::string slurp(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}
std::size_t files_in(const fs::path& folder) {
  return static_cast<std::size_t>(std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
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
  peft::write(out.path(), file_of("m.q", {A, B, {.alpha = 1e-300, .rule = lora::scaling_rule::fixed}}));
  const auto again = peft::read(out.path());
  CHECK(std::memcmp(again.at("m.q").factors().lora_A().data(), A.data(), 5 * sizeof(float)) == 0);
  CHECK(std::memcmp(again.at("m.q").factors().lora_B().data(), B.data(), 4 * sizeof(float)) == 0);
  CHECK(again.at("m.q").scaling() == 1e-300);
}

TEST_CASE("what no reader would take for the same adapter is refused before it is written", "[peft][write]") {
  const build::directory out;
  const auto folder = out.path() / "new";
  const auto refused = [&](const peft::adapter_file<float>& file, std::initializer_list<const char*> says) {
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
  const auto other = peft::parse_config(R"({"peft_type":"LORA","r":2,"lora_alpha":1,"target_modules":["q"]})", "config");
  refused({other, map}, {"target_modules"});
}

#if defined(__unix__)
TEST_CASE("a write that the system cuts short leaves the old files", "[peft][write][faults]") {
  const build::directory out;
  peft::write(out.path(), file_of("m.q", made(2, 3)));
  const auto weights = slurp(out.path() / "adapter_model.safetensors"), config = slurp(out.path() / "adapter_config.json");
  const auto large =
      peft::make_file<float>({{"m.q", {matrix::Constant(64, 50, 1), matrix::Constant(40, 64, 1), {.alpha = 2}}, false}});

  ::rlimit old{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &old) == 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  for (const auto durability : {st::durability::process, st::durability::power}) {
    const ::rlimit limit{4096, old.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
    const auto message = test::refusal<lora::format_error>([&] { peft::write(out.path(), large, {durability}); });
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
}
#endif

}  // namespace
