// SPDX-License-Identifier: Apache-2.0
//
// What a PEFT directory holds, read: entries by module name, tensors that replace ones of the base,
// trained rows, and notes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora/embed.hpp"
#include "lora/io/detail/module_path.hpp"
#include "lora/io/peft_config.hpp"
#include "lora/io/peft_entry.hpp"
#include "lora/io/peft_replacement.hpp"
#include "lora/moved_prefix.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {

/// For adapter_file::renamed.
using lora::moved_prefix;

namespace file_detail {

/// A tensor's key in the file under the renamed base name. PEFT's own modules stay as far from the
/// end as they were.
template <class Rename>
std::string renamed_key(const std::string& key, const std::string& name, const std::string& moved,
                        const Rename& rename) {
  if (key == name) return moved;
  const auto is_own = [](std::string_view segment) {
    return segment == "base_layer" || segment == "token_adapter" || segment == "modules_to_save" ||
           segment == "original_module";
  };
  const auto segments = io_detail::segments(key);
  const auto own = std::count_if(segments.begin(), segments.end(), is_own);
  auto parts = io_detail::segments(moved);
  if (segments.size() - static_cast<std::size_t>(own) != io_detail::segments(name).size())
    return rename(key);
  for (std::size_t from_end = 0; from_end < segments.size(); ++from_end) {
    const auto segment = segments[segments.size() - 1 - from_end];
    if (is_own(segment) && from_end <= parts.size())
      parts.insert(parts.end() - static_cast<std::ptrdiff_t>(from_end), segment);
  }
  return io_detail::joined(parts);
}

template <scalar T, class Rename>
entry<T> renamed_entry(const entry<T>& e, const Rename& rename) {
  entry_parts<T> parts = e.parts();
  const std::string old = parts.name;
  parts.name = rename(parts.name);
  parts.base_name = rename(parts.base_name);
  if (!parts.shared_with.empty()) parts.shared_with = rename(parts.shared_with);
  if (parts.path == old) {
    parts.path = parts.name;
    return entry<T>(std::move(parts));
  }
  // PEFT's path is that of the module around it, and PEFT's own modules.
  const auto module = io_detail::without_last_segment(old);
  if (io_detail::last_segment(old) != io_detail::last_segment(parts.name) ||
      !parts.path.starts_with(module))
    lora::detail::raise_value(
        "peft::adapter_file::renamed",
        io_detail::in_quotes(old) + " keeps its last part, which is not the module's own name");
  parts.path =
      std::string(io_detail::without_last_segment(parts.name)) + parts.path.substr(module.size());
  return entry<T>(std::move(parts));
}

}  // namespace file_detail

/// The adapters of one file by module name, in byte order of the names, and everything else that
/// the file changes. Immutable.
template <scalar T>
class adapter_file {
 public:
  using entry_map = std::map<std::string, entry<T>, std::less<>>;
  using row_map = std::map<std::string, replaced_rows<T>, std::less<>>;
  struct rest {
    std::vector<replacement> replacements = {};
    row_map token_rows = {};
    std::map<std::string, safetensors::dtype, std::less<>> row_dtypes =
        {};  ///< in which the rows were stored
    std::vector<std::string> left_out = {}, passed_over = {}, unused_patterns = {}, notes = {};
    bool prefixed = true;
    bool names_changed = false;  ///< the config's keys are for other names
    read_options options = {};
  };

  adapter_file(peft::config config, entry_map entries, std::vector<std::string> left_out)
      : adapter_file(std::move(config), std::move(entries), rest{.left_out = std::move(left_out)}) {
  }
  adapter_file(peft::config config, entry_map entries, rest more = {})
      : config_(std::move(config)), entries_(std::move(entries)), more_(std::move(more)) {}

  const peft::config& config() const { return config_; }
  std::size_t size() const { return entries_.size(); }
  /// Iterates over pairs (name, entry).
  auto begin() const { return entries_.begin(); }
  auto end() const { return entries_.end(); }
  std::vector<std::string> names() const {
    std::vector<std::string> result;
    for (const auto& each : entries_) result.push_back(each.first);
    return result;
  }

  bool contains(std::string_view module) const { return entries_.find(module) != entries_.end(); }
  /// Throws value_error naming what is near.
  const entry<T>& at(std::string_view module) const {
    const auto found = entries_.find(module);
    if (found != entries_.end()) return found->second;
    const auto near = io_detail::near_names(
        module, entries_, [](const auto& e) -> std::string_view { return e.first; });
    lora::detail::raise_value(
        "peft::adapter_file::at",
        "no adapter for the module " + io_detail::in_quotes(module) +
            (near.empty() ? "; the file has none" : "; near: " + io_detail::listed(near)));
  }

  /// Tensors that replace ones of the base, in byte order of their keys.
  const std::vector<replacement>& replacements() const { return more_.replacements; }
  /// Trained rows of embeddings (trainable_token_indices), by the embedding's name.
  const row_map& token_rows() const { return more_.token_rows; }
  /// The format in which the file had those of an embedding; that of T for others.
  safetensors::dtype row_dtype(std::string_view embedding) const {
    const auto found = more_.row_dtypes.find(embedding);
    return found == more_.row_dtypes.end() ? safetensors::dtype_of<T>() : found->second;
  }

  /// Config keys that were passed over (see read_options::ignore_keys).
  const std::vector<std::string>& ignored_keys() const { return config_.ignored_keys; }
  /// Tensors of whole modules that were left out (see read_options::leave_out_saved_modules).
  const std::vector<std::string>& left_out() const { return more_.left_out; }
  /// What a reader should know and no part above says: settings without effect or said twice,
  /// trained files beside this one.
  const std::vector<std::string>& notes() const { return more_.notes; }
  /// Keys of rank_pattern and alpha_pattern from which no module of the file takes its value, in
  /// words.
  const std::vector<std::string>& unused_patterns() const { return more_.unused_patterns; }
  /// What read_options::lenient let pass, in words.
  const std::vector<std::string>& passed_over() const { return more_.passed_over; }
  /// Whether the file's names begin with base_model.model.
  bool prefixed() const { return more_.prefixed; }
  /// Whether names are others than those that the config was written for: renamed, or without a
  /// wrapper inside.
  bool names_changed() const { return more_.names_changed; }

  /// The same file with rename(name) in place of the name of every module, parameter and replaced
  /// tensor: for a base whose modules have moved since the adapter was trained. The file's own
  /// target_modules has been evaluated before; what is written names the new modules in
  /// target_modules, rank_pattern and alpha_pattern. Other keys keep their names, and write()
  /// refuses where they are full ones (modules_to_save, target_parameters,
  /// trainable_token_indices). Throws value_error for two names that become one, and for a new name
  /// of another last part where PEFT derives names from it (parameters, attentions).
  template <class Rename>
  adapter_file renamed(const Rename& rename) const {
    rest more = more_;
    more.names_changed = true;
    more.unused_patterns.clear();  // they are of the old names
    entry_map entries;
    for (const auto& [name, e] : entries_) {
      auto moved = file_detail::renamed_entry(e, rename);
      std::string key = moved.name();
      if (!entries.emplace(std::move(key), std::move(moved)).second) refuse_twice(name);
    }
    std::map<std::string, std::string> replaced;  // old names by new ones
    for (auto& each : more.replacements) {
      const std::string old = std::exchange(each.name, rename(each.name));
      each.key = file_detail::renamed_key(each.key, old, each.name, rename);
      if (replaced.emplace(each.name, old).first->second != old) refuse_twice(old);
    }
    std::sort(more.replacements.begin(), more.replacements.end(),
              [](const auto& a, const auto& b) { return a.key < b.key; });
    more.token_rows.clear();
    more.row_dtypes.clear();
    for (const auto& [name, rows] : more_.token_rows) {
      std::string moved = rename(name);
      more.row_dtypes.emplace(moved, row_dtype(name));
      if (!more.token_rows.emplace(std::move(moved), rows).second) refuse_twice(name);
    }
    return {config_, std::move(entries), std::move(more)};
  }
  /// What its reader was told beyond the files.
  const read_options& options() const { return more_.options; }

 private:
  [[noreturn]] static void refuse_twice(const std::string& name) {
    lora::detail::raise_value(
        "peft::adapter_file::renamed",
        io_detail::in_quotes(name) + " gets a name that another tensor or module has");
  }

  peft::config config_;
  entry_map entries_;
  rest more_;
};
static_assert(lora::detail::file_like<adapter_file<float>>);

}  // namespace lora::inline LORA_DETAIL_ABI::peft
