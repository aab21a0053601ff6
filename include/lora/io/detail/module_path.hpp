// SPDX-License-Identifier: Apache-2.0
//
// Paths of modules, "model.layers.0.self_attn.q_proj": their segments, their ends, and the names of
// modules whose rows are tokens.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "lora/version.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// The part of a path behind its last dot.
inline std::string_view last_segment(std::string_view path) {
  return path.substr(path.rfind('.') + 1);
}
/// The part before it; empty without a dot.
inline std::string_view without_last_segment(std::string_view path) {
  const auto dot = path.rfind('.');
  return dot == std::string_view::npos ? std::string_view{} : path.substr(0, dot);
}

inline std::vector<std::string_view> segments(std::string_view module) {
  std::vector<std::string_view> result;
  for (std::size_t from = 0; from <= module.size();) {
    const auto dot = std::min(module.find('.', from), module.size());
    result.push_back(module.substr(from, dot - from));
    from = dot + 1;
  }
  return result;
}

/// The name itself, or its last segments.
inline bool is_or_ends_with(std::string_view module, std::string_view name) {
  if (module == name) return true;
  return module.size() > name.size() && module[module.size() - name.size() - 1] == '.' &&
         module.ends_with(name);
}

/// Whether it holds for the path, or for one that the path lies in.
template <class Fits>
bool any_on_the_way(std::string_view path, const Fits& fits) {
  for (auto end = path.size(); end != std::string_view::npos && end != 0;
       end = path.rfind('.', end - 1))
    if (fits(path.substr(0, end))) return true;
  return false;
}

inline bool is_number(std::string_view text) {
  return !text.empty() &&
         std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

/// The path of these segments.
inline std::string joined(const std::vector<std::string_view>& parts) {
  std::string result;
  for (std::size_t k = 0; k < parts.size(); ++k) {
    if (k != 0) result += '.';
    result += parts[k];
  }
  return result;
}

/// Embeddings and heads whose weight PEFT saves with an adapter that changes or resizes them.
inline constexpr std::array embedding_names =
    std::to_array<std::string_view>({"embed_tokens", "lm_head", "wte", "embed_in", "embed_out",
                                     "word_embeddings", "shared", "embeddings", "tok_embeddings"});

/// Whether a module is called like an embedding or a head.
inline bool is_embedding_name(std::string_view module) {
  return std::find(embedding_names.begin(), embedding_names.end(), last_segment(module)) !=
         embedding_names.end();
}

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
