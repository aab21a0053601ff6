// SPDX-License-Identifier: Apache-2.0
//
// lora::peft::read<T = float>(directory)   a LoRA adapter as Hugging Face PEFT saves it: adapter_config.json and
//                                          adapter_model.safetensors, as a map from module names to entries
//
//   const auto file = lora::peft::read("adapters/style");
//   lora::merge(W, file.at("model.layers.0.self_attn.q_proj"));
//   for (const auto& each : file.replacements()) ...              // tensors that replace ones of the base
//   for (const auto& [embedding, rows] : file.token_rows()) ...   // trained rows of embeddings, into the replaced table
//   for (const auto& note : file.notes()) ...                     // what else a user should know
//   file.renamed(peft::moved_prefix{"model.", "language_model."}) // for a base whose modules have moved
//
// Names are the modules' without base_model.model. Each entry holds A [rank, in] and B [out, rank], widened exactly to T, the
// scaling that PEFT would use (alpha / r or alpha / sqrt(r), with rank_pattern and alpha_pattern: the first key that fits wins)
// and whatever else the file has for the module: docs/formats.md has the table of every kind. What cannot be right from the
// files alone is refused with what is missing: no tensor is passed over in silence. read_options has what a caller may know
// beyond the files, and `lenient`, which follows PEFT and lists what it let pass. Values are not looked at: NaN passes, and
// merge_checked finds it.
//
//   throws   format_error naming the file and the tensor or key; std::bad_alloc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora/io/detail/peft_directory.hpp"
#include "lora/io/detail/peft_keys.hpp"
#include "lora/io/detail/peft_metadata.hpp"
#include "lora/io/detail/peft_modules.hpp"
#include "lora/io/detail/peft_version.hpp"
#include "lora/io/format_error.hpp"
#include "lora/io/peft_config.hpp"
#include "lora/io/peft_entry.hpp"
#include "lora/io/peft_replacement.hpp"
#include "lora/io/peft_verbs.hpp"
#include "lora/io/safetensors.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {

/// For adapter_file::renamed: names that begin with one prefix get another; the others stay.
///   file.renamed(peft::moved_prefix{"language_model.model.", "model.language_model."})
struct moved_prefix {
  std::string from, to;
  std::string operator()(const std::string& name) const {
    return name.starts_with(from) ? to + name.substr(from.size()) : name;
  }
};

namespace read_detail {

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
  if (io_detail::last_segment(old) != io_detail::last_segment(parts.name) || !parts.path.starts_with(module))
    lora::detail::raise_value("peft::adapter_file::renamed",
                              io_detail::in_quotes(old) + " keeps its last part, which is not the module's own name");
  parts.path = std::string(io_detail::without_last_segment(parts.name)) + parts.path.substr(module.size());
  return entry<T>(std::move(parts));
}

}  // namespace read_detail

/// The adapters of one file by module name, in byte order of the names, and everything else that the file changes. Immutable.
template <scalar T>
class adapter_file {
 public:
  using entry_map = std::map<std::string, entry<T>, std::less<>>;
  using row_map = std::map<std::string, replaced_rows<T>, std::less<>>;
  struct rest {
    std::vector<replacement> replacements = {};
    row_map token_rows = {};
    std::map<std::string, safetensors::dtype, std::less<>> row_dtypes = {};  ///< in which the rows were stored
    std::vector<std::string> left_out = {}, passed_over = {}, unused_patterns = {}, notes = {};
    bool prefixed = true;
    read_options options = {};
  };

  adapter_file(peft::config config, entry_map entries, std::vector<std::string> left_out)
      : adapter_file(std::move(config), std::move(entries), rest{.left_out = std::move(left_out)}) {}
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
    const auto near = io_detail::near_names(module, entries_, [](const auto& e) -> std::string_view { return e.first; });
    lora::detail::raise_value("peft::adapter_file::at",
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
  /// What a reader should know and no part above says: settings without effect or said twice, trained files beside this one.
  const std::vector<std::string>& notes() const { return more_.notes; }
  /// Keys of rank_pattern and alpha_pattern from which no module of the file takes its value, in words.
  const std::vector<std::string>& unused_patterns() const { return more_.unused_patterns; }
  /// What read_options::lenient let pass, in words.
  const std::vector<std::string>& passed_over() const { return more_.passed_over; }
  /// Whether the file's names begin with base_model.model.
  bool prefixed() const { return more_.prefixed; }

  /// The same file with rename(name) in place of the name of every module, parameter and replaced tensor: for a base whose
  /// modules have moved since the adapter was trained. The file's own target_modules has been evaluated before; what is written
  /// names the new modules. Throws value_error for two names that become one, and for a new name of another last part where PEFT
  /// derives names from it (parameters, attentions).
  template <class Rename>
  adapter_file renamed(const Rename& rename) const {
    rest more = more_;
    more.options.select_by_tensors = true;
    entry_map entries;
    for (const auto& [name, e] : entries_) {
      auto moved = read_detail::renamed_entry(e, rename);
      std::string key = moved.name();
      if (!entries.emplace(std::move(key), std::move(moved)).second) refuse_twice(name);
    }
    std::set<std::string> replaced;
    for (auto& each : more.replacements) {
      each.name = rename(each.name);
      each.key = rename(each.key);
      if (each.applies() && !replaced.insert(each.name).second) refuse_twice(each.name);
    }
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
    lora::detail::raise_value("peft::adapter_file::renamed", io_detail::in_quotes(name) + " gets a name that another has");
  }

  peft::config config_;
  entry_map entries_;
  rest more_;
};

namespace read_detail {

/// From checked tensors and a config to entries.
template <scalar T>
class assembler {
 public:
  assembler(const config& c, const safetensors::file& tensors, const read_options& options)
      : config_(c), tensors_(tensors), options_(options), keys_(c, tensors, options), modules_(c, keys_, tensors, options) {}

  /// `notes` is what the caller knows beyond the tensors.
  adapter_file<T> run(std::vector<std::string> notes) {
    add_modules();
    for (const auto& each : keys_.replacing()) add_replacement(each);
    for (const auto& [module, t] : keys_.token_rows()) add_rows(module, *t);
    more_.left_out = keys_.left_out();
    more_.passed_over.insert(more_.passed_over.begin(), keys_.passed_over().begin(), keys_.passed_over().end());
    if (entries_.empty() && more_.token_rows.empty()) refuse_nothing();
    check_all_rows();
    more_.notes = std::move(notes);
    for (auto& each : io_detail::differences_of_metadata(config_, tensors_)) more_.notes.push_back(std::move(each));
    note_unused(config_.rank_pattern, used_ranks_, "rank_pattern");
    note_unused(config_.alpha_pattern, used_alphas_, "alpha_pattern");
    more_.prefixed = keys_.prefixed();
    more_.options = options_;
    return {config_, std::move(entries_), std::move(more_)};
  }

 private:
  using matrix = lora::detail::row_major_matrix<T>;

  [[noreturn]] void refuse_nothing() const {
    const auto& passed = more_.passed_over;
    const std::string which =
        passed.empty() ? ""
                       : ", after passing over " + std::to_string(passed.size()) + ", the first of them " + passed.front();
    lora::detail::raise(format_error(
        {.path = tensors_.name(),
         .expected = "tensors named ...lora_A.weight and ...lora_B.weight",
         .found = tensors_.size() == 0 ? "none: the file holds no tensor at all" : "none" + which,
         .hint = tensors_.size() == 0
                     ? "nothing was saved: the model had no adapter, or another process held it"
                     : (passed.empty() ? "save the adapter again with save_pretrained of the PEFT model, not of its base"
                                       : "")}));
  }

  // ---- modules
  struct found_module {
    const std::string* path;
    const io_detail::module_tensors* tensors;
    io_detail::adapted what;
    bool loads;
  };
  void add_modules() {
    std::vector<found_module> all;
    for (const auto& [path, t] : keys_.modules()) {
      auto what = modules_.identify(path, t);
      const bool loads = modules_.would_load(what);
      all.push_back({&path, &t, std::move(what), loads});
    }
    if (!all.empty() && std::none_of(all.begin(), all.end(), [](const auto& m) { return m.loads; }))
      refuse_selection(*all.front().tensors->any(), all.size());
    for (const auto& each : all) add(each);
  }
  /// PEFT stops where target_modules selects nothing.
  [[noreturn]] void refuse_selection(const safetensors::entry& first, std::size_t count) const {
    const auto& excluded = config_.exclude_modules;
    const bool excludes = excluded.expression.has_value() || excluded.names.has_value();
    refuse(first, "an adapter of a module that target_modules selects",
           "target_modules " + config_.target_modules.text() +
               (excludes ? " without exclude_modules " + excluded.text() : std::string()) + ", which selects none of the " +
               std::to_string(count) + " modules that the file has adapters for",
           "PEFT finds no module either, and stops: correct the config, or read with read_options::select_by_tensors, which "
           "takes the modules that the tensors name");
  }

  void add(const found_module& m) {
    const auto& [path, tensors, what, loads] = m;
    const auto& t = *tensors;
    if (!loads) {
      if (!options_.lenient)
        refuse(*t.any(), "an adapter of a module that target_modules selects", "one that it does not",
               "PEFT would ignore this tensor; read_options::lenient does too");
      more_.passed_over.push_back("module " + io_detail::in_quotes(what.name) + ": not selected by target_modules");
      return;
    }
    if (t.A == nullptr)
      refuse(*t.any(), "a tensor " + *path + suffix(t, 'A') + " beside it", "none", "the file is incomplete");
    if (t.B == nullptr) {
      if (!options_.lenient)
        refuse(*t.A, "a tensor " + *path + suffix(t, 'B') + " beside it", "none", "the file is incomplete");
      more_.passed_over.push_back("module " + io_detail::in_quotes(what.name) + ": no lora_B, which PEFT takes as zero");
      return;
    }
    check_no_placeholder(t);
    auto parts = factors_of(*path, what, t);
    add_extras(parts, t);
    auto base = modules_.in_base(what.name, *t.A);
    parts.base_name = base.name;
    if (base.shared) parts.shared_with = std::move(base.name);
    used_ranks_.insert(config_.rank_pattern.look_up(what.looked_up).fits);
    used_alphas_.insert(config_.alpha_pattern.look_up(what.looked_up).fits);
    if (entries_.contains(what.name)) refuse(*t.A, "one adapter for " + io_detail::in_quotes(what.name), "two");
    entries_.emplace(what.name, entry<T>(std::move(parts)));
  }
  /// A module of empty factors among others that are whole: no sharded save, which leaves all of them empty.
  void check_no_placeholder(const io_detail::module_tensors& t) const {
    if (!t.A->bytes.empty() || !t.B->bytes.empty()) return;
    const bool others = std::any_of(tensors_.begin(), tensors_.end(), [](const auto& each) { return !each.bytes.empty(); });
    if (others)
      refuse(*t.A, "values", t.A->text(),
             "an empty placeholder, where other modules have their factors: the writer saved nothing for this one (it fused "
             "the projection away, or did not gather its parts)");
  }
  template <class Table, class Used>
  void note_unused(const Table& table, const Used& used, const std::string& key) {
    for (const auto& row : table.rows())
      if (!used.contains(&row))
        more_.unused_patterns.push_back(key + " " + io_detail::in_quotes(row.key) +
                                        ": no module of the file takes its value from it");
  }
  static std::string suffix(const io_detail::module_tensors& t, char factor) {
    return t.embedding ? std::string(".lora_embedding_") + factor : std::string(".lora_") + factor + ".weight";
  }

  // ---- the factors
  entry_parts<T> factors_of(const std::string& path, const io_detail::adapted& what, const io_detail::module_tensors& t) {
    entry_parts<T> parts;
    parts.name = what.name;
    parts.path = path;
    parts.kind = what.kind;
    parts.scale = config_.scaling_of(what.looked_up);
    parts.dtype_A = t.A->dtype;
    parts.dtype_B = t.B->dtype;
    parts.fan_in_fan_out = what.kind == entry_kind::linear && config_.fan_in_fan_out;
    parts.twice = what.kind == entry_kind::attention_out && options_.attention_out_proj_twice;
    const index_t rank = config_.rank_of(what.looked_up);
    if (what.kind == entry_kind::convolution)
      convolution(parts, t, rank);
    else if (what.kind == entry_kind::parameter)
      experts(parts, t, rank);
    else
      matrices(parts, t, rank);
    return parts;
  }

  template <class M, class N>
  lora::adapter<T> adapter_of(const entry_parts<T>& parts, const M& A, const N& B, index_t rank) const {
    const double s = resolve(parts.scale, rank);
    return {A, B, {.alpha = parts.twice ? 2 * s : s, .rule = scaling_rule::fixed}};
  }

  void matrices(entry_parts<T>& parts, const io_detail::module_tensors& t, index_t rank) {
    check_matrix(*t.A);
    check_matrix(*t.B);
    choose_packing(parts, *t.A);
    const auto r = static_cast<std::uint64_t>(rank);
    const auto blocks = static_cast<std::uint64_t>(parts.blocks);
    if (t.A->shape[0] != r) refuse_rank(*t.A, rank, "first", is_flat_stack(t, r) ? flat_stack_hint : nullptr);
    const bool packed_B = parts.packed == packed_factor::B;
    if (t.B->shape[1] != (packed_B ? r / blocks : r)) refuse_rank(*t.B, rank, "second");
    matrix A = widened(*t.A), B = widened(*t.B);
    if (parts.packed != packed_factor::none) {
      const auto& packed = packed_B ? *t.B : *t.A;
      if (packed.shape[0] % blocks != 0 || r % blocks != 0)
        refuse(packed, "rows and a rank that " + std::to_string(blocks) + " blocks divide", packed.text());
      (packed_B ? B : A) = spread(packed, packed_B ? B : A, parts.blocks);
    }
    parts.experts.push_back(adapter_of(parts, A, B, rank));
  }

  /// The blocks below each other in `packed`, on the diagonal. The result has the elements of the tensor times the blocks, so
  /// that a small file could ask for any memory: a large result must not be mostly zeros.
  matrix spread(const safetensors::entry& t, const matrix& packed, index_t blocks) const {
    constexpr index_t most_blocks = 256, most_elements = (index_t{64} << 20) / static_cast<index_t>(sizeof(T));
    if (blocks > most_blocks && packed.size() > most_elements / blocks)
      refuse(t, "blocks whose matrix has at most 64 MiB, or at most " + std::to_string(most_blocks) + " times their bytes",
             std::to_string(blocks) + " blocks in " + t.text() + ", a matrix of " + std::to_string(packed.rows()) + " x " +
                 std::to_string(packed.cols()) + " * " + std::to_string(blocks),
             "a reader does not ask for so much memory for a small tensor");
    const index_t rows = packed.rows() / blocks;
    matrix result = matrix::Zero(packed.rows(), packed.cols() * blocks);
    for (index_t b = 0; b < blocks; ++b)
      result.block(b * rows, b * packed.cols(), rows, packed.cols()) = packed.middleRows(b * rows, rows);
    return result;
  }

  void choose_packing(entry_parts<T>& parts, const safetensors::entry& t) const {
    if (!config_.bd || parts.kind != entry_kind::linear) return;
    const auto last = io_detail::last_segment(parts.name);
    const auto in = [&](const std::vector<std::string>& names) {
      return std::any_of(names.begin(), names.end(), [&](const auto& n) { return last.find(n) != std::string_view::npos; });
    };
    const bool in_A = in(config_.bd->in_A), in_B = in(config_.bd->in_B);
    if (in_A == in_B && (in_A || config_.bd->strict))
      refuse(t, "a module that use_bdlora puts in one of target_modules_bd_a and target_modules_bd_b",
             in_A ? "one in both" : "one in neither");
    if (!in_A && !in_B) return;
    parts.packed = in_A ? packed_factor::A : packed_factor::B;
    parts.blocks = static_cast<index_t>(config_.bd->blocks);
  }

  /// A [r, channels, kernel...], B [out, r / groups, 1...]. With groups, the blocks of B go on the diagonal, so that U = A * x
  /// over all channels and B * U are what PEFT computes.
  void convolution(entry_parts<T>& parts, const io_detail::module_tensors& t, index_t rank) {
    const auto& A = t.A->shape;
    const auto& B = t.B->shape;
    check_not_empty(*t.A);
    check_not_empty(*t.B);
    check_no_stack(t, rank);
    const auto r = static_cast<std::uint64_t>(rank);
    if (A.size() < 3 || A.size() > 5) refuse(*t.A, "the kernel of a convolution, of 3 to 5 dimensions", t.A->text());
    if (A[0] != r) refuse_rank(*t.A, rank, "first");
    const bool ones = std::all_of(B.begin() + std::min<std::ptrdiff_t>(2, static_cast<std::ptrdiff_t>(B.size())), B.end(),
                                  [](auto extent) { return extent == 1; });
    if (B.size() != A.size() || !ones)
      refuse(*t.B, "a kernel of 1 in every direction, with " + std::to_string(A.size()) + " dimensions", t.B->text());
    if (r % B[1] != 0) refuse(*t.B, "a second dimension that divides the rank " + std::to_string(rank), t.B->text());
    parts.groups = static_cast<index_t>(r / B[1]);
    if (B[0] % (r / B[1]) != 0)
      refuse(*t.B, "outputs that the " + std::to_string(parts.groups) + " groups divide", t.B->text());
    parts.in_channels = static_cast<index_t>(A[1]);
    for (std::size_t k = 2; k < A.size(); ++k) parts.kernel.push_back(static_cast<index_t>(A[k]));
    const matrix lora_A = widened(*t.A);
    const matrix lora_B = widened(*t.B);
    parts.experts.push_back(
        adapter_of(parts, lora_A, parts.groups == 1 ? lora_B : spread(*t.B, lora_B, parts.groups), rank));
  }

  /// A has the ranks of the experts one after the other, expert by expert; B the experts of each rank, rank by rank, or as the
  /// config says.
  void experts(entry_parts<T>& parts, const io_detail::module_tensors& t, index_t rank) {
    check_no_stack(t, rank);
    check_matrix(*t.A);
    check_matrix(*t.B);
    const auto r = static_cast<std::uint64_t>(rank);
    if (t.A->shape[0] % r != 0) refuse_rank(*t.A, rank, "a multiple of it as its first");
    if (t.B->shape[1] != t.A->shape[0])
      refuse(*t.B, "as many columns as lora_A has rows, " + std::to_string(t.A->shape[0]), t.B->text());
    const auto count = static_cast<index_t>(t.A->shape[0] / r);
    choose_orientation(parts, t, count);
    const bool grouped = columns_of(parts, t, count) == expert_columns::grouped_by_expert;
    const matrix A = widened(*t.A), B = widened(*t.B);
    parts.experts.reserve(static_cast<std::size_t>(count));
    for (index_t e = 0; e < count; ++e) {
      matrix of_expert(B.rows(), rank);
      for (index_t k = 0; k < rank; ++k) of_expert.col(k) = B.col(grouped ? e * rank + k : k * count + e);
      const auto rows = A.middleRows(e * rank, rank);
      if (parts.stored_transposed)
        parts.experts.push_back(adapter_of(parts, of_expert.transpose(), rows.transpose(), rank));
      else
        parts.experts.push_back(adapter_of(parts, rows, of_expert, rank));
    }
  }

  /// Whether slices take B A or its transpose: what the caller says, else B A. Files of PEFT before 0.19.1 have the transpose,
  /// and a square stack fits either way.
  void choose_orientation(entry_parts<T>& parts, const io_detail::module_tensors& t, index_t count) const {
    const auto before = io_detail::comes_before(config_.peft_version, {0, 19, 1});
    const bool in_doubt = before.value_or(true);
    if (options_.parameters_in_out) {
      // For one expert the tensors may be those of a matrix, which never is transposed.
      parts.stored_transposed = in_doubt && *options_.parameters_in_out && count > 1;
      parts.fan_in_fan_out = *options_.parameters_in_out && !parts.stored_transposed;
      return;
    }
    if (!in_doubt || t.A->shape[1] != t.B->shape[0]) return;
    parts.orientation_unsaid = count == 1;
    if (count > 1)
      refuse(
          *t.A, "to know whether the square slices of " + io_detail::in_quotes(parts.name) + " take B A or its transpose",
          config_.peft_version.empty() ? "no peft_version in the config"
                                       : "peft_version " + io_detail::in_quotes(config_.peft_version),
          "PEFT before 0.19.1 saved stacks of experts transposed, and later versions load such a file without a word: read "
          "with read_options::parameters_in_out = true for the transpose (what PEFT 0.17 and 0.18 trained), or false for B A");
  }

  expert_columns columns_of(const entry_parts<T>& parts, const io_detail::module_tensors& t, index_t count) const {
    expert_layout said;
    for (const auto& [name, layout] : config_.expert_layouts) {
      if (!name.empty() && !config_detail::is_or_ends_with(parts.name, name)) continue;
      if (layout.lora_B) said.lora_B = layout.lora_B;
      if (layout.experts) said.experts = layout.experts;
    }
    if (said.experts && *said.experts != static_cast<std::uint64_t>(count))
      refuse(*t.A, std::to_string(*said.experts) + " experts, as num_experts in the config says",
             std::to_string(count) + " in " + t.A->text());
    const auto& option = options_.experts_grouped_b;
    if (!option) return said.lora_B.value_or(expert_columns::rank_major);
    const auto wanted = *option ? expert_columns::grouped_by_expert : expert_columns::rank_major;
    if (said.lora_B.value_or(wanted) != wanted)
      refuse(*t.B, "lora_B_layout in the config as read_options::experts_grouped_b says", "the other order",
             "the option is for files that do not say it");
    return wanted;
  }

  /// Factors of all experts in one tensor of three dimensions: how other trainers save them.
  void check_no_stack(const io_detail::module_tensors& t, index_t rank) const {
    const auto &A = t.A->shape, &B = t.B->shape;
    if (A.size() != 3 || B.size() != 3) return;
    const auto r = static_cast<std::uint64_t>(rank);
    const bool kernel = A[0] == r && B[2] == 1;
    const bool leading = A[1] == r && B[2] == r && (A[0] == B[0] || A[0] == 1 || B[0] == 1);
    const bool trailing = A[1] == r && B[1] == r && A[0] == B[2];
    if (kernel || (!leading && !trailing)) return;
    refuse(*t.A, "two dimensions", t.A->text() + " beside lora_B " + t.B->text() + ", a stack of experts",
           "other trainers save the factors of all experts so; PEFT cannot load them, and they are not read yet: PEFT has "
           "[rank * experts, in] and [out, rank * experts] under target_parameters");
  }
  bool is_flat_stack(const io_detail::module_tensors& t, std::uint64_t rank) const {
    return t.A->shape[0] % rank == 0 && t.A->shape[0] == t.B->shape[1];
  }
  static constexpr const char* flat_stack_hint =
      "these may be several experts' factors: name the parameter in target_parameters, as PEFT does; or the config and the "
      "tensors do not belong together, or rank_pattern lacks this module";

  // ---- what a module has beside factors
  void add_extras(entry_parts<T>& parts, const io_detail::module_tensors& t) {
    const auto out = static_cast<std::uint64_t>(parts.experts.front().out_features());
    const auto rank = static_cast<std::uint64_t>(parts.experts.front().rank());
    check_kind(parts, *t.A);
    extra(parts.bias, parts.dtype_bias, t, t.bias, config_.lora_bias, "lora_bias", ".lora_B.bias", out, parts.name);
    extra(parts.magnitude, parts.dtype_magnitude, t, t.magnitude, config_.use_dora, "use_dora", ".lora_magnitude_vector",
          out, parts.name);
    const bool kasa = config_.change == base_change::kasa && parts.kind == entry_kind::linear;
    extra(parts.diagonal, parts.dtype_diagonal, t, t.diagonal, kasa, "kasa_config", ".lora_diag", rank, parts.name);
    if (parts.kind == entry_kind::linear) parts.change = config_.change;
  }

  /// Throws when the config asks for what this kind cannot have: PEFT refuses it, or it is more than the entry could say.
  void check_kind(const entry_parts<T>& parts, const safetensors::entry& t) const {
    const bool parameter = parts.kind == entry_kind::parameter;
    const bool attention = is_attention(parts.kind);
    const auto refuse_key = [&](const std::string& key, const std::string& why) {
      refuse(t, "a config without " + key + " for the " + name_of(parts.kind) + " " + io_detail::in_quotes(parts.name),
             "one with it", why);
    };
    if (config_.use_dora && (attention || parameter))
      refuse_key("use_dora", "PEFT has no DoRA of attentions and parameters and refuses to load this adapter");
    if (config_.lora_bias && (parameter || parts.kind == entry_kind::embedding))
      refuse_key("lora_bias", "PEFT has no such bias for embeddings and parameters and refuses to load this adapter");
    if (config_.change == base_change::kasa && (attention || parameter))
      refuse_key("kasa_config", "PEFT has no KaSA of attentions and parameters and refuses to load this adapter");
    if (config_.change != base_change::none && (attention || parameter))
      refuse_key("init_lora_weights " + io_detail::in_quotes(config_.init_lora_weights),
                 "PEFT changes the base when it loads " + std::string(entry<T>::change_name(config_.change)) +
                     ", which converted() knows for linear modules only: convert the adapter with "
                     "path_initial_model_for_weight_conversion of save_pretrained");
  }

  void extra(std::vector<T>& values, safetensors::dtype& dtype, const io_detail::module_tensors& t,
             const safetensors::entry* tensor, bool asked_for, const char* key, const char* suffix, std::uint64_t size,
             const std::string& module) {
    if (tensor == nullptr && !asked_for) return;
    if (tensor == nullptr)
      refuse(*t.A, "a tensor " + module + suffix + " beside it, for " + key, "none", "the file is incomplete");
    if (!asked_for) {
      if (!options_.lenient)
        refuse(*tensor, std::string(key) + " in the config, for this tensor", "none",
               "PEFT would ignore this tensor; read_options::lenient does too");
      more_.passed_over.push_back("tensor " + io_detail::in_quotes(tensor->name) + ": the config does not ask for it");
      return;
    }
    check_not_empty(*tensor);
    std::uint64_t elements = 1;
    for (const auto extent : tensor->shape) elements *= extent;  // cannot overflow: the reader counted the bytes
    if (elements != size) refuse(*tensor, std::to_string(size) + " values", tensor->text());
    check_holds(*tensor);
    values = tensors_.template copy<T>(tensor->name);
    dtype = tensor->dtype;
  }

  void add_replacement(const io_detail::replacing_tensor& each) {
    const auto& t = *each.tensor;
    more_.replacements.push_back({modules_.in_base(each.name, t).name,
                                  std::string(keys_.bare(t)),
                                  each.why,
                                  t.dtype,
                                  {t.shape.begin(), t.shape.end()},
                                  {t.bytes.begin(), t.bytes.end()}});
  }

  /// Rows of no token are no values, and right.
  void add_rows(const std::string& module, const safetensors::entry& t) {
    if (t.shape.size() != 2 || t.shape[0] != 0) check_matrix(t);
    const std::vector<index_t>* ids = nullptr;
    for (const auto& [name, numbers] : config_.trainable_tokens) {
      if (!name.empty() && !config_detail::is_or_ends_with(module, name)) continue;
      if (ids != nullptr && *ids != numbers)
        refuse(t, "the same tokens in every key of trainable_token_indices that fits " + io_detail::in_quotes(module),
               "others in " + io_detail::in_quotes(name), "keep the key that belongs to this embedding");
      ids = &numbers;
    }
    if (ids == nullptr) refuse(t, "trainable_token_indices in the config for " + io_detail::in_quotes(module), "none");
    if (ids->size() != t.shape[0])
      refuse(t, "a row for each of the " + std::to_string(ids->size()) + " tokens of the config", t.text());
    if (entries_.find(module) != entries_.end())
      refuse(t, "an embedding with trained rows or with an adapter", "one with both",
             "which of them wins for a trained row is not defined");
    auto sorted = *ids;
    std::sort(sorted.begin(), sorted.end());
    if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end())
      refuse(t, "every token of trainable_token_indices once", "one twice");
    more_.token_rows.emplace(module, replaced_rows<T>(*ids, widened(t)));
    more_.row_dtypes.emplace(module, t.dtype);
  }

  /// Throws when tokens of the config have no rows. Embeddings that share a weight and have the same tokens share the rows, and
  /// PEFT saves them once.
  void check_all_rows() {
    std::set<std::vector<index_t>> there;
    for (const auto& each : more_.token_rows) there.insert(each.second.ids());
    for (const auto& [name, ids] : config_.trainable_tokens) {
      if (ids.empty() || there.contains(ids)) continue;
      if (!options_.lenient)
        lora::detail::raise(format_error(
            {.path = tensors_.name(),
             .item = "trainable_token_indices",
             .expected = "a tensor " + (name.empty() ? "<input embedding>" : name) + ".token_adapter.trainable_tokens_delta",
             .found = "none",
             .hint = "the file is incomplete"}));
      more_.passed_over.push_back("trainable_token_indices " + io_detail::in_quotes(name) +
                                  ": no rows, which PEFT takes as those of the base");
    }
  }

  // ---- tensors
  void check_not_empty(const safetensors::entry& t) const {
    if (t.bytes.empty()) io_detail::refuse_empty(tensors_, t);
  }
  void check_matrix(const safetensors::entry& t) const {
    check_not_empty(t);
    if (t.shape.size() != 2) refuse(t, "two dimensions", t.text());
  }
  void check_holds(const safetensors::entry& t) const {
    if (!safetensors::holds_exactly<T>(t.dtype))
      refuse(t, std::string(name_of(safetensors::dtype_of<T>())) + " or a type whose every value it holds", t.text(),
             t.dtype == safetensors::dtype::f64   ? "read<double>() keeps every value"
             : t.dtype == safetensors::dtype::f32 ? "read<float>() keeps every value"
                                                  : "");
  }
  /// First dimension x product of the others.
  matrix widened(const safetensors::entry& t) const {
    check_holds(t);
    const auto values = tensors_.template copy<T>(t.name);
    const auto rows = static_cast<index_t>(t.shape[0]);
    if (rows == 0) return matrix(0, static_cast<index_t>(t.shape.back()));
    return Eigen::Map<const matrix>(values.data(), rows, static_cast<index_t>(values.size()) / rows);
  }

  [[noreturn]] void refuse_rank(const safetensors::entry& t, index_t rank, const char* dimension,
                                const char* hint = nullptr) const {
    refuse(t, "rank " + std::to_string(rank) + ", as the config says for this module, as its " + dimension + " dimension",
           t.text(),
           hint != nullptr ? hint : "the config and the tensors do not belong together, or rank_pattern lacks this module");
  }
  [[noreturn]] void refuse(const safetensors::entry& t, std::string expected, std::string found,
                           std::string hint = "") const {
    io_detail::refuse_tensor(tensors_, t, std::move(expected), std::move(found), std::move(hint));
  }

  const config& config_;
  const safetensors::file& tensors_;
  const read_options& options_;
  io_detail::peft_keys keys_;
  io_detail::peft_modules modules_;
  typename adapter_file<T>::entry_map entries_;
  typename adapter_file<T>::rest more_;
  std::set<const typename pattern_table<index_t>::row*> used_ranks_;
  std::set<const typename pattern_table<double>::row*> used_alphas_;
};

/// The config of a file that stands alone, out of its metadata.
inline config config_in(const safetensors::file& tensors, const read_options& options) {
  const auto found = io_detail::configs_in_metadata(tensors);
  if (found.size() == 1) return parse_config(found.front(), tensors.name() + " (metadata)", options);
  lora::detail::raise(format_error(
      {.path = tensors.name(),
       .expected = "an adapter's directory, or a file whose metadata holds the config",
       .found =
           found.empty() ? "a file in place of the directory" : "the configs of " + std::to_string(found.size()) + " models",
       .hint = found.empty()
                   ? "PEFT saves adapter_config.json beside the weights; without it the scaling is not known: pass the "
                     "directory with both"
                   : "give each model's adapter a file of its own"}));
}

}  // namespace read_detail

/// The adapters that a config and the tensors beside it describe; for parts that did not come from one directory.
template <scalar T = float>
adapter_file<T> assemble(const config& c, const safetensors::file& tensors, const read_options& options = {}) {
  return read_detail::assembler<T>(c, tensors, options).run({});
}

/// Reads a directory, or a single file whose metadata holds the whole config (as diffusers writes it); see the top of this file.
/// T is float, double, or a 16-bit type when the file holds that type.
template <scalar T = float>
adapter_file<T> read(const std::filesystem::path& path, const read_options& options = {}) {
  std::error_code failure;
  if (std::filesystem::is_regular_file(path, failure)) {
    const auto tensors = safetensors::read(path);
    return assemble<T>(read_detail::config_in(tensors, options), tensors, options);
  }
  const io_detail::peft_directory directory(path);
  if (!directory.has(directory.config_name)) {
    if (!directory.has(directory.weights_name)) directory.refuse_config();
    const auto tensors = safetensors::read(directory.weights());
    if (io_detail::configs_in_metadata(tensors).empty()) directory.refuse_config();
    return assemble<T>(read_detail::config_in(tensors, options), tensors, options);
  }
  // The config first: it says why a file of another kind is refused, also where its weights are missing.
  const auto c = read_config(directory.config(), options);
  if (!directory.has(directory.weights_name)) directory.refuse_weights();
  const auto tensors = safetensors::read(directory.weights());
  return read_detail::assembler<T>(c, tensors, options).run(directory.trained_files());
}

}  // namespace lora::inline LORA_DETAIL_ABI::peft
