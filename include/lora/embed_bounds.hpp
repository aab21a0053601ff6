// SPDX-License-Identifier: Apache-2.0
//
// How far the results of embed.hpp and through.hpp may be from exact arithmetic; see bounds.hpp.
//
//   embed_bound(W, ids, y, l...)                of embed(W, ids, y, l...), W a matrix or
//                                               scaled_embedding(it, c)
//   overwrite_rows_bound(ids, y, replaced, c)   of overwrite_rows(ids, y, replaced, c): 0 in the
//                                               columns that it leaves
//   apply_through_bound(down, y, l...)          of apply_through(down, y, l...); y as it is before.
//                                               down is called once for each adapter; the error of
//                                               what it returns comes on top
//
//   shapes   Eigen::MatrixXd of y's shape; of y's elements only apply_through_bound reads any.
//   formula  docs/numerics.md, "The bounds"; for rows |c| (gamma_3 |W row| + gamma_{R+5} d column)
//            + underflow, and what storing rounds; 0 where a row is copied into its own format.
//   cost     2 R features FLOPs a token, as the verb; doubles of the factors that are read, and of
//            y's size.
//   throws   as the verb
#pragma once

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "lora/bounds.hpp"
#include "lora/detail/eigen.hpp"
#include "lora/embed.hpp"
#include "lora/through.hpp"

LORA_DETAIL_QUIET_BEGIN
namespace lora::inline LORA_DETAIL_ABI {
namespace detail {

/// A bound without NaN: infinity times 0 is in it where an error has no limit.
template <class M>
M or_infinite(M e) {
  return e.unaryExpr(
      [](double v) { return is_finite(v) ? v : std::numeric_limits<double>::infinity(); });
}
/// e + u_y (size + e) + eta_y / 2
inline Eigen::MatrixXd stored_error(const Eigen::MatrixXd& e, const Eigen::MatrixXd& size,
                                    rounding_unit output) {
  return or_infinite<Eigen::MatrixXd>(e.array() + output.u * (size.array() + e.array()) +
                                      output.eta / 2);
}

/// sum of |s| |B| |U| over the adapters, and the sums of |U| over all ranks.
struct through_sizes {
  Eigen::MatrixXd delta;
  Eigen::RowVectorXd sum_U;
  index_t rank = 0;

  through_sizes(index_t out, index_t columns)
      : delta(Eigen::MatrixXd::Zero(out, columns)), sum_U(Eigen::RowVectorXd::Zero(columns)) {}
  template <class B>
  void add(double s, const B& lora_B, const Eigen::MatrixXd& U) {
    rank += U.rows();
    if (U.rows() == 0) return;
    delta += std::abs(s) * multiplied(widened(lora_B).cwiseAbs(), U.cwiseAbs());
    sum_U += U.cwiseAbs().colwise().sum();
  }
};

template <class W, class R, class Y, class... L>
Eigen::MatrixXd embed_bound_of(const W& weight, double c, const R& ids, const Y& y, const L&... l) {
  using acc = accumulator_t<typename W::value_type, Y, L...>;
  const default_environment environment;
  const auto to = input_view(y);
  const auto tokens = detail::checked_ids("embed_bound", ids, weight.rows());
  detail::check_y("embed_bound", to.rows(), to.cols(), weight.cols(), tokens.size());
  const auto each = each_of(l...);
  checked_total_rank("embed_bound", each, weight.cols(), weight.rows());
  through_sizes sizes(to.rows(), to.cols());
  each([&](const auto& one) {
    if (!is_read(one)) return;
    const auto& lora_A = one.lora_A();
    const auto& lora_B = one.lora_B();
    const auto A = as_matrix(lora_A);
    Eigen::MatrixXd columns(A.rows(), to.cols());
    for (index_t t = 0; t < to.cols(); ++t)
      for (index_t k = 0; k < A.rows(); ++k)
        columns(k, t) = widen<double>(A(k, tokens[static_cast<std::size_t>(t)]));
    sizes.add(static_cast<double>(one.scaling()), as_matrix(lora_B), columns);
  });
  Eigen::MatrixXd base(to.rows(), to.cols());
  for (index_t t = 0; t < to.cols(); ++t)
    for (index_t i = 0; i < to.rows(); ++i)
      base(i, t) = std::abs(widen<double>(weight(tokens[static_cast<std::size_t>(t)], i)));
  const auto unit = unit_of<acc>();
  Eigen::MatrixXd e = Eigen::MatrixXd::Zero(to.rows(), to.cols());
  if (sizes.rank != 0 || c != 1) {
    e = gamma(3, unit.u) * base + gamma(sizes.rank + 5, unit.u) * sizes.delta;
    e.rowwise() += unit.eta * (sizes.sum_U.array() + static_cast<double>(sizes.rank + 1)).matrix();
    e = (std::abs(c) * e.array() + unit.eta).matrix();
  }
  // Of a row that is copied, the format is that of the weight: it holds every element where y's
  // does.
  const bool copied =
      sizes.rank == 0 && c == 1 && holds_exactly<element_t<Y>, typename W::value_type>;
  return copied ? e
                : stored_error(e, std::abs(c) * (base + sizes.delta),
                               unit_of_stored<element_t<Y>, acc>());
}

}  // namespace detail

/// Of rows; see the top of this file.
template <class M, class R, class Y, class... L>
  requires(matrix_like<M> || detail::is_embedding_view<M>) && token_range<R> && activations<Y> &&
          (detail::adapters<L> && ...)
Eigen::MatrixXd embed_bound(const M& W, const R& ids, const Y& y, const L&... l) {
  if constexpr (detail::is_embedding_view<M>)
    return detail::embed_bound_of(W.weight, W.scale, ids, y, l...);
  else
    return detail::embed_bound_of(as_matrix(W), 1.0, ids, y, l...);
}

/// Of the columns that overwrite_rows(ids, y, replaced, scale) writes.
template <class R, class Y, scalar T>
  requires token_range<R> && activations<Y>
Eigen::MatrixXd overwrite_rows_bound(const R& ids, const Y& y, const replaced_rows<T>& replaced,
                                     double scale = 1.0) {
  using acc = accumulator_t<Y, T>;
  const detail::default_environment environment;
  if (!detail::is_finite(scale)) detail::raise_value("apply_bound", "the scale is not finite");
  const auto to = detail::input_view(y);
  detail::check_y("overwrite_rows_bound", to.rows(), to.cols(), replaced.features(),
                  std::size(ids));
  const auto unit = detail::unit_of<acc>(),
             output = detail::unit_of_stored<detail::element_t<Y>, acc>();
  Eigen::MatrixXd bound = Eigen::MatrixXd::Zero(to.rows(), to.cols());
  index_t t = 0;
  for (const auto id : ids) {
    const index_t k = std::in_range<index_t>(id) ? replaced.find(static_cast<index_t>(id)) : -1;
    for (index_t i = 0; k >= 0 && i < to.rows(); ++i) {
      const double size = std::abs(scale * detail::widen<double>(replaced.values()(k, i)));
      const double e = scale == 1 ? 0 : detail::gamma(2, unit.u) * size + unit.eta;
      const bool copied = scale == 1 && detail::holds_exactly<detail::element_t<Y>, T>;
      bound(i, t) = copied ? 0 : e + output.u * (size + e) + output.eta / 2;
    }
    ++t;
  }
  return bound;
}

/// Of apply_through, beside the error of what down returns. 0 where no adapter is read.
template <class Down, class Y, class... L>
  requires activations<Y> && (detail::adapters<L> && ...)
Eigen::MatrixXd apply_through_bound(const Down& down, const Y& y, const L&... l) {
  using acc = accumulator_t<Y, L...>;
  const auto to = detail::input_view(y);
  const auto each = detail::each_of(l...);
  detail::check_all("apply_through_bound", each, to.rows());
  detail::through_sizes sizes(to.rows(), to.cols());
  each([&](const auto& one) {
    if (!detail::is_read(one)) return;
    const auto& lora_A = one.lora_A();
    const auto& lora_B = one.lora_B();
    const auto& held = down(as_matrix(lora_A));
    const detail::default_environment environment;
    const auto U = as_matrix(held);
    if (U.rows() != static_cast<index_t>(one.rank()) || U.cols() != to.cols())
      detail::raise_shape("apply_through_bound",
                          "down(lora_A) is " + detail::shape_text(U.rows(), U.cols()) +
                              ", not rank x positions, which is " +
                              detail::shape_text(static_cast<index_t>(one.rank()), to.cols()));
    sizes.add(static_cast<double>(one.scaling()), as_matrix(lora_B), detail::widened(U));
  });
  const detail::default_environment environment;
  if (sizes.rank == 0) return Eigen::MatrixXd::Zero(to.rows(), to.cols());
  const auto unit = detail::unit_of<acc>();
  const Eigen::MatrixXd before = detail::widened(to).cwiseAbs();
  Eigen::MatrixXd e = unit.u * before + detail::gamma(sizes.rank + 3, unit.u) * sizes.delta;
  e.rowwise() += unit.eta * (sizes.sum_U.array() + static_cast<double>(sizes.rank + 1)).matrix();
  return detail::stored_error(e, before + sizes.delta,
                              detail::unit_of_stored<detail::element_t<Y>, acc>());
}

}  // namespace lora::inline LORA_DETAIL_ABI
LORA_DETAIL_QUIET_END
