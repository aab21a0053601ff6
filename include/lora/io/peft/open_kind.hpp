// SPDX-License-Identifier: Apache-2.0
//
// An adapter of a file that does not store one size of its layer: a factor for each output says
// nothing of the inputs. It fits a weight of any such size.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "lora/concepts.hpp"
#include "lora/error.hpp"
#include "lora/steps.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {

/// A size of a layer that the file says, or does not say.
enum class layer_size { stored, open };

/// A kind, with which sizes of it count and how the base stores the weight. Its steps are those of
/// the kind, which must not depend on an open size. out_features() or in_features() is 0 where the
/// size is open. Immutable; copies share what the kind shares.
template <class K>
class [[nodiscard]] open_kind {
 public:
  using value_type = typename K::value_type;

  open_kind(K kind, layer_size out, layer_size in, bool stored_in_out)
      : kind_(std::move(kind)), out_(out), in_(in), stored_in_out_(stored_in_out) {}

  const K& kind() const { return kind_; }
  index_t out_features() const { return out_ == layer_size::stored ? kind_.out_features() : 0; }
  index_t in_features() const { return in_ == layer_size::stored ? kind_.in_features() : 0; }
  bool stored_in_out() const { return stored_in_out_; }
  bool holds_double() const { return lora::detail::holds_double_now(kind_); }
  /// Throws shape_error where a size that is stored is another.
  void check_fits(const char* operation, index_t out, index_t in) const {
    check_size(operation, "outputs", out_, kind_.out_features(), out);
    check_size(operation, "inputs", in_, kind_.in_features(), in);
  }
  template <class Acc>
  std::vector<step<Acc>> steps(const step_request<Acc>& request) const {
    return kind_.template steps<Acc>(request);
  }

 private:
  static void check_size(const char* operation, const char* what, layer_size size, index_t stored,
                         index_t given) {
    if (size == layer_size::stored && stored != given)
      lora::detail::raise_shape(operation, "the adapter is for " + std::to_string(stored) + " " +
                                               what + " and the weight has " +
                                               std::to_string(given) +
                                               " (stored the other way round?)");
  }

  K kind_;
  layer_size out_, in_;
  bool stored_in_out_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::peft
