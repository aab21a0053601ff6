// SPDX-License-Identifier: Apache-2.0
//
// "Nothing was merged and nothing was said" is the most common complaint about merge tools. A set
// is matched against the names of a base before anything is written, and says what does not match
// and which renaming would help.
#include "lora/adapter_set.hpp"

#include <map>
#include <random>

#include "lora/dora.hpp"
#include "lora/io/peft_entry.hpp"
#include "lora/kinds/ia3.hpp"
#include "lora/model.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"

namespace {

using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using lora::index_t;

matrix random(std::mt19937& bits, index_t rows, index_t cols) {
  std::normal_distribution<float> value;
  matrix m(rows, cols);
  for (index_t k = 0; k < m.size(); ++k) m.data()[k] = value(bits);
  return m;
}
lora::adapter<float> plain(std::mt19937& bits, index_t out, index_t in) {
  return {random(bits, 3, in), random(bits, out, 3), {.alpha = 5}};
}

/// Two modules of two layers: a LoRA, a DoRA, an IA3 and a LoRA.
lora::adapter_set some(std::mt19937& bits) {
  lora::adapter_set set;
  set.add({{"model.layers.0.q_proj"}, plain(bits, 6, 4), "LORA"});
  set.add({{"model.layers.0.k_proj"},
           lora::dora_adapter<float>(plain(bits, 6, 4), std::vector<float>(6, 1.5F)),
           "DORA"});
  set.add({{"model.layers.1.q_proj"},
           lora::ia3_adapter<float>::of_outputs(std::vector<float>(6, 0.5F), 4),
           "IA3"});
  set.add({{"model.layers.1.k_proj"}, plain(bits, 6, 4), "LORA"});
  return set;
}
std::map<std::string, matrix> base(std::mt19937& bits, const std::string& prefix) {
  std::map<std::string, matrix> weights;
  for (const auto* name :
       {"layers.0.q_proj", "layers.0.k_proj", "layers.1.q_proj", "layers.1.k_proj"})
    weights.emplace(prefix + name + ".weight", random(bits, 6, 4));
  return weights;
}

}  // namespace

TEST_CASE("a set merges into weights by name what each adapter merges alone", "[adapter_set]") {
  std::mt19937 bits(7);
  const auto set = some(bits);
  auto weights = base(bits, "model.");
  const auto before = weights;
  const auto report = lora::merge(weights, set, 0.5);
  CHECK(report.weights == 4);
  CHECK(report.elements == 4 * 24);
  CHECK(report.changed == 4 * 24);
  for (const auto& [name, l] : set) {
    matrix alone = before.at(name + ".weight");
    lora::merge(alone, lora::scaled(0.5, l));
    CAPTURE(name);
    CHECK(test::same_bits(alone, weights.at(name + ".weight")));
  }
}

TEST_CASE("a base with other names is refused whole, with the renaming that fits",
          "[adapter_set]") {
  std::mt19937 bits(8);
  const auto set = some(bits);
  auto weights = base(bits, "language_model.");
  const auto before = weights;
  std::vector<std::string> names;
  for (const auto& [name, W] : weights) names.push_back(name);
  const auto match = set.matched_against(names);
  CHECK(match.matched.empty());
  CHECK(match.unmatched.size() == 4);
  REQUIRE(match.renaming.has_value());
  CHECK(match.renaming->from == "model.");
  CHECK(match.renaming->to == "language_model.");
  CHECK(match.matched_when_renamed == 4);
  CHECK(match.unmatched.front().nearest.front() == "language_model.layers.0.k_proj.weight");
  CHECK(match.text().find("0 of 4 adapters have a weight in this base") == 0);
  CHECK_THROWS_AS(lora::merge(weights, set), lora::value_error);
  for (const auto& [name, W] : before) CHECK(test::same_bits(W, weights.at(name)));
  CHECK(lora::merge(weights, set.renamed(*match.renaming)).weights == 4);
}

TEST_CASE("prefixes that are added, removed or exchanged are found", "[adapter_set]") {
  std::mt19937 bits(9);
  const auto set = some(bits);
  for (const std::string prefix : {"", "base.model.", "m."}) {
    const auto weights = base(bits, prefix);
    std::vector<std::string> names{"lm_head.weight", "norm.weight"};
    for (const auto& [name, W] : weights) names.push_back(name);
    const auto match = set.matched_against(names);
    CAPTURE(prefix);
    REQUIRE(match.renaming.has_value());
    CHECK(match.matched_when_renamed == 4);
    CHECK(set.renamed(*match.renaming).matched_against(names).complete());
  }
}

TEST_CASE("a weight of another shape leaves all weights as they are", "[adapter_set]") {
  std::mt19937 bits(10);
  const auto set = some(bits);
  auto weights = base(bits, "model.");
  weights.at("model.layers.1.q_proj.weight") = random(bits, 6, 5);
  const auto before = weights;
  CHECK_THROWS_AS(lora::merge(weights, set), lora::shape_error);
  for (const auto& [name, W] : before) CHECK(test::same_bits(W, weights.at(name)));
}

TEST_CASE("two adapters for one module and unknown modules are named", "[adapter_set]") {
  std::mt19937 bits(11);
  auto set = some(bits);
  CHECK_THROWS_AS(set.add({{"model.layers.0.q_proj"}, plain(bits, 6, 4)}), lora::value_error);
  CHECK(set.size() == 4);
  try {
    static_cast<void>(set.at("layers.0.q_proj"));
    FAIL("at() took a name that is not there");
  } catch (const lora::value_error& e) {
    CHECK(std::string(e.what()).find("near: model.layers.0.q_proj") != std::string::npos);
  }
  CHECK_THROWS_AS(set.renamed([](const std::string&) { return std::string("same"); }),
                  lora::value_error);
}

TEST_CASE("a model attaches a set to all of its modules or to none", "[adapter_set][model]") {
  std::mt19937 bits(12);
  const auto set = some(bits);
  const auto weights = base(bits, "model.");
  lora::model<float> net;
  for (const auto& [name, W] : weights)
    if (name != "model.layers.1.q_proj.weight")
      net.add(name.substr(0, name.size() - 7), lora::linear<float>(W));
  CHECK_THROWS_AS(net.attach("style", set), lora::value_error);
  for (const auto& [name, layer] : net) CHECK(!layer.contains("style"));
  net.add("model.layers.1.q_proj", lora::linear<float>(matrix(random(bits, 6, 5))));
  CHECK_THROWS_AS(net.attach("style", set), lora::shape_error);
  for (const auto& [name, layer] : net) CHECK(!layer.contains("style"));

  lora::model<float> whole;
  for (const auto& [name, W] : weights)
    whole.add(name.substr(0, name.size() - 7), lora::linear<float>(W));
  whole.attach("style", set, 0.5);
  CHECK(whole.merge("style").weights == 4);
  for (const auto& [name, l] : set) {
    matrix alone = weights.at(name + ".weight");
    lora::merge(alone, lora::scaled(0.5, l));
    CAPTURE(name);
    CHECK(test::same_bits(alone, matrix(whole.at(name).weight())));
  }
  whole.unmerge("style");
  for (const auto& [name, W] : weights)
    CHECK(test::same_bits(W, matrix(whole.at(name.substr(0, name.size() - 7)).weight())));
  CHECK_THROWS_AS(whole.merge("other"), lora::value_error);
}

TEST_CASE("what one adapter of a set refuses leaves all weights as they are", "[adapter_set]") {
  std::mt19937 bits(13);
  auto set = some(bits);
  lora::peft::entry_parts<float> parts;  // the last name: the others would be merged before
  parts.name = "model.layers.1.v_proj";
  parts.experts.push_back(plain(bits, 6, 4));
  parts.bias = std::vector<float>(6, 1.0F);
  set.add({{parts.name}, lora::peft::entry<float>(parts)});
  auto weights = base(bits, "model.");
  weights.emplace("model.layers.1.v_proj.weight", random(bits, 6, 4));
  const auto before = weights;
  CHECK_THROWS_WITH(lora::merge(weights, set), Catch::Contains("lora_bias"));
  for (const auto& [name, W] : before) CHECK(test::same_bits(W, weights.at(name)));
}

TEST_CASE("a stack of experts takes each expert's adapter, or nothing", "[adapter_set]") {
  std::mt19937 bits(14);
  const std::vector<lora::any_kind> experts{plain(bits, 6, 4), plain(bits, 6, 4),
                                            plain(bits, 6, 4)};
  const lora::module_adapter l({"experts"}, experts);
  std::vector<float> values(3 * 6 * 4);
  for (float& v : values) v = std::normal_distribution<float>()(bits);
  const auto before = values;
  CHECK(lora::merge(lora::tensor_view<float, 3>(values, {3, 6, 4}), l, 0.5).weights == 3);
  for (std::size_t k = 0; k < 3; ++k) {
    matrix alone = Eigen::Map<const matrix>(before.data() + 24 * k, 6, 4);
    lora::merge(alone, lora::scaled(0.5, experts[k]));
    CAPTURE(k);
    CHECK(test::same_bits(alone, matrix(Eigen::Map<const matrix>(values.data() + 24 * k, 6, 4))));
  }
  CHECK_THROWS_AS(lora::merge(lora::tensor_view<float, 3>(values, {2, 9, 4}), l),
                  lora::shape_error);
  matrix W = random(bits, 6, 4);
  CHECK_THROWS_AS(lora::merge(W, l), lora::value_error);
  CHECK_THROWS_AS((lora::module_adapter(
                      {"m"}, std::vector<lora::any_kind>{plain(bits, 6, 4), plain(bits, 5, 4)})),
                  lora::shape_error);
}
