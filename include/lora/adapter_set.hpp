// SPDX-License-Identifier: Apache-2.0
//
// adapter_set: the adapters of a model by module name, of any kinds, and what else a file changes.
//
//   const lora::adapter_set set = lora::peft::adapters("adapters/style");
//   const auto report = set.matched_against(names_of_base);         // before anything is merged
//   if (!report.complete()) std::puts(report.text().c_str());
//   lora::merge(W, set.at("model.layers.0.self_attn.q_proj"));
//   lora::merge(weights, set);   // a map of weights by name: all, or an error
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "lora/detail/name_match.hpp"
#include "lora/error.hpp"
#include "lora/merge.hpp"
#include "lora/merge_report.hpp"
#include "lora/module_adapter.hpp"
#include "lora/moved_prefix.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// What adapter_set::matched_against found.
struct [[nodiscard]] match_report {
  struct miss {
    std::string module;
    std::string weight;                ///< the tensor that the base does not have
    std::vector<std::string> nearest;  ///< names of the base, the nearest first
  };
  std::vector<std::string> matched;  ///< modules whose weight the base has
  std::vector<miss> unmatched;
  /// A move of a prefix under which more modules would match, and how many then.
  std::optional<moved_prefix> renaming;
  std::size_t matched_when_renamed = 0;

  bool complete() const { return unmatched.empty(); }
  /// "2 of 8 adapters have a weight in this base; ...", with the first misses.
  std::string text() const {
    const std::size_t all = matched.size() + unmatched.size();
    std::string result = std::to_string(matched.size()) + " of " + std::to_string(all) +
                         " adapters have a weight in this base";
    if (renaming)
      result += "; with \"" + renaming->from + "\" renamed to \"" + renaming->to + "\" " +
                std::to_string(matched_when_renamed) + " would";
    constexpr std::size_t most = 8;
    for (std::size_t k = 0; k < std::min(most, unmatched.size()); ++k) {
      result += "\n  no " + unmatched[k].weight;
      for (std::size_t n = 0; n < unmatched[k].nearest.size(); ++n)
        result += (n == 0 ? "; near: " : ", ") + unmatched[k].nearest[n];
    }
    if (unmatched.size() > most)
      result += "\n  and " + std::to_string(unmatched.size() - most) + " more";
    return result;
  }
};

/// Values in the format that they were stored in.
using stored_values = std::variant<std::vector<float>, std::vector<double>, std::vector<float16>,
                                   std::vector<bfloat16>>;

/// A tensor that replaces one of the base: values, not a difference.
struct replaced_tensor {
  std::string name;    ///< of the base's tensor
  std::string origin;  ///< where it was read
  std::vector<index_t> shape;
  stored_values values;  ///< row-major
};

/// Rows that replace those of an embedding: values, not a difference.
struct trained_rows {
  std::string embedding;  ///< the module
  std::string origin;
  std::vector<index_t> ids;
  index_t features = 0;
  stored_values values;  ///< ids.size() x features, row-major
};

/// Adapters by module name, in byte order of the names. Immutable but for add.
class [[nodiscard]] adapter_set {
 public:
  using map = std::map<std::string, module_adapter, std::less<>>;

  adapter_set() = default;

  /// Throws value_error when the module is there already.
  void add(module_adapter l) {
    std::string name = l.target().module;
    if (!adapters_.emplace(name, std::move(l)).second)
      detail::raise_value("adapter_set::add", "two adapters for the module \"" + name + "\"");
  }
  /// A tensor, or rows, that the file has beside its adapters.
  void add(replaced_tensor t) { replaced_.push_back(std::move(t)); }
  void add(trained_rows r) { rows_.push_back(std::move(r)); }
  /// What a reader should know.
  void add_note(std::string note) { notes_.push_back(std::move(note)); }

  std::size_t size() const { return adapters_.size(); }
  bool empty() const { return adapters_.empty(); }
  /// Iterates over pairs (name, module_adapter).
  auto begin() const { return adapters_.begin(); }
  auto end() const { return adapters_.end(); }
  bool contains(std::string_view module) const { return adapters_.find(module) != adapters_.end(); }
  /// Throws value_error naming what is near.
  const module_adapter& at(std::string_view module) const {
    const auto found = adapters_.find(module);
    if (found != adapters_.end()) return found->second;
    std::vector<std::string> names;
    for (const auto& each : adapters_) names.push_back(each.first);
    std::string near;
    for (const auto& name : detail::nearest_names(module, names))
      near += (near.empty() ? "; near: " : ", ") + name;
    detail::raise_value("adapter_set::at", "no adapter for the module \"" + std::string(module) +
                                               "\"" +
                                               (adapters_.empty() ? "; the set is empty" : near));
  }
  const std::vector<std::string>& notes() const { return notes_; }
  /// Without these the model is not the one that was trained: put them into the base first.
  const std::vector<replaced_tensor>& replaced() const { return replaced_; }
  const std::vector<trained_rows>& rows() const { return rows_; }
  /// The adapters without replaced() and rows().
  adapter_set adapters_alone() const {
    adapter_set result = *this;
    result.replaced_.clear();
    result.rows_.clear();
    return result;
  }
  /// Throws value_error where there is more than adapters.
  void check_adapters_alone(const char* operation) const {
    if (replaced_.empty() && rows_.empty()) return;
    const std::string first =
        replaced_.empty() ? "rows of " + rows_.front().embedding : replaced_.front().name;
    detail::raise_value(
        operation,
        "the set also replaces " + std::to_string(replaced_.size() + rows_.size()) +
            " tensors or rows of the base (the first: " + first +
            "): put those of replaced() and rows() into the base, and pass adapters_alone()");
  }

  /// The same adapters with rename(name) in place of the name of every module and of its tensors.
  /// Throws value_error for two names that become one.
  template <class Rename>
  adapter_set renamed(const Rename& rename) const {
    adapter_set result;
    result.notes_ = notes_;
    for (const auto& [name, l] : adapters_) {
      const adapter_target& t = l.target();
      result.add(l.moved_to(
          {rename(t.module), rename(t.weight), rename(t.bias), t.first_row, t.weight_rows}));
    }
    result.replaced_ = replaced_;
    for (auto& each : result.replaced_) each.name = rename(each.name);
    result.rows_ = rows_;
    for (auto& each : result.rows_) each.embedding = rename(each.embedding);
    return result;
  }

  /// Which adapters have a weight in a base with these tensor names, which have not, and whether
  /// moving a prefix would help.
  template <class Names>
  match_report matched_against(const Names& names_of_base) const {
    const std::set<std::string, std::less<>> base(std::begin(names_of_base),
                                                  std::end(names_of_base));
    match_report report;
    std::vector<std::string> missing;
    for (const auto& [name, l] : adapters_) {
      const std::string& weight = l.target().weight;
      if (base.contains(weight) || base.contains(name)) {
        report.matched.push_back(name);
      } else {
        report.unmatched.push_back({name, weight, {}});
        missing.push_back(weight);
      }
    }
    if (missing.empty()) return report;
    const std::vector<std::string> all(base.begin(), base.end());
    constexpr std::size_t most = 64;  // a hint for each of thousands helps nobody
    for (std::size_t k = 0; k < std::min(most, missing.size()); ++k)
      report.unmatched[k].nearest = detail::nearest_names(missing[k], all);
    find_renaming(base, all, missing, report);
    return report;
  }

 private:
  void find_renaming(const std::set<std::string, std::less<>>& base,
                     const std::vector<std::string>& all, const std::vector<std::string>& missing,
                     match_report& report) const {
    std::size_t best = report.matched.size();
    for (const auto& [from, to] : detail::prefix_moves(missing, all)) {
      const moved_prefix move{from, to};
      std::size_t count = 0;
      for (const auto& each : adapters_) {
        const std::string& weight = each.second.target().weight;
        count += base.contains(move(weight)) || base.contains(move(each.first));
      }
      if (count <= best) continue;
      best = count;
      report.renaming = move;
      report.matched_when_renamed = count;
    }
  }

  map adapters_;
  std::vector<replaced_tensor> replaced_;
  std::vector<trained_rows> rows_;
  std::vector<std::string> notes_;
};

/// Merges a whole set into weights by name: every adapter into weights.at(its target's weight, or
/// its module), as the base stores it, at a strength. Weights is a map-like container of matrices.
/// Throws value_error with the report where a weight is missing or the set also replaces tensors,
/// shape_error where one does not fit: all names and
/// shapes are checked before the first weight is written.
template <class Weights>
  requires requires(Weights& w, const std::string& name) {
    { w.find(name)->second } -> matrix_like;
  }
merge_report merge(Weights& weights, const adapter_set& set, double strength = 1) {
  set.check_adapters_alone("merge");
  const auto weight_of = [&](const module_adapter& l) {
    const auto found = weights.find(l.target().weight);
    return found != weights.end() ? found : weights.find(l.target().module);
  };
  std::vector<std::string> names;
  for (const auto& each : weights) names.push_back(each.first);
  const match_report match = set.matched_against(names);
  if (!match.complete()) detail::raise_value("merge", match.text());
  for (const auto& each : set) {
    const module_adapter& l = each.second;
    const auto view = as_matrix(weight_of(l)->second);
    const bool swapped = l.stored_in_out();
    l.check_fits("merge", swapped ? view.cols() : view.rows(), swapped ? view.rows() : view.cols());
    detail::check_can_merge("merge", weight_of(l)->second, scaled(strength, l));
  }
  merge_report report;
  for (const auto& each : set)
    report += merge(weight_of(each.second)->second, scaled(strength, each.second));
  return report;
}

}  // namespace lora::inline LORA_DETAIL_ABI
