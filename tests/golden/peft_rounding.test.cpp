// SPDX-License-Identifier: Apache-2.0
//
// PEFT's two roundings, bit for bit: the 16-bit cases of golden/peft-0.21. From the recorded delta every stored bit follows;
// where the product does not round (the dyadic cases) it follows from the factors.
#include <fstream>
#include <nlohmann/json.hpp>

#include "lora/io/peft.hpp"
#include "lora/rounding.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/dense_delta.hpp"

namespace {

namespace st = lora::safetensors;
namespace peft = lora::peft;
using lora::bfloat16;
using lora::float16;
template <class T>
using matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

std::filesystem::path folder(const std::string& id) {
  return std::filesystem::path(LORA_OUTSIDE_DIR) / "golden/peft-0.21" / id;
}

template <class T>
matrix<T> load(const st::file& file, const std::string& name) {
  const auto values = file.copy<T>(name);
  const auto& shape = file.at(name).shape;
  return Eigen::Map<const matrix<T>>(values.data(), static_cast<lora::index_t>(shape[0]),
                                     static_cast<lora::index_t>(shape[1]));
}

/// "a+b" as its parts.
std::vector<std::string> parts(const std::string& label) {
  std::vector<std::string> result;
  for (std::size_t from = 0; from <= label.size();) {
    const auto plus = std::min(label.find('+', from), label.size());
    result.push_back(label.substr(from, plus - from));
    from = plus + 1;
  }
  return result;
}

/// T is the base's scalar, D the delta's. Returns how many tensors were compared bit for bit.
template <class T, class D>
std::size_t check(const std::string& id, bool dyadic) {
  const auto io = st::read(folder(id) / "io.safetensors");
  const auto base = st::read(folder(id) / "base.safetensors");
  const std::map<std::string, peft::adapter_file<D>> files{{"a", peft::read<D>(folder(id) / "a")},
                                                           {"b", peft::read<D>(folder(id) / "b")}};
  std::ifstream stream(folder(id) / "case.json");
  const auto text = nlohmann::json::parse(stream);
  std::size_t compared = 0;
  for (const auto& expected : text.at("expected")) {
    const std::string name = expected.at("tensor");
    // merged.MODE.LABEL.MODULE.weight, drift.cyclesN.MODE.a.MODULE.weight
    std::vector<std::string> word;
    for (std::size_t from = 0; from <= name.size();) {
      const auto dot = std::min(name.find('.', from), name.size());
      word.push_back(name.substr(from, dot - from));
      from = dot + 1;
    }
    INFO(id << ": " << name);
    const std::string module = word.size() > 1 ? word[word.size() - 2] : "";
    const auto merge_from_delta = [&](matrix<T>& W, const std::string& mode, const std::vector<std::string>& adapters) {
      for (const auto& a : adapters) {
        const test::dense_delta delta(load<D>(io, "delta." + a + "." + module + ".weight"));
        if (mode == "safe")
          lora::merge(lora::rounding::as_peft_safe, W, delta);
        else
          lora::merge(lora::rounding::as_peft, W, delta);
      }
    };
    const auto merge_from_factors = [&](matrix<T>& W, const std::string& mode, const std::vector<std::string>& adapters) {
      for (const auto& a : adapters) {
        const auto& l = files.at(a).at(module).factors();
        if (mode == "safe")
          lora::merge(lora::rounding::as_peft_safe, W, l);
        else
          lora::merge(lora::rounding::as_peft, W, l);
      }
    };
    if (word[0] == "delta") {
      const auto& l = files.at(word[1]).at(module).factors();
      const Eigen::MatrixXf ours = lora::delta_weight(l);
      const auto want = load<D>(io, name);
      for (lora::index_t k = 0; k < want.size(); ++k) {
        const float w = lora::detail::widen<float>(want.data()[k]), got = ours(k / want.cols(), k % want.cols());
        CHECK(std::abs(got - w) <= (sizeof(D) == 2 ? 0x1p-7F : 1e-5F) * std::abs(w) + 1e-6F);
      }
    } else if (word[0] == "merged" || word[0] == "unmerged") {
      auto W = load<T>(base, module + ".weight");
      const auto adapters = parts(word[2]);
      merge_from_delta(W, word[1], adapters);
      if (word[0] == "unmerged")
        for (auto a = adapters.rbegin(); a != adapters.rend(); ++a)
          lora::unmerge(lora::rounding::as_peft, W,
                        test::dense_delta(load<D>(io, "delta." + *a + "." + module + ".weight")));
      CHECK(test::same_bits(W, load<T>(io, name)));
      ++compared;
      if (!dyadic) continue;
      auto again = load<T>(base, module + ".weight");
      merge_from_factors(again, word[1], adapters);
      if (word[0] == "unmerged")
        for (auto a = adapters.rbegin(); a != adapters.rend(); ++a)
          lora::unmerge(lora::rounding::as_peft, again, files.at(*a).at(module).factors());
      CHECK(test::same_bits(again, load<T>(io, name)));
    } else if (word[0] == "drift") {
      auto W = load<T>(base, module + ".weight");
      const int cycles = std::stoi(word[1].substr(6));
      const test::dense_delta delta(load<D>(io, "delta." + word[3] + "." + module + ".weight"));
      for (int k = 0; k < cycles; ++k) {
        merge_from_delta(W, word[2], {word[3]});
        lora::unmerge(lora::rounding::as_peft, W, delta);
      }
      CHECK(test::same_bits(W, load<T>(io, name)));
      ++compared;
    } else if (word[0] == "round_once") {
      // The exact sum rounded once is what merge gives: it accumulates in double here.
      const auto a = peft::read<double>(folder(id) / "a"), b = peft::read<double>(folder(id) / "b");
      auto W = load<T>(base, module + ".weight");
      lora::merge(W, a.at(module).factors(), b.at(module).factors());
      CHECK(test::same_bits(W, load<T>(io, name)));
      ++compared;
    } else if (word[0] == "low_memory_delta") {
      // low_cpu_mem_usage rounds float factors to the base's format.
      const auto& l = files.at("a").at(module).factors();
      const lora::adapter<T> low(l.lora_A().unaryExpr([](const D& v) { return T(lora::detail::widen<float>(v)); }).eval(),
                                 l.lora_B().unaryExpr([](const D& v) { return T(lora::detail::widen<float>(v)); }).eval(),
                                 {.alpha = l.scaling(), .rule = lora::scaling_rule::fixed});
      const Eigen::MatrixXf ours = lora::delta_weight(low);
      const auto want = load<float>(io, name);
      for (lora::index_t k = 0; k < want.size(); ++k)
        CHECK(std::abs(ours(k / want.cols(), k % want.cols()) - want.data()[k]) <=
              2.5e-7F + 1e-5F * std::abs(want.data()[k]));
    }
  }
  return compared;
}

}  // namespace

TEST_CASE("golden: PEFT's roundings of 16-bit merges, bit for bit", "[golden][rounding]") {
  CHECK((check<bfloat16, float>("half_bf16_base_f32_adapter", false) == 45));
  CHECK((check<bfloat16, float>("half_bf16_base_f32_adapter_dyadic", true) == 45));
  CHECK((check<bfloat16, bfloat16>("half_bf16_base_bf16_adapter", false) == 45));
  CHECK((check<bfloat16, bfloat16>("half_bf16_base_bf16_adapter_dyadic", true) == 45));
  CHECK((check<float16, float>("half_fp16_base_f32_adapter", false) == 45));
  CHECK((check<float16, float16>("half_fp16_base_fp16_adapter", false) == 45));
}
