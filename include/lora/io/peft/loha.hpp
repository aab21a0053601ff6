// SPDX-License-Identifier: Apache-2.0
//
// LoHa in a PEFT file (peft_type LOHA): config keys, tensors, and lora::loha_adapter.
//
//   .hada_w1_a [out, r], .hada_w1_b [r, in], and w2 the same
//   with cores (use_effective_conv2d, kernels above 1): .hada_w1_a [r, out], .hada_w1_b
//   [r, channels], .hada_t1 [r, r, kernel] of four dimensions, and w2, t2 the same
//
// Without cores the in of a convolution is channels * kernel. PEFT 0.21, tuners/loha/layer.py.
#pragma once

#include <array>
#include <optional>
#include <string_view>
#include <type_traits>

#include "lora/io/peft/common_keys.hpp"
#include "lora/io/peft/kind_module.hpp"
#include "lora/kinds/loha.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

inline constexpr std::array loha_fixed_keys = std::to_array<fixed_key>({
    {"rank_dropout"},
    {"module_dropout"},
    {"init_weights"},
    {"use_effective_conv2d"},  // the tensors say it
});

/// r, alpha and their patterns, which LoHa and LoKr have.
inline void read_lycoris_rank_and_alpha(config_object& keys, peft::config& c) {
  if (const auto* r = keys.take("r")) c.r = keys.positive_in(*r, "r");
  if (const auto* alpha = keys.take("alpha")) c.lora_alpha = keys.finite_in(*alpha, "alpha");
  read_pattern_keys(keys, c);
}

inline void read_loha_keys(config_object& keys, peft::config& c) {
  read_lycoris_rank_and_alpha(keys, c);
  read_module_keys(keys, c);
}

inline constexpr std::array loha_suffixes = std::to_array<std::string_view>(
    {".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2"});

/// One of the two matrices, or w2 of LoKr, by the names of its parts.
template <scalar T>
factored_matrix<T> lycoris_factors(const kind_module& m, std::string_view left,
                                   std::string_view right, std::string_view core) {
  const auto &a = m.matrix_at(left), &b = m.matrix_at(right);
  m.check_extent(b, 0, m.rank(), "the rank that the config says for this module");
  if (!m.has(core)) {
    m.check_extent(a, 1, m.rank(), "the rank that the config says for this module");
    return {m.matrix<T>(a), m.matrix<T>(b)};
  }
  m.check_extent(a, 0, m.rank(), "the rank that the config says for this module");
  const auto& t = m.matrix_at(core, 4);
  if (t.shape.size() != 4)
    m.refuse(t, "four dimensions: rank, rank and two of the kernel", t.text());
  m.check_extent(t, 0, m.rank(), "the rank that the config says for this module");
  m.check_extent(t, 1, m.rank(), "the rank that the config says for this module");
  return {m.matrix<T>(t), m.matrix<T>(a), m.matrix<T>(b)};
}

inline any_kind decode_loha(const kind_module& m) {
  const auto size = [&](std::string_view a, std::string_view b, std::string_view core) {
    const std::size_t out = m.has(core) ? 1 : 0;
    return std::pair(m.matrix_at(a).shape[out], m.matrix_at(b).shape[1]);
  };
  if (m.has(".hada_t1") != m.has(".hada_t2"))
    m.refuse(m.at(m.has(".hada_t1") ? ".hada_t1" : ".hada_t2"),
             "both .hada_t1 and .hada_t2, or neither", "one of them", "the file is incomplete");
  if (size(".hada_w1_a", ".hada_w1_b", ".hada_t1") != size(".hada_w2_a", ".hada_w2_b", ".hada_t2"))
    m.refuse(m.at(".hada_w2_a"), "the same outputs and inputs in hada_w1 and hada_w2", "others");
  return m.in_stored_format([&]<scalar T>(std::type_identity<T>) -> any_kind {
    auto first = lycoris_factors<T>(m, ".hada_w1_a", ".hada_w1_b", ".hada_t1");
    auto second = lycoris_factors<T>(m, ".hada_w2_a", ".hada_w2_b", ".hada_t2");
    if (first.cols() != second.cols())
      m.refuse(m.at(".hada_t2"), "the same kernel as .hada_t1", m.at(".hada_t2").text());
    return loha_adapter<T>(std::move(first), std::move(second), {.alpha = m.alpha()});
  });
}

/// The parts of a factored matrix. The core's kernel is written as one extent and 1: which two it
/// had does not change the matrix.
template <scalar T>
void add_lycoris_factors(kind_parts& parts, const factored_matrix<T>& f, const std::string& left,
                         const std::string& right, const std::string& core) {
  parts.tensors.push_back(kind_parts::of_matrix(left, f.left()));
  parts.tensors.push_back(kind_parts::of_matrix(right, f.right()));
  if (!f.has_core()) return;
  const auto r = static_cast<std::uint64_t>(f.rank());
  const auto q = static_cast<std::uint64_t>(f.right().rows());
  const auto kernel = static_cast<std::uint64_t>(f.core().cols()) / q;
  parts.tensors.push_back(kind_parts::of_matrix(core, f.core(), {r, q, kernel, 1}));
  parts.settings["use_effective_conv2d"] = "true";
}

/// r, and the alpha that gives the scaling.
template <class K>
void add_rank_and_alpha(kind_parts& parts, const K& kind) {
  parts.rank = kind.rank();
  parts.alpha = numerator_for(kind.scaling(), static_cast<double>(kind.rank()));
  if (!parts.alpha)
    detail::raise_value("peft::write_adapters",
                        "no alpha gives this scaling with rank " + std::to_string(kind.rank()));
}

inline std::optional<kind_parts> encode_loha(const any_kind& any) {
  kind_parts parts;
  const bool is = any_format([&]<scalar T>(std::type_identity<T>) {
    const auto* kind = any.get_if<loha_adapter<T>>();
    if (kind == nullptr) return false;
    add_lycoris_factors(parts, kind->first(), ".hada_w1_a", ".hada_w1_b", ".hada_t1");
    add_lycoris_factors(parts, kind->second(), ".hada_w2_a", ".hada_w2_b", ".hada_t2");
    add_rank_and_alpha(parts, *kind);
    return true;
  });
  return is ? std::optional(std::move(parts)) : std::nullopt;
}

inline constexpr peft_kind loha_kind{
    {"LOHA", read_loha_keys, loha_fixed_keys}, loha_suffixes, {}, decode_loha, encode_loha};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
