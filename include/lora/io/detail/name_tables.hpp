// SPDX-License-Identifier: Apache-2.0
//
// Tables of names that are looked up for every module of a file. Searches for ranks write one name for each module, so a look-up
// must not try them all: it takes a binary search for each group of names that have one length and dots at the same places.
#pragma once

#include <algorithm>
#include <cstddef>
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

  bool contains(std::string_view name) const { return std::binary_search(names_.begin(), names_.end(), name); }
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

/// Plain keys of a pattern table, each with its place in the table. A dot of a key fits any character of a module's name, so
/// keys are grouped by length and by where their dots are: within a group a look-up is for text.
class plain_keys {
 public:
  static constexpr std::size_t none = static_cast<std::size_t>(-1);

  void add(std::string_view key, std::size_t place) {
    std::string shape(key);
    for (auto& c : shape) c = c == '.' ? '.' : '_';
    groups_[std::move(shape)].emplace(key, place);  // of equal keys the first counts
  }
  /// The first place whose key fits a module's name of plain characters; none when there is none.
  std::size_t first(std::string_view module) const {
    std::size_t result = none;
    for (const auto& [shape, keys] : groups_) {
      if (module.size() < shape.size()) continue;
      const auto path = module.substr(0, module.size() - shape.size());
      if (!path.empty() && path.back() != '.') continue;
      std::string end(module.substr(path.size()));
      for (std::size_t k = 0; k < end.size(); ++k)
        if (shape[k] == '.') end[k] = '.';
      if (const auto found = keys.find(end); found != keys.end()) result = std::min(result, found->second);
    }
    return result;
  }
  std::size_t groups() const { return groups_.size(); }

 private:
  std::map<std::string, std::map<std::string, std::size_t, std::less<>>> groups_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
