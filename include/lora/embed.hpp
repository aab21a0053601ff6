// SPDX-License-Identifier: Apache-2.0
//
// embed(W, ids, y, l...)                   y(:, t) := round(W(ids[t], :) + sum of s * lora_B *
//                                          lora_A(:, ids[t]))
// embed(W, ids, y, form)                   y(:, t) := round(g W(ids[t], :) + ...): a mixed form,
//                                          made from W.transpose() (mixed.hpp)
// embed(scaled_embedding(W, c), ids, ...)  y(:, t) := round(c * (...)), for an embedding that
//                                          multiplies by a constant
// assign_rows(W, replaced)                 W(i, :) := the trained row of every replaced id i
// overwrite_rows(ids, y, replaced)         y(:, t) := the trained row where ids[t] is replaced; other
//                                          columns stay
//
// An embedding with its adapters mixed in: only the rows that are asked for are read, of W and of
// the adapters.
//   shapes   W vocabulary x features, as PyTorch stores it; lora_A rank x vocabulary, lora_B
//            features x rank (PEFT's lora_embedding_A and _B): the delta weight is features x
//            vocabulary, and merge(W.transpose(), l) merges it. ids is a range of integers, one for
//            each token; y features x tokens.
//   rounding once, to y's scalar: the sum over the stacked ranks is a chain of multiply-adds from
//            zero in float (double if W, y or a factor is double), with s folded into lora_B; W's
//            row is added, then the sum is multiplied by c: in that accumulator, or in double where
//            it does not hold c as a normal number.
//   error    |result - exact| <= u_y |exact| + (1+u_y) (|c| (gamma_3 |W row| + gamma_{R+5} sum |s|
//            |lora_B| |lora_A column|) + underflow) + eta_y/2, underflow = |c| eta (R + 1 + sum
//            over ranks of |lora_A column|) + eta; the names are those of docs/numerics.md. Exact
//            without adapters where y holds W's scalar and c = 1. overwrite_rows(ids, y, replaced,
//            c): u_y |exact| + (1+u_y) (gamma_2 |exact| + eta) + eta_y/2; with c = 1 one rounding.
//   overflow y holds the infinity; assign_rows(W, replaced) counts the elements that became
//            infinite.
//   cost     2 R features FLOPs per token; allocates R (features + tokens) accumulators.
//   aliasing y must not overlap W, the replaced rows or a factor: shape_error.
//   throws   value_error for an id outside the vocabulary, shape_error, value_error (scaling not
//            finite), before anything is written.
// PEFT: tuners/lora/layer.py, Embedding (embed_scale); tuners/trainable_tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/adapter.hpp"
#include "lora/detail/eigen.hpp"
#include "lora/detail/operands.hpp"
#include "lora/detail/refusals.hpp"
#include "lora/merge.hpp"
#include "lora/through.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// Token numbers: a vector, span or array of any integer type.
template <class R>
concept token_range = requires(const R& r) {
  { std::size(r) } -> std::convertible_to<std::size_t>;
  requires std::integral<std::remove_cvref_t<decltype(*std::begin(r))>>;
};

/// An embedding's weight with the constant by which its output is multiplied. Looks at the weight.
template <class W>
struct embedding_view {
  W weight;  ///< matrix_view, vocabulary x features
  double scale;
};

/// W and the constant c as one argument of embed. Throws value_error when c is not finite. W must
/// outlive the result.
template <class M>
  requires matrix_like<M>
auto scaled_embedding(const M& W, double c) {
  if (!detail::is_finite(c)) detail::raise_value("scaled_embedding", "the scale is not finite");
  const auto weight = as_matrix(W);
  return embedding_view<std::remove_const_t<decltype(weight)>>{weight, c};
}

/// Whole rows of an embedding that training replaced: values, not differences. Owns them.
/// Invariant: the ids are not negative and each is there once.
template <scalar T>
class replaced_rows {
 public:
  /// values holds ids.size() x features, row k for ids[k]. Throws shape_error, value_error for an
  /// id twice or negative.
  template <class M>
    requires matrix_like<std::remove_cvref_t<M>>
  replaced_rows(std::vector<index_t> ids, M&& values)
      : ids_(std::move(ids)), values_(detail::taken<T>(std::forward<M>(values))) {
    if (static_cast<index_t>(ids_.size()) != values_.rows())
      detail::raise_shape("replaced_rows", std::to_string(ids_.size()) + " ids and " +
                                               std::to_string(values_.rows()) + " rows of values");
    order_.resize(ids_.size());
    std::iota(order_.begin(), order_.end(), std::size_t{0});
    std::sort(order_.begin(), order_.end(), [&](auto a, auto b) { return ids_[a] < ids_[b]; });
    for (std::size_t k = 0; k < order_.size(); ++k)
      if (ids_[order_[k]] < 0 || (k > 0 && ids_[order_[k]] == ids_[order_[k - 1]]))
        detail::raise_value("replaced_rows", "the id " + std::to_string(ids_[order_[k]]) +
                                                 " is negative or there twice");
  }

  const std::vector<index_t>& ids() const { return ids_; }
  const detail::row_major_matrix<T>& values() const { return values_; }
  index_t features() const { return values_.cols(); }
  /// The row of values for an id; -1 when it is not replaced.
  index_t find(index_t id) const {
    const auto at = std::lower_bound(order_.begin(), order_.end(), id,
                                     [&](auto k, index_t v) { return ids_[k] < v; });
    return at != order_.end() && ids_[*at] == id ? static_cast<index_t>(*at) : -1;
  }

 private:
  std::vector<index_t> ids_;
  detail::row_major_matrix<T> values_;
  std::vector<std::size_t> order_;
};

namespace detail {

template <class M>
inline constexpr bool is_embedding_view = false;
template <class W>
inline constexpr bool is_embedding_view<embedding_view<W>> = true;

template <class R>
std::vector<index_t> checked_ids(const char* operation, const R& ids, index_t vocabulary) {
  std::vector<index_t> result;
  result.reserve(std::size(ids));
  for (const auto id : ids) {
    if (std::cmp_less(id, 0) || std::cmp_greater_equal(id, vocabulary))
      detail::raise_value(operation, "token " + std::to_string(result.size()) + " has the id " +
                                         std::to_string(id) + ", which is not a row of the " +
                                         std::to_string(vocabulary) + " of the embedding");
    result.push_back(static_cast<index_t>(id));
  }
  return result;
}

/// Multiplies by an embedding's constant c and rounds to T. In the accumulator where c is a normal
/// number of it, or 0; else in double, where neither c nor the product is lost.
template <class T, class Acc>
class times_constant {
 public:
  explicit times_constant(double c) : c_(c), held_(is_held(std::abs(c))) {}
  T operator()(Acc value) const {
    if (c_ == 1.0) return detail::narrow<T>(value);
    if (held_) return detail::narrow<T>(value * static_cast<Acc>(c_));
    return detail::narrow<T>(static_cast<double>(value) * c_);
  }

 private:
  static bool is_held(double magnitude) {
    using limits = std::numeric_limits<Acc>;
    return magnitude == 0 || (magnitude >= static_cast<double>(limits::min()) &&
                              magnitude <= static_cast<double>(limits::max()));
  }

  double c_;
  bool held_;
};

inline void check_y(const char* operation, index_t rows, index_t cols, index_t features,
                    std::size_t tokens) {
  if (rows != features || cols != static_cast<index_t>(tokens))
    detail::raise_shape(operation, "y is " + detail::shape_text(rows, cols) +
                                       ", not features x tokens, which is " +
                                       detail::shape_text(features, static_cast<index_t>(tokens)));
}

/// The stacked factors, gathered: U has the columns of lora_A for the ids.
template <class Acc, class Each>
detail::expansion<Acc> gather(const char* operation, const Each& each,
                              const std::vector<index_t>& ids, index_t features,
                              index_t vocabulary) {
  detail::expansion<Acc> result(features,
                                detail::checked_total_rank(operation, each, features, vocabulary),
                                static_cast<index_t>(ids.size()));
  index_t at = 0;
  each([&](const auto& l) {
    if (!detail::is_read(l)) return;
    const auto& lora_A = l.lora_A();
    const auto& lora_B = l.lora_B();
    const auto A = as_matrix(lora_A);
    result.set_B(at, as_matrix(lora_B), static_cast<double>(l.scaling()));
    for (std::size_t t = 0; t < ids.size(); ++t)
      for (index_t i = 0; i < A.rows(); ++i)
        result.U(at + i, static_cast<index_t>(t)) = detail::widen<Acc>(A(i, ids[t]));
    at += A.rows();
  });
  return result;
}

/// Columns `ids` of the deltas without factors, times their gains; no elements where there are
/// none.
template <class Acc, class Form>
detail::matrix<Acc> columns_of_deltas(const detail::folded_steps<Form>& folded,
                                      const mixed_form<Form>& form,
                                      const std::vector<index_t>& ids) {
  detail::matrix<Acc> result;
  if (folded.deltas().empty()) return result;
  constexpr index_t block = 8;
  const auto tokens = static_cast<index_t>(ids.size());
  result.setZero(form.out_features(), tokens);
  detail::matrix<Form> units, columns;
  for (index_t first = 0; first < tokens; first += block) {
    const index_t count = std::min(block, tokens - first);
    units.setZero(form.in_features(), count);
    for (index_t t = 0; t < count; ++t) units(ids[static_cast<std::size_t>(first + t)], t) = 1;
    for (const auto& one : folded.deltas()) {
      columns.resize(one.rows.count, count);
      one.source->product(units.data(), count, columns.data());
      for (index_t t = 0; t < count; ++t)
        for (index_t i = 0; i < one.rows.count; ++i) {
          const double s =
              one.gain.empty() ? one.scale : one.gain[static_cast<std::size_t>(i)] * one.scale;
          result(one.rows.first + i, first + t) +=
              static_cast<Acc>(s * static_cast<double>(columns(i, t)));
        }
    }
  }
  return result;
}

template <class W, class R, class Y, class... L>
void look_up(const W& weight, double scale, const R& ids, Y& y, const L&... l) {
  const detail::default_environment environment;
  const auto to = detail::output_view(y);
  using value = typename std::remove_const_t<decltype(to)>::value_type;
  using acc = accumulator_t<typename W::value_type, value, L...>;
  const auto tokens = checked_ids("embed", ids, weight.rows());
  check_y("embed", to.rows(), to.cols(), weight.cols(), tokens.size());
  const auto each = detail::each_of(l...);
  detail::refuse_overlap("embed", "y", to, "W", weight);
  detail::refuse_factor_overlap("embed", "y", to, each);
  const auto sum = gather<acc>("embed", each, tokens, weight.cols(), weight.rows());
  const times_constant<value, acc> scaled(scale);
  sum.run(to, [&](value& element, acc delta, index_t i, index_t t) {
    const acc base = detail::widen<acc>(weight(tokens[static_cast<std::size_t>(t)], i));
    // Not base + 0 * ...: without an adapter the row passes through bit for bit.
    element = scaled(sum.B.cols() == 0 ? base : base + delta);
  });
}

/// embed with a form: the gains that follow an adapter are folded into its lora_B.
template <class W, class R, class Y, class Acc>
void look_up_form(const W& weight, double scale, const R& ids, Y& y, const mixed_form<Acc>& form) {
  const detail::default_environment environment;
  const auto to = detail::output_view(y);
  using value = typename std::remove_const_t<decltype(to)>::value_type;
  using acc = accumulator_t<typename W::value_type, value, Acc>;
  if (weight.rows() != form.in_features() || weight.cols() != form.out_features())
    detail::raise_shape("embed", "W is " + detail::shape_text(weight.rows(), weight.cols()) +
                                     " (vocabulary x features) and the form was made from " +
                                     detail::shape_text(form.out_features(), form.in_features()) +
                                     " (features x vocabulary): make it from W.transpose()");
  const auto tokens = checked_ids("embed", ids, weight.rows());
  check_y("embed", to.rows(), to.cols(), weight.cols(), tokens.size());
  if (form.has_input_map())
    detail::raise_value("embed",
                        "an adapter changes what W is multiplied by, and rows that are looked up "
                        "are not: merge it");
  if (form.state().term(1).shift != nullptr)
    detail::raise_value("embed", "an adapter has a bias of its own, and an embedding has none");
  detail::refuse_overlap("embed", "y", to, "W", weight);
  const detail::folded_steps<Acc> folded(form.steps(), form.out_features());
  detail::expansion<acc> sum(to.rows(), folded.rank(), to.cols());
  index_t at = 0;
  for (const auto& one : folded.factors())
    one.factors->visit([&](const auto& l) {
      detail::refuse_overlap("embed", "y", to, "lora_A", l.lora_A());
      detail::refuse_overlap("embed", "y", to, "lora_B", l.lora_B());
      sum.set_B(at, l.lora_B(), {one.scaling, one.gain, one.rows});
      for (index_t t = 0; t < to.cols(); ++t)
        for (index_t i = 0; i < l.rank(); ++i)
          sum.U(at + i, t) = detail::widen<acc>(l.lora_A()(i, tokens[static_cast<std::size_t>(t)]));
      at += l.rank();
    });
  const auto more = columns_of_deltas<acc>(folded, form, tokens);
  const times_constant<value, acc> scaled(scale);
  const Acc* const gain = form.gain().empty() ? nullptr : form.gain().data();
  const bool untouched = form.changes_nothing();
  sum.run(to, [&](value& element, acc delta, index_t i, index_t t) {
    acc base = detail::widen<acc>(weight(tokens[static_cast<std::size_t>(t)], i));
    if (untouched) return void(element = scaled(base));
    if (more.size() != 0) delta += more(i, t);
    if (gain != nullptr) base = static_cast<acc>(gain[i]) * base;
    element = scaled(detail::plus(base, delta));
  });
}

}  // namespace detail

/// y(:, t) := round(c (W(ids[t], :) + sum of deltas)); W is a matrix or scaled_embedding(W, c). See
/// the top of this file.
template <class M, class R, class Y, class... L>
  requires(matrix_like<M> || detail::is_embedding_view<M>) && token_range<R> && activations<Y> &&
          (detail::adapters<L> && ...)
void embed(const M& W, const R& ids, Y&& y, const L&... l) {
  detail::refuse_temporary<Y>();
  if constexpr (detail::is_embedding_view<M>)
    detail::look_up(W.weight, W.scale, ids, y, l...);
  else
    detail::look_up(as_matrix(W), 1.0, ids, y, l...);
}

/// y(:, t) := round(c (g W(ids[t], :) + sum of deltas)) for a form that was made from
/// W.transpose(); see the top of this file. A delta that no factors give is multiplied by unit
/// vectors: vocabulary accumulators for each token. Throws value_error for a form with an input map
/// or a bias.
template <class M, class R, class Y, class Acc>
  requires(matrix_like<M> || detail::is_embedding_view<M>) && token_range<R> && activations<Y>
void embed(const M& W, const R& ids, Y&& y, const mixed_form<Acc>& form) {
  detail::refuse_temporary<Y>();
  if constexpr (detail::is_embedding_view<M>)
    detail::look_up_form(W.weight, W.scale, ids, y, form);
  else
    detail::look_up_form(as_matrix(W), 1.0, ids, y, form);
}
/// The same with adapters of any kind: makes their form in the call, at its cost.
template <class M, class R, class Y, class... L>
  requires(matrix_like<M> || detail::is_embedding_view<M>) && token_range<R> && activations<Y> &&
          (detail::any_adapters<L> && ...) && (detail::kinds<L> || ...)
void embed(const M& W, const R& ids, Y&& y, const L&... l) {
  detail::refuse_temporary<Y>();
  const auto run = [&](const auto& weight, const auto& as_given) {
    using acc = accumulator_t<detail::bare<decltype(weight)>, Y, L...>;
    embed(as_given, ids, y,
          detail::form_beside<acc>("embed", step_use::embed, weight.transpose(), l...));
  };
  if constexpr (detail::is_embedding_view<M>)
    run(W.weight, W);
  else
    run(as_matrix(W), W);
}

/// W(id, :) := the trained row, for every replaced id; exact where W's scalar holds the values,
/// else one rounding. W is vocabulary x features. Reports the elements that were finite and no
/// longer are: of values that W's scalar cannot hold. Throws value_error for an id outside W,
/// shape_error; then nothing is written.
template <class M, scalar T>
  requires matrix_like<M>
merge_report assign_rows(M&& W, const replaced_rows<T>& replaced) {
  detail::refuse_temporary<M>();
  const detail::default_environment environment;
  const auto weight = detail::output_view(W);
  using value = typename std::remove_const_t<decltype(weight)>::value_type;
  detail::checked_ids("assign_rows", replaced.ids(), weight.rows());
  if (weight.cols() != replaced.features())
    detail::raise_shape("assign_rows", "W has " + std::to_string(weight.cols()) +
                                           " features and the replaced rows " +
                                           std::to_string(replaced.features()) +
                                           "; W must be vocabulary x features");
  detail::refuse_overlap("assign_rows", "W", weight, "the replaced rows",
                         as_matrix(replaced.values()));
  merge_report report{.elements = static_cast<std::size_t>(weight.size()), .weights = 1};
  for (std::size_t k = 0; k < replaced.ids().size(); ++k)
    for (index_t j = 0; j < weight.cols(); ++j) {
      value& element = weight(replaced.ids()[k], j);
      const value before = element;
      const bool was_finite = detail::is_finite(element);
      element = detail::narrow<value>(
          detail::widen<accumulator_t<value, T>>(replaced.values()(static_cast<index_t>(k), j)));
      const bool is_finite = detail::is_finite(element);
      report.became_nonfinite += was_finite && !is_finite;
      report.nonfinite_before += !was_finite;
      report.nonfinite_after += !is_finite;
      report.changed += std::memcmp(&element, &before, sizeof before) != 0;
    }
  return report;
}

/// y(:, t) := scale * the trained row where ids[t] is replaced: what embed() gives on a W into
/// which they were merged, for a base that is not touched. One rounding, and one more for each of
/// scale and its product where scale is not 1. Throws shape_error, value_error when scale is not
/// finite.
template <class R, class Y, scalar T>
  requires token_range<R> && activations<Y>
void overwrite_rows(const R& ids, Y&& y, const replaced_rows<T>& replaced, double scale = 1.0) {
  detail::refuse_temporary<Y>();
  const detail::default_environment environment;
  if (!detail::is_finite(scale)) detail::raise_value("overwrite_rows", "the scale is not finite");
  const auto to = detail::output_view(y);
  using value = typename std::remove_const_t<decltype(to)>::value_type;
  using acc = accumulator_t<value, T>;
  detail::check_y("overwrite_rows", to.rows(), to.cols(), replaced.features(), std::size(ids));
  detail::refuse_overlap("overwrite_rows", "y", to, "the replaced rows",
                         as_matrix(replaced.values()));
  const detail::times_constant<value, acc> scaled(scale);
  index_t t = 0;
  for (const auto id : ids) {
    const index_t k = std::in_range<index_t>(id) ? replaced.find(static_cast<index_t>(id)) : -1;
    for (index_t i = 0; k >= 0 && i < to.rows(); ++i)
      to(i, t) = scaled(detail::widen<acc>(replaced.values()(k, i)));
    ++t;
  }
}

/// Rows that training replaced are assigned, not merged.
template <class M, scalar T>
  requires matrix_like<M>
void merge(M&&, const replaced_rows<T>&) {
  static_assert(detail::never<T>,
                "lora::merge: these rows replace rows of W and add nothing: assign_rows(W, rows)");
}
/// And overwritten, not applied.
template <class R, class Y, scalar T>
  requires token_range<R> && activations<Y>
void apply(const R&, Y&&, const replaced_rows<T>&, double = 1.0) {
  static_assert(detail::never<T>,
                "lora::apply: these rows replace columns of y and add nothing: "
                "overwrite_rows(ids, y, rows)");
}

/// A mistaken call of it gets a sentence.
template <class... A>
  requires detail::mistaken_on_layer<A...>
auto embed(const A&...) {
  static_assert(detail::refuse_on_embed<A...>());
}

}  // namespace lora::inline LORA_DETAIL_ABI
