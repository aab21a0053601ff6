// SPDX-License-Identifier: Apache-2.0
//
// linear<T>: a base weight with named adapters, each with a weight (strength), active or not, merged or not.
//
//   forward(x, y):   y := round(W * x (+ b) + sum over ACTIVE adapters of weight * s * lora_B * (lora_A * x))
//
// Merged or not says where an active adapter is evaluated, inside the weight or beside it; it never
// changes which function is computed. So all states of one set of (active adapter, weight) pairs
// agree up to rounding, by the bound of docs/numerics.md (and by what attach<F> of a narrower F
// rounds), also when one adapter is merged and another is mixed in beside it. (PEFT drops the
// latter: huggingface/peft#3756.) A merged adapter that is deactivated leaves the weight, and
// returns when it is activated again.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "lora/adapter.hpp"
#include "lora/detail/refusals.hpp"
#include "lora/forward.hpp"
#include "lora/merge.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace detail {

/// An adapter in the format it came in, from which it is merged.
using any_adapter = std::variant<adapter<float>, adapter<double>, adapter<float16>, adapter<bfloat16>>;
/// The same in panels, from which it is mixed.
using any_packed_adapter =
    std::variant<packed_adapter<float>, packed_adapter<double>, packed_adapter<float16>, packed_adapter<bfloat16>>;
struct attached_adapter {
  any_adapter factors;
  any_packed_adapter panels;
};

/// The narrowest of our formats that holds the elements of both factors.
template <low_rank L, class A = storage_t<factor_scalar_A<L>>, class B = storage_t<factor_scalar_B<L>>>
using factor_format = std::conditional_t<std::is_same_v<A, B>, A, accumulator_t<A, B>>;

/// scaled(w, ... adapter) taken apart: the product of the weights, and what they multiply.
template <low_rank L>
double weight_of(const L&) {
  return 1.0;
}
template <low_rank L>
double weight_of(const scaled_adapter<L>& l) {
  return l.weight() * weight_of(l.adapter());
}
template <low_rank L>
const L& unscaled(const L& l) {
  return l;
}
template <low_rank L>
const auto& unscaled(const scaled_adapter<L>& l) {
  return unscaled(l.adapter());
}

}  // namespace detail

/// How an adapter is attached to a linear.
struct attachment {
  double weight;   ///< strength; multiplies scaling
  double scaling;  ///< the adapter's own s
  index_t rank;
  bool active;  ///< part of the function
  bool merged;  ///< evaluated inside the weight while active
};

/// A weight of out_features x in_features elements T (float, double, float16, bfloat16) and its adapters, all owned.
///
/// Invariant: weight() is round(pristine + sum over merged and active adapters), rounded once from the pristine base with
/// the adapters in the order of their names. So the order of calls changes no bit, nothing drifts, and with nothing merged
/// weight() is the pristine base bit for bit, after any sequence of calls.
///
/// The weight is kept in panels (packed_weight.hpp), whose padding is at most 31 outputs.
/// Memory, in weights: 1 while nothing is merged and 2 while something is, the pristine copy and the merged weight. Given a
/// reload function it holds 1 in every state and 2 while a call changes what is merged. An adapter is kept twice, as it
/// came and in panels of the same format (double for a double layer), ranks and outputs padded to them. Blocks of 2 MiB
/// and more take whole huge pages of 2 MiB, those from 16 KiB on share them (see packed_adapter).
///
/// Every call that throws has changed nothing. Const calls may run at the same time; others need the object to themselves.
template <class T>
class linear {
  static_assert(detail::refuse_panels<T>());

 public:
  /// Writes the pristine base weight, row-major, again: called when the bits are needed and no copy is kept. It must give
  /// the bits of construction (a hash is checked) and may throw.
  using reload_function = std::function<void(std::span<T> row_major_weight)>;

  /// Copies a base: a matrix out_features x in_features, or with_bias(W, b). A scalar narrower than T is widened exactly,
  /// a wider one refused at compile time. Without a reload function a pristine copy is kept.
  template <class Base>
    requires matrix_like<Base> || detail::is_biased<Base>
  explicit linear(const Base& base, reload_function reload = nullptr) : reload_(std::move(reload)) {
    const detail::default_environment environment;
    if constexpr (detail::is_biased<Base>) {
      static_assert(!detail::is_packed_weight<detail::bare<decltype(base.weight)>>,
                    "lora::linear: give it the weight itself, which it packs");
      copy_weight(base.weight);
      detail::check_bias("linear", out_features(), base.bias);
      bias_.resize(static_cast<std::size_t>(out_features()));
      static_assert(detail::holds_exactly<bias_value, detail::element_t<decltype(base.bias)>>,
                    "lora::linear: the bias has a wider scalar than the layer computes in: cast it first");
      for (index_t i = 0; i < out_features(); ++i)
        bias_[static_cast<std::size_t>(i)] = detail::widen<bias_value>(base.bias(i, 0));
    } else {
      copy_weight(as_matrix(base));
    }
  }

  /// A mistaken base gets a sentence.
  template <class Base>
    requires detail::mistaken_base<Base>
  explicit linear(const Base&, reload_function = nullptr) {
    static_assert(detail::refuse_weight<detail::verb::linear, Base>());
  }

  index_t out_features() const { return packed().out_features(); }
  index_t in_features() const { return packed().in_features(); }
  bool has_bias() const { return !bias_.empty(); }

  /// The weight as it stands, with what is merged, as a row-major matrix: a copy.
  auto weight() const { return packed().matrix(); }
  /// The same in panels, as it is held; valid until the next call that is not const.
  const packed_weight<T>& packed() const { return is_merged_ ? merged_ : pristine_; }

  /// Adds an adapter under a name: active, not merged, with the weight of scaled(w, l) (1 without).
  /// Copies the factors in their format. attach<bfloat16>(name, l) keeps the panels from which it
  /// is mixed in 16 bits: half the bytes of float factors on a 16-bit base, and a rounding of each
  /// factor that packed_adapter states; merging still takes the factors as they came. So merged and
  /// mixed are then two functions, which differ by that: two states add its term to their bounds.
  /// Throws shape_error (does not fit), value_error (name empty or taken, weight or scaling not
  /// finite).
  template <class Panels = void, low_rank L>
  void attach(const std::string& name, const L& l) {
    if (name.empty()) detail::raise_value("linear::attach", "the name is empty");
    if (adapters_.count(name) != 0)
      detail::raise_value("linear::attach", "an adapter named \"" + name + "\" is attached already: detach it first");
    detail::check_adapter("linear::attach", l, out_features(), in_features());
    const auto& source = detail::unscaled(l);
    const double weight = detail::weight_of(l);
    check_weight("linear::attach", name, weight, static_cast<double>(source.scaling()));
    using format = detail::factor_format<detail::bare<decltype(source)>>;
    // Tiles of doubles read panels of doubles only.
    using mixed = std::conditional_t<std::is_same_v<accumulator_t<T, format>, double>, double, format>;
    using panels = std::conditional_t<std::is_void_v<Panels>, mixed, Panels>;
    static_assert(std::is_same_v<accumulator_t<T, panels>, accumulator_t<panels>>,
                  "lora::linear::attach: a double layer reads panels of double only");
    adapters_.emplace(name, slot{std::make_shared<const detail::attached_adapter>(
                                     detail::attached_adapter{adapter<format>(source), packed_adapter<panels>(source)}),
                                 weight, true, false});
  }
  /// What is no adapter gets a sentence.
  template <class Panels = void, class L>
    requires(!low_rank<L> && detail::recognisable<L>)
  void attach(const std::string&, const L&) {
    static_assert(detail::refuse_adapter<detail::verb::linear, L>());
  }

  /// Takes an adapter out; if it is merged, out of the weight too. Throws value_error when the name is not attached.
  void detach(const std::string& name) {
    change([&](slots& all) {
      find("linear::detach", all, name);
      all.erase(name);
    });
  }

  /// Sets an adapter's strength, merged or not. Throws value_error when it is not finite or the name is not attached.
  void set_weight(const std::string& name, double weight) {
    change([&](slots& all) {
      slot& one = find("linear::set_weight", all, name);
      check_weight("linear::set_weight", name, weight, one.scaling());
      one.weight = weight;
    });
  }

  /// Makes an adapter part of the function, or not; its weight and whether it is merged are kept.
  void activate(const std::string& name) {
    change([&](slots& all) { find("linear::activate", all, name).active = true; });
  }
  void deactivate(const std::string& name) {
    change([&](slots& all) { find("linear::deactivate", all, name).active = false; });
  }

  /// Moves adapters into the weight; without names, every active one. Merging what is merged changes nothing. Says how many
  /// elements of the pristine base are finite and of the weight now are not.
  template <class... Names>
    requires(std::convertible_to<const Names&, std::string> && ...)
  merge_report merge(const Names&... names) {
    return change([&](slots& all) {
      if constexpr (sizeof...(Names) == 0) {
        for (auto& [name, one] : all) one.merged = one.merged || one.active;
      } else {
        ((find("linear::merge", all, names).merged = true), ...);
      }
    });
  }

  /// Moves adapters out of the weight; without names, all. What stays merged is rounded from the pristine base once.
  template <class... Names>
    requires(std::convertible_to<const Names&, std::string> && ...)
  merge_report unmerge(const Names&... names) {
    return change([&](slots& all) {
      if constexpr (sizeof...(Names) == 0) {
        for (auto& [name, one] : all) one.merged = false;
      } else {
        ((find("linear::unmerge", all, names).merged = false), ...);
      }
    });
  }

  bool contains(const std::string& name) const { return adapters_.count(name) != 0; }
  /// Throws value_error when the name is not attached.
  attachment at(const std::string& name) const {
    const slot& one = find("linear::at", adapters_, name);
    const auto rank = std::visit([](const auto& l) { return l.rank(); }, one.adapter->factors);
    return {one.weight, one.scaling(), rank, one.active, one.merged};
  }
  /// In the order in which they are merged and evaluated.
  std::vector<std::string> names() const {
    std::vector<std::string> result;
    for (const auto& [name, one] : adapters_) result.push_back(name);
    return result;
  }

  /// The function at the top of this file. x in_features x tokens, y out_features x tokens; rounding, error, cost and
  /// exceptions as lora::forward, with W the weight as it stands and the active adapters that are not merged beside it.
  template <class X, class Y>
    requires activations<X> && activations<Y>
  void forward(const X& x, Y&& y) const {
    workspace space;
    forward(space, x, std::forward<Y>(y));
  }
  /// The same with scratch that the caller keeps: no allocation once it is large enough.
  template <class X, class Y>
    requires activations<X> && activations<Y>
  void forward(workspace& space, const X& x, Y&& y) const {
    detail::refuse_temporary<Y>();
    const detail::default_environment environment;
    using acc = accumulator_t<T, X, Y>;
    decltype(auto) input = detail::in_memory(x);
    const auto from = detail::input_view(input);
    const auto to = detail::output_view(y);
    const auto beside = [this](const auto& visit) { this->visit_beside(visit); };
    const matrix_view<const bias_value, storage_order::col_major> column(bias_.data(), has_bias() ? out_features() : 0, 1);
    const auto* bias = has_bias() ? &column : nullptr;
    const auto run = [&]<class Acc>(std::type_identity<Acc>) {
      detail::with_source<Acc, typename decltype(from)::value_type>(
          packed(), [&](const auto& source, index_t out, index_t in) {
            detail::forward_views("linear::forward", space, out, in, source, bias, from, to,
                                  detail::same_for_all<decltype(beside)>{beside});
          });
    };
    if (needs_double<acc>(beside))
      run(std::type_identity<double>());
    else
      run(std::type_identity<acc>());
  }
  /// What is no call of it gets a sentence.
  template <class... A>
    requires detail::mistaken_on_linear<A...>
  auto forward(const A&...) const {
    static_assert(detail::refuse_on_activations<detail::verb::linear, A...>());
  }

 private:
  using bias_value = accumulator_t<T>;

  struct slot {
    std::shared_ptr<const detail::attached_adapter> adapter;
    double weight;
    bool active, merged;

    double scaling() const {
      return std::visit([](const auto& l) { return l.scaling(); }, adapter->factors);
    }
    bool in_weight() const { return merged && active && weight * scaling() != 0.0; }
  };
  using slots = std::map<std::string, slot>;

  template <class W>
  void copy_weight(const W& view) {
    static_assert(detail::holds_exactly<T, typename W::value_type>,
                  "lora::linear: the base weight has a wider scalar than the layer stores, which would round it silently: "
                  "cast it first or use that scalar");
    pristine_ = packed_weight<T>(view);
    if (reload_) fingerprint_ = fingerprint([&](index_t i, index_t k) { return detail::exactly<T>(view(i, k)); });
  }

  template <class Slots>
  static auto& find(const char* operation, Slots& all, const std::string& name) {
    const auto found = all.find(name);
    if (found == all.end()) raise_unknown(operation, all, name);
    return found->second;
  }
  [[noreturn]] static void raise_unknown(const char* operation, const slots& all, const std::string& name) {
    std::string attached;
    for (const auto& [other, one] : all) attached += (attached.empty() ? "\"" : ", \"") + other + "\"";
    detail::raise_value(
        operation, "no adapter named \"" + name + "\" is attached; attached: " + (attached.empty() ? "none" : attached));
  }

  /// Weights of nested scaled(...) multiply here before they meet the scaling, which may overflow where scaled does not.
  static void check_weight(const char* operation, const std::string& name, double weight, double scaling) {
    if (!detail::is_finite(weight) || !detail::is_finite(weight * scaling))
      detail::raise_value(operation, "the weight of \"" + name + "\", alone or times its scaling, is not finite");
  }

  /// visit(scaled(weight, adapter)) for what is in the weight, in the order of the names.
  template <class Visit>
  static void visit_inside(const slots& all, const Visit& visit) {
    for (const auto& entry : all) {
      const slot& one = entry.second;
      if (!one.in_weight()) continue;
      std::visit([&](const auto& l) { visit(scaled_adapter<detail::bare<decltype(l)>>(one.weight, l)); },
                 one.adapter->factors);
    }
  }
  /// The same, of the panels, for what is active and not merged.
  template <class Visit>
  void visit_beside(const Visit& visit) const {
    for (const auto& entry : adapters_) {
      const slot& one = entry.second;
      if (!one.active || one.merged) continue;
      std::visit([&]<class F>(const packed_adapter<F>& l) { visit(scaled_packed_adapter<F>(one.weight, l)); },
                 one.adapter->panels);
    }
  }

  /// Whether a double adapter takes part in an accumulation that would otherwise be float.
  template <class Acc, class Each>
  static bool needs_double(const Each& each) {
    bool any = false;
    if constexpr (!std::is_same_v<Acc, double>)
      each([&](const auto& l) { any = any || (detail::holds_double<detail::bare<decltype(l)>> && detail::is_read(l)); });
    return any;
  }

  /// Applies a change to a copy of the slots, makes the weight fit, and only then keeps the copy: nothing after the weight
  /// is written can throw.
  template <class Change>
  merge_report change(const Change& apply_to) {
    const detail::default_environment environment;
    slots next = adapters_;
    apply_to(next);
    const merge_report report = same_weight(adapters_, next) ? report_ : rebuild(next);
    adapters_.swap(next);
    report_ = report;
    return report;
  }

  static bool same_weight(const slots& before, const slots& after) {
    const auto merged = [](const slots& all) {
      std::vector<std::pair<const detail::attached_adapter*, double>> list;
      for (const auto& [name, one] : all)
        if (one.in_weight()) list.emplace_back(one.adapter.get(), one.weight);
      return list;
    };
    return merged(before) == merged(after);
  }

  merge_report rebuild(const slots& next) {
    const auto inside = [&next](const auto& visit) { visit_inside(next, visit); };
    return needs_double<bias_value>(inside) ? rebuild_in<double>(inside) : rebuild_in<bias_value>(inside);
  }

  /// What can throw comes first: after it the weight is written and nothing else happens.
  template <class Acc, class Each>
  merge_report rebuild_in(const Each& inside) {
    workspace space;
    const detail::panel_update<Acc, detail::has_dots<Acc, bfloat16>> update(space, "linear", inside, out_features(),
                                                                            in_features(), detail::merging);
    if (reload_ && is_merged_) {
      const std::vector<T> row_major = reloaded();
      merged_.assign(lora::row_major(row_major, out_features(), in_features()));
    } else if (!is_merged_ && update.rank() != 0) {
      merged_ = reload_ ? std::move(pristine_) : packed_weight<T>::unfilled(out_features(), in_features());
    }
    is_merged_ = update.rank() != 0;
    if (is_merged_) return detail::report_of(detail::write_panels(update, reload_ ? merged_ : pristine_, merged_), out_features() * in_features());
    if (reload_) pristine_ = std::move(merged_);
    merged_ = {};
    return {};
  }

  /// The pristine bits again, or a value_error: other bits would be merged into silently.
  std::vector<T> reloaded() const {
    std::vector<T> base(static_cast<std::size_t>(out_features() * in_features()));
    reload_(std::span<T>(base));
    const auto at = [&](index_t i, index_t k) { return base[static_cast<std::size_t>(i * in_features() + k)]; };
    if (fingerprint(at) != fingerprint_)
      detail::raise_value("linear", "the reload function gave other bits than the weight that the layer was built from");
    return base;
  }
  /// A hash of the bits, row by row.
  template <class At>
  std::size_t fingerprint(const At& at) const {
    std::vector<T> row(static_cast<std::size_t>(in_features()));
    std::size_t hash = 0;
    for (index_t i = 0; in_features() != 0 && i < out_features(); ++i) {
      for (index_t k = 0; k < in_features(); ++k) row[static_cast<std::size_t>(k)] = at(i, k);
      const std::string_view bytes(reinterpret_cast<const char*>(row.data()), row.size() * sizeof(T));
      hash = hash * 31 + std::hash<std::string_view>{}(bytes);
    }
    return hash;
  }

  packed_weight<T> pristine_;  ///< empty while is_merged_ and a reload function stands in for it
  packed_weight<T> merged_;    ///< empty unless is_merged_
  bool is_merged_ = false;
  std::vector<bias_value> bias_;
  reload_function reload_;
  std::size_t fingerprint_ = 0;
  slots adapters_;
  merge_report report_;
};

template <class Base>
  requires matrix_like<Base>
linear(const Base&) -> linear<detail::storage_t<detail::element_t<Base>>>;
template <class W, class B>
linear(const biased<W, B>&) -> linear<detail::storage_t<typename W::value_type>>;
template <class Base>
  requires detail::mistaken_base<Base>
linear(const Base&) -> linear<float>;  // for the sentence
static_assert(detail::linear_like<linear<float>>);

}  // namespace lora::inline LORA_DETAIL_ABI
