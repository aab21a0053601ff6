// SPDX-License-Identifier: Apache-2.0
//
// What an adapter of any kind does to a layer: an ordered list of steps. A kind (LoRA, DoRA, LoHa,
// IA3, ...) says its steps and nothing else; every verb is written once over them.
//
//   step         in a merge: row i of W             in a mix: y, which starts as W x
//   low_rank     row += s lora_B(i, :) lora_A       y += s lora_B (lora_A x)
//   delta        row += s D(i, :)                   y += s D x
//   gain         row *= g_i                         y = diag(g) y
//   input        row := row T                       W and the steps before it see T x in place of x
//   shift        bias_i += c_i                      y += c, after all other steps, with the base's
//                bias
//
// Steps of several adapters follow each other in the order of the call. The steps before a gain or
// an input map are changed by it: W' = diag(g) (W + s B A) T for low_rank, gain, input in this
// order.
//
// A step may be for a block of the rows of W alone, which are outputs of y (its `rows`);
// in_rows.hpp makes such steps of any adapter. All other rows, and their outputs, keep their bits.
//
// A kind of your own is a class with out_features(), in_features(), a value_type, and
//   template <class Acc> std::vector<lora::step<Acc>> steps(const lora::step_request<Acc>&) const;
// docs/kinds.md shows one.
#pragma once

#include <concepts>
#include <cstddef>
#include <iterator>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "lora/adapter.hpp"
#include "lora/concepts.hpp"
#include "lora/detail/operands.hpp"
#include "lora/error.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// lora_A and lora_B in the format that they are stored in, with their scaling. Cheap to copy. Owns
/// the factors together with its copies, or looks at factors that live elsewhere.
class any_factors {
 public:
  using view = std::variant<adapter_view<float>, adapter_view<double>, adapter_view<float16>,
                            adapter_view<bfloat16>>;

  /// Shares the ownership of factors.
  template <scalar T>
  explicit any_factors(std::shared_ptr<const adapter<T>> owner)
      : view_(adapter_view<T>(*owner)), owner_(std::move(owner)) {}
  /// Looks at factors, which must outlive the result and its copies.
  template <scalar T>
  static any_factors view_of(const adapter<T>& l) {
    return any_factors(adapter_view<T>(l), nullptr);
  }
  /// Looks at factors that `owner` keeps alive.
  template <scalar T>
  any_factors(const adapter_view<T>& l, std::shared_ptr<const void> owner)
      : view_(l), owner_(std::move(owner)) {}
  /// Copies the factors of any adapter, in their format (the wider one, if they differ).
  template <low_rank L>
  static any_factors copy_of(const L& l) {
    using a = detail::storage_t<detail::factor_scalar_A<L>>;
    using b = detail::storage_t<detail::factor_scalar_B<L>>;
    using format = std::conditional_t<std::is_same_v<a, b>, a, accumulator_t<a, b>>;
    return any_factors(std::make_shared<const adapter<format>>(l));
  }

  index_t rank() const {
    return std::visit([](const auto& l) { return l.rank(); }, view_);
  }
  index_t out_features() const {
    return std::visit([](const auto& l) { return l.out_features(); }, view_);
  }
  index_t in_features() const {
    return std::visit([](const auto& l) { return l.in_features(); }, view_);
  }
  double scaling() const {
    return std::visit([](const auto& l) { return l.scaling(); }, view_);
  }
  bool holds_double() const { return std::holds_alternative<adapter_view<double>>(view_); }
  /// The same adapter for the rows first ... first + count - 1 of the weight alone: those of
  /// lora_B. No copy.
  any_factors rows(index_t first, index_t count) const {
    const auto cut = [&]<class T>(const adapter_view<T>& l) {
      const lora::scaling own{.alpha = l.scaling(), .rule = scaling_rule::fixed};
      return any_factors(adapter_view<T>(l.lora_A(), l.lora_B().middle_rows(first, count), own),
                         owner_);
    };
    return std::visit(cut, view_);
  }
  /// visit(adapter_view<T>).
  template <class Visit>
  decltype(auto) visit(const Visit& visit) const {
    return std::visit(visit, view_);
  }

 private:
  view view_;
  std::shared_ptr<const void> owner_;
};

/// T of an input step: a map of in_features to in_features. Thread-safe.
template <class Acc>
class input_map {
 public:
  virtual ~input_map() = default;
  /// x := T x for `tokens` columns of in_features elements, `stride` apart.
  virtual void columns(Acc* x, index_t tokens, index_t stride) const = 0;
  /// row := row T for `count` rows of in_features elements, `stride` apart.
  virtual void rows(Acc* rows, index_t count, index_t stride) const = 0;
  /// row := row T^-1; value_error naming the operation where T has no inverse. Called once with
  /// count 0 before anything is written.
  virtual void undo_rows(const char* operation, Acc* rows, index_t count, index_t stride) const = 0;
};

/// D of a delta step: an out_features x in_features matrix that is not kept. Thread-safe.
template <class Acc>
class delta_source {
 public:
  virtual ~delta_source() = default;
  /// Rows first ... first + count - 1 of D, `stride` apart. Called by several threads at once. What
  /// it throws (std::bad_alloc) leaves the rows of W that were done before merged.
  virtual void rows(index_t first, index_t count, Acc* to, index_t stride) const = 0;
  /// y := D x for `tokens` columns; x has in_features elements a column, y out_features, no gaps.
  virtual void product(const Acc* x, index_t tokens, Acc* y) const = 0;
  /// Factors with lora_B lora_A = D (scaling 1) where mixing by them costs less than product; else
  /// null.
  virtual const any_factors* expanded() const { return nullptr; }
};

/// Rows first ... first + count - 1 of a weight; count -1: all rows.
struct row_range {
  index_t first = 0, count = -1;

  bool all() const { return count < 0; }
  index_t end() const { return first + count; }
  /// The same with the count of a weight in place of -1.
  row_range of(index_t out_features) const { return all() ? row_range{0, out_features} : *this; }
};

namespace detail {

/// Where blocks of rows begin and end in a weight of `rows` rows, its own ends too: in order, each
/// once. of(block) says its row_range, with a count.
template <class Blocks, class Of>
std::vector<index_t> ends_of(const Blocks& blocks, index_t rows, const Of& of) {
  std::vector<index_t> ends{0, rows};
  for (const auto& one : blocks) {
    const row_range range = of(one);
    ends.insert(ends.end(), {range.first, range.end()});
  }
  std::sort(ends.begin(), ends.end());
  ends.erase(std::unique(ends.begin(), ends.end()), ends.end());
  return ends;
}

}  // namespace detail

// The numbers of a step are those of its `rows` alone: out_features in the comments is their count.
struct low_rank_step {
  any_factors factors;
  double strength = 1;  ///< multiplies factors.scaling()
  row_range rows = {};
};
template <class Acc>
struct delta_step {
  std::shared_ptr<const delta_source<Acc>> source;
  double scale = 1;
  row_range rows = {};
};
template <class Acc>
struct gain_step {
  std::vector<Acc> gain;     ///< out_features
  bool scales_bias = false;  ///< the base's bias, and shifts before it, too
  row_range rows = {};
};
/// With `rows` it is for merging alone: a product has one x for all rows.
template <class Acc>
struct input_step {
  std::shared_ptr<const input_map<Acc>> map;
  row_range rows = {};
};
struct shift_step {
  std::vector<double> shift;  ///< out_features
  std::string of = {};        ///< whose it is, for messages
  row_range rows = {};
};

/// One step; see the top of this file.
template <class Acc>
using step =
    std::variant<low_rank_step, delta_step<Acc>, gain_step<Acc>, input_step<Acc>, shift_step>;

/// Where rows of a weight lie, so that they can be fetched ahead of time; null: unknown.
struct memory_of_rows {
  const std::byte* at = nullptr;
  index_t row_bytes = 0, col_bytes = 0;
};

namespace detail {
template <class Acc>
class square_source;
}  // namespace detail

/// Reads a base weight, out_features x in_features, widened. Thread-safe.
template <class Acc>
class weight_rows {
 public:
  virtual ~weight_rows() = default;
  virtual index_t out_features() const = 0;
  virtual index_t in_features() const = 0;
  /// Rows that are best read together.
  virtual index_t granule() const { return 1; }
  /// Rows first ... first + count - 1 and columns first_col ... first_col + cols - 1; rows `stride`
  /// apart in `to`.
  virtual void read(index_t first, index_t count, index_t first_col, index_t cols, Acc* to,
                    index_t stride) const = 0;
  /// Where an element lies that may be fetched; nowhere for a row -1.
  virtual memory_of_rows memory(index_t, index_t) const { return {}; }
  /// For the library's own weights, which compute norms faster than by read.
  virtual const detail::square_source<Acc>* squares() const { return nullptr; }
};

namespace detail {
/// The rows of a step for a weight of out_features rows. Throws shape_error when the weight has no
/// such rows.
inline row_range checked_rows(const char* operation, const row_range& rows, index_t out_features) {
  const row_range of = rows.of(out_features);
  if (of.first < 0 || of.count > out_features || of.first > out_features - of.count)
    raise_shape(operation, "a step is for " + std::to_string(of.count) + " rows from row " +
                               std::to_string(of.first) + " on, and the weight has " +
                               std::to_string(out_features) + " rows");
  return of;
}

/// Throws value_error for factors of double in steps that accumulate in float.
template <class Acc>
void refuse_double_factors(const char* operation, const any_factors& factors) {
  if (!std::is_same_v<Acc, double> && factors.holds_double())
    raise_value(operation,
                "an adapter's factors are double, and this call accumulates in float: its kind has "
                "to say so, with "
                "value_type = double or holds_double()");
}
}  // namespace detail

/// What the steps are for.
enum class step_use {
  merge,    ///< into a weight
  prepare,  ///< a mixed form, for any use
  product,  ///< y = W x: forward, apply
  embed,    ///< an embedding's rows
  through,  ///< a convolution of the caller's
};

/// What a verb asks a kind's steps for.
template <class Acc>
struct step_request {
  const char* operation;  ///< the verb, for messages
  double strength = 1;    ///< of scaled(strength, adapter), finite
  /// The base as it was before any merge; null where the verb has none (apply).
  const weight_rows<Acc>* weight = nullptr;
  step_use use = step_use::merge;
};

/// A class that says its steps. It may also have
///   bool stored_in_out() const                             the base stores its weight in x out,
///                                                          and verbs take it so
///   void check_fits(operation, out_features, in_features)  throws unless it is for such a weight,
///                                                          with a better sentence
///   bool holds_double() const                              its numbers are double, where
///                                                          value_type does not say so
template <class K>
concept adapter_kind = requires(const detail::bare<K>& k, const step_request<float>& f,
                                const step_request<double>& d) {
  typename detail::bare<K>::value_type;
  { k.out_features() } -> std::convertible_to<index_t>;
  { k.in_features() } -> std::convertible_to<index_t>;
  { k.template steps<float>(f) } -> std::same_as<std::vector<step<float>>>;
  { k.template steps<double>(d) } -> std::same_as<std::vector<step<double>>>;
};
/// A run-time number of them.
template <class R>
concept adapter_kind_range =
    !adapter_kind<R> && !low_rank<R> && requires(const detail::bare<R>& r) {
      { *std::begin(r) } -> adapter_kind;
      { std::end(r) };
    };

template <adapter_kind K>
class scaled_kind;
namespace detail {
template <class K>
bool holds_double_now(const K& k);
template <class K>
inline constexpr bool is_scaled_kind = false;
template <class K>
inline constexpr bool is_scaled_kind<scaled_kind<K>> = true;
}  // namespace detail

/// strength * (an adapter of any kind): its steps at that strength. Looks at the adapter, which
/// must outlive it.
template <adapter_kind K>
class [[nodiscard]] scaled_kind {
 public:
  using value_type = typename K::value_type;

  /// Throws value_error when the strength is not finite.
  scaled_kind(double strength, const K& of) : strength_(strength), of_(&of) {
    if (!detail::is_finite(strength)) detail::raise_value("scaled", "the strength is not finite");
  }
  double strength() const { return strength_; }
  const K& of() const { return *of_; }
  index_t out_features() const { return of_->out_features(); }
  index_t in_features() const { return of_->in_features(); }
  bool stored_in_out() const
    requires requires(const K& k) { k.stored_in_out(); }
  {
    return of_->stored_in_out();
  }
  bool holds_double() const { return detail::holds_double_now(*of_); }
  void check_fits(const char* operation, index_t out_features, index_t in_features) const
    requires requires(const K& k) { k.check_fits(operation, out_features, in_features); }
  {
    of_->check_fits(operation, out_features, in_features);
  }
  template <class Acc>
  std::vector<step<Acc>> steps(step_request<Acc> request) const {
    request.strength *= strength_;
    return of_->template steps<Acc>(request);
  }

 private:
  double strength_;
  const K* of_;
};

/// The adapter at `strength` times its own; strengths multiply when nested. 0: the adapter is not
/// read.
template <adapter_kind K>
  requires(!low_rank<K> && !detail::is_scaled_kind<K>)
scaled_kind<K> scaled(double strength, const K& of) {
  return {strength, of};
}
template <adapter_kind K>
scaled_kind<K> scaled(double strength, const scaled_kind<K>& of) {
  return {strength * of.strength(), of.of()};
}
template <adapter_kind K>
  requires(!low_rank<K> && !detail::is_scaled_kind<K>)
void scaled(double, const K&& temporary) = delete;  // the result would look at it: name it

namespace detail {

template <class K>
  requires(adapter_kind<K> && !low_rank<K>)
inline constexpr bool holds_double<K> = std::is_same_v<typename K::value_type, double>;
template <adapter_kind_range R>
inline constexpr bool holds_double<R> =
    holds_double<bare<decltype(*std::begin(std::declval<const bare<R>&>()))>>;

/// Adapters of any kind, and ranges of them.
template <class L>
concept any_adapters = adapters<L> || adapter_kind<L> || adapter_kind_range<L>;

/// visit(l) for one adapter of any kind, or for each of a range.
template <class Visit, class L>
void visit_kinds(const Visit& visit, const L& l) {
  if constexpr (low_rank<L> || adapter_kind<L>)
    visit(l);
  else
    for (const auto& each : l) visit(each);
}

/// The one delta step of a kind with a scaling; none at strength 0, where make_source() is not
/// called.
template <class Acc, class Make>
std::vector<step<Acc>> delta_steps(const step_request<Acc>& request, double scaling,
                                   const Make& make_source) {
  const double s = request.strength * scaling;
  if (!is_finite(s))
    raise_value(request.operation, "the adapter's scaling times its strength is not finite");
  std::vector<step<Acc>> all;
  if (!is_zero(s)) all.push_back(delta_step<Acc>{make_source(), s});
  return all;
}

/// The steps of an adapter, behind those that are there. Factors of a low-rank one are copied.
template <class Acc, class L>
void append_steps(std::vector<step<Acc>>& all, const step_request<Acc>& request, const L& l) {
  if constexpr (low_rank<L>) {
    if (is_read(l)) all.emplace_back(low_rank_step{any_factors::copy_of(l), request.strength});
  } else {
    auto some = l.template steps<Acc>(request);
    for (auto& one : some) all.push_back(std::move(one));
  }
}

/// Throws unless an adapter is for such a weight.
template <class K>
void check_kind(const char* operation, const K& one, index_t out_features, index_t in_features) {
  if constexpr (low_rank<K>)
    check_adapter(operation, one, out_features, in_features);
  else if constexpr (requires { one.check_fits(operation, out_features, in_features); })
    one.check_fits(operation, out_features, in_features);
  else if constexpr (requires {
                       { one.scaling() } -> std::convertible_to<double>;
                     })
    check_fit(operation, one.out_features(), one.in_features(), one.scaling(), out_features,
              in_features);
  else
    check_fit(operation, one.out_features(), one.in_features(), 1.0, out_features, in_features);
}

/// Whether the numbers of an adapter are double; of some kinds only the run time knows.
template <class K>
bool holds_double_now(const K& k) {
  if constexpr (requires {
                  { k.holds_double() } -> std::convertible_to<bool>;
                })
    return k.holds_double();
  else
    return holds_double<K>;
}
template <class... L>
bool any_holds_double_now(const L&... l) {
  bool any = false;
  [[maybe_unused]] const auto look = [&](const auto& one) { any = any || holds_double_now(one); };
  (visit_kinds(look, l), ...);
  return any;
}

/// The steps of adapters of any kind and ranges of them, in order. Checks that each is for the
/// shape.
template <class Acc, class... L>
std::vector<step<Acc>> steps_of(const step_request<Acc>& request, index_t out_features,
                                index_t in_features, const L&... l) {
  std::vector<step<Acc>> all;
  [[maybe_unused]] const auto add = [&]<class K>(const K& one) {
    check_kind(request.operation, one, out_features, in_features);
    append_steps(all, request, one);
  };
  (visit_kinds(add, l), ...);
  return all;
}

/// Whether the base stores the weight of an adapter in_features x out_features, and its verbs take
/// it so.
template <class K>
bool is_stored_in_out(const K& k) {
  if constexpr (requires {
                  { k.stored_in_out() } -> std::convertible_to<bool>;
                })
    return k.stored_in_out();
  else
    return false;
}

/// What a message calls an adapter.
template <class K>
std::string name_of_kind(const K& k) {
  if constexpr (requires {
                  { k.name() } -> std::convertible_to<std::string>;
                })
    return k.name();
  else if constexpr (requires {
                       { k.of().name() } -> std::convertible_to<std::string>;
                     })
    return k.of().name();
  else
    return "an adapter";
}

/// The same for all adapters of a call. Throws value_error when they disagree.
template <class... L>
bool are_stored_in_out(const char* operation, const L&... l) {
  std::string in_out, out_in;  // one of each
  [[maybe_unused]] const auto look = [&](const auto& one) {
    std::string& name = is_stored_in_out(one) ? in_out : out_in;
    if (name.empty()) name = name_of_kind(one);
  };
  (visit_kinds(look, l), ...);
  if (!in_out.empty() && !out_in.empty())
    raise_value(operation,
                "the config of one adapter says fan_in_fan_out and the other's does not, for " +
                    in_out + " and " + out_in +
                    "; one weight is stored one way: read them with read_options::fan_in_fan_out");
  return !in_out.empty();
}

}  // namespace detail
}  // namespace lora::inline LORA_DETAIL_ABI
