// SPDX-License-Identifier: Apache-2.0
//
// From a config and the tensors beside it to entries, replacements and trained rows: every tensor
// is used, or named in an error.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "lora/io/detail/module_path.hpp"
#include "lora/io/detail/peft_keys.hpp"
#include "lora/io/detail/peft_metadata.hpp"
#include "lora/io/detail/peft_modules.hpp"
#include "lora/io/detail/peft_version.hpp"
#include "lora/io/detail/tensor_rows.hpp"
#include "lora/io/format_error.hpp"
#include "lora/io/peft_config.hpp"
#include "lora/io/peft_entry.hpp"
#include "lora/io/peft_file.hpp"
#include "lora/io/safetensors_index.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {
namespace read_detail {

using io_detail::in_quotes;
using io_detail::sentence;

/// Whether replacements() get their bytes.
enum class replaced_values { read, left_in_file };

/// From checked tensors and a config to entries.
template <scalar T>
class assembler {
 public:
  assembler(const config& c, const safetensors::index& tensors, const read_options& options)
      : config_(c),
        tensors_(tensors),
        options_(options),
        keys_(c, tensors, options),
        modules_(c, keys_, tensors, options) {}

  /// `notes` is what the caller knows beyond the tensors.
  adapter_file<T> run(std::vector<std::string> notes,
                      replaced_values replaced = replaced_values::read) {
    add_modules();
    for (const auto& each : keys_.replacing()) add_replacement(each, replaced);
    for (const auto& [module, t] : keys_.token_rows()) add_rows(module, *t);
    more_.left_out = keys_.left_out();
    more_.passed_over.insert(more_.passed_over.begin(), keys_.passed_over().begin(),
                             keys_.passed_over().end());
    if (entries_.empty() && more_.token_rows.empty()) refuse_nothing();
    check_all_rows();
    check_all_layouts();
    more_.notes = std::move(notes);
    more_.notes.insert(more_.notes.end(), keys_.notes().begin(), keys_.notes().end());
    for (auto& each : io_detail::differences_of_metadata(config_, tensors_))
      more_.notes.push_back(std::move(each));
    note_unused(config_.rank_pattern, used_ranks_, "rank_pattern");
    note_unused(config_.alpha_pattern, used_alphas_, "alpha_pattern");
    more_.prefixed = keys_.prefixed();
    more_.names_changed = keys_.names_changed();
    more_.options = options_;
    return {config_, std::move(entries_), std::move(more_)};
  }

  /// The tensors of the file's replacements(), in their order.
  const std::vector<io_detail::replacing_tensor>& replacing() const { return keys_.replacing(); }

 private:
  using matrix = lora::detail::row_major_matrix<T>;

  [[noreturn]] void refuse_nothing() const {
    const auto& passed = more_.passed_over;
    const std::string which = passed.empty()
                                  ? ""
                                  : ", after passing over " + std::to_string(passed.size()) +
                                        ", the first of them " + passed.front();
    io_detail::refuse(
        {.path = tensors_.name()}, "tensors named ...lora_A.weight and ...lora_B.weight",
        tensors_.size() == 0 ? "none: the file holds no tensor at all" : "none" + which,
        tensors_.size() == 0
            ? "nothing was saved: the model had no adapter, or another process held it"
            : (passed.empty() ? "save the adapter again with save_pretrained of the PEFT model, "
                                "not of its base"
                              : ""));
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
  [[noreturn]] void refuse_selection(const safetensors::tensor_info& first,
                                     std::size_t count) const {
    std::string others;
    const auto add = [&](bool there, const std::string& text) {
      if (there) others += (others.empty() ? " with " : ", ") + text;
    };
    const auto& excluded = config_.exclude_modules;
    add(excluded.expression || excluded.names, "exclude_modules " + excluded.text());
    add(!config_.saved_modules().empty(),
        "modules_to_save [" + io_detail::listed(config_.saved_modules()) + "]");
    add(!config_.layers_to_transform.empty(), "layers_to_transform");
    add(!config_.target_parameters.empty(),
        "target_parameters [" + io_detail::listed(config_.target_parameters) + "]");
    refuse(first, "an adapter of a module that target_modules selects",
           sentence({"target_modules ", config_.target_modules.text(), others,
                     ", which selects none of the ", std::to_string(count),
                     " modules that the file has adapters for"}),
           "PEFT loads none of these adapters, and stops where it finds no module either: correct "
           "the config, or read with "
           "read_options::select_by_tensors, which takes the modules that the tensors name");
  }

  void add(const found_module& m) {
    const auto& [path, tensors, what, loads] = m;
    const auto& t = *tensors;
    if (!loads) {
      if (!options_.lenient)
        refuse(*t.any(), "an adapter of a module that target_modules selects",
               "one that it does not",
               "PEFT would ignore this tensor; read_options::lenient does too");
      more_.passed_over.push_back("module " + in_quotes(what.name) +
                                  ": not selected by target_modules");
      return;
    }
    if (t.A == nullptr)
      refuse(*t.any(), sentence({"a tensor ", *path, suffix(t, 'A'), " beside it"}), "none",
             "the file is incomplete");
    if (t.B == nullptr) {
      if (!options_.lenient)
        refuse(*t.A, sentence({"a tensor ", *path, suffix(t, 'B'), " beside it"}), "none",
               "the file is incomplete");
      more_.passed_over.push_back("module " + in_quotes(what.name) +
                                  ": no lora_B, which PEFT takes as zero");
      return;
    }
    check_no_placeholder(t);
    auto parts = factors_of(*path, what, t);
    add_extras(parts, t);
    auto base = modules_.in_base(what.name, *t.A);
    parts.base_name = base.name;
    if (base.shared) parts.shared_with = std::move(base.name);
    used_ranks_.insert(what.rank);
    used_alphas_.insert(what.alpha);
    if (entries_.contains(what.name))
      refuse(*t.A, sentence({"one adapter for ", in_quotes(what.name)}), "two");
    entries_.emplace(what.name, entry<T>(std::move(parts)));
  }
  /// Empty factors in one module while others are whole. A sharded save leaves all of them empty.
  void check_no_placeholder(const io_detail::module_tensors& t) const {
    if (!t.A->empty() || !t.B->empty()) return;
    const auto& all = keys_.modules();
    const bool others = std::any_of(all.begin(), all.end(), [](const auto& each) {
      return each.second.A != nullptr && !each.second.A->empty();
    });
    if (others)
      refuse(*t.A, "values", t.A->text(),
             "an empty placeholder, where other modules have their factors: the writer saved "
             "nothing for this one (it fused "
             "the projection away, or did not gather its parts)");
  }
  template <class Table, class Used>
  void note_unused(const Table& table, const Used& used, const std::string& key) {
    for (const auto& row : table.rows())
      if (!used.contains(&row))
        more_.unused_patterns.push_back(key + " " + in_quotes(row.key) +
                                        ": no module of the file takes its value from it");
  }
  static std::string suffix(const io_detail::module_tensors& t, char factor) {
    return t.embedding ? std::string(".lora_embedding_") + factor
                       : std::string(".lora_") + factor + ".weight";
  }

  // ---- the factors
  entry_parts<T> factors_of(const std::string& path, const io_detail::adapted& what,
                            const io_detail::module_tensors& t) {
    entry_parts<T> parts;
    parts.name = what.name;
    parts.path = path;
    parts.kind = what.kind;
    parts.scale = {.alpha = what.alpha == nullptr ? config_.lora_alpha : what.alpha->value,
                   .rule = config_.rule};
    parts.dtype_A = t.A->dtype;
    parts.dtype_B = t.B->dtype;
    parts.fan_in_fan_out = what.kind == entry_kind::linear && config_.fan_in_fan_out;
    parts.twice = what.kind == entry_kind::attention_out && options_.attention_out_proj_twice;
    const index_t rank = what.rank == nullptr ? config_.r : what.rank->value;
    if (what.kind == entry_kind::convolution)
      convolution(parts, t, rank);
    else if (what.kind == entry_kind::parameter)
      experts(parts, t, rank);
    else
      matrices(parts, t, rank);
    return parts;
  }

  /// Takes a matrix that is moved in without a copy.
  template <class M, class N>
  lora::adapter<T> adapter_of(const entry_parts<T>& parts, M&& A, N&& B, index_t rank) const {
    const double s = resolve(parts.scale, rank);
    return {std::forward<M>(A),
            std::forward<N>(B),
            {.alpha = parts.twice ? 2 * s : s, .rule = scaling_rule::fixed}};
  }

  void matrices(entry_parts<T>& parts, const io_detail::module_tensors& t, index_t rank) {
    check_matrix(*t.A);
    check_matrix(*t.B);
    choose_packing(parts, *t.A);
    const auto r = static_cast<std::uint64_t>(rank);
    const auto blocks = static_cast<std::uint64_t>(parts.blocks);
    if (t.A->shape[0] != r)
      refuse_rank(*t.A, rank, "first", is_flat_stack(t, r) ? flat_stack_hint : std::string_view{});
    const bool packed_B = parts.packed == packed_factor::B;
    if (t.B->shape[1] != (packed_B ? r / blocks : r)) refuse_rank(*t.B, rank, "second");
    matrix A = widened(*t.A), B = widened(*t.B);
    if (parts.packed != packed_factor::none) {
      const auto& packed = packed_B ? *t.B : *t.A;
      if (packed.shape[0] % blocks != 0 || r % blocks != 0)
        refuse(packed,
               sentence({"rows and a rank that ", std::to_string(blocks), " blocks divide"}),
               packed.text());
      (packed_B ? B : A) = spread(packed, packed_B ? B : A, parts.blocks);
    }
    parts.experts.push_back(adapter_of(parts, std::move(A), std::move(B), rank));
  }

  /// The blocks below each other in `packed`, on the diagonal. The result has the elements of the
  /// tensor times the blocks, so that a small file could ask for any memory: a large result must
  /// not be mostly zeros.
  matrix spread(const safetensors::tensor_info& t, const matrix& packed, index_t blocks) const {
    constexpr index_t most_blocks = 256,
                      most_elements = (index_t{64} << 20) / static_cast<index_t>(sizeof(T));
    if (blocks > most_blocks && packed.size() > most_elements / blocks)
      refuse(t,
             sentence({"blocks whose matrix has at most 64 MiB, or at most ",
                       std::to_string(most_blocks), " times their bytes"}),
             sentence({std::to_string(blocks), " blocks in ", t.text(), ", a matrix of ",
                       std::to_string(packed.rows()), " x ", std::to_string(packed.cols()), " * ",
                       std::to_string(blocks)}),
             "a reader does not ask for so much memory for a small tensor");
    const index_t rows = packed.rows() / blocks;
    matrix result = matrix::Zero(packed.rows(), packed.cols() * blocks);
    for (index_t b = 0; b < blocks; ++b)
      result.block(b * rows, b * packed.cols(), rows, packed.cols()) =
          packed.middleRows(b * rows, rows);
    return result;
  }

  void choose_packing(entry_parts<T>& parts, const safetensors::tensor_info& t) const {
    if (!config_.bd || parts.kind != entry_kind::linear) return;
    const auto last = io_detail::last_segment(parts.name);
    const auto in = [&](const std::vector<std::string>& names) {
      return std::any_of(names.begin(), names.end(),
                         [&](const auto& n) { return last.find(n) != std::string_view::npos; });
    };
    const bool in_A = in(config_.bd->in_A), in_B = in(config_.bd->in_B);
    if (in_A == in_B && (in_A || config_.bd->strict))
      refuse(t,
             "a module that use_bdlora puts in one of target_modules_bd_a and target_modules_bd_b",
             in_A ? "one in both" : "one in neither");
    if (!in_A && !in_B) return;
    parts.packed = in_A ? packed_factor::A : packed_factor::B;
    parts.blocks = static_cast<index_t>(config_.bd->blocks);
  }

  /// A [r, channels, kernel...], B [out, r / groups, 1...]. With groups, the blocks of B go on the
  /// diagonal, so that U = A * x over all channels and B * U are what PEFT computes.
  void convolution(entry_parts<T>& parts, const io_detail::module_tensors& t, index_t rank) {
    const auto& A = t.A->shape;
    const auto& B = t.B->shape;
    check_not_empty(*t.A);
    check_not_empty(*t.B);
    check_no_stack(t, rank);
    const auto r = static_cast<std::uint64_t>(rank);
    if (A.size() < 3 || A.size() > 5)
      refuse(*t.A, "the kernel of a convolution, of 3 to 5 dimensions", t.A->text());
    if (A[0] != r) refuse_rank(*t.A, rank, "first");
    const bool ones =
        std::all_of(B.begin() + std::min<std::ptrdiff_t>(2, static_cast<std::ptrdiff_t>(B.size())),
                    B.end(), [](auto extent) { return extent == 1; });
    if (B.size() != A.size() || !ones)
      refuse(*t.B,
             sentence({"a kernel of 1 in every direction, with ", std::to_string(A.size()),
                       " dimensions"}),
             t.B->text());
    if (r % B[1] != 0)
      refuse(*t.B, sentence({"a second dimension that divides the rank ", std::to_string(rank)}),
             t.B->text());
    parts.groups = static_cast<index_t>(r / B[1]);
    if (B[0] % (r / B[1]) != 0)
      refuse(*t.B, sentence({"outputs that the ", std::to_string(parts.groups), " groups divide"}),
             t.B->text());
    parts.in_channels = static_cast<index_t>(A[1]);
    for (std::size_t k = 2; k < A.size(); ++k) parts.kernel.push_back(static_cast<index_t>(A[k]));
    matrix lora_A = widened(*t.A), lora_B = widened(*t.B);
    if (parts.groups != 1) lora_B = spread(*t.B, lora_B, parts.groups);
    parts.experts.push_back(adapter_of(parts, std::move(lora_A), std::move(lora_B), rank));
  }

  /// A has the ranks of the experts one after the other, expert by expert; B the experts of each
  /// rank, rank by rank, or as the config says.
  void experts(entry_parts<T>& parts, const io_detail::module_tensors& t, index_t rank) {
    check_no_stack(t, rank);
    check_matrix(*t.A);
    check_matrix(*t.B);
    const auto r = static_cast<std::uint64_t>(rank);
    if (t.A->shape[0] % r != 0) refuse_rank(*t.A, rank, "a multiple of it as its first");
    if (t.B->shape[1] != t.A->shape[0])
      refuse(*t.B,
             sentence({"as many columns as lora_A has rows, ", std::to_string(t.A->shape[0])}),
             t.B->text());
    const auto count = static_cast<index_t>(t.A->shape[0] / r);
    choose_orientation(parts, t, count);
    const bool grouped = columns_of(parts, t, count) == expert_columns::grouped_by_expert;
    check_holds(*t.A);
    check_holds(*t.B);
    auto all_B = columns_by_expert(*t.B, rank, count, grouped);
    parts.experts.reserve(static_cast<std::size_t>(count));
    for (index_t e = 0; e < count; ++e) {
      matrix A = widened_rows(*t.A, e * rank, rank);
      matrix& B = all_B[static_cast<std::size_t>(e)];
      if (parts.stored_transposed)
        parts.experts.push_back(
            adapter_of(parts, matrix(B.transpose()), matrix(A.transpose()), rank));
      else
        parts.experts.push_back(adapter_of(parts, std::move(A), std::move(B), rank));
    }
  }

  /// The columns of each expert, of a tensor that is read in blocks of at most 1 MiB, or a row.
  std::vector<matrix> columns_by_expert(const safetensors::tensor_info& t, index_t rank,
                                        index_t count, bool grouped) const {
    const auto rows = static_cast<index_t>(t.shape[0]);
    std::vector<matrix> result(static_cast<std::size_t>(count));
    for (matrix& B : result) B.resize(rows, rank);
    const index_t row_bytes = count * rank * static_cast<index_t>(sizeof(T));
    const index_t most = std::max<index_t>(1, (index_t{1} << 20) / row_bytes);
    for (index_t first = 0; first < rows; first += most) {
      const matrix some = widened_rows(t, first, std::min(most, rows - first));
      for (index_t e = 0; e < count; ++e)
        for (index_t k = 0; k < rank; ++k)
          result[static_cast<std::size_t>(e)].col(k).segment(first, some.rows()) =
              some.col(grouped ? e * rank + k : k * count + e);
    }
    return result;
  }

  /// Whether slices take B A or its transpose: what the caller says, else B A. Files of PEFT before
  /// 0.19.1 have the transpose, and a square stack fits either way.
  void choose_orientation(entry_parts<T>& parts, const io_detail::module_tensors& t,
                          index_t count) const {
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
      refuse(*t.A,
             sentence({"to know whether the square slices of ", in_quotes(parts.name),
                       " take B A or its transpose"}),
             config_.peft_version.empty() ? "no peft_version in the config"
                                          : "peft_version " + in_quotes(config_.peft_version),
             "PEFT before 0.19.1 saved stacks of experts transposed, and later versions load such "
             "a file without a word: read "
             "with read_options::parameters_in_out = true for the transpose (what PEFT 0.17 and "
             "0.18 trained), or false for B A");
  }

  expert_columns columns_of(const entry_parts<T>& parts, const io_detail::module_tensors& t,
                            index_t count) {
    expert_layout said;
    const std::string* by = nullptr;
    const auto take = [&](std::string_view ending) {
      const auto found = config_.expert_layouts.find(ending);
      if (found == config_.expert_layouts.end()) return;
      const auto& [name, layout] = *found;
      used_layouts_.insert(name);
      const bool differs = (said.lora_B && layout.lora_B && said.lora_B != layout.lora_B) ||
                           (said.experts && layout.experts && said.experts != layout.experts);
      if (by != nullptr && !by->empty() && differs)
        refuse(*t.B, sentence({"one layout for ", in_quotes(parts.name)}),
               sentence({"another under ", in_quotes(name), " than under ", in_quotes(*by)}));
      if (layout.lora_B) said.lora_B = layout.lora_B;
      if (layout.experts) said.experts = layout.experts;
      by = &name;
    };
    take("");
    for (std::string_view ending = parts.name; !ending.empty();) {
      take(ending);
      const auto dot = ending.find('.');
      ending = dot == std::string_view::npos ? std::string_view{} : ending.substr(dot + 1);
    }
    if (said.experts && *said.experts != static_cast<std::uint64_t>(count))
      refuse(
          *t.A,
          sentence({std::to_string(*said.experts), " experts, as num_experts in the config says"}),
          sentence({std::to_string(count), " in ", t.A->text()}));
    const auto& option = options_.experts_grouped_b;
    if (!option) return said.lora_B.value_or(expert_columns::rank_major);
    const auto wanted = *option ? expert_columns::grouped_by_expert : expert_columns::rank_major;
    if (said.lora_B.value_or(wanted) != wanted)
      refuse(*t.B, "lora_B_layout in the config as read_options::experts_grouped_b says",
             "the other order", "the option is for files that do not say it");
    return wanted;
  }

  /// Throws for a layout in another order than PEFT's that belongs to no stack of the file: it may
  /// be meant for one.
  void check_all_layouts() const {
    for (const auto& [name, layout] : config_.expert_layouts)
      if (!name.empty() && layout.lora_B == expert_columns::grouped_by_expert &&
          !used_layouts_.contains(name))
        io_detail::refuse({.path = config_.path, .item = "unsloth_fused_expert_lora"},
                          "the name of a parameter that the file has a stack for", in_quotes(name),
                          "its columns are grouped by expert, so the stack that it is meant for "
                          "would be scrambled");
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
    refuse(*t.A, "two dimensions",
           sentence({t.A->text(), " beside lora_B ", t.B->text(), ", a stack of experts"}),
           "other trainers save the factors of all experts so; PEFT cannot load them, and they are "
           "not read yet: PEFT has "
           "[rank * experts, in] and [out, rank * experts] under target_parameters");
  }
  bool is_flat_stack(const io_detail::module_tensors& t, std::uint64_t rank) const {
    return t.A->shape[0] % rank == 0 && t.A->shape[0] == t.B->shape[1];
  }
  static constexpr std::string_view flat_stack_hint =
      "these may be several experts' factors: name the parameter in target_parameters, as PEFT "
      "does; or the config and the "
      "tensors do not belong together, or rank_pattern lacks this module";

  // ---- what a module has beside factors
  void add_extras(entry_parts<T>& parts, const io_detail::module_tensors& t) {
    const auto out = static_cast<std::uint64_t>(parts.experts.front().out_features());
    const auto rank = static_cast<std::uint64_t>(parts.experts.front().rank());
    check_kind(parts, *t.A);
    extra(parts.bias, parts.dtype_bias, t, t.bias, config_.lora_bias, "lora_bias", ".lora_B.bias",
          out, parts.name);
    extra(parts.magnitude, parts.dtype_magnitude, t, t.magnitude, config_.use_dora, "use_dora",
          ".lora_magnitude_vector", out, parts.name);
    const bool kasa = config_.change == base_change::kasa && parts.kind == entry_kind::linear;
    extra(parts.diagonal, parts.dtype_diagonal, t, t.diagonal, kasa, "kasa_config", ".lora_diag",
          rank, parts.name);
    if (parts.kind == entry_kind::linear) parts.change = config_.change;
  }

  /// Throws when the config asks for what this kind cannot have: PEFT refuses it, or it is more
  /// than the entry could say.
  void check_kind(const entry_parts<T>& parts, const safetensors::tensor_info& t) const {
    const bool parameter = parts.kind == entry_kind::parameter;
    const bool attention = is_attention(parts.kind);
    const auto refuse_key = [&](const std::string& key, const std::string& why) {
      refuse(t,
             sentence({"a config without ", key, " for the ", name_of(parts.kind), " ",
                       in_quotes(parts.name)}),
             "one with it", why);
    };
    if (config_.use_dora && (attention || parameter))
      refuse_key("use_dora",
                 "PEFT has no DoRA of attentions and parameters and refuses to load this adapter");
    if (config_.lora_bias && (parameter || parts.kind == entry_kind::embedding))
      refuse_key(
          "lora_bias",
          "PEFT has no such bias for embeddings and parameters and refuses to load this adapter");
    if (config_.change == base_change::kasa && (attention || parameter))
      refuse_key("kasa_config",
                 "PEFT has no KaSA of attentions and parameters and refuses to load this adapter");
    if (config_.change != base_change::none && (attention || parameter))
      refuse_key(
          sentence({"init_lora_weights ", in_quotes(config_.init_lora_weights)}),
          sentence({"PEFT changes the base when it loads ", entry<T>::change_name(config_.change),
                    ", which converted() knows for linear modules only: convert the adapter with "
                    "path_initial_model_for_weight_conversion of save_pretrained"}));
  }

  void extra(std::vector<T>& values, safetensors::dtype& dtype, const io_detail::module_tensors& t,
             const safetensors::tensor_info* tensor, bool asked_for, const char* key,
             const char* suffix, std::uint64_t size, const std::string& module) {
    if (tensor == nullptr && !asked_for) return;
    if (tensor == nullptr)
      refuse(*t.A, sentence({"a tensor ", module, suffix, " beside it, for ", key}), "none",
             "the file is incomplete");
    if (!asked_for) {
      if (!options_.lenient)
        refuse(*tensor, sentence({key, " in the config, for this tensor"}), "none",
               "PEFT would ignore this tensor; read_options::lenient does too");
      more_.passed_over.push_back("tensor " + in_quotes(tensor->name) +
                                  ": the config does not ask for it");
      return;
    }
    check_not_empty(*tensor);
    std::uint64_t elements = 1;
    for (const auto extent : tensor->shape)
      elements *= extent;  // cannot overflow: the reader counted the bytes
    if (elements != size)
      refuse(*tensor, sentence({std::to_string(size), " values"}), tensor->text());
    check_holds(*tensor);
    values = tensors_.template copy<T>(tensor->name);
    dtype = tensor->dtype;
  }

  void add_replacement(const io_detail::replacing_tensor& each, replaced_values values) {
    const auto& t = *each.tensor;
    const auto base = modules_.in_base(each.name, t);
    more_.replacements.push_back(
        {base.name,
         std::string(keys_.bare(t)),
         each.why,
         t.dtype,
         {t.shape.begin(), t.shape.end()},
         values == replaced_values::read ? tensors_.copy_bytes(t) : std::vector<std::byte>(),
         base.shared});
  }

  /// Rows of no token are no values, and right.
  void add_rows(const std::string& module, const safetensors::tensor_info& t) {
    if (t.shape.size() != 2 || t.shape[0] != 0) check_matrix(t);
    const std::vector<index_t>* ids = nullptr;
    for (const auto& [name, numbers] : config_.trainable_tokens) {
      if (!name.empty() && !io_detail::is_or_ends_with(module, name)) continue;
      if (ids != nullptr && *ids != numbers)
        refuse(t,
               sentence({"the same tokens in every key of trainable_token_indices that fits ",
                         in_quotes(module)}),
               sentence({"others in ", in_quotes(name)}),
               "keep the key that belongs to this embedding");
      ids = &numbers;
    }
    if (ids == nullptr)
      refuse(t, sentence({"trainable_token_indices in the config for ", in_quotes(module)}),
             "none");
    if (ids->size() != t.shape[0])
      refuse(t,
             sentence(
                 {"a row for each of the ", std::to_string(ids->size()), " tokens of the config"}),
             t.text());
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

  /// Throws when tokens of the config have no rows. Embeddings that share a weight and have the
  /// same tokens share the rows, and PEFT saves them once.
  void check_all_rows() {
    std::set<std::vector<index_t>> there;
    for (const auto& each : more_.token_rows) there.insert(each.second.ids());
    for (const auto& [name, ids] : config_.trainable_tokens) {
      if (ids.empty() || there.contains(ids)) continue;
      if (!options_.lenient)
        io_detail::refuse({.path = tensors_.name(), .item = "trainable_token_indices"},
                          sentence({"a tensor ", name.empty() ? "<input embedding>" : name,
                                    ".token_adapter.trainable_tokens_delta"}),
                          "none", "the file is incomplete");
      more_.passed_over.push_back("trainable_token_indices " + in_quotes(name) +
                                  ": no rows, at which PEFT stops; those of the base stay");
    }
  }

  // ---- tensors
  void check_not_empty(const safetensors::tensor_info& t) const {
    if (t.empty()) io_detail::refuse_empty(tensors_, t);
  }
  void check_matrix(const safetensors::tensor_info& t) const {
    check_not_empty(t);
    if (t.shape.size() != 2) refuse(t, "two dimensions", t.text());
  }
  void check_holds(const safetensors::tensor_info& t) const {
    if (!safetensors::holds_exactly<T>(t.dtype))
      refuse(
          t,
          sentence({name_of(safetensors::dtype_of<T>()), " or a type whose every value it holds"}),
          t.text(),
          t.dtype == safetensors::dtype::f64   ? "read<double>() keeps every value"
          : t.dtype == safetensors::dtype::f32 ? "read<float>() keeps every value"
                                               : "");
  }
  /// First dimension x product of the others.
  matrix widened(const safetensors::tensor_info& t) const {
    const auto rows = static_cast<index_t>(t.shape[0]);
    if (rows == 0) return matrix(0, static_cast<index_t>(t.shape.back()));
    return widened_rows(t, 0, rows);
  }
  /// Some rows of it, read straight into the matrix.
  matrix widened_rows(const safetensors::tensor_info& t, index_t first, index_t count) const {
    check_holds(t);
    return io_detail::read_rows<T>(tensors_, t, first, count);
  }

  [[noreturn]] void refuse_rank(const safetensors::tensor_info& t, index_t rank,
                                std::string_view dimension, std::string_view hint = {}) const {
    refuse(
        t,
        sentence({"rank ", std::to_string(rank), ", as the config says for this module, as its ",
                  dimension, " dimension"}),
        t.text(),
        hint.empty()
            ? "the config and the tensors do not belong together, or rank_pattern lacks this module"
            : hint);
  }
  [[noreturn]] void refuse(const safetensors::tensor_info& t, std::string_view expected,
                           std::string_view found, std::string_view hint = {}) const {
    io_detail::refuse_tensor(tensors_, t, expected, found, hint);
  }

  const config& config_;
  const safetensors::index& tensors_;
  const read_options& options_;
  io_detail::peft_keys keys_;
  io_detail::peft_modules modules_;
  typename adapter_file<T>::entry_map entries_;
  typename adapter_file<T>::rest more_;
  std::set<const typename pattern_table<index_t>::row*> used_ranks_;
  std::set<const typename pattern_table<double>::row*> used_alphas_;
  std::set<std::string> used_layouts_;
};

}  // namespace read_detail
}  // namespace lora::inline LORA_DETAIL_ABI::peft
