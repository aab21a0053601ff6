// SPDX-License-Identifier: Apache-2.0
//
// linear<T>: a base weight with named adapters of any kind, each with a strength, active or not,
// merged or not.
//
//   forward(x, y):   y := round(W * x (+ b) + sum over ACTIVE adapters of strength * s * lora_B *
//                    (lora_A * x))
//
// Adapters of other kinds (DoRA, ...) do their steps (steps.hpp) instead. Adapters act in the order
// of their names, from the pristine base. Merged or not says where an active adapter is evaluated,
// inside the weight or beside it; it never changes which function is computed. So all states of one
// set of (active adapter, strength) pairs agree up to rounding, by the bound of docs/numerics.md
// (and by what attach<F> of a narrower F rounds), also when one adapter is merged and another is
// mixed in beside it. (PEFT drops the latter: huggingface/peft#3756.) A merged adapter that is
// deactivated leaves the weight, and returns when it is activated again.
//
// Not every adapter is additive: a gain or an input map changes what those before it did. Where one
// of two active adapters is not additive, the earlier one must not stay beside a weight that holds
// the later one: such a change throws value_error.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "lora/adapter.hpp"
#include "lora/any_kind.hpp"
#include "lora/detail/merge_steps.hpp"
#include "lora/detail/refusals.hpp"
#include "lora/forward.hpp"
#include "lora/merge.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace detail {

/// An adapter in the format it came in, from which it is merged.
using any_adapter =
    std::variant<adapter<float>, adapter<double>, adapter<float16>, adapter<bfloat16>>;
/// The same in panels, from which it is mixed.
using any_packed_adapter = std::variant<packed_adapter<float>, packed_adapter<double>,
                                        packed_adapter<float16>, packed_adapter<bfloat16>>;
struct attached_adapter {
  any_adapter factors;
  any_packed_adapter panels;
};

/// The narrowest of our formats that holds the elements of both factors.
template <low_rank L, class A = storage_t<factor_scalar_A<L>>,
          class B = storage_t<factor_scalar_B<L>>>
using factor_format = std::conditional_t<std::is_same_v<A, B>, A, accumulator_t<A, B>>;

/// Steps of a kind from one base at one strength.
template <class Acc>
struct prepared_kind {
  std::vector<step<Acc>> steps;
  bool additive;
};

/// scaled(w, ... adapter) taken apart: the product of the weights, and what they multiply.
template <low_rank L>
double weight_of(const L&) {
  return 1.0;
}
template <low_rank L>
double weight_of(const scaled_adapter<L>& l) {
  return l.strength() * weight_of(l.adapter());
}
template <low_rank L>
const L& unscaled(const L& l) {
  return l;
}
template <adapter_kind K>
double weight_of(const K&) {
  return 1.0;
}
template <adapter_kind K>
double weight_of(const scaled_kind<K>& l) {
  return l.strength();
}
template <adapter_kind K>
const K& unscaled(const K& l) {
  return l;
}
template <adapter_kind K>
const K& unscaled(const scaled_kind<K>& l) {
  return l.of();
}
template <low_rank L>
const auto& unscaled(const scaled_adapter<L>& l) {
  return unscaled(l.adapter());
}

}  // namespace detail

/// How an adapter is attached to a linear.
struct attachment {
  double strength;  ///< multiplies scaling
  double scaling;   ///< the adapter's own s; 1 for other kinds than low-rank factors
  index_t rank;     ///< 0 for other kinds than low-rank factors
  bool active;      ///< part of the function
  bool merged;      ///< evaluated inside the weight while active
  bool additive;    ///< adds to W x, and commutes with others that do
};

/// A weight of out_features x in_features elements T (float, double, float16, bfloat16) and its
/// adapters, all owned.
///
/// Invariant: weight() is round(pristine + sum over merged and active adapters), rounded once from
/// the pristine base with the adapters in the order of their names (of other kinds: what their
/// steps make of it). So the order of calls changes no bit, nothing drifts, and with nothing merged
/// weight() is the pristine base bit for bit, after any sequence of calls.
///
/// The weight is kept in panels (packed_weight.hpp), whose padding is at most 31 outputs.
/// Memory, in weights: 1 while nothing is merged and 2 while something is, the pristine copy and
/// the merged weight. Given a reload function it holds 1 in every state and 2 while a call changes
/// what is merged (3 where adapters of other kinds than low-rank ones are merged; without a reload
/// function 3 then, too). An adapter is kept twice, as it came and in panels of the same format
/// (double for a double layer), ranks and outputs padded to them. Blocks of 1 MiB and more take
/// whole huge pages of 2 MiB. While adapters of other kinds are active beside the weight, all that
/// is beside it is held once more, as one mixed form.
///
/// Copies are explicit: clone(). Every call that throws has changed nothing. Const calls may run at
/// the same time; others need the object to themselves.
template <class T>
class linear {
  static_assert(detail::refuse_panels<T>());

 public:
  /// Writes the pristine base weight, row-major, again: called when the bits are needed and no copy
  /// is kept. It must give the bits of construction (a hash is checked) and may throw.
  using reload_function = std::function<void(std::span<T> row_major_weight)>;

  /// Of a 0 x 0 weight.
  linear() = default;

  /// Copies a base: a matrix out_features x in_features, or with_bias(W, b). A scalar narrower than
  /// T is widened exactly, a wider one refused at compile time. Without a reload function a
  /// pristine copy is kept.
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
      static_assert(
          detail::holds_exactly<bias_value, detail::element_t<decltype(base.bias)>>,
          "lora::linear: the bias has a wider scalar than the layer computes in: cast it first");
      for (index_t i = 0; i < out_features(); ++i)
        bias_[static_cast<std::size_t>(i)] = detail::widen<bias_value>(base.bias(i, 0));
    } else {
      copy_weight(as_matrix(base));
    }
  }

  /// Takes over a packed base, without a copy.
  explicit linear(packed_weight<T>&& base, reload_function reload = nullptr)
      : reload_(std::move(reload)) {
    pristine_ = std::move(base);
    if (reload_) fingerprint_ = fingerprint([&](index_t i, index_t k) { return pristine_(i, k); });
  }

  linear(linear&&) noexcept = default;
  linear& operator=(linear&&) noexcept = default;
  ~linear() = default;
  /// A layer of its own with the same weights; adapters that do not change are shared.
  linear clone() const { return *this; }

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

 private:
  using bias_value = accumulator_t<T>;

  struct slot {
    std::shared_ptr<const detail::attached_adapter> adapter = nullptr;  ///< low-rank factors
    std::shared_ptr<const any_kind> kind = nullptr;  ///< or another kind, with its steps
    std::shared_ptr<const detail::prepared_kind<float>> in_float = nullptr;
    std::shared_ptr<const detail::prepared_kind<double>> in_double = nullptr;
    double strength;
    bool active, merged;

    double scaling() const {
      return adapter == nullptr
                 ? 1.0
                 : std::visit([](const auto& l) { return l.scaling(); }, adapter->factors);
    }
    bool is_read() const { return kind != nullptr || strength * scaling() != 0.0; }
    bool in_weight() const { return merged && active && is_read(); }
    bool is_beside() const { return !merged && active && is_read(); }
    bool additive() const {
      return kind == nullptr || (in_float != nullptr ? in_float->additive : in_double->additive);
    }
    bool is_double() const {
      return kind != nullptr ? kind->holds_double()
                             : std::holds_alternative<lora::adapter<double>>(adapter->factors);
    }
    template <class Acc>
    auto& prepared() {
      if constexpr (std::is_same_v<Acc, double>)
        return in_double;
      else
        return in_float;
    }
    template <class Acc>
    const auto& prepared() const {
      return const_cast<slot*>(this)->template prepared<Acc>();
    }
    /// The steps, behind those that are there.
    template <class Acc>
    void append_to(std::vector<step<Acc>>& all) const {
      if (kind != nullptr) {
        all.insert(all.end(), prepared<Acc>()->steps.begin(), prepared<Acc>()->steps.end());
        return;
      }
      std::visit(
          [&]<class F>(const lora::adapter<F>& l) {
            all.emplace_back(low_rank_step{any_factors(adapter_view<F>(l), adapter), strength});
          },
          adapter->factors);
    }
  };
  using slots = std::map<std::string, slot>;

 public:
  /// Several changes of the adapters as one: change([&](auto& all) { ... }) gets it, and the
  /// layer's own functions of these names do what it does. An argument `names` is one name,
  /// several, or a range of names.
  class transaction {
   public:
    template <class Panels = void, class L>
      requires low_rank<L> || adapter_kind<L>
    void attach(const std::string& name, const L& l) {
      if (name.empty()) detail::raise_value("linear::attach", "the name is empty");
      if (next_.count(name) != 0)
        detail::raise_value("linear::attach", "an adapter named \"" + name +
                                                  "\" is attached already: detach it first");
      const auto& source = detail::unscaled(l);
      const double strength = detail::weight_of(l);
      slot made{.strength = strength, .active = true, .merged = false};
      if constexpr (low_rank<L>) {
        detail::check_adapter("linear::attach", l, layer_.out_features(), layer_.in_features());
        check_strength("linear::attach", name, strength, static_cast<double>(source.scaling()));
        made.adapter = attached<Panels>(source);
      } else {
        static_assert(
            std::is_void_v<Panels>,
            "lora::linear::attach<F>: F says how low-rank factors are packed, and this is "
            "an adapter of another kind");
        detail::check_kind("linear::attach", l, layer_.out_features(), layer_.in_features());
        check_strength("linear::attach", name, strength, 1.0);
        made.kind = std::make_shared<const any_kind>(source);
        prepare_own("linear::attach", made);
      }
      next_.emplace(name, std::move(made));
    }
    template <class... Names>
    void detach(const Names&... names) {
      static_assert(sizeof...(Names) > 0, "lora::linear::detach: say which adapters");
      each_name(
          [&](const std::string& name) {
            find("linear::detach", next_, name);
            next_.erase(name);
          },
          names...);
    }
    void set_strength(const std::string& name, double strength) {
      slot& one = find("linear::set_strength", next_, name);
      check_strength("linear::set_strength", name, strength, one.scaling());
      if (one.strength == strength) return;
      one.strength = strength;
      one.in_float = nullptr;
      one.in_double = nullptr;
      if (one.kind != nullptr) prepare_own("linear::set_strength", one);
    }
    template <class... Names>
    void activate(const Names&... names) {
      each_name(
          [&](const std::string& name) { find("linear::activate", next_, name).active = true; },
          names...);
    }
    template <class... Names>
    void deactivate(const Names&... names) {
      each_name(
          [&](const std::string& name) { find("linear::deactivate", next_, name).active = false; },
          names...);
    }
    template <class... Names>
    void merge(const Names&... names) {
      if constexpr (sizeof...(Names) == 0) {
        for (auto& [name, one] : next_) one.merged = one.merged || one.active;
      } else {
        each_name(
            [&](const std::string& name) { find("linear::merge", next_, name).merged = true; },
            names...);
      }
    }
    template <class... Names>
    void unmerge(const Names&... names) {
      if constexpr (sizeof...(Names) == 0) {
        for (auto& [name, one] : next_) one.merged = false;
      } else {
        each_name(
            [&](const std::string& name) { find("linear::unmerge", next_, name).merged = false; },
            names...);
      }
    }

   private:
    friend linear;
    explicit transaction(const linear& layer) : layer_(layer), next_(layer.adapters_) {}

    template <class Panels, class L>
    static auto attached(const L& source) {
      using format = detail::factor_format<L>;
      // Tiles of doubles read panels of doubles only.
      using mixed =
          std::conditional_t<std::is_same_v<accumulator_t<T, format>, double>, double, format>;
      using panels = std::conditional_t<std::is_void_v<Panels>, mixed, Panels>;
      static_assert(std::is_same_v<accumulator_t<T, panels>, accumulator_t<panels>>,
                    "lora::linear::attach: a double layer reads panels of double only");
      return std::make_shared<const detail::attached_adapter>(
          detail::attached_adapter{adapter<format>(source), packed_adapter<panels>(source)});
    }
    /// visit(name) for names and ranges of them.
    template <class Visit, class... Names>
    static void each_name(const Visit& visit, const Names&... names) {
      const auto one = [&]<class N>(const N& name) {
        if constexpr (std::convertible_to<const N&, std::string>)
          visit(std::string(name));
        else
          for (const auto& each : name) visit(std::string(each));
      };
      (one(names), ...);
    }
    /// In its own accumulator: what a kind refuses is refused now.
    void prepare_own(const char* operation, slot& one) {
      if (one.is_double())
        prepare<double>(operation, one);
      else
        prepare<bias_value>(operation, one);
    }
    /// The steps of a kind from the pristine base, unless they are there.
    template <class Acc>
    void prepare(const char* operation, slot& one) {
      auto& made = one.template prepared<Acc>();
      if (one.kind == nullptr || made != nullptr) return;
      made = layer_.with_pristine<Acc>(base_, [&](const weight_rows<Acc>& rows) {
        auto steps = one.kind->template steps<Acc>(step_request<Acc>{.operation = operation,
                                                                     .strength = one.strength,
                                                                     .weight = &rows,
                                                                     .use = step_use::prepare});
        bool additive = true;
        for (const auto& s : steps)
          additive = additive && !std::holds_alternative<gain_step<Acc>>(s) &&
                     !std::holds_alternative<input_step<Acc>>(s);
        return std::make_shared<const detail::prepared_kind<Acc>>(
            detail::prepared_kind<Acc>{std::move(steps), additive});
      });
    }

    const linear& layer_;
    slots next_;
    std::vector<T> base_;  ///< row-major, once it was loaded again
  };

  /// change([&](auto& all) { all.set_strength("a", 0.3); all.merge("b"); }): all changes with one
  /// rebuild of the weight, or, where one of them throws, none. Says how many elements of the
  /// pristine base are finite and of the weight now are not.
  template <class Changes>
  merge_report change(const Changes& changes) {
    const detail::default_environment environment;
    transaction all(*this);
    changes(all);
    return commit(all);
  }

  /// Adds an adapter of any kind under a name: active, not merged, with the strength of scaled(w,
  /// l) (1 without). Copies it; the factors of a low-rank one in their format.
  /// attach<bfloat16>(name, l) keeps the panels from which it is mixed in 16 bits: half the bytes
  /// of float factors on a 16-bit base, and a rounding of each factor that packed_adapter states;
  /// merging still takes the factors as they came. So merged and mixed are then two functions,
  /// which differ by that: two states add its term to their bounds. Throws shape_error (does not
  /// fit), value_error (name empty or taken, strength or scaling not finite, an adapter before it
  /// in the order is merged and does not commute with it), and what the kind throws.
  template <class Panels = void, class L>
    requires low_rank<L> || adapter_kind<L>
  void attach(const std::string& name, const L& l) {
    change([&](transaction& all) { all.template attach<Panels>(name, l); });
  }
  /// What is no adapter gets a sentence.
  template <class Panels = void, class L>
    requires(!low_rank<L> && !adapter_kind<L> && detail::recognisable<L>)
  void attach(const std::string&, const L&) {
    static_assert(detail::refuse_adapter<detail::verb::linear, L>());
  }

  /// Takes adapters out; where they are merged, out of the weight too. Throws value_error when a
  /// name is not attached.
  template <class... Names>
  void detach(const Names&... names) {
    change([&](transaction& all) { all.detach(names...); });
  }

  /// Sets an adapter's strength, merged or not. Throws value_error when it is not finite or the
  /// name is not attached.
  void set_strength(const std::string& name, double strength) {
    change([&](transaction& all) { all.set_strength(name, strength); });
  }

  /// Makes adapters part of the function, or not; strengths and whether they are merged are kept.
  template <class... Names>
  void activate(const Names&... names) {
    change([&](transaction& all) { all.activate(names...); });
  }
  template <class... Names>
  void deactivate(const Names&... names) {
    change([&](transaction& all) { all.deactivate(names...); });
  }

  /// Moves adapters into the weight; without names, every active one. Merging what is merged
  /// changes nothing. Says how many elements of the pristine base are finite and of the weight now
  /// are not. Throws value_error for an adapter after one that is not merged and does not commute
  /// with it: merge that, too.
  template <class... Names>
  merge_report merge(const Names&... names) {
    return change([&](transaction& all) { all.merge(names...); });
  }

  /// Moves adapters out of the weight; without names, all. What stays merged is rounded from the
  /// pristine base once.
  template <class... Names>
  merge_report unmerge(const Names&... names) {
    return change([&](transaction& all) { all.unmerge(names...); });
  }

  bool contains(const std::string& name) const { return adapters_.count(name) != 0; }
  /// Throws value_error when the name is not attached.
  attachment at(const std::string& name) const {
    const slot& one = find("linear::at", adapters_, name);
    const auto rank = one.adapter == nullptr ? 0
                                             : std::visit([](const auto& l) { return l.rank(); },
                                                          one.adapter->factors);
    return {one.strength, one.scaling(), rank, one.active, one.merged, one.additive()};
  }
  /// In the order in which they are merged and evaluated.
  std::vector<std::string> names() const {
    std::vector<std::string> result;
    for (const auto& [name, one] : adapters_) result.push_back(name);
    return result;
  }

  /// The function at the top of this file. x in_features x tokens, y out_features x tokens;
  /// rounding, error, cost and exceptions as lora::forward, with W the weight as it stands and the
  /// active adapters that are not merged beside it.
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
    const auto& b = bias();
    const matrix_view<const bias_value, storage_order::col_major> column(
        b.data(), b.empty() ? 0 : out_features(), 1);
    const auto* of_bias = b.empty() ? nullptr : &column;
    const auto run = [&]<class Acc>(std::type_identity<Acc>, const auto& parts) {
      detail::with_source<Acc, typename decltype(from)::value_type>(
          packed(), [&](const auto& source, index_t out, index_t in) {
            detail::forward_views("linear::forward", space, out, in, source, of_bias, from, to,
                                  parts);
          });
    };
    if (const auto* form = std::get_if<mixed_form<double>>(&beside_))
      return run(std::type_identity<double>(), detail::one_form<double>(*form));
    if (const auto* form = std::get_if<mixed_form<float>>(&beside_)) {
      if constexpr (std::is_same_v<acc, double>)
        return run(std::type_identity<double>(), detail::one_form<double>(form_in_double()));
      else
        return run(std::type_identity<float>(), detail::one_form<float>(*form));
    }
    const auto beside = [this](const auto& visit) { this->visit_beside(visit); };
    const detail::same_for_all<decltype(beside)> parts{beside};
    if (needs_double<acc>(beside))
      run(std::type_identity<double>(), parts);
    else
      run(std::type_identity<acc>(), parts);
  }
  /// What is no call of it gets a sentence.
  template <class... A>
    requires detail::mistaken_on_linear<A...>
  auto forward(const A&...) const {
    static_assert(detail::refuse_on_activations<detail::verb::linear, A...>());
  }

 private:
  // For clone().
  linear(const linear&) = default;
  linear& operator=(const linear&) = default;

  template <class W>
  void copy_weight(const W& view) {
    static_assert(detail::holds_exactly<T, typename W::value_type>,
                  "lora::linear: the base weight has a wider scalar than the layer stores, which "
                  "would round it silently: "
                  "cast it first or use that scalar");
    pristine_ = packed_weight<T>(view);
    if (reload_)
      fingerprint_ =
          fingerprint([&](index_t i, index_t k) { return detail::exactly<T>(view(i, k)); });
  }

  template <class Slots>
  static auto& find(const char* operation, Slots& all, const std::string& name) {
    const auto found = all.find(name);
    if (found == all.end()) raise_unknown(operation, all, name);
    return found->second;
  }
  [[noreturn]] static void raise_unknown(const char* operation, const slots& all,
                                         const std::string& name) {
    std::string attached;
    for (const auto& [other, one] : all)
      attached += (attached.empty() ? "\"" : ", \"") + other + "\"";
    detail::raise_value(operation, "no adapter named \"" + name + "\" is attached; attached: " +
                                       (attached.empty() ? "none" : attached));
  }

  /// Strengths of nested scaled(...) multiply here before they meet the scaling, which may overflow
  /// where scaled does not.
  static void check_strength(const char* operation, const std::string& name, double strength,
                             double scaling) {
    if (!detail::is_finite(strength) || !detail::is_finite(strength * scaling))
      detail::raise_value(
          operation, "the strength of \"" + name + "\", alone or times its scaling, is not finite");
  }

  /// visit(scaled(weight, adapter)) for what is in the weight, in the order of the names.
  template <class Visit>
  static void visit_inside(const slots& all, const Visit& visit) {
    for (const auto& entry : all) {
      const slot& one = entry.second;
      if (!one.in_weight()) continue;
      std::visit(
          [&](const auto& l) { visit(scaled_adapter<detail::bare<decltype(l)>>(one.strength, l)); },
          one.adapter->factors);
    }
  }
  /// The same, of the panels, for what is active and not merged.
  template <class Visit>
  void visit_beside(const Visit& visit) const {
    for (const auto& entry : adapters_) {
      const slot& one = entry.second;
      if (!one.active || one.merged || one.adapter == nullptr) continue;
      std::visit(
          [&]<class F>(const packed_adapter<F>& l) {
            visit(scaled_packed_adapter<F>(one.strength, l));
          },
          one.adapter->panels);
    }
  }

  /// Whether a double adapter takes part in an accumulation that would otherwise be float.
  template <class Acc, class Each>
  static bool needs_double(const Each& each) {
    bool any = false;
    if constexpr (!std::is_same_v<Acc, double>)
      each([&](const auto& l) {
        any = any || (detail::holds_double<detail::bare<decltype(l)>> && detail::is_read(l));
      });
    return any;
  }

  /// Makes the weight fit the changed slots, and only then keeps them: nothing after the weight is
  /// written can throw.
  merge_report commit(transaction& all) {
    slots& next = all.next_;
    check_order(next);
    auto beside = form_beside(all);
    const bool same = same_weight(adapters_, next);
    std::vector<bias_value> merged_bias =
        same ? std::move(merged_bias_) : std::vector<bias_value>();
    const merge_report report = same ? report_ : rebuild(all, merged_bias);
    adapters_.swap(next);
    beside_ = std::move(beside);
    merged_bias_ = std::move(merged_bias);
    report_ = report;
    return report;
  }

  /// A merged adapter acts before all that are beside it, so it must commute with those that come
  /// before it by name.
  static void check_order(const slots& all) {
    for (auto before = all.begin(); before != all.end(); ++before) {
      if (!before->second.is_beside()) continue;
      for (auto after = std::next(before); after != all.end(); ++after)
        if (after->second.in_weight() && !(before->second.additive() && after->second.additive()))
          detail::raise_value(
              "linear", "\"" + after->first + "\" is merged and \"" + before->first +
                            "\", which acts before it, is not, and they do not commute: merge \"" +
                            before->first + "\", too, or unmerge \"" + after->first + "\"");
    }
  }

  template <class Which>
  static bool any(const slots& all, const Which& which) {
    return std::any_of(all.begin(), all.end(),
                       [&](const auto& entry) { return which(entry.second); });
  }
  /// The steps of some adapters in Acc, in the order of the names.
  template <class Acc, class Which>
  static std::vector<step<Acc>> steps_of(transaction& all, const Which& which) {
    std::vector<step<Acc>> steps;
    for (auto& entry : all.next_) {
      slot& one = entry.second;
      if (!which(one)) continue;
      all.template prepare<Acc>("linear", one);
      one.template append_to<Acc>(steps);
    }
    return steps;
  }

  using any_form = std::variant<std::monostate, mixed_form<float>, mixed_form<double>>;
  /// The form of what is beside the weight, where it is more than low-rank factors.
  any_form form_beside(transaction& all) const {
    const auto beside = [](const slot& one) { return one.is_beside(); };
    if (!any(all.next_, [&](const slot& one) { return beside(one) && one.kind != nullptr; }))
      return {};
    const auto form = [&]<class Acc>(std::type_identity<Acc>) {
      return mixed_form<Acc>("linear", out_features(), in_features(), steps_of<Acc>(all, beside));
    };
    if (std::is_same_v<bias_value, double> ||
        any(all.next_, [&](const slot& one) { return beside(one) && one.is_double(); }))
      return form(std::type_identity<double>());
    return form(std::type_identity<float>());
  }
  /// The same for activations of double beside a form of float: made in the call.
  mixed_form<double> form_in_double() const {
    transaction all(*this);
    return mixed_form<double>(
        "linear::forward", out_features(), in_features(),
        steps_of<double>(all, [](const slot& one) { return one.is_beside(); }));
  }

  static bool same_weight(const slots& before, const slots& after) {
    const auto merged = [](const slots& all) {
      std::vector<std::tuple<const void*, const void*, double>> list;
      for (const auto& [name, one] : all)
        if (one.in_weight()) list.emplace_back(one.adapter.get(), one.kind.get(), one.strength);
      return list;
    };
    return merged(before) == merged(after);
  }

  merge_report rebuild(transaction& all, std::vector<bias_value>& merged_bias) {
    const slots& next = all.next_;
    const auto in_weight = [](const slot& one) { return one.in_weight(); };
    if (any(next, [&](const slot& one) { return in_weight(one) && one.kind != nullptr; })) {
      if (std::is_same_v<bias_value, double> ||
          any(next, [&](const slot& one) { return in_weight(one) && one.is_double(); }))
        return rebuild_by_steps<double>(all, merged_bias);
      return rebuild_by_steps<bias_value>(all, merged_bias);
    }
    const auto inside = [&next](const auto& visit) { visit_inside(next, visit); };
    return needs_double<bias_value>(inside) ? rebuild_in<double>(inside)
                                            : rebuild_in<bias_value>(inside);
  }

  /// What can throw comes first: after it the weight is written and nothing else happens.
  template <class Acc, class Each>
  merge_report rebuild_in(const Each& inside) {
    workspace space;
    const detail::panel_update<Acc, detail::has_dots<Acc, bfloat16>> update(
        space, "linear", inside, out_features(), in_features(), detail::merging);
    if (update.rank() == 0) {
      drop_merged();
      return {};
    }
    begin_merged();
    is_merged_ = true;
    return detail::report_of(detail::write_panels(update, reload_ ? merged_ : pristine_, merged_),
                             out_features() * in_features());
  }
  /// The same for steps of any kind, and what they do to the bias.
  template <class Acc>
  merge_report rebuild_by_steps(transaction& all, std::vector<bias_value>& merged_bias) {
    const auto steps = steps_of<Acc>(all, [](const slot& one) { return one.in_weight(); });
    const std::span<const step<Acc>> list(steps);
    if (const detail::bias_change change =
            detail::bias_change_of("linear", list, out_features(), in_features());
        !change.empty()) {
      merged_bias = bias_;
      merged_bias.resize(static_cast<std::size_t>(out_features()), bias_value(0));
      detail::change_bias(col_major(merged_bias, out_features(), 1), detail::merging, change);
    }
    const bool again = reload_ && is_merged_;
    if (again && all.base_.empty()) all.base_ = reloaded();
    // What stands is kept until the new weight is complete: the pass may throw.
    packed_weight<T> next =
        again ? packed_weight<T>(lora::row_major(all.base_.data(), out_features(), in_features()))
        : reload_ ? packed_weight<T>(pristine_)
                  : packed_weight<T>::unfilled(out_features(), in_features());
    const detail::tally seen =
        detail::pass_over<Acc>("linear", detail::merging, reload_ ? next : pristine_, next, list);
    merged_ = std::move(next);
    if (reload_) pristine_ = {};
    is_merged_ = true;
    return detail::report_of(seen, out_features() * in_features());
  }

  /// Makes merged_ the destination; given a reload function it holds the pristine base then.
  void begin_merged() {
    if (reload_ && is_merged_) {
      const std::vector<T> row_major = reloaded();
      merged_.assign(lora::row_major(row_major, out_features(), in_features()));
    } else if (!is_merged_) {
      merged_ = reload_ ? std::move(pristine_)
                        : packed_weight<T>::unfilled(out_features(), in_features());
    }
  }
  /// Back to the pristine base.
  void drop_merged() {
    if (reload_ && is_merged_) {
      const std::vector<T> row_major = reloaded();
      merged_.assign(lora::row_major(row_major, out_features(), in_features()));
    }
    if (reload_ && is_merged_) pristine_ = std::move(merged_);
    is_merged_ = false;
    merged_ = {};
  }

  /// call(rows of the pristine base); `loaded` keeps what was loaded again for it.
  template <class Acc, class Call>
  auto with_pristine(std::vector<T>& loaded, const Call& call) const {
    if (!(reload_ && is_merged_)) return call(detail::reader_of<Acc>(pristine_));
    if (loaded.empty()) loaded = reloaded();
    return call(
        detail::reader_of<Acc>(lora::row_major(loaded.data(), out_features(), in_features())));
  }
  /// The bias that goes with the weight as it stands; empty: none.
  const std::vector<bias_value>& bias() const {
    return merged_bias_.empty() ? bias_ : merged_bias_;
  }

  /// The pristine bits again, or a value_error: other bits would be merged into silently.
  std::vector<T> reloaded() const {
    std::vector<T> base(static_cast<std::size_t>(out_features() * in_features()));
    reload_(std::span<T>(base));
    const auto at = [&](index_t i, index_t k) {
      return base[static_cast<std::size_t>(i * in_features() + k)];
    };
    if (fingerprint(at) != fingerprint_)
      detail::raise_value(
          "linear",
          "the reload function gave other bits than the weight that the layer was built from");
    return base;
  }
  /// A hash of the bits, row by row.
  template <class At>
  std::size_t fingerprint(const At& at) const {
    std::vector<T> row(static_cast<std::size_t>(in_features()));
    std::size_t hash = 0;
    for (index_t i = 0; in_features() != 0 && i < out_features(); ++i) {
      for (index_t k = 0; k < in_features(); ++k) row[static_cast<std::size_t>(k)] = at(i, k);
      const std::string_view bytes(reinterpret_cast<const char*>(row.data()),
                                   row.size() * sizeof(T));
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
  any_form beside_;  ///< set while adapters of other kinds are active beside the weight
  std::vector<bias_value> merged_bias_;  ///< what merged adapters make of the bias; empty: bias_
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
