// SPDX-License-Identifier: Apache-2.0
//
// One module's adapter out of a PEFT file, with everything the file says of it: how the base stores
// its weight, a bias of its own, a magnitude, a kernel, several experts. It is an adapter kind: the
// verbs take it where they take an adapter, with W as the base stores it, and honour all of it.
//
//   merge(W, e...), unmerge, merged, merge_checked, merge(rounding::as_peft, W, e...)
//   merge(W, b, e...), unmerge(W, b, e...)    and the base's bias b:  b += sum of s * bias
//   merge(stack, e...)                        a tensor_view<T, 3> [experts, ., .] (peft_stacks.hpp)
//   forward(W, x, y, e...), mixed(W, e...)    one product, whatever the kind
//   apply(x, y, e...)                         y := round(y + sum of (s B (A x) + s bias))
//   embed(W, ids, y, e...)                     an embedding's rows with its adapters
//   apply_through(down, y, e...)              a convolution's, through the caller's convolution
//                                             (through.hpp)
//
// A square W does not betray a wrong fan_in_fan_out (only a rectangular one "fits transposed"):
// before merging a file, compare the shapes of all its entries with the base. A verb that cannot
// honour an entry wholly throws value_error before anything is written: a bias without b, a grouped
// convolution in merge (its delta has no kernel of the base's shape), a change of the base (see
// converted() in peft_convert.hpp), a weight that replicated layers share.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/adapter.hpp"
#include "lora/dora.hpp"
#include "lora/io/detail/module_path.hpp"
#include "lora/io/peft_entry_parts.hpp"
#include "lora/scaled.hpp"
#include "lora/steps.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {

template <scalar T>
class entry;

namespace entry_detail {

/// What of the base a verb is given.
enum class given { matrix, stack };

/// PEFT looks at a module's is_transposed for stacks only: a parameter of two dimensions is out x
/// in always.
template <class T>
bool stored_in_out(const entry<T>& e, given base) {
  if (e.kind() == entry_kind::parameter && base == given::matrix) return false;
  return e.fan_in_fan_out() || e.kind() == entry_kind::embedding;
}

/// A hint where only the number of tokens differs.
template <class T>
std::string resized_vocabulary(index_t stored_rows, index_t stored_cols, index_t rows, index_t cols,
                               const entry<T>& e) {
  const bool embeds = e.kind() == entry_kind::embedding || io_detail::is_embedding_name(e.name());
  if (!embeds || stored_cols != cols || stored_rows == rows) return {};
  const std::string tokens = "; the columns fit and the rows are tokens: ";
  if (stored_rows > rows)
    return tokens +
           "this base has a larger vocabulary, or a padded one, than the adapter was trained with";
  return tokens +
         "the vocabulary was resized, probably, before the adapter was trained: resize the base "
         "to " +
         std::to_string(rows) + " rows first (its new rows may be in a file beside the adapter)";
}

/// Throws shape_error, with a way out when W only fits the other way round.
template <class T>
void check_shape(const char* operation, index_t stored_rows, index_t stored_cols, const entry<T>& e,
                 given base = given::matrix) {
  const bool swapped = stored_in_out(e, base);
  const index_t rows = swapped ? e.in_features() : e.out_features();
  const index_t cols = swapped ? e.out_features() : e.in_features();
  if (stored_rows == rows && stored_cols == cols) return;
  std::string what = "the weight of " + e.name() + " is " +
                     lora::detail::shape_text(stored_rows, stored_cols) +
                     " and the adapter is for " + lora::detail::shape_text(rows, cols);
  if (stored_rows == cols && stored_cols == rows && e.kind() == entry_kind::linear)
    what += swapped ? "; it fits transposed: the config says fan_in_fan_out, but this base stores "
                      "out x in: read with "
                      "{.fan_in_fan_out = false}"
                    : "; it fits transposed: this base stores in x out (fan_in_fan_out, as GPT-2 "
                      "does) and the config does "
                      "not say so: read with {.fan_in_fan_out = true}";
  if (stored_rows == cols && stored_cols == rows && e.kind() == entry_kind::parameter)
    what += base == given::stack
                ? "; it fits transposed: a base may store [expert, in, out] (is_transposed), and "
                  "PEFT before "
                  "0.19.1 saved stacks transposed: read with read_options::parameters_in_out the "
                  "other way"
                : "; it fits transposed: if this is a slice of a stack of experts, pass the stack";
  lora::detail::raise_shape(operation,
                            what + resized_vocabulary(stored_rows, stored_cols, rows, cols, e));
}

/// Throws value_error where a use cannot honour an entry.
template <class T>
void check_use(const char* operation, step_use use, const entry<T>& e);

}  // namespace entry_detail

/// Immutable. Copies share what they hold, and moving copies, so that no entry is ever empty.
template <scalar T>
class entry {
 public:
  using value_type = T;

  entry(const entry&) = default;
  entry& operator=(const entry&) = default;
  ~entry() = default;
  /// Throws value_error or shape_error for parts that do not belong together: values of another
  /// number than outputs or ranks, experts of different shapes, a kernel that is not lora_A's, a
  /// dtype that holds no factor.
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
  /// The base stores W as [in, out]; of a parameter: a stack of experts as [expert, in, out], a
  /// matrix never.
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
  /// The base's module whose weight several replicated layers use; empty when this layer has a
  /// weight of its own.
  const std::string& shared_with() const { return parts_->shared_with; }

  /// The low-rank factors alone, for a weight that the caller views as out x in (W, W.transpose(),
  /// a kernel flattened). What else the entry holds is the caller's to add. Throws value_error for
  /// a stack of experts: see expert().
  const lora::adapter<T>& factors() const {
    if (parts_->experts.size() != 1)
      lora::detail::raise_value("peft::entry::factors", parts_->name + " is a stack of " +
                                                            std::to_string(parts_->experts.size()) +
                                                            " experts: use expert(k)");
    return parts_->experts.front();
  }
  /// The factors of one expert. Throws value_error when there is no such.
  const lora::adapter<T>& expert(index_t k) const {
    if (k < 0 || k >= experts())
      lora::detail::raise_value("peft::entry::expert",
                                parts_->name + " has " + std::to_string(experts()) +
                                    " experts, not one " + std::to_string(k));
    return parts_->experts[static_cast<std::size_t>(k)];
  }

  /// The adapter, for a caller who passes W as it is stored. Throws value_error when the entry is
  /// more than that, or the weight is stored the other way round.
  const lora::adapter<T>& plain() const {
    const std::string more = what_else();
    if (!more.empty())
      lora::detail::raise_value("peft::entry::plain",
                                parts_->name + " has " + more +
                                    ": use the verbs of lora/io/peft_verbs.hpp, or factors()");
    if (parts_->fan_in_fan_out && parts_->kind == entry_kind::parameter)
      lora::detail::raise_value("peft::entry::plain",
                                parts_->name +
                                    " was read with read_options::parameters_in_out, which counts "
                                    "for a stack of experts and not for a matrix: use "
                                    "merge(stack, entry) or merge(W, entry)");
    if (parts_->fan_in_fan_out || parts_->kind == entry_kind::embedding)
      lora::detail::raise_value("peft::entry::plain",
                                "the base stores the weight of " + parts_->name +
                                    " as in_features x out_features (fan_in_fan_out): pass "
                                    "W.transpose() and factors(), or merge(W, entry)");
    return factors();
  }

  /// What makes the entry more than a low-rank delta of one weight, in words; empty when nothing
  /// does.
  std::string what_else() const {
    std::string result;
    const auto add = [&](bool holds, const std::string& what) {
      if (holds) result += (result.empty() ? "" : ", ") + what;
    };
    add(!parts_->bias.empty(), "a bias (lora_bias)");
    add(!parts_->magnitude.empty(), "a magnitude (DoRA)");
    add(parts_->change != base_change::none,
        "a change of the base (" + std::string(change_name(parts_->change)) + ")");
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

  /// Whether the verbs take W in_features x out_features.
  bool stored_in_out() const {
    return entry_detail::stored_in_out(*this, entry_detail::given::matrix);
  }
  /// Throws shape_error unless it is for an out_features x in_features weight, with a way out where
  /// there is one.
  void check_fits(const char* operation, index_t out_features, index_t in_features) const {
    const bool swapped = stored_in_out();
    entry_detail::check_shape(operation, swapped ? in_features : out_features,
                              swapped ? out_features : in_features, *this);
  }
  /// The factors as stored, the gains of a magnitude, the bias.
  template <class Acc>
  std::vector<step<Acc>> steps(const step_request<Acc>& request) const {
    entry_detail::check_use(request.operation, request.use, *this);
    const double s = request.strength * scaling();
    const any_factors shared(adapter_view<T>(factors()), parts_);
    std::vector<step<Acc>> all;
    if (!magnitude().empty())
      all = lora::detail::dora_steps(request, shared, magnitude());
    else if (!lora::detail::is_zero(s))
      all.push_back(low_rank_step{shared, request.strength});
    if (!lora_bias().empty() && !lora::detail::is_zero(s)) {
      shift_step shift{.shift = std::vector<double>(lora_bias().size()), .of = name()};
      for (std::size_t i = 0; i < shift.shift.size(); ++i)
        shift.shift[i] = s * lora::detail::widen<double>(lora_bias()[i]);
      all.push_back(std::move(shift));
    }
    return all;
  }

 private:
  static entry_parts<T> plain_parts(std::string& name, lora::adapter<T>& factors,
                                    bool fan_in_fan_out) {
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

/// strength * (an entry), as scaled(strength, entry) makes it. Looks at the entry.
template <scalar T>
using scaled_entry = scaled_kind<entry<T>>;

namespace entry_detail {

template <class T>
void check_use(const char* operation, step_use use, const entry<T>& e) {
  const auto refuse = [&](const std::string& why) {
    lora::detail::raise_value(operation, e.name() + why);
  };
  if (e.change() != base_change::none)
    refuse(std::string(" was trained beside a base that its initialization had changed (") +
           e.change_name(e.change()) +
           "): make it an adapter of the published base with converted(W, entry) of "
           "lora/io/peft_convert.hpp");
  if (use == step_use::merge && e.groups() > 1)
    refuse(" is a convolution with " + std::to_string(e.groups()) +
           " groups whose lora_A sees all channels, so that its delta has no kernel of the base's "
           "shape (PEFT refuses to merge "
           "it too): mix it in with apply_through");
  if ((use == step_use::merge || (use == step_use::prepare && !e.magnitude().empty())) &&
      !e.shared_with().empty())
    refuse(" is one of several layers of layer_replication that share the weight of " +
           e.shared_with() +
           ": copy the weight for each layer and merge the factors() of its entry there, or mix "
           "with apply");
  if (use == step_use::product && e.kind() == entry_kind::embedding)
    refuse(" is an embedding: use embed(W, ids, y, entry)");
  const auto& kernel = e.kernel();
  if (use == step_use::product &&
      std::any_of(kernel.begin(), kernel.end(), [](auto extent) { return extent != 1; }))
    refuse(" is a convolution with a kernel: use apply_through(down, y, entry)");
  if (use == step_use::embed && e.kind() != entry_kind::embedding)
    refuse(std::string(" is not an embedding but a ") + name_of(e.kind()));
}

}  // namespace entry_detail

namespace entry_detail {
template <class E>
inline constexpr bool is_entry = false;
template <class T>
inline constexpr bool is_entry<entry<T>> = true;
template <class T>
inline constexpr bool is_entry<scaled_kind<entry<T>>> = true;
}  // namespace entry_detail

template <class E>
concept adapter_entry = entry_detail::is_entry<std::remove_cvref_t<E>>;

static_assert(adapter_kind<entry<float>> && lora::detail::entry_like<entry<float>>);
static_assert(!low_rank<entry<float>>,
              "an entry must not pass as an adapter: what else it holds would be ignored");

}  // namespace lora::inline LORA_DETAIL_ABI::peft
