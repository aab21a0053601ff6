// SPDX-License-Identifier: Apache-2.0
//
// lora::peft::read<T = float>(directory)   a LoRA adapter as Hugging Face PEFT saves it: adapter_config.json and
//                                          adapter_model.safetensors, as a map from module names to entries
//
//   const auto file = lora::peft::read("adapters/style");
//   lora::merge(W, file.at("model.layers.0.self_attn.q_proj"));
//   for (const auto& each : file.replacements()) ...              // tensors that replace ones of the base
//   for (const auto& [embedding, rows] : file.token_rows()) ...   // trained rows of embeddings
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

#include "lora/io/detail/peft_keys.hpp"
#include "lora/io/detail/peft_modules.hpp"
#include "lora/io/format_error.hpp"
#include "lora/io/peft_config.hpp"
#include "lora/io/peft_entry.hpp"
#include "lora/io/peft_verbs.hpp"
#include "lora/io/safetensors.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {

/// A tensor of the file that replaces one of the base: values, not a difference. Owns its bytes.
struct replacement {
  enum class reason {
    saved_module,  ///< of modules_to_save: the whole module is another
    bias,          ///< a trained bias (bias = "all" or "lora_only")
    embedding,     ///< an embedding's weight, saved because it was adapted or resized
    unused_copy,   ///< written by PEFT beside the value that counts; not to be applied
  };
  std::string name;  ///< of the base's tensor
  std::string key;   ///< in the file, without base_model.model.
  reason why;
  safetensors::dtype dtype;
  std::vector<std::uint64_t> shape;
  std::vector<std::byte> bytes;

  bool applies() const { return why != reason::unused_copy; }
  /// The values, widened exactly. Throws value_error for a dtype whose values T does not hold.
  template <scalar T>
  std::vector<T> values() const {
    std::vector<T> result;
    if (!safetensors::widen_to(dtype, bytes, result))
      lora::detail::raise_value("peft::replacement::values",
                                key + " is " + std::string(name_of(dtype)) + ", whose values this type does not hold");
    return result;
  }
};

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
    std::vector<std::string> left_out = {}, passed_over = {};
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
  /// What read_options::lenient let pass, in words.
  const std::vector<std::string>& passed_over() const { return more_.passed_over; }
  /// Whether the file's names begin with base_model.model.
  bool prefixed() const { return more_.prefixed; }
  /// What its reader was told beyond the files.
  const read_options& options() const { return more_.options; }

 private:
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

  adapter_file<T> run() {
    for (const auto& [path, t] : keys_.modules()) add(path, t);
    for (const auto& each : keys_.replacing()) add_replacement(each);
    for (const auto& [module, t] : keys_.token_rows()) add_rows(module, *t);
    if (entries_.empty() && more_.token_rows.empty())
      lora::detail::raise(
          format_error({.path = tensors_.name(),
                        .expected = "tensors named ...lora_A.weight and ...lora_B.weight",
                        .found = "none",
                        .hint = "save the adapter again with save_pretrained of the PEFT model, not of its base"}));
    check_all_rows();
    more_.left_out = keys_.left_out();
    more_.passed_over.insert(more_.passed_over.begin(), keys_.passed_over().begin(), keys_.passed_over().end());
    more_.prefixed = keys_.prefixed();
    more_.options = options_;
    return {config_, std::move(entries_), std::move(more_)};
  }

 private:
  using matrix = lora::detail::row_major_matrix<T>;

  void add(const std::string& path, const io_detail::module_tensors& t) {
    const auto what = modules_.identify(path, t);
    if (!modules_.would_load(what)) {
      if (!options_.lenient)
        refuse(*t.any(), "an adapter of a module that target_modules selects", "one that it does not",
               "PEFT would ignore this tensor; read_options::lenient does too");
      more_.passed_over.push_back("module " + io_detail::in_quotes(what.name) + ": not selected by target_modules");
      return;
    }
    if (t.A == nullptr)
      refuse(*t.any(), "a tensor " + path + suffix(t, 'A') + " beside it", "none", "the file is incomplete");
    if (t.B == nullptr) {
      if (!options_.lenient)
        refuse(*t.A, "a tensor " + path + suffix(t, 'B') + " beside it", "none", "the file is incomplete");
      more_.passed_over.push_back("module " + io_detail::in_quotes(what.name) + ": no lora_B, which PEFT takes as zero");
      return;
    }
    auto parts = factors_of(path, what, t);
    add_extras(parts, t);
    auto base = modules_.in_base(what.name, *t.A);
    parts.base_name = base.name;
    if (base.shared) parts.shared_with = std::move(base.name);
    if (entries_.contains(what.name)) refuse(*t.A, "one adapter for " + io_detail::in_quotes(what.name), "two");
    entries_.emplace(what.name, entry<T>(std::move(parts)));
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
    parts.fan_in_fan_out = what.kind == entry_kind::linear      ? config_.fan_in_fan_out
                           : what.kind == entry_kind::parameter ? options_.parameters_in_out
                                                                : false;
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

  lora::adapter<T> adapter_of(const entry_parts<T>& parts, const matrix& A, const matrix& B, index_t rank) const {
    const double s = resolve(parts.scale, rank);
    return {A, B, {.alpha = parts.twice ? 2 * s : s, .rule = scaling_rule::fixed}};
  }

  void matrices(entry_parts<T>& parts, const io_detail::module_tensors& t, index_t rank) {
    check_matrix(*t.A);
    check_matrix(*t.B);
    choose_packing(parts, *t.A);
    const auto r = static_cast<std::uint64_t>(rank);
    const auto blocks = static_cast<std::uint64_t>(parts.blocks);
    if (t.A->shape[0] != r) refuse_rank(*t.A, rank, "first");
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

  /// A has the ranks of the experts one after the other, expert by expert; B the experts of each rank, rank by rank.
  void experts(entry_parts<T>& parts, const io_detail::module_tensors& t, index_t rank) {
    check_matrix(*t.A);
    check_matrix(*t.B);
    const auto r = static_cast<std::uint64_t>(rank);
    if (t.A->shape[0] % r != 0) refuse_rank(*t.A, rank, "a multiple of it as its first");
    if (t.B->shape[1] != t.A->shape[0])
      refuse(*t.B, "as many columns as lora_A has rows, " + std::to_string(t.A->shape[0]), t.B->text());
    const auto count = static_cast<index_t>(t.A->shape[0] / r);
    const matrix A = widened(*t.A), B = widened(*t.B);
    parts.experts.reserve(static_cast<std::size_t>(count));
    for (index_t e = 0; e < count; ++e) {
      matrix of_expert(B.rows(), rank);
      for (index_t k = 0; k < rank; ++k) of_expert.col(k) = B.col(k * count + e);
      parts.experts.push_back(adapter_of(parts, A.middleRows(e * rank, rank), of_expert, rank));
    }
  }

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
    std::uint64_t elements = 1;
    for (const auto extent : tensor->shape) elements *= extent;  // cannot overflow: the reader counted the bytes
    if (elements != size) refuse(*tensor, std::to_string(size) + " values", tensor->text());
    check_holds(*tensor);
    values = tensors_.template copy<T>(tensor->name);
    dtype = tensor->dtype;
  }

  void add_replacement(const io_detail::replacing_tensor& each) {
    const auto& t = *each.tensor;
    replacement result{modules_.in_base(each.name, t).name,
                       std::string(keys_.prefixed() ? t.name.substr(io_detail::peft_keys::prefix.size()) : t.name),
                       static_cast<replacement::reason>(each.why),
                       t.dtype,
                       {t.shape.begin(), t.shape.end()},
                       {t.bytes.begin(), t.bytes.end()}};
    more_.replacements.push_back(std::move(result));
  }

  void add_rows(const std::string& module, const safetensors::entry& t) {
    check_matrix(t);
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
    if (t.bytes.empty())
      refuse(t, "values", t.text(),
             "an empty tensor: saved from a sharded model (DeepSpeed ZeRO-3) without gathering its parts");
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
    return Eigen::Map<const matrix>(values.data(), rows, static_cast<index_t>(values.size()) / rows);
  }

  [[noreturn]] void refuse_rank(const safetensors::entry& t, index_t rank, const char* dimension) const {
    refuse(t, "rank " + std::to_string(rank) + ", as the config says for this module, as its " + dimension + " dimension",
           t.text(), "the config and the tensors do not belong together, or rank_pattern lacks this module");
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
};

/// Where an adapter's file lies, or a format_error that says what is there instead.
inline std::filesystem::path file_in(const std::filesystem::path& directory, const char* name, const char* other,
                                     const char* hint_for_other) {
  std::error_code failure;
  const auto path = directory / name;
  if (std::filesystem::exists(path, failure)) return path;
  const bool is_file = std::filesystem::is_regular_file(directory, failure);
  const bool has_other = std::filesystem::exists(directory / other, failure);
  lora::detail::raise(format_error({.path = path.string(),
                                    .expected = "an adapter's directory with " + std::string(name),
                                    .found = is_file ? "a file in place of the directory" : "no such file",
                                    .hint = has_other ? hint_for_other : ""}));
}

}  // namespace read_detail

/// The adapters that a config and the tensors beside it describe; for parts that did not come from one directory.
template <scalar T = float>
adapter_file<T> assemble(const config& c, const safetensors::file& tensors, const read_options& options = {}) {
  return read_detail::assembler<T>(c, tensors, options).run();
}

/// Reads a directory; see the top of this file. T is float, double, or a 16-bit type when the file holds that type.
template <scalar T = float>
adapter_file<T> read(const std::filesystem::path& directory, const read_options& options = {}) {
  // The config first: it says why a file of another kind is refused, also where its weights are missing.
  const auto c = read_config(read_detail::file_in(directory, "adapter_config.json", "adapter_model.safetensors",
                                                  "PEFT saves adapter_config.json beside the weights; without it the "
                                                  "scaling is not known"),
                             options);
  const auto tensors = safetensors::read(read_detail::file_in(
      directory, "adapter_model.safetensors", "adapter_model.bin",
      "adapter_model.bin is a PyTorch file, which can run code when loaded: convert it to safetensors"));
  return assemble<T>(c, tensors, options);
}

}  // namespace lora::inline LORA_DETAIL_ABI::peft
