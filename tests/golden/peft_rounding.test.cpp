// SPDX-License-Identifier: Apache-2.0
//
// PEFT's two roundings, bit for bit: the 16-bit cases of golden/peft-0.21. From the recorded delta
// every stored bit follows; where the product does not round (the dyadic cases) it follows from the
// factors.
#include "lora/io/peft.hpp"
#include "lora/rounding.hpp"
#include "support/dense_delta.hpp"
#include "support/golden.hpp"

namespace {

namespace peft = lora::peft;
using lora::bfloat16;
using lora::float16;
using test::matrix;

/// T is the base's scalar, D the delta's. Returns how many tensors were compared bit for bit.
template <class T, class D>
std::size_t check(const std::string& id, bool dyadic) {
  const golden::case_files c{golden::root() / id};
  const std::map<std::string, peft::adapter_file<D>> files{{"a", peft::read<D>(c.folder / "a")},
                                                           {"b", peft::read<D>(c.folder / "b")}};
  std::size_t compared = 0;
  for (const auto& expected : c.about.at("expected")) {
    const std::string name = expected.at("tensor");
    // merged.MODE.LABEL.MODULE.weight, drift.cyclesN.MODE.a.MODULE.weight
    const auto word = golden::split(name, '.');
    INFO(id << ": " << name);
    const std::string module = word.size() > 1 ? word[word.size() - 2] : "";
    const auto recorded = [&](const std::string& a) {
      return test::dense_delta(golden::tensor<D>(c.io, "delta." + a + "." + module + ".weight"));
    };
    const auto factors = [&](const std::string& a) -> const auto& {
      return files.at(a).at(module).factors();
    };
    const auto merge = [](matrix<T>& W, const std::string& mode, const auto& l) {
      if (mode == "safe")
        lora::merge(lora::rounding::as_peft_safe, W, l);
      else
        lora::merge(lora::rounding::as_peft, W, l);
    };
    const auto base = [&] { return golden::tensor<T>(c.base, module + ".weight"); };
    const auto want = [&] { return golden::tensor<T>(c.io, name); };
    if (word[0] == "delta") {
      const Eigen::MatrixXf ours = lora::delta_weight(factors(word[1]));
      const auto theirs = golden::tensor<D>(c.io, name);
      for (lora::index_t k = 0; k < theirs.size(); ++k) {
        const float w = lora::detail::widen<float>(theirs.data()[k]),
                    got = ours(k / theirs.cols(), k % theirs.cols());
        CHECK(std::abs(got - w) <= (sizeof(D) == 2 ? 0x1p-7F : 1e-5F) * std::abs(w) + 1e-6F);
      }
    } else if (word[0] == "merged" || word[0] == "unmerged") {
      const auto adapters = golden::split(word[2], '+');
      const auto check_from = [&](const auto& of) {
        auto W = base();
        for (const auto& a : adapters) merge(W, word[1], of(a));
        if (word[0] == "unmerged")
          for (auto a = adapters.rbegin(); a != adapters.rend(); ++a)
            lora::unmerge(lora::rounding::as_peft, W, of(*a));
        CHECK(test::same_bits(W, want()));
      };
      check_from(recorded);
      ++compared;
      if (dyadic) check_from(factors);
    } else if (word[0] == "drift") {
      auto W = base();
      const int cycles = std::stoi(word[1].substr(6));
      const auto delta = recorded(word[3]);
      for (int k = 0; k < cycles; ++k) {
        merge(W, word[2], delta);
        lora::unmerge(lora::rounding::as_peft, W, delta);
      }
      CHECK(test::same_bits(W, want()));
      ++compared;
    } else if (word[0] == "round_once") {
      // The exact sum rounded once is what merge gives: it accumulates in double here.
      const auto a = peft::read<double>(c.folder / "a"), b = peft::read<double>(c.folder / "b");
      auto W = base();
      lora::merge(W, a.at(module).factors(), b.at(module).factors());
      CHECK(test::same_bits(W, want()));
      ++compared;
    } else if (word[0] == "low_memory_delta") {
      // low_cpu_mem_usage rounds float factors to the base's format.
      const auto& l = factors("a");
      const lora::adapter<T> low(
          l.lora_A().unaryExpr([](const D& v) { return T(lora::detail::widen<float>(v)); }).eval(),
          l.lora_B().unaryExpr([](const D& v) { return T(lora::detail::widen<float>(v)); }).eval(),
          {.alpha = l.scaling(), .rule = lora::scaling_rule::fixed});
      const Eigen::MatrixXf ours = lora::delta_weight(low);
      const auto theirs = golden::tensor<float>(c.io, name);
      for (lora::index_t k = 0; k < theirs.size(); ++k)
        CHECK(std::abs(ours(k / theirs.cols(), k % theirs.cols()) - theirs.data()[k]) <=
              2.5e-7F + 1e-5F * std::abs(theirs.data()[k]));
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
