// SPDX-License-Identifier: Apache-2.0
//
// module_adapter: the adapter of one module of a model, of any kind, and where it goes.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "lora/any_kind.hpp"
#include "lora/error.hpp"
#include "lora/in_rows.hpp"
#include "lora/merge.hpp"
#include "lora/tensor_view.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// Where an adapter goes: names in the base.
struct adapter_target {
  std::string module;       ///< "model.layers.0.self_attn.q_proj"
  std::string weight = {};  ///< the tensor that it changes; empty: module + ".weight"
  std::string bias = {};    ///< the bias of that module; empty: module + ".bias"
  /// Of a fused weight (q of qkv): the adapter's rows begin at first_row of weight_rows. 0: the
  /// weight is the adapter's.
  index_t first_row = 0, weight_rows = 0;
};

/// One module's adapter in the format that it was stored in. It is an adapter kind: every verb
/// takes it, with W as the base stores it. Immutable; copies share what they hold. Invariant: never
/// empty; the experts of a stack have one shape.
class [[nodiscard]] module_adapter {
 public:
  using value_type = float;

  /// `kind` is what a format calls it ("LORA", "LOHA"), `origin` where it was read. Throws
  /// value_error for a target without name.
  module_adapter(adapter_target target, any_kind adapter, std::string kind = {},
                 std::string origin = {})
      : module_adapter(std::move(target), std::vector<any_kind>{std::move(adapter)},
                       std::move(kind), std::move(origin)) {}
  /// Of a stack of experts. Throws shape_error when their shapes differ or the target's weight does
  /// not have their rows, value_error when there is none.
  module_adapter(adapter_target target, std::vector<any_kind> experts, std::string kind = {},
                 std::string origin = {})
      : target_(std::move(target)),
        own_(std::move(experts)),
        kind_(std::move(kind)),
        origin_(std::move(origin)) {
    if (target_.module.empty()) detail::raise_value("module_adapter", "the target has no name");
    if (own_.empty()) detail::raise_value("module_adapter", target_.module + " has no adapter");
    if (target_.weight_rows == 0 && target_.first_row != 0)
      detail::raise_value("module_adapter",
                          target_.module + " has a first row, and no number of rows of its weight");
    for (const any_kind& one : own_)
      experts_.push_back(target_.weight_rows == 0
                             ? one
                             : any_kind(in_rows(target_.first_row, target_.weight_rows, one)));
    for (const any_kind& one : experts_)
      if (one.out_features() != out_features() || one.in_features() != in_features() ||
          one.stored_in_out() != stored_in_out())
        detail::raise_shape("module_adapter",
                            "the experts of " + target_.module + " have different shapes");
    if (target_.weight.empty()) target_.weight = target_.module + ".weight";
    if (target_.bias.empty()) target_.bias = target_.module + ".bias";
  }

  const adapter_target& target() const { return target_; }
  const std::string& kind() const { return kind_; }
  const std::string& origin() const { return origin_; }
  index_t experts() const { return static_cast<index_t>(experts_.size()); }
  /// One expert's, in the target's rows. Throws value_error when there is no such.
  const any_kind& expert(index_t k) const {
    if (k < 0 || k >= experts())
      detail::raise_value("module_adapter::expert", target_.module + " has " +
                                                        std::to_string(experts()) +
                                                        " experts, not one " + std::to_string(k));
    return experts_[static_cast<std::size_t>(k)];
  }
  /// The same adapter for another target.
  module_adapter moved_to(adapter_target target) const {
    return module_adapter(std::move(target), own_, kind_, origin_);
  }

  // As an adapter kind.
  index_t out_features() const { return experts_.front().out_features(); }
  index_t in_features() const { return experts_.front().in_features(); }
  bool holds_double() const { return experts_.front().holds_double(); }
  bool stored_in_out() const { return experts_.front().stored_in_out(); }
  void check_fits(const char* operation, index_t out_features, index_t in_features) const {
    experts_.front().check_fits(operation, out_features, in_features);
  }
  /// Throws value_error for a stack: merge(stack, adapter), or expert(k).
  template <class Acc>
  std::vector<step<Acc>> steps(const step_request<Acc>& request) const {
    if (experts() != 1)
      detail::raise_value(request.operation, target_.module + " is a stack of " +
                                                 std::to_string(experts()) +
                                                 " experts: pass the stack, or use expert(k)");
    return experts_.front().steps(request);
  }

 private:
  adapter_target target_;
  std::vector<any_kind> own_, experts_;  ///< as they came, and in the target's rows
  std::string kind_, origin_;
};
static_assert(adapter_kind<module_adapter>);

/// Every expert of a stack [experts, ., .] with its adapter, at a strength; slices as the base
/// stores them. Shapes are checked before anything is written.
template <class T>
  requires(!std::is_const_v<T>)
merge_report merge(const tensor_view<T, 3>& stack, const module_adapter& l, double strength = 1) {
  const bool swapped = l.stored_in_out();
  if (l.experts() != stack.extent(0))
    detail::raise_shape("merge", l.target().module + " is for " + std::to_string(l.experts()) +
                                     " experts and the stack has " +
                                     std::to_string(stack.extent(0)));
  for (index_t k = 0; k < l.experts(); ++k)
    l.expert(k).check_fits("merge", stack.extent(swapped ? 2 : 1), stack.extent(swapped ? 1 : 2));
  for (index_t k = 0; k < l.experts(); ++k) {
    const auto slice = stack.slice(k).matrix();
    detail::check_can_merge("merge", slice, scaled(strength, l.expert(k)));
  }
  merge_report report;
  for (index_t k = 0; k < l.experts(); ++k)
    report += merge(stack.slice(k).matrix(), scaled(strength, l.expert(k)));
  return report;
}

}  // namespace lora::inline LORA_DETAIL_ABI
