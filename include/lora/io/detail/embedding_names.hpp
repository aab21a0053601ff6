// SPDX-License-Identifier: Apache-2.0
//
// Names of modules whose rows are tokens, and the parts of a module's path.
#pragma once

#include <algorithm>
#include <array>
#include <string_view>

#include "lora/version.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// The part of a path behind its last dot.
inline std::string_view last_segment(std::string_view path) { return path.substr(path.rfind('.') + 1); }
/// The part before it; empty without a dot.
inline std::string_view without_last_segment(std::string_view path) {
  const auto dot = path.rfind('.');
  return dot == std::string_view::npos ? std::string_view{} : path.substr(0, dot);
}

/// Embeddings and heads whose weight PEFT saves with an adapter that changes or resizes them.
inline constexpr std::array embedding_names =
    std::to_array<std::string_view>({"embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings", "shared",
                                     "embeddings", "tok_embeddings"});

/// Whether a module is called like an embedding or a head.
inline bool is_embedding_name(std::string_view module) {
  return std::find(embedding_names.begin(), embedding_names.end(), last_segment(module)) != embedding_names.end();
}

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
