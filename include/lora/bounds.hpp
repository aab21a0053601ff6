// SPDX-License-Identifier: Apache-2.0
//
// How far a result may be from exact arithmetic. The bound of verb(arguments) is verb_bound(the
// same arguments):
//
//   merge_bound(W, l...)           of merge(W, l...), merged, merge_checked; W as it is before the
//                                  merge
//   unmerge_bound(W, l...)         of unmerge(W, l...); W as it is before
//   delta_weight_bound(l...)       of delta_weight(l...)
//   forward_bound(W, x, y, l...)   of forward(W, x, y, l...), also with a bias or a batch; y is not
//                                  read
//   apply_bound(x, y, l...)        of apply(x, y, l...); y as it is before
//   with_merged(W, l...)           as W of forward_bound: the weight that merge(W, l...) makes of
//                                  this W
//
//   const auto bound = lora::merge_bound(W, style);
//   if (!(std::abs(W_merged(i, j) - exact(i, j)) <= bound(i, j))) ...     // a mistake: no rounding
//   if (!(bound.share(W_merged) <= 1)) ...                                // the same of all
//                                                                         elements
//
// A difference within the bound may be rounding; a larger one is a mistake (a lost adapter, a scale
// used twice). Two results of one function, by two states or two programs, differ by at most the
// sum of their bounds. Each comparison is written !(difference <= bound), so that NaN fails it.
//   formula  docs/numerics.md, "The bounds": e, and what is rounded when the result is stored. The
//            thresholds below which a build for AVX512-BF16 takes numbers for zero are in it
//            (flush_threshold_of_product, flush_threshold_of_delta).
//   shapes   as the verb's. A weight's bound is a weight_bound, out x in, which computes its
//            elements when they are asked for. The others are Eigen::MatrixXd, out x tokens.
//   units    those of the result; absolute.
//   exact    no: the bound is a sum of out x in positive terms, computed in double. Its own
//            relative error is about (in + R) 2^-53.
//   cost     a weight_bound: 16 R (in + out) bytes; 2 R FLOPs for an element, 2 R out in for all,
//            in blocks of 256 KiB. forward_bound: 2 (out in + R (in + out)) FLOPs a token, and 2 R
//            out in where something is merged; doubles of the size of x and twice y, a block, and
//            the factors. Nothing of the size of W.
//   throws   shape_error, value_error (scaling not finite), std::bad_alloc, as the verb.
// The bound of a sum of products is Higham's (Accuracy and Stability of Numerical Algorithms,
// section 3.1).
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/batch.hpp"
#include "lora/delta.hpp"
#include "lora/detail/eigen.hpp"
#include "lora/detail/error_terms.hpp"
#include "lora/detail/operands.hpp"
#include "lora/forward.hpp"
#include "lora/merge.hpp"

LORA_DETAIL_QUIET_BEGIN
namespace lora::inline LORA_DETAIL_ABI {
namespace detail {

/// The elements of a matrix, as another scalar that holds them.
template <class To = double, class V>
Eigen::Matrix<To, Eigen::Dynamic, Eigen::Dynamic> widened(const V& view) {
  Eigen::Matrix<To, Eigen::Dynamic, Eigen::Dynamic> result(view.rows(), view.cols());
  for (index_t j = 0; j < view.cols(); ++j)
    for (index_t i = 0; i < view.rows(); ++i)
      result(i, j) = static_cast<To>(widen<double>(view(i, j)));
  return result;
}

/// What an operation accumulated in Acc makes of an adapter.
template <class Acc, low_rank L>
error_part error_part_of(const L& l) {
  const auto& lora_A = l.lora_A();
  const auto& lora_B = l.lora_B();
  return {
      .A = widened(as_matrix(lora_A)),
      .B = widened(as_matrix(lora_B)),
      .s = static_cast<double>(l.scaling()),
      .U = {},
      .flushed = uses_dots<Acc>(l) ? static_cast<double>(std::numeric_limits<float>::min()) : 0.0,
      .in_pairs = std::is_same_v<typename panels_in_call<Acc, L>::type, bfloat16>};
}
/// The same of a packed one: the factors as they are in the panels.
template <class Acc, packed_factors L>
error_part error_part_of(const L& l) {
  using F = packed_scalar<L>;
  constexpr index_t width = tile_cols<accumulator_t<F>>;
  const auto& packed = adapter_of(l);
  const auto where = packed.where();
  error_part result{.A = Eigen::MatrixXd(where.rank, where.in_features),
                    .B = Eigen::MatrixXd(where.out_features, where.rank),
                    .s = static_cast<double>(l.scaling()),
                    .U = {},
                    .flushed = 0,
                    .in_pairs = std::is_same_v<typename panels_in_call<Acc, L>::type, bfloat16>};
  if (packed.intermediate_format() == intermediate_format::factors) result.U = unit_of<F>();
  for (index_t r = 0; r < where.rank; ++r) {
    const index_t panel = r / width;
    for (index_t k = 0; k < where.in_features; ++k)
      result.A(r, k) =
          widen<double>(packed.A_panels()[panel * where.A_panel() +
                                          panel_offset<F>(r % width, k, where.A_width(panel))]);
    for (index_t i = 0; i < where.out_features; ++i)
      result.B(i, r) = widen<double>(
          packed.B_panels()[i / width * where.B_panel() + panel_offset<F>(i % width, r, width)]);
  }
  return result;
}

/// The adapters that take part, checked.
template <class Acc, class Each>
std::vector<error_part> error_parts(const char* operation, const Each& each, index_t out_features,
                                    index_t in_features) {
  checked_total_rank(operation, each, out_features, in_features);
  std::vector<error_part> parts;
  each([&](const auto& l) {
    if (is_read(l)) parts.push_back(error_part_of<Acc>(l));
  });
  return parts;
}

/// The rows of a weight: of a matrix_view, or of a packed_weight that lives elsewhere.
template <class V>
class weight_rows {
 public:
  using value_type = typename V::value_type;

  explicit weight_rows(const V& weight) : weight_(hold(weight)) {}

  index_t rows() const {
    if constexpr (is_packed_weight<V>)
      return weight_->out_features();
    else
      return weight_.rows();
  }
  index_t cols() const {
    if constexpr (is_packed_weight<V>)
      return weight_->in_features();
    else
      return weight_.cols();
  }
  double operator()(index_t i, index_t j) const {
    if constexpr (is_packed_weight<V>)
      return widen<double>((*weight_)(i, j));
    else
      return widen<double>(weight_(i, j));
  }
  /// Writes rows from the first on; the block says how many.
  template <class Block>
  void read(index_t first, Block& block) const {
    for (index_t i = 0; i < block.rows(); ++i)
      for (index_t j = 0; j < block.cols(); ++j)
        block(i, j) = static_cast<typename Block::Scalar>((*this)(first + i, j));
  }

 private:
  static auto hold(const V& weight) {
    if constexpr (is_packed_weight<V>)
      return &weight;
    else
      return weight;
  }
  std::conditional_t<is_packed_weight<V>, const V*, V> weight_;
};
/// Of a delta alone: zeros.
class no_weight {
 public:
  no_weight(index_t rows, index_t cols) : rows_(rows), cols_(cols) {}
  index_t rows() const { return rows_; }
  index_t cols() const { return cols_; }
  double operator()(index_t, index_t) const { return 0; }
  template <class Block>
  void read(index_t, Block& block) const {
    block.setZero();
  }

 private:
  index_t rows_, cols_;
};

template <class M>
auto rows_of_weight(const M& W) {
  if constexpr (is_packed_weight<M>) {
    return weight_rows<M>(W);
  } else {
    const auto view = as_matrix(W);
    return weight_rows<std::remove_const_t<decltype(view)>>(view);
  }
}

}  // namespace detail

/// The bound of a weight, out_features x in_features, element by element: |stored - exact| <=
/// bound(i, j). Holds copies of the factors and looks at W, which must outlive it and stay as it
/// is: a merge in place changes W, so keep a copy or compare with what merged(W, l...) returns. It
/// holds nothing of W's size; every element is computed when it is asked for. share is there for
/// merge, unmerge and delta_weight of plain adapters.
template <class Acc, class Weight, class Error = detail::weight_error>
class weight_bound {
 public:
  weight_bound(Weight weight, Error error, double sign)
      : weight_(std::move(weight)), error_(std::move(error)), sign_(sign) {}

  index_t rows() const { return weight_.rows(); }
  index_t cols() const { return weight_.cols(); }

  double operator()(index_t i, index_t j) const {
    const detail::default_environment environment;
    return error_.of_element(i, j, weight_(i, j));
  }

  /// visit(i, the bounds of row i as a span of doubles) for all rows in order.
  template <class Visit>
  void each_row(const Visit& visit) const {
    const detail::default_environment environment;
    each_block([&](index_t first, const block&, const block& bounds) {
      for (index_t i = 0; i < bounds.rows(); ++i)
        visit(first + i, std::span<const double>(bounds.data() + i * cols(),
                                                 static_cast<std::size_t>(cols())));
    });
  }

  /// The largest bound of an element; 0 of a weight without elements.
  double largest() const {
    const detail::default_environment environment;
    double result = 0;
    each_block([&](index_t, const block&, const block& bounds) {
      result = std::max(result, bounds.maxCoeff());
    });
    return result;
  }

  /// The largest |result - exact| / bound: at most 1 if the result differs by rounding. Infinite
  /// where an element of the result or of the bound is not finite. The exact result is computed in
  /// double, in long double where the accumulator is double; what those may be off is added to the
  /// bound. Throws shape_error when the result has another shape.
  template <class M>
    requires detail::base_weight<M> && std::same_as<Error, detail::weight_error>
  double share(const M& result) const {
    const detail::default_environment environment;
    const auto got = detail::rows_of_weight(result);
    if (got.rows() != rows() || got.cols() != cols())
      detail::raise_shape("share", "the result is " + detail::shape_text(got.rows(), got.cols()) +
                                       " and the bound is " + detail::shape_text(rows(), cols()));
    constexpr double infinity = std::numeric_limits<double>::infinity();
    const double slack = detail::gamma(
        error_.rank() + 3, static_cast<double>(std::numeric_limits<wide>::epsilon() / 2));
    double largest = 0;
    each_block([&](index_t first, const block& size, const block& bounds) {
      Eigen::Matrix<wide, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> exact(size.rows(),
                                                                                 cols());
      weight_.read(first, exact);
      for (const auto& p : error_.parts())
        if (p.rank() != 0)
          exact += static_cast<wide>(sign_ * p.s) *
                   detail::multiplied(p.B.middleRows(first, size.rows()).template cast<wide>(),
                                      p.A.template cast<wide>());
      for (index_t i = 0; i < size.rows(); ++i)
        for (index_t j = 0; j < cols(); ++j) {
          const auto difference =
              static_cast<double>(std::abs(static_cast<wide>(got(first + i, j)) - exact(i, j)));
          const double bound = bounds(i, j) + slack * size(i, j);
          if (!detail::is_finite(difference) || !detail::is_finite(bound))
            largest = infinity;
          else if (difference > 0)
            largest = std::max(largest, difference / bound);
        }
    });
    return largest;
  }

 private:
  using block = detail::weight_error::block;
  using wide = std::conditional_t<std::is_same_v<Acc, double>, long double, double>;

  /// visit(first row, |W| + d, the bounds) for blocks of rows.
  template <class Visit>
  void each_block(const Visit& visit) const {
    if (cols() == 0) return;
    detail::each_block(rows(), cols(), [&](index_t first, index_t rows) {
      block size(rows, cols()), bounds;
      weight_.read(first, size);
      size = size.cwiseAbs();
      error_.of_rows(first, size, bounds);
      visit(first, size, bounds);
    });
  }

  Weight weight_;
  Error error_;
  double sign_;
};

/// A base of forward_bound: the weight that merge(W, l...) makes of W, with W's bias. Looks at W.
template <class Base>
struct merged_base {
  Base base;  ///< matrix_view, pointer to a packed_weight, or what with_bias returns
  detail::weight_error merged;
};

namespace detail {

template <class M>
inline constexpr bool is_merged_base = false;
template <class B>
inline constexpr bool is_merged_base<merged_base<B>> = true;

/// The error of a merge into an out x in weight of T.
template <class T, class... L>
weight_error merge_error(const char* operation, index_t out, index_t in, const L&... l) {
  using acc = accumulator_t<T, L...>;
  return {error_parts<acc>(operation, each_of(l...), out, in),
          out,
          in,
          unit_of<acc>().u,
          3,
          unit_of<acc>(),
          unit_of_stored<T, acc>()};
}

template <class M, class... L>
auto merge_bound_of(const char* operation, double sign, const M& W, const L&... l) {
  const default_environment environment;
  const auto weight = rows_of_weight(W);
  using rows = std::remove_const_t<decltype(weight)>;
  using value = typename rows::value_type;
  return weight_bound<accumulator_t<value, L...>, rows>(
      weight, merge_error<value>(operation, weight.rows(), weight.cols(), l...), sign);
}

/// A base taken apart: its weight, its bias (out x 1, or empty) and what is merged into it.
template <class M>
const auto& weight_of_base(const M& W) {
  if constexpr (is_merged_base<M>)
    return weight_of_base(W.base);
  else if constexpr (is_biased<M>)
    return W.weight;
  else if constexpr (std::is_pointer_v<M>)
    return *W;
  else
    return W;
}
template <class M>
Eigen::MatrixXd bias_of_base(const char* operation, index_t out_features, const M& W) {
  if constexpr (is_merged_base<M>) {
    return bias_of_base(operation, out_features, W.base);
  } else if constexpr (is_biased<M>) {
    check_bias(operation, out_features, W.bias);
    return widened(W.bias);
  } else {
    return {};
  }
}
template <class M>
const weight_error* merged_in_base(const M& W) {
  if constexpr (is_merged_base<M>)
    return &W.merged;
  else
    return nullptr;
}

/// Whether a base's bias is double; its weight says the rest.
template <class M>
inline constexpr bool bias_is_double = false;
template <class W, class B>
inline constexpr bool bias_is_double<biased<W, B>> = holds_double<bare<B>>;
template <class B>
inline constexpr bool bias_is_double<merged_base<B>> = bias_is_double<B>;

template <class M>
concept bounded_base = base<M> || is_merged_base<bare<M>>;

/// forward_bound with everything found out but the parts: add(error) adds those of every token.
/// Operands are what the accumulator depends on besides W, x and y.
template <class... Operands, class M, class X, class Y, class Check, class Add>
Eigen::MatrixXd forward_bound_of(const M& W, const X& x, const Y& y, const Check& check,
                                 const Add& add) {
  const default_environment environment;
  decltype(auto) input = in_memory(x);
  const auto from = input_view(input);
  const auto to = input_view(y);
  const auto weight = rows_of_weight(weight_of_base(W));
  using value = typename std::remove_const_t<decltype(weight)>::value_type;
  using acc =
      std::conditional_t<bias_is_double<M>, double, accumulator_t<value, X, Y, Operands...>>;
  const index_t out = weight.rows(), in = weight.cols();
  if (from.rows() != in || to.rows() != out || from.cols() != to.cols())
    raise_shape(
        "forward_bound",
        "W is " + shape_text(out, in) + " (out_features x in_features), x is " +
            shape_text(from.rows(), from.cols()) + " and y is " + shape_text(to.rows(), to.cols()) +
            ": x needs in_features rows, y out_features rows, both one column for each token");
  check(out, in, from.cols());
  const Eigen::MatrixXd bias = bias_of_base("forward_bound", out, W);
  product_error error(widened(from), out, unit_of<acc>(),
                      flush_threshold_of_product<acc, value, element_t<X>>());
  error.add_weight([&](index_t first, auto& block) { weight.read(first, block); },
                   merged_in_base(W));
  add(std::type_identity<acc>(), error, out, in, from.cols());
  return std::move(error).stored(bias, unit_of_stored<element_t<Y>, acc>());
}

inline std::vector<strong_part> at_own_strength(const std::vector<error_part>& parts) {
  std::vector<strong_part> result;
  for (const error_part& p : parts) result.push_back({&p, p.s});
  return result;
}

}  // namespace detail

/// Of merge, merged and merge_checked, for the W that is merged into; see the top of this file.
template <class M, class... L>
  requires detail::mergeable<M> && (detail::adapters<L> && ...)
auto merge_bound(const M& W, const L&... l) {
  return detail::merge_bound_of("merge_bound", 1, W, l...);
}
/// Of unmerge, for the W that is unmerged: its bound from W - delta. unmerge(merge(W)) is within
/// both bounds of W.
template <class M, class... L>
  requires detail::mergeable<M> && (detail::adapters<L> && ...)
auto unmerge_bound(const M& W, const L&... l) {
  return detail::merge_bound_of("unmerge_bound", -1, W, l...);
}

/// Of delta_weight. Throws value_error without an adapter.
template <class... L>
  requires(detail::adapters<L> && ...) && (sizeof...(L) > 0)
auto delta_weight_bound(const L&... l) {
  using acc = accumulator_t<L...>;
  const detail::default_environment environment;
  const auto each = detail::each_of(l...);
  index_t out = -1, in = -1;
  each([&](const auto& one) {
    if (out >= 0) return;
    const auto& lora_A = one.lora_A();
    const auto& lora_B = one.lora_B();
    out = as_matrix(lora_B).rows();
    in = as_matrix(lora_A).cols();
  });
  if (out < 0)
    detail::raise_value("delta_weight_bound", "no adapter is given, so the shape is not known");
  return weight_bound<acc, detail::no_weight>(
      {out, in},
      {detail::error_parts<acc>("delta_weight_bound", each, out, in),
       out,
       in,
       0.0,
       2,
       detail::unit_of<acc>(),
       {}},
      1);
}

/// A base of forward_bound with adapters inside its weight: that of a layer whose W took merge(W,
/// l...). W is the weight before the merge, or with_bias(it, b); it must outlive the result. linear
/// merges the same way.
template <class M, class... L>
  requires detail::base<M> && (detail::adapters<L> && ...)
auto with_merged(const M& W, const L&... l) {
  const detail::default_environment environment;
  const auto weight = detail::rows_of_weight(detail::weight_of_base(W));
  using value = typename std::remove_const_t<decltype(weight)>::value_type;
  auto merged = detail::merge_error<value>("with_merged", weight.rows(), weight.cols(), l...);
  if constexpr (detail::is_biased<M>) {
    return merged_base<M>{W, std::move(merged)};
  } else if constexpr (detail::is_packed_weight<M>) {
    return merged_base<const M*>{&W, std::move(merged)};
  } else {
    const auto view = as_matrix(W);
    return merged_base<std::remove_const_t<decltype(view)>>{view, std::move(merged)};
  }
}

/// Of forward. W is what forward takes, or with_merged(it, ...). Of y the shape and the scalar
/// count.
template <class M, class X, class Y, class... L>
  requires detail::bounded_base<M> && activations<X> && activations<Y> &&
           (detail::mixables<L> && ...)
Eigen::MatrixXd forward_bound(const M& W, const X& x, const Y& y, const L&... l) {
  const auto each = detail::each_of(l...);
  return detail::forward_bound_of<L...>(
      W, x, y,
      [&](index_t out, index_t in, index_t) {
        detail::checked_total_rank("forward_bound", each, out, in);
      },
      [&]<class Acc>(std::type_identity<Acc>, detail::product_error& error, index_t out, index_t in,
                     index_t tokens) {
        const auto parts = detail::error_parts<Acc>("forward_bound", each, out, in);
        error.add_parts(0, tokens, detail::at_own_strength(parts));
      });
}
/// Of forward with a batch: every token with its own adapters.
template <class M, class X, class Y, class F>
  requires detail::bounded_base<M> && activations<X> && activations<Y>
Eigen::MatrixXd forward_bound(const M& W, const X& x, const Y& y, const batch<F>& who) {
  return detail::forward_bound_of<batch<F>>(
      W, x, y,
      [&](index_t out, index_t in, index_t tokens) {
        detail::by_token<F>{who}.check("forward_bound", out, in, tokens);
      },
      [&]<class Acc>(std::type_identity<Acc>, detail::product_error& error, index_t, index_t,
                     index_t tokens) {
        std::vector<detail::error_part> parts;
        for (const auto& l : who.used()) parts.push_back(detail::error_part_of<Acc>(*l.adapter));
        const auto lists = who.parts();
        std::vector<detail::strong_part> of_token;
        for (index_t t = 0; t < tokens; ++t) {
          of_token.clear();
          for (index_t k = lists.begin[t]; k < lists.begin[t + 1]; ++k) {
            const auto& part = parts[static_cast<std::size_t>(lists.index[k])];
            of_token.push_back({&part, lists.weight[k] * part.s});
          }
          error.add_parts(t, 1, of_token);
        }
      });
}

/// Of apply: y is its content before the call. 0 where no adapter is read, because then y stays.
template <class X, class Y, class... L>
  requires activations<X> && activations<Y> && (detail::mixables<L> && ...)
Eigen::MatrixXd apply_bound(const X& x, const Y& y, const L&... l) {
  using acc = accumulator_t<X, Y, L...>;
  const detail::default_environment environment;
  decltype(auto) input = detail::in_memory(x);
  const auto from = detail::input_view(input);
  const auto to = detail::input_view(y);
  if (from.cols() != to.cols())
    detail::raise_shape("apply_bound", "x is " + detail::shape_text(from.rows(), from.cols()) +
                                           " and y is " + detail::shape_text(to.rows(), to.cols()) +
                                           "; both need one column for each token");
  const auto parts =
      detail::error_parts<acc>("apply", detail::each_of(l...), to.rows(), from.rows());
  if (detail::total_rank(parts) == 0) return Eigen::MatrixXd::Zero(to.rows(), to.cols());
  detail::product_error error(detail::widened(from), to.rows(), detail::unit_of<acc>(), 0);
  error.add_parts(0, to.cols(), detail::at_own_strength(parts));
  return std::move(error).stored(detail::widened(to),
                                 detail::unit_of_stored<detail::element_t<Y>, acc>());
}

}  // namespace lora::inline LORA_DETAIL_ABI
LORA_DETAIL_QUIET_END
