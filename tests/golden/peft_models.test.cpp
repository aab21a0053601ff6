// SPDX-License-Identifier: Apache-2.0
//
// Tiny transformers models with PEFT's merged weights, checkpoints and, for the Llama, logits in
// float and bfloat16.
#include <cstdint>

#include "golden/checkpoint.hpp"
#include "golden/reference_case.hpp"
#include "llama.hpp"

namespace {

using golden::json;
using golden::MatrixXd;

/// The adapters of a case in the order of a merge.
std::vector<const lora::peft::adapter_file<float>*> both(const golden::reference_case& c) {
  return {&c.adapters<float>().at("a"), &c.adapters<float>().at("b")};
}

/// vocabulary x all tokens of a batch of prompts.
template <class T>
MatrixXd logits(const llama::model<T>& model, const lora::safetensors::file& io) {
  const auto ids = io.copy<std::int64_t>("x");
  const auto& extents = io.at("x").shape;
  REQUIRE(extents.size() == 2);
  const auto length = static_cast<std::size_t>(extents[1]);
  MatrixXd result(model.shape().vocabulary, static_cast<Eigen::Index>(ids.size()));
  for (std::size_t k = 0; k < ids.size(); k += length)
    result.middleCols(static_cast<Eigen::Index>(k), static_cast<Eigen::Index>(length)) =
        model.logits(std::span(ids).subspan(k, length)).template cast<double>();
  return result;
}

/// Logits with some adapters, those of the bits of `merged` merged.
template <class T>
MatrixXd logits(const golden::reference_case& c, const std::string& base,
                const golden::scenario& active, unsigned merged) {
  auto model = llama::read<T>(golden::root() / "llama_tiny" / base);
  for (std::size_t k = 0; k < active.size(); ++k) {
    const auto& [name, factor] = active[k];
    model.attach(name, c.adapters<typename llama::model<T>::real>().at(name), factor);
    if ((merged >> k & 1) != 0) model.merge(name);
  }
  return logits(model, c.io());
}

// How roundings travel through a network has no bound of its own; another float implementation of
// the same network shows their size, and ours may be four times that.
constexpr double times_peft = 4;

void check_float(const golden::reference_case& c, const json& entry) {
  const auto active = c.scenario_of(entry.at("scenario"));
  const MatrixXd exact = golden::tensor<double>(c.io(), entry.at("ref")).transpose();
  const MatrixXd peft = golden::tensor<double>(c.io(), entry.at("tensor")).transpose();
  const double allowed = times_peft * golden::distance(peft, exact);
  for (unsigned merged = 0; merged < 1u << active.size(); ++merged) {
    CAPTURE(merged);
    CHECK(golden::share(logits<double>(c, "base", active, merged), exact,
                        1e-9 * exact.cwiseAbs().maxCoeff()) <= 1);
    const MatrixXd ours = logits<float>(c, "base", active, merged);
    CHECK(golden::share(ours, exact, allowed) <= 1);
    CHECK(golden::share(ours, peft, entry) <= 1);
  }
}

/// On the bfloat16 base our activations are float, PEFT's bfloat16. So beside the weight ours are
/// as near as in float; what is merged rounds the weight once, PEFT's twice and its activations
/// everywhere.
void check_bfloat16(const golden::reference_case& c, const json& entry) {
  const std::string of =
      entry.at("scenario").get<std::string>().substr(std::string("bf16:").size());
  const auto active = c.scenario_of(of);
  const MatrixXd exact = golden::tensor<double>(c.io(), entry.at("ref")).transpose();
  const MatrixXd peft = golden::tensor<double>(c.io(), entry.at("tensor")).transpose();
  const double in_float = golden::distance(golden::tensor<double>(c.io(), "y_" + of).transpose(),
                                           golden::tensor<double>(c.io(), "y64_" + of).transpose());
  CHECK(golden::share(logits<double>(c, "base_bf16", active, 0), exact,
                      1e-9 * exact.cwiseAbs().maxCoeff()) <= 1);
  for (unsigned merged = 0; merged < 1u << active.size(); ++merged) {
    CAPTURE(merged);
    const MatrixXd ours = logits<lora::bfloat16>(c, "base_bf16", active, merged);
    CHECK(golden::share(ours, exact,
                        times_peft * (merged == 0 ? in_float : golden::distance(peft, exact))) <=
          1);
    CHECK(golden::share(ours, peft, entry) <= 1);
  }
}

}  // namespace

TEST_CASE("a tiny Llama with two trained adapters", "[golden]") {
  const golden::reference_case c(golden::root() / "llama_tiny");
  golden::check_expected(c, [](const golden::reference_case& one, const json& entry) {
    if (entry.at("scenario").get<std::string>().starts_with("bf16:"))
      check_bfloat16(one, entry);
    else
      check_float(one, entry);
  });
}

TEST_CASE("checkpoints of the tiny Llama that PEFT merged", "[golden]") {
  const golden::reference_case c(golden::root() / "llama_tiny");
  const auto files = [](const char* name) {
    return golden::shards(golden::root() / "llama_tiny" / name);
  };
  const auto adapters = both(c);
  SECTION("float") {
    golden::check_checkpoint<float>(files("merged_a+b"), files("base"), adapters);
  }
  SECTION("float, the base in three files") {
    golden::check_checkpoint<float>(files("merged_a+b"), files("base_sharded"), adapters);
  }
  SECTION("bfloat16") {
    golden::check_checkpoint<lora::bfloat16>(files("merged_bf16_a+b"), files("base_bf16"),
                                             adapters);
  }
  SECTION("the bfloat16 base is the float base, rounded") {
    golden::check_checkpoint<lora::bfloat16>(files("merged_bf16_a+b"), files("base"), adapters);
  }
}

TEST_CASE("the weights of a tiny GPT-2, stored in x out, two of them square", "[golden]") {
  const golden::reference_case c(golden::root() / "gpt2_tiny");
  golden::check_weights(c);
  golden::check_checkpoint<float>(golden::shards(golden::root() / "gpt2_tiny" / "merged_a+b"),
                                  golden::shards(golden::root() / "gpt2_tiny" / "base"), both(c),
                                  true);
}
