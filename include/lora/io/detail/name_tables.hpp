// SPDX-License-Identifier: Apache-2.0
//
// Tables of names that are looked up for every module of a file. Searches for ranks write one name
// for each module, so a look-up must not try them all: it takes a binary search for each group of
// names that have one length and dots at the same places.
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora/version.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// Names that select a module when they are its name, or its last segments.
class path_endings {
 public:
  explicit path_endings(std::vector<std::string> names) : names_(std::move(names)) {
    std::sort(names_.begin(), names_.end());
  }

  bool contains(std::string_view name) const {
    return std::binary_search(names_.begin(), names_.end(), name);
  }
  bool select(std::string_view module) const {
    for (;;) {
      if (contains(module)) return true;
      const auto dot = module.find('.');
      if (dot == std::string_view::npos) return false;
      module.remove_prefix(dot + 1);
    }
  }
  /// An upper bound for the comparisons of characters in select().
  double work(std::string_view module) const {
    if (names_.empty()) return 0;
    const auto endings = 1 + std::count(module.begin(), module.end(), '.');
    return static_cast<double>(endings) * static_cast<double>(module.size());
  }

 private:
  std::vector<std::string> names_;
};

/// Plain keys of a pattern table, each with its place in the table. A dot of a key fits any
/// character of a module's name, so keys are grouped by length and by where their dots are: within
/// a group a look-up is for text.
class plain_keys {
 public:
  static constexpr std::size_t none = static_cast<std::size_t>(-1);

  void add(std::string_view key, std::size_t place) {
    std::string shape(key);
    for (auto& c : shape) c = c == '.' ? '.' : '_';
    groups_[key.size()][std::move(shape)].emplace(key, place);  // of equal keys the first counts
  }
  /// The first place whose key fits the whole of a name of plain characters; none when there is
  /// none.
  std::size_t first_for_whole(std::string_view module) const {
    std::size_t result = none;
    const auto groups = groups_.find(module.size());
    if (groups == groups_.end()) return result;
    for (const auto& [shape, keys] : groups->second) {
      std::string text(module);
      for (std::size_t k = 0; k < text.size(); ++k)
        if (shape[k] == '.') text[k] = '.';
      if (const auto found = keys.find(text); found != keys.end())
        result = std::min(result, found->second);
    }
    return result;
  }
  /// The same for the name, or its end behind a dot.
  std::size_t first_for_end(std::string_view module) const {
    std::size_t result = first_for_whole(module);
    for_ends(module,
             [&](std::string_view end) { result = std::min(result, first_for_whole(end)); });
    return result;
  }
  /// An upper bound for the steps of first_for_whole: each group is memory that the last one did
  /// not touch.
  double work_for_whole(std::string_view module) const {
    constexpr double miss = 100;
    const auto groups = groups_.find(module.size());
    return groups == groups_.end() ? 1
                                   : static_cast<double>(groups->second.size()) *
                                         (miss + static_cast<double>(module.size()));
  }
  double work_for_end(std::string_view module) const {
    double result = work_for_whole(module);
    for_ends(module, [&](std::string_view end) { result += work_for_whole(end); });
    return result;
  }

 private:
  template <class Call>
  static void for_ends(std::string_view module, const Call& call) {
    for (auto dot = module.find('.'); dot != std::string_view::npos; dot = module.find('.')) {
      module.remove_prefix(dot + 1);
      call(module);
    }
  }

  using group = std::map<std::string, std::size_t, std::less<>>;
  std::map<std::size_t, std::map<std::string, group>> groups_;  // by length, then by shape
};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
