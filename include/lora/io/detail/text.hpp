// SPDX-License-Identifier: Apache-2.0
//
// Text for messages: names out of files made printable, and the known names that a misspelt one is
// near to.
#pragma once

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora/version.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// ASCII as it is, everything else as \xNN, the middle left out beyond 160 characters: a name in a
/// hostile file can be long, or hold line ends and terminal controls.
inline std::string printable(std::string_view name) {
  constexpr std::size_t longest = 160;
  constexpr char digits[] = "0123456789abcdef";
  std::string result;
  for (std::size_t k = 0; k < name.size(); ++k) {
    if (name.size() > longest && k == longest / 2) {
      result += "[...]";
      k = name.size() - longest / 2;
    }
    const auto byte = static_cast<unsigned char>(name[k]);
    if (byte >= 0x20 && byte < 0x7f) {
      result += name[k];
    } else {
      result += {'\\', 'x', digits[byte >> 4], digits[byte & 15]};
    }
  }
  return result;
}

inline std::string in_quotes(std::string_view name) { return '"' + printable(name) + '"'; }

/// The pieces one after another, for messages.
[[gnu::cold, gnu::noinline]] inline std::string sentence(
    std::initializer_list<std::string_view> pieces) {
  std::string result;
  for (const auto piece : pieces) result += piece;
  return result;
}

/// "a", "b", "c": at most `most` of them, then how many more.
template <class Names>
std::string listed(const Names& names, std::size_t most = 8) {
  std::string result;
  std::size_t count = 0;
  for (const auto& name : names) {
    if (count < most) result += (count == 0 ? "" : ", ") + in_quotes(name);
    ++count;
  }
  return count > most ? result + " and " + std::to_string(count - most) + " more" : result;
}

/// ASCII letters in lower case.
inline std::string lower_case(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), [](char x) {
    return x >= 'A' && x <= 'Z' ? static_cast<char>(x - 'A' + 'a') : x;
  });
  return text;
}

/// What a repository holds in place of a large file.
inline bool is_git_lfs_pointer(std::string_view begin) { return begin.starts_with("version "); }
inline constexpr const char* git_lfs_hint =
    "this is a Git LFS pointer: fetch the file itself with git lfs pull";

/// Insertions, deletions and replacements that turn a into b.
inline std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i + 1);
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i] == b[j] ? 0u : 1u);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, diagonal + 1, row[j] + 1});
    }
  }
  return row[b.size()];
}

/// The three names nearest to a wanted one, nearest first. Names are any range of pairs (name, ...)
/// or of strings; only the first 4096 and only those of ordinary length are looked at, so that the
/// work is bounded.
template <class Names, class NameOf>
std::vector<std::string> near_names(std::string_view wanted, const Names& names,
                                    const NameOf& name_of) {
  constexpr std::size_t most_names = 4096, longest = 256;
  std::vector<std::pair<std::size_t, std::string>> ranked;
  std::size_t looked_at = 0;
  for (const auto& each : names) {
    if (++looked_at > most_names || wanted.size() > longest) break;
    const std::string_view name = name_of(each);
    if (name.size() <= longest) ranked.emplace_back(edit_distance(wanted, name), std::string(name));
  }
  const auto kept = std::min<std::size_t>(3, ranked.size());
  std::partial_sort(ranked.begin(), ranked.begin() + static_cast<std::ptrdiff_t>(kept),
                    ranked.end());
  std::vector<std::string> result;
  for (std::size_t k = 0; k < kept; ++k) result.push_back(std::move(ranked[k].second));
  return result;
}

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
