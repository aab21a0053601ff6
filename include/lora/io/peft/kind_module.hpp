// SPDX-License-Identifier: Apache-2.0
//
// The tensors of one module in the file of an adapter that is not LoRA: what the reader of a kind
// makes an adapter of, and what its writer leaves.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/any_kind.hpp"
#include "lora/io/detail/json_text.hpp"
#include "lora/io/detail/peft_keys.hpp"
#include "lora/io/detail/tensor_rows.hpp"
#include "lora/io/peft/config.hpp"
#include "lora/io/peft/config_kind.hpp"
#include "lora/io/peft/config_object.hpp"
#include "lora/io/peft/stored_format.hpp"
#include "lora/io/safetensors_index.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// Tensors of a file by suffix, or by whole name.
using part_map = std::map<std::string_view, const safetensors::tensor_info*>;

/// The tensors that all modules of a file share, and the matrices that were made of them.
struct shared_tensors {
  part_map parts;
  std::map<std::pair<std::string_view, safetensors::dtype>, std::shared_ptr<const void>> made;
};

/// One module while it is read. Looks at the file and its config.
class kind_module {
 public:
  using tensor = safetensors::tensor_info;

  kind_module(std::string name, const peft::config& c, const safetensors::index& tensors,
              const peft::read_options& options, part_map parts, shared_tensors& shared,
              std::size_t modules)
      : name_(std::move(name)),
        config_(c),
        tensors_(tensors),
        options_(options),
        parts_(std::move(parts)),
        shared_(shared),
        modules_(modules) {}

  /// As the base calls it.
  const std::string& name() const { return name_; }
  const peft::config& config() const { return config_; }
  const peft::read_options& options() const { return options_; }
  /// How many modules the file has.
  std::size_t modules() const { return modules_; }
  /// What the config says that only this kind knows: read(config_object&).
  template <class Read>
  auto settings(const Read& read) const {
    config_object keys(*config_.source, config_.path, options_);
    return read(keys);
  }
  /// Throws format_error about a key of the config.
  [[noreturn]] void refuse_key(std::string_view key, std::string_view expected,
                               std::string_view found, std::string_view hint = {}) const {
    io_detail::refuse({.path = config_.path, .item = key}, expected, found, hint);
  }

  // ---- tensors
  bool has(std::string_view suffix) const { return parts_.contains(suffix); }
  const tensor& any() const { return *parts_.begin()->second; }
  /// Throws format_error where the file does not have it.
  const tensor& at(std::string_view suffix) const {
    const auto found = parts_.find(suffix);
    if (found == parts_.end())
      refuse(any(), sentence({"a tensor ", name_, suffix, " beside it"}), "none",
             "the file is incomplete");
    return *found->second;
  }
  /// A tensor that all modules share, or null.
  const tensor* shared(std::string_view name) const {
    const auto found = shared_.parts.find(name);
    return found == shared_.parts.end() ? nullptr : found->second;
  }
  /// Throws format_error unless it has values in two dimensions, or in `most`.
  const tensor& matrix_at(std::string_view suffix, std::size_t most = 2) const {
    const tensor& t = at(suffix);
    if (t.empty()) refuse_empty(tensors_, t);
    if (t.shape.size() < 2 || t.shape.size() > most)
      refuse(t, most == 2 ? "two dimensions" : "a matrix, or the kernel of a convolution",
             t.text());
    return t;
  }
  /// Throws format_error unless a dimension has a size, which is said as `what`.
  void check_extent(const tensor& t, std::size_t dimension, index_t size,
                    std::string_view what) const {
    if (t.shape[dimension] == static_cast<std::uint64_t>(size)) return;
    constexpr std::array ordinals{"first", "second", "third", "fourth"};
    refuse(t,
           sentence({what, ", ", std::to_string(size), ", as its ",
                     ordinals[dimension < 4 ? dimension : 3], " dimension"}),
           t.text(), "the config and the tensors do not belong together");
  }
  [[noreturn]] void refuse(const tensor& t, std::string_view expected, std::string_view found,
                           std::string_view hint = {}) const {
    refuse_tensor(tensors_, t, expected, found, hint);
  }

  // ---- values
  /// make(std::type_identity<T>) for the format that holds every tensor of the module, with those
  /// that it shares: that is how they are stored, where they have one format.
  template <class Make>
  any_kind in_stored_format(const Make& make) const {
    std::vector<safetensors::dtype> all;
    for (const part_map* parts : {&parts_, &std::as_const(shared_.parts)})
      for (const auto& each : *parts) {
        all.push_back(each.second->dtype);
        if (!common_format({all.back()}))
          refuse(*each.second, "F64, F32, F16 or BF16", each.second->text());
      }
    return visit_format(*common_format(all), make);
  }
  template <scalar T>
  std::vector<T> values(const tensor& t) const {
    return tensors_.template copy<T>(t.name);
  }
  /// The first dimension by the product of the others.
  template <scalar T>
  detail::row_major_matrix<T> matrix(const tensor& t) const {
    const auto rows = static_cast<index_t>(t.shape[0]);
    if (t.empty()) return {rows, static_cast<index_t>(t.shape.back())};
    return io_detail::read_rows<T>(tensors_, t, 0, rows);
  }

  /// A shared tensor, made once for all modules that have it in one format.
  template <scalar T>
  std::shared_ptr<const detail::row_major_matrix<T>> shared_matrix(const tensor& t) const {
    auto& made = shared_.made[{t.name, safetensors::dtype_of<T>()}];
    if (made == nullptr) made = std::make_shared<const detail::row_major_matrix<T>>(matrix<T>(t));
    return std::static_pointer_cast<const detail::row_major_matrix<T>>(made);
  }

  // ---- the rank and alpha that count for the module
  index_t rank() const { return decided("rank_pattern", config_.rank_pattern, config_.r); }
  double alpha() const {
    return decided("alpha_pattern", config_.alpha_pattern, config_.lora_alpha);
  }

 private:
  template <class Table, class V>
  V decided(const char* key, const Table& table, V otherwise) const {
    const auto answer = table.look_up(name_);
    if (answer.unicode != nullptr)
      refuse_key(
          key, "an expression whose answer does not depend on the Unicode class of a letter",
          sentence({in_quotes(answer.unicode->key), " for the module ", in_quotes(name_)}),
          "write the module's name, or a class of characters in place of \\w, \\d, \\s or \\b");
    return answer.fits == nullptr ? otherwise : answer.fits->value;
  }

  std::string name_;
  const peft::config& config_;
  const safetensors::index& tensors_;
  const peft::read_options& options_;
  part_map parts_;
  shared_tensors& shared_;
  std::size_t modules_;
};

/// One module as it is written: tensors, and what the config must say.
struct kind_parts {
  struct tensor {
    std::string name;  ///< a suffix of the module's name, or the whole name of a shared tensor
    safetensors::dtype dtype;
    std::vector<std::uint64_t> shape;
    std::vector<std::byte> bytes;
  };
  std::vector<tensor> tensors, shared;
  /// Keys with their values in JSON, which all modules must agree on.
  std::map<std::string, std::string> settings;
  /// Where the kind has them: r and alpha of this module.
  std::optional<index_t> rank;
  std::optional<double> alpha;
  /// Keys that list modules, and whether this one is in it.
  std::map<std::string, bool> lists;
  /// Keys that hold an object: what this module adds, as its name and a suffix, and a value.
  std::map<std::string, std::pair<std::string, std::string>> tables;

  /// A tensor of values in memory.
  template <class T>
  static tensor of(std::string name, std::vector<std::uint64_t> shape, std::span<const T> values) {
    tensor t{std::move(name), safetensors::dtype_of<T>(), std::move(shape), {}};
    t.bytes.resize(values.size_bytes());
    if (!t.bytes.empty()) std::memcpy(t.bytes.data(), values.data(), t.bytes.size());
    return t;
  }
  template <class M>
  static tensor of_matrix(std::string name, const M& m, std::vector<std::uint64_t> shape = {}) {
    using T = typename M::Scalar;
    if (shape.empty())
      shape = {static_cast<std::uint64_t>(m.rows()), static_cast<std::uint64_t>(m.cols())};
    return of<T>(std::move(name), std::move(shape),
                 std::span<const T>(m.data(), static_cast<std::size_t>(m.size())));
  }
};

/// The number whose quotient by another is a scaling, bit for bit; nothing where no double does.
inline std::optional<double> numerator_for(double scaling, double divisor) {
  const double near = scaling * divisor;
  for (const double alpha : {near, std::nextafter(near, 0.0), std::nextafter(near, 2 * near)})
    if (detail::is_finite(alpha) && alpha / divisor == scaling) return alpha;
  return std::nullopt;
}

/// visit(std::type_identity<T>) for the four formats until one returns true.
template <class Visit>
bool any_format(const Visit& visit) {
  return visit(std::type_identity<float>()) || visit(std::type_identity<bfloat16>()) ||
         visit(std::type_identity<float16>()) || visit(std::type_identity<double>());
}

/// What the reader and the writer need of each kind that is not LoRA.
struct peft_kind {
  config_kind keys;
  /// The ends of the names of a module's tensors, with their dots.
  std::span<const std::string_view> suffixes;
  /// Whole names of tensors that all modules share.
  std::span<const std::string_view> shared;
  /// Makes the adapter, or throws format_error for what is missing or wrong. Every tensor of the
  /// module is taken, or refused.
  any_kind (*decode)(const kind_module&);
  /// The reverse; nothing for an adapter that is not of this kind. Throws value_error for one that
  /// PEFT cannot store.
  std::optional<kind_parts> (*encode)(const any_kind&);
};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
