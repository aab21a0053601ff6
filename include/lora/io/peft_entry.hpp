// SPDX-License-Identifier: Apache-2.0
//
// One module's adapter out of a PEFT file, with everything the file says of it. An entry is more than factors: how the base
// stores its weight, a bias of its own, a magnitude, a kernel, several experts. So it is not an adapter that a verb of the core
// takes (a verb would ignore the rest); lora/io/peft_verbs.hpp has the verbs that honour all of it.
#pragma once

#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/adapter.hpp"
#include "lora/io/peft_entry_parts.hpp"
#include "lora/scaled.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {

/// Immutable. Copies share what they hold, and moving copies, so that no entry is ever empty.
template <scalar T>
class entry {
 public:
  entry(const entry&) = default;
  entry& operator=(const entry&) = default;
  ~entry() = default;
  /// Throws value_error or shape_error for parts that do not belong together: values of another number than outputs or ranks,
  /// experts of different shapes, a kernel that is not lora_A's, a dtype that holds no factor.
  explicit entry(entry_parts<T> parts) : parts_(checked(std::move(parts))) {}
  /// A plain adapter of a linear layer.
  entry(std::string name, lora::adapter<T> factors, bool fan_in_fan_out)
      : entry(plain_parts(name, factors, fan_in_fan_out)) {}

  const entry_parts<T>& parts() const { return *parts_; }
  const std::string& name() const { return parts_->name; }
  entry_kind kind() const { return parts_->kind; }
  /// The base's tensor that the delta weight belongs to.
  std::string weight_name() const {
    if (parts_->kind == entry_kind::parameter) return parts_->base_name;
    return parts_->base_name + (parts_->kind == entry_kind::attention_in ? "_weight" : ".weight");
  }
  /// The base's tensor that lora_bias() belongs to.
  std::string bias_name() const {
    return parts_->base_name + (parts_->kind == entry_kind::attention_in ? "_bias" : ".bias");
  }

  index_t rank() const { return parts_->experts.front().rank(); }
  double scaling() const { return parts_->experts.front().scaling(); }
  index_t in_features() const { return parts_->experts.front().in_features(); }
  index_t out_features() const { return parts_->experts.front().out_features(); }
  /// The base stores W as [in, out]; of a parameter: a stack of experts as [expert, in, out], a matrix never.
  bool fan_in_fan_out() const { return parts_->fan_in_fan_out; }
  index_t experts() const { return static_cast<index_t>(parts_->experts.size()); }

  /// Values that lora_B adds to its output before the scaling; empty without lora_bias.
  const std::vector<T>& lora_bias() const { return parts_->bias; }
  /// One for each output; empty without DoRA.
  const std::vector<T>& magnitude() const { return parts_->magnitude; }
  peft::base_change change() const { return parts_->change; }
  const std::vector<index_t>& kernel() const { return parts_->kernel; }
  index_t in_channels() const { return parts_->in_channels; }
  index_t groups() const { return parts_->groups; }
  /// The base's module whose weight several replicated layers use; empty when this layer has a weight of its own.
  const std::string& shared_with() const { return parts_->shared_with; }

  /// The low-rank factors alone, for a weight that the caller views as out x in (W, W.transpose(), a kernel flattened). What
  /// else the entry holds is the caller's to add. Throws value_error for a stack of experts: see expert().
  const lora::adapter<T>& factors() const {
    if (parts_->experts.size() != 1)
      lora::detail::raise_value(
          "peft::entry::factors",
          parts_->name + " is a stack of " + std::to_string(parts_->experts.size()) + " experts: use expert(k)");
    return parts_->experts.front();
  }
  /// The factors of one expert. Throws value_error when there is no such.
  const lora::adapter<T>& expert(index_t k) const {
    if (k < 0 || k >= experts())
      lora::detail::raise_value("peft::entry::expert", parts_->name + " has " + std::to_string(experts()) +
                                                           " experts, not one " + std::to_string(k));
    return parts_->experts[static_cast<std::size_t>(k)];
  }

  /// The adapter, for a caller who passes W as it is stored. Throws value_error when the entry is more than that, or the
  /// weight is stored the other way round.
  const lora::adapter<T>& plain() const {
    const std::string more = what_else();
    if (!more.empty())
      lora::detail::raise_value("peft::entry::plain",
                                parts_->name + " has " + more + ": use the verbs of lora/io/peft_verbs.hpp, or factors()");
    if (parts_->fan_in_fan_out && parts_->kind == entry_kind::parameter)
      lora::detail::raise_value("peft::entry::plain", parts_->name +
                                                          " was read with read_options::parameters_in_out, which counts "
                                                          "for a stack of experts and not for a matrix: use "
                                                          "merge(stack, entry) or merge(W, entry)");
    if (parts_->fan_in_fan_out || parts_->kind == entry_kind::embedding)
      lora::detail::raise_value("peft::entry::plain", "the base stores the weight of " + parts_->name +
                                                          " as in_features x out_features (fan_in_fan_out): pass "
                                                          "W.transpose() and factors(), or merge(W, entry)");
    return factors();
  }

  /// What makes the entry more than a low-rank delta of one weight, in words; empty when nothing does.
  std::string what_else() const {
    std::string result;
    const auto add = [&](bool holds, const std::string& what) {
      if (holds) result += (result.empty() ? "" : ", ") + what;
    };
    add(!parts_->bias.empty(), "a bias (lora_bias)");
    add(!parts_->magnitude.empty(), "a magnitude (DoRA)");
    add(parts_->change != base_change::none, "a change of the base (" + std::string(change_name(parts_->change)) + ")");
    add(parts_->groups > 1, "a convolution with groups");
    add(parts_->experts.size() > 1, "several experts");
    add(!parts_->shared_with.empty(), "a weight that replicated layers share");
    return result;
  }
  static const char* change_name(peft::base_change change) {
    switch (change) {
      case base_change::none: return "none";
      case base_change::pissa: return "PiSSA";
      case base_change::olora: return "OLoRA";
      case base_change::kasa: return "KaSA";
    }
    return "";
  }

 private:
  static entry_parts<T> plain_parts(std::string& name, lora::adapter<T>& factors, bool fan_in_fan_out) {
    entry_parts<T> parts;
    parts.name = std::move(name);
    parts.scale = {.alpha = factors.scaling(), .rule = scaling_rule::fixed};
    parts.experts.push_back(std::move(factors));
    parts.fan_in_fan_out = fan_in_fan_out;
    return parts;
  }

  static std::shared_ptr<const entry_parts<T>> checked(entry_parts<T> parts) {
    entry_detail::invariant<T>(parts).check();
    if (parts.path.empty()) parts.path = parts.name;
    if (parts.base_name.empty()) parts.base_name = parts.name;
    return std::make_shared<const entry_parts<T>>(std::move(parts));
  }

  std::shared_ptr<const entry_parts<T>> parts_;
};

/// weight * (an entry): the delta and the bias at that strength; a magnitude stays. Looks at the entry, which must outlive it.
template <scalar T>
class scaled_entry {
 public:
  scaled_entry(double weight, const entry<T>& of) : weight_(weight), entry_(&of) {
    if (!lora::detail::is_finite(weight)) lora::detail::raise_value("scaled", "the weight is not finite");
  }
  double weight() const { return weight_; }
  const entry<T>& of() const { return *entry_; }

  const std::string& name() const { return entry_->name(); }
  index_t in_features() const { return entry_->in_features(); }
  index_t out_features() const { return entry_->out_features(); }
  bool fan_in_fan_out() const { return entry_->fan_in_fan_out(); }
  scaled_adapter<lora::adapter<T>> factors() const { return {weight_, entry_->factors()}; }

 private:
  double weight_;
  const entry<T>* entry_;
};

namespace entry_detail {
template <class E>
inline constexpr bool is_entry = false;
template <class T>
inline constexpr bool is_entry<entry<T>> = true;
template <class T>
inline constexpr bool is_entry<scaled_entry<T>> = true;
}  // namespace entry_detail

template <class E>
concept adapter_entry = entry_detail::is_entry<std::remove_cvref_t<E>>;

static_assert(lora::detail::entry_like<entry<float>> && lora::detail::entry_like<scaled_entry<float>>);
static_assert(!low_rank<entry<float>> && !low_rank<scaled_entry<float>>,
              "an entry must not pass as an adapter: what else it holds would be ignored");

}  // namespace lora::inline LORA_DETAIL_ABI::peft

namespace lora::inline LORA_DETAIL_ABI {

/// The entry at weight times its own scaling, as a view. Throws value_error when the weight is not finite.
template <scalar T>
auto scaled(double weight, const peft::entry<T>& e) {
  return peft::scaled_entry<T>(weight, e);
}
template <scalar T>
void scaled(double weight, peft::entry<T>&& temporary) = delete;  // the view would outlive it
template <scalar T>
auto scaled(double weight, const peft::scaled_entry<T>& e) {
  return peft::scaled_entry<T>(weight * e.weight(), e.of());
}

}  // namespace lora::inline LORA_DETAIL_ABI
