// SPDX-License-Identifier: Apache-2.0
//
// Stacks of experts (target_parameters): which way round a slice is, which follows from the base
// and from the version of PEFT that wrote the file; in which order the columns of lora_B go; and
// the layouts of other writers, each named.
#include <cmath>
#include <cstddef>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "io/peft_file.hpp"
#include "lora/io/peft_write.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"

namespace {

namespace peft = lora::peft;
using build::assemble;
using build::config;
using build::prefix;
using build::refused;

constexpr int experts = 3, rank = 2;

/// lora_A [rank * experts, in], lora_B [out, rank * experts].
build::file stack(int out, int in) {
  return build::file()
      .add(prefix + "x.experts.lora_A.weight", {rank * experts, in}, 0.5F)
      .add(prefix + "x.experts.lora_B.weight", {out, rank * experts}, 0.25F);
}
std::string written_by(const std::string& version, const std::string& more = "") {
  return config(R"("target_modules":[],"target_parameters":["experts.w"])" +
                (version.empty() ? "" : R"(,"peft_version":")" + version + '"') +
                (more.empty() ? "" : "," + more));
}

/// s B A of one expert by the definition: rows of A go expert by expert, columns of B by `column`.
template <class Column>
test::matrix<float> delta(int out, int in, int e, const Column& column) {
  test::matrix<float> result = test::matrix<float>::Zero(out, in);
  for (int o = 0; o < out; ++o)
    for (int i = 0; i < in; ++i)
      for (int k = 0; k < rank; ++k) {
        const int row = e * rank + k;
        result(o, i) += 3 * (0.25F * static_cast<float>(o * rank * experts + column(e, k) + 1)) *
                        (0.5F * static_cast<float>(row * in + i + 1));
      }
  return result;
}
int rank_major(int e, int k) { return k * experts + e; }
int grouped(int e, int k) { return e * rank + k; }

/// The stack of zeros [experts, rows, cols] after merging.
std::vector<test::matrix<float>> merged(const peft::entry<float>& e, int rows, int cols) {
  std::vector<float> values(static_cast<std::size_t>(experts * rows * cols), 0.0F);
  lora::merge(lora::tensor_view<float, 3>(values, {experts, rows, cols}), e);
  std::vector<test::matrix<float>> result;
  for (int k = 0; k < experts; ++k)
    result.emplace_back(
        Eigen::Map<const test::matrix<float>>(values.data() + k * rows * cols, rows, cols));
  return result;
}

peft::adapter_file<float> again(const peft::adapter_file<float>& file,
                                const peft::read_options& options) {
  const build::directory dir;
  peft::write(dir.path(), file);
  return peft::read(dir.path(), options);
}

}  // namespace

// Values are small multiples of 1/8, so that every sum is exact and == compares them.

TEST_CASE("a square stack of an old or unsaid version is refused until its orientation is said",
          "[peft][stacks]") {
  for (const std::string version : {"0.17.0", "0.18.1", "0.19.0", "0.19.1.dev0", "0.19.1rc1",
                                    "0.19.1a1", "0.19.1b2", "", "unknown"}) {
    INFO("peft_version " << version);
    refused(
        [&] { (void)assemble(written_by(version), stack(4, 4)); },
        {"x.experts.lora_A.weight", "x.experts.w", version.empty() ? "no peft_version" : version,
         "transpose", "parameters_in_out = true", "or false", "0.19.1"});
    for (const bool said : {false, true}) {
      const auto file = assemble(written_by(version), stack(4, 4), {.parameters_in_out = said});
      const auto slices = merged(file.at("x.experts.w"), 4, 4);
      for (int k = 0; k < experts; ++k) {
        const auto d = delta(4, 4, k, rank_major);
        CHECK(slices[static_cast<std::size_t>(k)] ==
              (said ? test::matrix<float>(d.transpose()) : d));
      }
    }
  }
}

TEST_CASE("a square stack of PEFT since 0.19.1 follows the base alone", "[peft][stacks]") {
  for (const std::string version :
       {"0.19.1", "0.19.2.dev0", "0.20.0", "0.21.2", "0.21.3.dev0@abc", "1.0"}) {
    INFO("peft_version " << version);
    const auto d = delta(4, 4, 1, rank_major);
    CHECK(merged(assemble(written_by(version), stack(4, 4)).at("x.experts.w"), 4, 4)[1] == d);
    const auto turned = assemble(written_by(version), stack(4, 4), {.parameters_in_out = true});
    CHECK(merged(turned.at("x.experts.w"), 4, 4)[1] == d.transpose());
    // The base stores [expert, in, out], so the function of an expert is B A x.
    CHECK(lora::delta_weight(turned.at("x.experts.w").expert(1)) == d);
  }
}

TEST_CASE("experts of an old stack mix as they merge", "[peft][stacks]") {
  const Eigen::VectorXf x = Eigen::VectorXf::LinSpaced(4, 1, 4);
  for (const std::string version : {"0.18.1", ""}) {
    const auto file = assemble(written_by(version), stack(4, 4), {.parameters_in_out = true});
    const auto& e = file.at("x.experts.w");
    const auto slices = merged(e, 4, 4);
    for (int k = 0; k < experts; ++k) {
      Eigen::VectorXf y = Eigen::VectorXf::Zero(4);
      lora::apply(x, y, e.expert(k));
      CHECK(y == slices[static_cast<std::size_t>(k)] * x);
    }
  }
}

TEST_CASE("an old stack that is not square is told by the shape of the base", "[peft][stacks]") {
  const auto plain = assemble(written_by("0.18.1"), stack(4, 6));  // for a base [3, 6, 4]
  std::vector<float> values(static_cast<std::size_t>(experts * 24), 0.0F);
  const lora::tensor_view<float, 3> base(values, {experts, 6, 4});
  CHECK_THROWS_WITH(lora::merge(base, plain.at("x.experts.w")),
                    Catch::Contains("fits transposed") && Catch::Contains("before 0.19.1") &&
                        Catch::Contains("parameters_in_out the other way"));
  CHECK(values == std::vector<float>(values.size(), 0.0F));
  const auto turned = assemble(written_by("0.18.1"), stack(4, 6), {.parameters_in_out = true});
  CHECK(merged(turned.at("x.experts.w"), 6, 4)[2] == delta(4, 6, 2, rank_major).transpose());
}

TEST_CASE("an old stack is written as it was read", "[peft][stacks]") {
  const peft::read_options in_out{.parameters_in_out = true};
  for (const auto& tensors : {stack(4, 4), stack(4, 6)}) {
    const auto file = assemble(written_by("0.18.1"), tensors, in_out);
    const auto content = build::to_bytes(tensors.text());
    const auto before = lora::safetensors::parse(content, "before");
    const auto bytes = peft::tensor_bytes(file);
    const auto after = lora::safetensors::parse(bytes, "after");
    for (const auto name : before.names()) {
      const auto &a = before.at(name), &b = after.at(name);
      CHECK(a.shape == b.shape);
      CHECK(std::equal(a.bytes.begin(), a.bytes.end(), b.bytes.begin(), b.bytes.end()));
    }
    CHECK(again(file, in_out).at("x.experts.w").parts().stored_transposed);
  }
}

TEST_CASE("a stack of one expert may be a matrix, which never is transposed", "[peft][stacks]") {
  const auto one = build::file()
                       .add(prefix + "x.experts.lora_A.weight", {rank, 4}, 0.5F)
                       .add(prefix + "x.experts.lora_B.weight", {4, rank}, 0.25F);
  const auto file = assemble(written_by("0.18.1"), one);
  const auto& e = file.at("x.experts.w");
  Eigen::MatrixXf W = Eigen::MatrixXf::Zero(4, 4);
  lora::merge(W, e);
  CHECK(W == lora::delta_weight(e.factors()));
  std::vector<float> values(16, 0.0F);
  const lora::tensor_view<float, 3> base(values, {1, 4, 4});
  CHECK_THROWS_WITH(lora::merge(base, e),
                    Catch::Contains("before 0.19.1") && Catch::Contains("parameters_in_out"));
  CHECK(values == std::vector<float>(16, 0.0F));
  CHECK(again(file, {}).at("x.experts.w").parts().orientation_unsaid);
  lora::merge(base,
              assemble(written_by("0.18.1"), one, {.parameters_in_out = true}).at("x.experts.w"));
  CHECK(Eigen::Map<const test::matrix<float>>(values.data(), 4, 4) == W.transpose());
}

// ---- the columns of lora_B

namespace {
std::string layout(const std::string& all, const std::string& parameter,
                   const std::string& count = "3") {
  const std::string inner = parameter.empty() ? ""
                                              : R"("w":{"lora_B_layout":")" + parameter +
                                                    R"(","num_experts":)" + count + "}";
  return (all.empty() ? "" : R"("lora_B_layout":")" + all + R"(",)") +
         R"("unsloth_fused_expert_lora":{"lora_A_layout":"grouped_by_expert","parameters":{)" +
         inner + "}}";
}
}  // namespace

TEST_CASE("columns go over experts as the config says", "[peft][stacks]") {
  const auto slices = [](const std::string& json, const peft::read_options& options = {}) {
    return merged(assemble(written_by("0.21.2", json), stack(6, 4), options).at("x.experts.w"), 6,
                  4);
  };
  const auto is = [](const std::vector<test::matrix<float>>& found, const auto& column) {
    bool same = true;
    for (int k = 0; k < experts; ++k)
      same = same && found[static_cast<std::size_t>(k)] == delta(6, 4, k, column);
    return same;
  };
  CHECK(is(slices(""), rank_major));
  CHECK(is(slices(R"("lora_B_layout":null)"), rank_major));
  for (const bool both : {false, true}) {
    CHECK(is(slices(layout("rank_major", both ? "rank_major" : "")), rank_major));
    CHECK(is(slices(layout("grouped_by_expert", both ? "grouped_by_expert" : "")), grouped));
    CHECK(is(slices(layout(both ? "grouped_by_expert" : "", "grouped_by_expert")), grouped));
  }
  CHECK(is(slices("", {.experts_grouped_b = true}), grouped));
  CHECK(is(slices("", {.experts_grouped_b = false}), rank_major));
  // It is no key that a lenient reader passes over.
  CHECK(is(slices(layout("grouped_by_expert", ""), {.lenient = true}), grouped));
  CHECK(is(slices(layout("grouped_by_expert", ""), {.ignore_keys = {"lora_B_layout"}}), grouped));
}

TEST_CASE("layouts that cannot be are refused", "[peft][stacks]") {
  const auto words = [](const std::string& json, std::initializer_list<std::string_view> parts,
                        const peft::read_options& options = {}) {
    refused([&] { (void)assemble(written_by("0.21.2", json), stack(6, 4), options); }, parts);
    refused([&] { (void)assemble(written_by("0.21.2", json), stack(6, 4), {.lenient = true}); },
            {"lora"});
  };
  words(layout("by_moon", ""), {"lora_B_layout", "rank_major", "grouped_by_expert", "by_moon"});
  words(R"("lora_B_layout":3)", {"lora_B_layout"});
  words(layout("rank_major", "grouped_by_expert"),
        {"unsloth_fused_expert_lora", "another for \"w\"", "both places"});
  words(layout("", "grouped_by_expert", "4"),
        {"x.experts.lora_A.weight", "4 experts", "num_experts", "3 in F32"});
  words(R"("unsloth_fused_expert_lora":{"lora_A_layout":"rank_major"})",
        {"lora_A_layout", "rank_major"});
  words(R"("unsloth_fused_expert_lora":7)", {"an object or null"});
  refused(
      [&] {
        (void)assemble(written_by("0.21.2", layout("rank_major", "")), stack(6, 4),
                       {.experts_grouped_b = true});
      },
      {"x.experts.lora_B.weight", "experts_grouped_b"});
  refused(
      [&] {
        (void)assemble(written_by("0.21.2", R"("unsloth_fused_expert_lora":{"later":1})"),
                       stack(6, 4));
      },
      {"unsloth_fused_expert_lora.later"});
}

TEST_CASE("a layout is for one stack of the file, and one layout is for a stack",
          "[peft][stacks]") {
  const auto under = [](const std::string& names) {
    return written_by("0.21.2", R"("unsloth_fused_expert_lora":{"parameters":{)" + names + "}}");
  };
  const std::string by_expert = R"(":{"lora_B_layout":"grouped_by_expert"})",
                    major = R"(":{"lora_B_layout":"rank_major"})";
  for (const std::string name : {"w", "experts.w", "x.experts.w", "base_model.model.x.experts.w"})
    CHECK(merged(assemble(under("\"" + name + by_expert), stack(6, 4)).at("x.experts.w"), 6,
                 4)[1] == delta(6, 4, 1, grouped));
  for (const std::string name : {"gate_up_proj", "experts", "v"})
    refused([&] { (void)assemble(under("\"" + name + by_expert), stack(6, 4)); },
            {"unsloth_fused_expert_lora", name, "scrambled"});
  CHECK(assemble(under("\"other" + major), stack(6, 4)).size() == 1);
  refused([&] { (void)assemble(under("\"w" + by_expert + ",\"experts.w" + major), stack(6, 4)); },
          {"one layout for \"x.experts.w\"", "\"w\"", "\"experts.w\""});
  refused([&] { (void)assemble(under("\"" + by_expert), stack(6, 4)); }, {"an empty one"});
}

TEST_CASE("a stack is written in PEFT's order of columns", "[peft][stacks]") {
  const auto file =
      assemble(written_by("0.21.2", layout("grouped_by_expert", "grouped_by_expert")), stack(6, 4));
  const auto text = peft::config_text(file);
  CHECK_FALSE(build::has(text, R"("lora_B_layout": "grouped_by_expert")"));
  CHECK(build::has(text, R"("lora_B_layout": "rank_major")"));
  CHECK(merged(again(file, {}).at("x.experts.w"), 6, 4) == merged(file.at("x.experts.w"), 6, 4));
  const auto unsaid = assemble(written_by("0.21.2"), stack(6, 4), {.experts_grouped_b = true});
  CHECK(merged(again(unsaid, {}).at("x.experts.w"), 6, 4) ==
        merged(unsaid.at("x.experts.w"), 6, 4));
}

// ---- layouts of other writers

TEST_CASE("three-dimensional factors of experts are named for what they are", "[peft][stacks]") {
  const auto words = [](const std::string& json, std::initializer_list<int> A,
                        std::initializer_list<int> B) {
    const auto tensors = build::file()
                             .add(prefix + "x.experts.lora_A.weight", A)
                             .add(prefix + "x.experts.lora_B.weight", B);
    refused([&] { (void)assemble(json, tensors); },
            {"x.experts.lora_A.weight", "a stack of experts", "not read yet", "target_parameters"});
  };
  for (const auto& json : {config(), written_by("0.21.2")}) {
    words(json, {3, 2, 4}, {3, 6, 2});  // by expert
    words(json, {2, 2, 4}, {2, 6, 2});  // as many experts as ranks
    words(json, {1, 2, 4}, {3, 6, 2});  // one lora_A for all
    words(json, {3, 2, 4}, {1, 6, 2});  // one lora_B for all
    words(json, {3, 2, 4}, {6, 2, 3});  // the expert last in lora_B
  }
  // A kernel of one dimension is none of these.
  const auto kernel = build::file()
                          .add(prefix + "c.lora_A.weight", {2, 2, 4})
                          .add(prefix + "c.lora_B.weight", {6, 2, 1});
  CHECK(assemble(config(), kernel).at("c").kind() == peft::entry_kind::convolution);
}

TEST_CASE("flat factors of several experts ask for target_parameters", "[peft][stacks]") {
  refused([] { (void)assemble(config(R"("target_modules":["experts"])"), stack(6, 4)); },
          {"rank 2", "several experts", "target_parameters"});
}

TEST_CASE("parameter_order may name the parameters that the file has", "[peft][stacks]") {
  const std::string json = config(
      R"("target_modules":[],"target_parameters":["experts.up","experts.down"],"peft_version":"0.21.2")");
  refused([&] { (void)assemble(json, stack(6, 4)); },
          {"2 adapters inside", "\"up\", \"down\"", "found 1", "parameter_order"});
  refused(
      [&] {
        (void)assemble(json, stack(6, 4), {.parameter_order = {"up", "down"}});
      },
      {"found 1"});
  CHECK(assemble(json, stack(6, 4), {.parameter_order = {"down"}}).names() ==
        std::vector<std::string>{"x.experts.down"});
}

TEST_CASE("a stack merges into a copy, checked, and is unmerged", "[peft][stacks]") {
  const auto file = assemble(written_by("0.19.1"), stack(5, 4));
  const auto& e = file.begin()->second;
  std::vector<float> values(experts * 5 * 4, 0.5F);
  const auto before = values;
  const lora::tensor_view<float, 3> view(values, {experts, 5, 4});
  const std::vector<float> copy = lora::merged(
      lora::tensor_view<const float, 3>(before, {experts, 5, 4}), lora::scaled(-0.5, e));
  CHECK(lora::merge_checked(view, lora::scaled(-0.5, e)).weights == experts);
  CHECK(values == copy);
  CHECK(values != before);
  for (int k = 0; k < experts; ++k) {
    test::matrix<float> alone = test::matrix<float>::Constant(5, 4, 0.5F);
    lora::merge(alone, lora::scaled(-0.5, e.expert(k)));
    CHECK(test::same_bits(alone, test::matrix<float>(Eigen::Map<const test::matrix<float>>(
                                     copy.data() + 20 * k, 5, 4))));
  }
  lora::unmerge(view, lora::scaled(-0.5, e));
  for (const float v : values) CHECK(std::abs(v - 0.5F) < 1e-3F);
  auto sixteen = std::vector<lora::float16>(experts * 5 * 4, lora::float16(1.0F));
  const auto kept = sixteen;
  CHECK_THROWS_AS(lora::merge_checked(lora::tensor_view<lora::float16, 3>(sixteen, {experts, 5, 4}),
                                      lora::scaled(1e4, e)),
                  lora::value_error);
  CHECK(std::memcmp(kept.data(), sixteen.data(), sizeof(lora::float16) * kept.size()) == 0);
}
