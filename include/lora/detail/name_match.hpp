// SPDX-License-Identifier: Apache-2.0
//
// Names of modules and tensors that do not match: the nearest ones, and moves of a prefix under
// which they would.
#pragma once

#include <algorithm>
#include <cstddef>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora/version.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// How many segments between dots two names share at their ends.
inline std::size_t shared_segments(std::string_view a, std::string_view b) {
  std::size_t count = 0;
  for (;;) {
    const auto dot_a = a.rfind('.'), dot_b = b.rfind('.');
    if (a.substr(dot_a + 1) != b.substr(dot_b + 1)) return count;
    ++count;
    if (dot_a == std::string_view::npos || dot_b == std::string_view::npos) return count;
    a = a.substr(0, dot_a);
    b = b.substr(0, dot_b);
  }
}

/// A name without its last `count` segments: what comes before them, with its dot.
inline std::string_view prefix_before(std::string_view name, std::size_t count) {
  std::size_t end = name.size();
  for (; count > 0 && end != 0; --count) {
    const auto dot = name.rfind('.', end - 1);
    if (dot == std::string_view::npos) return {};
    end = dot;
  }
  return name.substr(0, end == name.size() ? end : end + 1);
}

/// A few names that share the most segments with a name at the end, then the most characters at the
/// beginning.
inline std::vector<std::string> nearest_names(std::string_view name,
                                              const std::vector<std::string>& names) {
  constexpr std::size_t most = 3;
  std::vector<std::pair<std::pair<std::size_t, std::size_t>, const std::string*>> ranked;
  for (const std::string& other : names) {
    const auto same =
        std::mismatch(name.begin(), name.end(), other.begin(), other.end()).first - name.begin();
    const std::size_t segments = shared_segments(name, other);
    if (segments == 0 && same < 4) continue;
    ranked.push_back({{segments, static_cast<std::size_t>(same)}, &other});
  }
  const auto count = std::min(most, ranked.size());
  std::partial_sort(ranked.begin(), ranked.begin() + static_cast<std::ptrdiff_t>(count),
                    ranked.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  std::vector<std::string> result;
  for (std::size_t k = 0; k < count; ++k) result.push_back(*ranked[k].second);
  return result;
}

/// Moves (from, to) of a prefix that turn some missing names into names that are there; those of
/// most names first.
inline std::vector<std::pair<std::string, std::string>> prefix_moves(
    const std::vector<std::string>& missing, const std::vector<std::string>& names) {
  constexpr std::size_t samples = 32, most = 16, least_shared = 2;
  std::multimap<std::string_view, const std::string*> by_end;  // the last two segments
  const auto end_of = [](std::string_view name) {
    const auto last = name.rfind('.');
    const auto before =
        last == std::string_view::npos || last == 0 ? last : name.rfind('.', last - 1);
    return before == std::string_view::npos ? name : name.substr(before + 1);
  };
  for (const std::string& name : names) by_end.emplace(end_of(name), &name);
  std::map<std::pair<std::string, std::string>, std::size_t> votes;
  const std::size_t step = std::max<std::size_t>(1, missing.size() / samples);
  for (std::size_t k = 0; k < missing.size(); k += step) {
    const auto [begin, end] = by_end.equal_range(end_of(missing[k]));
    std::size_t best = least_shared;
    for (auto at = begin; at != end; ++at)
      best = std::max(best, shared_segments(missing[k], *at->second));
    for (auto at = begin; at != end; ++at) {
      if (shared_segments(missing[k], *at->second) != best) continue;
      ++votes[{std::string(prefix_before(missing[k], best)),
               std::string(prefix_before(*at->second, best))}];
    }
  }
  std::vector<std::pair<std::size_t, std::pair<std::string, std::string>>> ranked;
  for (const auto& [move, count] : votes) ranked.emplace_back(count, move);
  std::sort(ranked.begin(), ranked.end(),
            [](const auto& a, const auto& b) { return a.first > b.first; });
  std::vector<std::pair<std::string, std::string>> result;
  for (std::size_t k = 0; k < std::min(most, ranked.size()); ++k)
    result.push_back(ranked[k].second);
  return result;
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
