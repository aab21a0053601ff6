// SPDX-License-Identifier: Apache-2.0
//
// lora::peft::read<T = float>(directory)   a LoRA adapter as Hugging Face PEFT saves it: adapter_config.json and
//                                          adapter_model.safetensors, as a map from module names to adapters
//
//   const auto file = lora::peft::read("adapters/style");
//   lora::merge(W, file.at("model.layers.0.self_attn.q_proj"));
//
// Names are the modules' without base_model.model. Each entry holds A [rank, in] and B [out, rank], widened exactly to T, and
// the scaling that PEFT would use: alpha / r or alpha / sqrt(r), with rank_pattern and alpha_pattern (the first key that
// fits wins). Linear layers and Conv1D (fan_in_fan_out) are read. Whatever else a config or a tensor asks for (DoRA, biases,
// embeddings, convolutions, whole modules, other kinds of adapters) is refused by name: no tensor is passed over in silence.
// Values are not looked at: NaN passes, and merge_checked finds it.
//
//   throws   format_error naming the file and the tensor or key; std::bad_alloc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora/io/detail/peft_keys.hpp"
#include "lora/io/format_error.hpp"
#include "lora/io/peft_config.hpp"
#include "lora/io/peft_entry.hpp"
#include "lora/io/safetensors.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {

/// The adapters of one file by module name, in byte order of the names. Immutable.
template <scalar T>
class adapter_file {
 public:
  adapter_file(peft::config config, std::map<std::string, entry<T>, std::less<>> entries, std::vector<std::string> left_out)
      : config_(std::move(config)), entries_(std::move(entries)), left_out_(std::move(left_out)) {}

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

  /// Config keys that were passed over (see read_options::ignore_keys).
  const std::vector<std::string>& ignored_keys() const { return config_.ignored_keys; }
  /// Tensors of whole modules that were left out (see read_options::leave_out_saved_modules).
  const std::vector<std::string>& left_out() const { return left_out_; }

 private:
  peft::config config_;
  std::map<std::string, entry<T>, std::less<>> entries_;
  std::vector<std::string> left_out_;
};

namespace read_detail {

/// From checked tensors and a config to entries.
template <scalar T>
class assembler {
 public:
  assembler(const config& c, const safetensors::file& tensors, const read_options& options)
      : config_(c), tensors_(tensors), keys_(c, tensors, options.leave_out_saved_modules) {}

  adapter_file<T> run() {
    check_pattern_work();
    std::map<std::string, entry<T>, std::less<>> entries;
    for (const auto& [module, pair] : keys_.modules()) entries.emplace_hint(entries.end(), module, one(module, pair));
    if (entries.empty())
      lora::detail::raise(format_error(
          {.path = tensors_.name(), .expected = "tensors named ...lora_A.weight and ...lora_B.weight", .found = "none"}));
    return {config_, std::move(entries), keys_.left_out()};
  }

 private:
  using matrix = lora::detail::row_major_matrix<T>;

  entry<T> one(const std::string& module, const io_detail::factor_pair& pair) const {
    if (pair.A == nullptr) missing(*pair.B, module, "lora_A.weight");
    if (pair.B == nullptr) missing(*pair.A, module, "lora_B.weight");
    check_shapes(module, *pair.A, *pair.B);
    const matrix A = widened(*pair.A), B = widened(*pair.B);
    return {module, lora::adapter<T>(A, B, config_.scaling_of(module)), config_.fan_in_fan_out};
  }

  void check_shapes(const std::string& module, const safetensors::entry& A, const safetensors::entry& B) const {
    check_matrix(A);
    check_matrix(B);
    const auto r = static_cast<std::uint64_t>(config_.rank_of(module));
    if (A.shape[0] != r)
      refuse(A, "rank " + std::to_string(r) + ", as the config says for this module, as its first dimension", A.text(),
             "the config and the tensors do not belong together, or rank_pattern lacks this module");
    if (B.shape[1] != r)
      refuse(B, "rank " + std::to_string(r) + ", as the config says for this module, as its second dimension", B.text(),
             "the config and the tensors do not belong together, or rank_pattern lacks this module");
  }

  void check_matrix(const safetensors::entry& t) const {
    std::uint64_t elements = 1;
    for (const auto extent : t.shape) elements = extent == 0 ? 0 : elements;
    if (elements == 0)
      refuse(t, "values", t.text(),
             "an empty tensor: saved from a sharded model (DeepSpeed ZeRO-3) without gathering its parts");
    if (t.shape.size() > 2) refuse(t, "two dimensions", t.text(), "adapters of convolutions are not supported");
    if (t.shape.size() < 2) refuse(t, "two dimensions", t.text(), "");
  }

  matrix widened(const safetensors::entry& t) const {
    if (!safetensors::holds_exactly<T>(t.dtype))
      refuse(t, std::string(name_of(safetensors::dtype_of<T>())) + " or a type whose every value it holds", t.text(),
             t.dtype == safetensors::dtype::f64   ? "read<double>() keeps every value"
             : t.dtype == safetensors::dtype::f32 ? "read<float>() keeps every value"
                                                  : "");
    const auto values = tensors_.template copy<T>(t.name);
    return Eigen::Map<const matrix>(values.data(), static_cast<index_t>(t.shape[0]), static_cast<index_t>(t.shape[1]));
  }

  /// Patterns are looked up for every module. Both come from files, so their product is bounded.
  void check_pattern_work() const {
    constexpr double most = 2e9;
    double cost = 0, length = 0;
    for (const auto& row : config_.rank_pattern.rows()) cost += static_cast<double>(row.pattern.cost());
    for (const auto& row : config_.alpha_pattern.rows()) cost += static_cast<double>(row.pattern.cost());
    for (const auto& each : keys_.modules()) length += static_cast<double>(each.first.size());
    if (cost * length > most)
      lora::detail::raise(format_error({.path = config_.path,
                                        .item = "rank_pattern",
                                        .expected = "patterns that can be looked up for every module of the file",
                                        .found = "more work than a reader may do for a file",
                                        .hint = "use plain names, or fewer patterns"}));
  }

  [[noreturn]] void missing(const safetensors::entry& other, const std::string& module, const char* factor) const {
    refuse(other, "a tensor " + module + "." + factor + " beside it", "none", "the file is incomplete");
  }
  [[noreturn]] void refuse(const safetensors::entry& t, std::string expected, std::string found, std::string hint) const {
    lora::detail::raise(format_error({.path = tensors_.name(),
                                      .item = t.name,
                                      .offset = t.offset,
                                      .expected = std::move(expected),
                                      .found = std::move(found),
                                      .hint = std::move(hint)}));
  }

  const config& config_;
  const safetensors::file& tensors_;
  io_detail::peft_keys keys_;
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
