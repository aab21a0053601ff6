// SPDX-License-Identifier: Apache-2.0
//
// What an entry of a PEFT file consists of, and the invariant of these parts.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "lora/adapter.hpp"
#include "lora/io/dtype.hpp"
#include "lora/io/peft_config.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {

enum class entry_kind {
  linear,     ///< a Linear or Conv1D module: <name>.weight, out x in (in x out with fan_in_fan_out)
  embedding,  ///< <name>.weight, vocabulary x features: the delta weight is its transpose
  convolution,    ///< <name>.weight, out x in/groups x kernel, flattened to out x (in * kernel)
  attention_in,   ///< in_proj of a MultiheadAttention: <name>_weight, 3 E x E
  attention_out,  ///< out_proj of a MultiheadAttention
  /// A bare parameter, also a stack of experts: <name>, [experts,] out x in (or in x out).
  parameter,
};

inline const char* name_of(entry_kind kind) {
  switch (kind) {
    case entry_kind::linear: return "linear";
    case entry_kind::embedding: return "embedding";
    case entry_kind::convolution: return "convolution";
    case entry_kind::attention_in: return "attention in_proj";
    case entry_kind::attention_out: return "attention out_proj";
    case entry_kind::parameter: return "parameter";
  }
  return "";
}

/// One of the two projections of an attention that PEFT adapts inside torch's MultiheadAttention.
inline bool is_attention(entry_kind kind) {
  return kind == entry_kind::attention_in || kind == entry_kind::attention_out;
}

/// Which factor of BD-LoRA is stored as its blocks.
enum class packed_factor { none, A, B };

/// What an entry consists of; fields that do not apply stay as they are.
template <scalar T>
struct entry_parts {
  std::string name;  ///< of the module, or of the parameter
  /// PEFT's key before .lora_A: the name, with base_layer where wrappers are nested.
  std::string path;
  entry_kind kind = entry_kind::linear;
  /// One, or one for each expert.
  std::vector<lora::adapter<T>> experts;
  lora::scaling scale{.alpha = 1, .rule = scaling_rule::fixed};  ///< as the config has it
  bool fan_in_fan_out = false;    ///< the base stores in x out; of a parameter: a stack
  std::vector<T> bias = {};       ///< of lora_B
  std::vector<T> magnitude = {};  ///< of DoRA
  std::vector<T> diagonal = {};   ///< of KaSA, between B and A
  base_change change = base_change::none;
  std::vector<index_t> kernel = {};  ///< of a convolution
  index_t in_channels = 0;           ///< of a convolution: of lora_A, which sees all of them
  index_t groups = 1;                ///< of a convolution
  packed_factor packed = packed_factor::none;
  index_t blocks = 1;
  bool twice = false;  ///< read_options::attention_out_proj_twice
  /// Of a stack: the file holds the factors of each slice's transpose (PEFT before 0.19.1).
  /// `experts` are those of the slices.
  bool stored_transposed = false;
  /// Of a stack with one expert: the file does not say whether a slice is B A or its transpose.
  bool orientation_unsaid = false;
  std::string base_name =
      {};  ///< the name in the base, where layer_replication gives it another; empty: the name
  std::string shared_with = {};  ///< the base's module, when replicated layers share its weight
  safetensors::dtype dtype_A = safetensors::dtype_of<T>(), dtype_B = dtype_A, dtype_bias = dtype_A,
                     dtype_magnitude = dtype_A, dtype_diagonal = dtype_A;
};

namespace entry_detail {

/// Throws unless the parts of an entry belong together. Everything that reads an entry stands on
/// it: sizes are not looked at again.
template <scalar T>
class invariant {
 public:
  explicit invariant(const entry_parts<T>& parts) : p_(parts) {}

  void check() const {
    if (p_.experts.empty()) refuse("an entry needs an adapter");
    check_experts();
    check_values();
    check_kernel();
    check_blocks();
    for (const auto type :
         {p_.dtype_A, p_.dtype_B, p_.dtype_bias, p_.dtype_magnitude, p_.dtype_diagonal})
      if (!holds_factors(type))
        refuse("a dtype, " + std::string(safetensors::name_of(type)) +
               ", is none of F64, F32, F16 and BF16");
  }

 private:
  using kind = entry_kind;
  index_t rank() const { return p_.experts.front().rank(); }
  index_t out() const { return p_.experts.front().out_features(); }
  index_t in() const { return p_.experts.front().in_features(); }

  void check_experts() const {
    if (p_.experts.size() > 1 && p_.kind != kind::parameter)
      refuse("a " + std::string(name_of(p_.kind)) +
             " has one adapter; only a parameter is a stack of experts");
    for (std::size_t k = 1; k < p_.experts.size(); ++k) {
      const auto& l = p_.experts[k];
      if (l.rank() != rank() || l.out_features() != out() || l.in_features() != in())
        refuse_shape(
            "expert " + std::to_string(k) + " is " + text(l.out_features(), l.in_features()) +
            " of rank " + std::to_string(l.rank()) + " and expert 0 is " + text(out(), in()) +
            " of rank " + std::to_string(rank()) + "; the experts of a stack have one shape");
      if (l.scaling() != p_.experts.front().scaling())
        refuse("its experts have different scalings");
    }
    if ((p_.stored_transposed || p_.orientation_unsaid) && p_.kind != kind::parameter)
      refuse("the orientation of slices is for parameters");
    if (p_.change != base_change::none && p_.kind != kind::linear)
      refuse("PEFT changes the base of linear modules only");
    if (p_.fan_in_fan_out && p_.kind != kind::linear && p_.kind != kind::parameter)
      refuse("fan_in_fan_out is for linear modules and parameters");
  }

  void check_values() const {
    check_count("values in the bias", p_.bias, out(), "outputs");
    check_count("magnitudes", p_.magnitude, out(), "outputs");
    check_count("values in the diagonal", p_.diagonal, rank(), "ranks");
  }
  void check_count(const char* what, const std::vector<T>& values, index_t count,
                   const char* of) const {
    if (!values.empty() && static_cast<index_t>(values.size()) != count)
      refuse_shape(std::to_string(values.size()) + " " + what + " for " + std::to_string(count) +
                   " " + of);
  }

  void check_kernel() const {
    if (p_.kind != kind::convolution) {
      if (!p_.kernel.empty() || p_.groups != 1) refuse("a kernel and groups are for convolutions");
      return;
    }
    index_t size = p_.in_channels;
    for (const auto extent : p_.kernel) {
      if (extent < 1 || size < 0 || size > std::numeric_limits<index_t>::max() / extent)
        refuse_shape("the extents of its kernel are not those of a matrix with " +
                     std::to_string(in()) + " columns");
      size *= extent;
    }
    if (p_.kernel.empty() || p_.kernel.size() > 3)
      refuse_shape("a kernel has one to three extents");
    if (size != in())
      refuse_shape(std::to_string(p_.in_channels) + " channels and the kernel are " +
                   std::to_string(size) + " inputs, and lora_A has " + std::to_string(in()) +
                   " columns");
    check_divides("groups", p_.groups, rank(), out());
  }

  void check_blocks() const {
    if (p_.packed == packed_factor::none) return;
    if (p_.kind != kind::linear) refuse("block-diagonal factors are for linear modules");
    check_divides("blocks", p_.blocks, rank(), p_.packed == packed_factor::A ? in() : out());
  }
  void check_divides(const char* what, index_t count, index_t one, index_t other) const {
    if (count < 1 || one % count != 0 || other % count != 0)
      refuse_shape(std::to_string(count) + " " + what + " do not divide " + std::to_string(one) +
                   " and " + std::to_string(other));
  }

  static bool holds_factors(safetensors::dtype type) {
    return safetensors::holds_exactly<double>(type);
  }
  static std::string text(index_t rows, index_t cols) {
    return lora::detail::shape_text(rows, cols);
  }
  std::string of_name(const std::string& why) const {
    return p_.name.empty() ? why : io_detail::in_quotes(p_.name) + ": " + why;
  }
  [[noreturn]] void refuse(const std::string& why) const {
    lora::detail::raise_value("peft::entry", of_name(why));
  }
  [[noreturn]] void refuse_shape(const std::string& why) const {
    lora::detail::raise_shape("peft::entry", of_name(why));
  }

  const entry_parts<T>& p_;
};

}  // namespace entry_detail

}  // namespace lora::inline LORA_DETAIL_ABI::peft
