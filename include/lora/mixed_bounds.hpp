// SPDX-License-Identifier: Apache-2.0
//
// How far the results of dora.hpp may be from exact arithmetic; see bounds.hpp.
//
//   const auto layer = lora::attach(W, style);              // for the verbs
//   const auto sure = lora::attach_bound(W, style);         // for their bounds: the same arguments
//   merge_bound(W, sure)             of merge(W, layer), and of merge(W, style)
//   unmerge_bound(W, sure)           of unmerge(W, layer); W as it is before, the merged weight
//   forward_bound(W, x, y, sure)     of forward(W, x, y, layer), also with a bias
//   apply_bound(x, y, sure)          of apply(x, y, layer); y as it is before
//   rows_bound(W, ids, y, sure)      of rows(W, ids, y, layer), also with_scale
//   apply_through_bound(down, y, sure)   of apply_through(down, y, layer), beside the error of what
//                                        down returns
//
//   formula  docs/numerics.md, "DoRA". attach_bound finds the norms again, and P, the relative
//            error that each factor g has. Where W + D cancels, P is large and so are all bounds of
//            that output; where nothing can be said they are infinite.
//   result   merge_bound and unmerge_bound: a weight_bound, out x in. The others: Eigen::MatrixXd
//            of y's shape.
//   W        out x in, as attach takes it; a weight that is stored in x out is passed as its
//            transpose.
//   cost     attach_bound: 4 r out in FLOPs for each adapter with a magnitude, in blocks of rows;
//            copies the factors as doubles. The others as those of bounds.hpp and rows_bounds.hpp.
//   throws   shape_error, value_error (scaling not finite)
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/bounds.hpp"
#include "lora/detail/eigen.hpp"
#include "lora/dora.hpp"
#include "lora/rows_bounds.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// What the bounds of an attached_dora need: for each of its adapters the factors, |g_k| and the
/// bound P_k of g_k's relative error, and |g_0| and P_0 of the base. Owns them; immutable. Right
/// for the W that attach saw. Acc is attach's accumulator.
template <class Acc>
class dora_bound {
 public:
  using column = Eigen::VectorXd;
  /// An adapter, with its row factors.
  struct piece {
    detail::error_part part;
    column g, P;
  };

  dora_bound(column base_scale, column base_error, std::vector<piece> pieces, index_t in_features, bool has_magnitude)
      : g_(std::move(base_scale)),
        P_(std::move(base_error)),
        pieces_(std::move(pieces)),
        in_(in_features),
        has_magnitude_(has_magnitude) {}

  const column& base_scale() const { return g_; }
  const column& base_error() const { return P_; }
  const std::vector<piece>& pieces() const { return pieces_; }
  index_t out_features() const { return g_.size(); }
  index_t in_features() const { return in_; }
  index_t rank() const {
    index_t sum = 0;
    for (const piece& p : pieces_) sum += p.part.rank();
    return sum;
  }
  /// No adapter is read and none has a magnitude.
  bool changes_nothing() const { return pieces_.empty() && !has_magnitude_; }

  static detail::rounding_unit unit() { return detail::unit_of<Acc>(); }
  /// (P + (1 + P) gamma_k) |g|
  static column share(const column& g, const column& P, index_t k) {
    return (P.array() + (1 + P.array()) * detail::gamma(k, unit().u)) * g.array();
  }
  column share(index_t k) const { return share(g_, P_, k); }

 private:
  column g_, P_;
  std::vector<piece> pieces_;
  index_t in_;
  bool has_magnitude_;
};

namespace detail {

/// Collects the adapters in order, then finds what dora_bound holds. Norms and factors in Wide:
/// double, or long double where attach's own are in double.
template <class Acc, class Rows>
class dora_bounder {
 public:
  using wide = std::conditional_t<std::is_same_v<Acc, double>, long double, double>;
  using column = Eigen::VectorXd;

  explicit dora_bounder(const Rows& W) : W_(W) {}

  template <class L>
  void add(const L& l) {
    if constexpr (weight_decomposed<L>) {
      add_one(l.factors, l.magnitude);
    } else if constexpr (weight_decomposed_range<L>) {
      for (const auto& each : l) add(each);
    } else {
      visit_adapters([&](const auto& one) { add_one(one, std::span<const float>()); }, l);
    }
  }
  template <class T>
  void add(const dora_adapter<T>& l) {
    add_one(l.factors(), std::span<const T>(l.magnitude()));
  }

  dora_bound<Acc> finish() && {
    const index_t out = W_.rows();
    column g = column::Ones(out), P = column::Zero(out);
    std::vector<typename dora_bound<Acc>::piece> pieces;
    bool has_magnitude = false;
    for (std::size_t k = all_.size(); k-- > 0;) {
      auto& one = all_[k];
      if (one.magnitude.size() != 0) {
        has_magnitude = true;
        column f(out), more(out);
        each_block(out, W_.cols(),
                   [&](index_t first, index_t rows) { norms(one.part, one.magnitude, first, rows, f, more); });
        g = g.cwiseProduct(f);
        P += more + P.cwiseProduct(more);  // of products of 1 + more the small digits would be lost
      }
      if (one.part.s == 0) continue;
      pieces.insert(pieces.begin(), typename dora_bound<Acc>::piece{std::move(one.part), g, P});
    }
    return {g, P, std::move(pieces), W_.cols(), has_magnitude};
  }

 private:
  struct collected {
    error_part part;
    column magnitude;  // empty without
  };

  template <class L, class M>
  void add_one(const L& l, const M& magnitude) {
    check_adapter("attach_bound", l, W_.rows(), W_.cols());
    if (!magnitude.empty() && static_cast<index_t>(magnitude.size()) != W_.rows())
      raise_shape("attach_bound",
                  std::to_string(magnitude.size()) + " magnitudes for " + std::to_string(W_.rows()) + " outputs");
    column m(static_cast<index_t>(magnitude.size()));
    for (index_t i = 0; i < m.size(); ++i) m(i) = std::abs(widen<double>(magnitude[static_cast<std::size_t>(i)]));
    all_.push_back({error_part_of<Acc>(l), std::move(m)});
    if (all_.back().part.s == 0) all_.back().part.A.resize(0, W_.cols()), all_.back().part.B.resize(W_.rows(), 0);
  }

  /// f = m / n, and the bound of its relative error, for a block of rows.
  void norms(const error_part& p, const column& magnitude, index_t first, index_t rows, column& f, column& more) const {
    using block = Eigen::Matrix<wide, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    block sum(rows, W_.cols());
    W_.read(first, sum);
    Eigen::MatrixXd off = Eigen::MatrixXd::Zero(rows, W_.cols());
    if (p.rank() != 0) {
      sum += static_cast<wide>(p.s) * (p.B.middleRows(first, rows).template cast<wide>() * p.A.template cast<wide>());
      const auto unit = unit_of<Acc>();
      off = (gamma(p.rank() + 2, unit.u) * std::abs(p.s)) * (p.B.middleRows(first, rows).cwiseAbs() * p.A.cwiseAbs());
      off.rowwise() += (unit.eta * (p.A.cwiseAbs().colwise().sum().array() + static_cast<double>(p.rank() + 1))).matrix();
    }
    const double own = gamma(W_.cols() + 5, 0x1p-53);
    for (index_t i = 0; i < rows; ++i) {
      const wide norm = sum.row(i).stableNorm();
      const auto e = static_cast<double>(static_cast<wide>(off.row(i).stableNorm()) / norm);
      const double t = e + (1 + e) * own;
      f(first + i) = static_cast<double>(static_cast<wide>(magnitude(first + i)) / norm);
      more(first + i) = t < 1 ? t / (1 - t) : std::numeric_limits<double>::infinity();
    }
  }

  const Rows& W_;
  std::vector<collected> all_;
};

/// weight_error with factors for each row: e = a |W| + sum c_p |s B_p| |A_p| + row + h col, of a
/// value of the size b |W| + sum g_p |s B_p| |A_p|.
class dora_error {
 public:
  using block = weight_error::block;
  using column = Eigen::VectorXd;
  struct piece {
    Eigen::MatrixXd A, B;  ///< |A|, |s| |B|
    column error, size;    ///< c_p, g_p
  };

  column of_W, size_of_W, by_row, of_col;
  Eigen::RowVectorXd by_col;
  std::vector<piece> pieces;
  rounding_unit stored;
  bool nothing = false;  ///< every bit stays

  template <class Block>
  void of_rows(index_t first, Block& size, Block& error) const {
    const index_t rows = size.rows();
    error = of_W.segment(first, rows).asDiagonal() * size;
    size = (size_of_W.segment(first, rows).asDiagonal() * size).eval();
    if (nothing) return error.setZero(), void();
    for (const piece& p : pieces) {
      const Block d = p.B.middleRows(first, rows) * p.A;
      error += p.error.segment(first, rows).asDiagonal() * d;
      size += p.size.segment(first, rows).asDiagonal() * d;
    }
    error.colwise() += by_row.segment(first, rows);
    error += of_col.segment(first, rows) * by_col;
    error = or_infinite((error.array() + stored.u * (size + error).array() + stored.eta / 2).matrix().eval());
  }
  double of_element(index_t row, index_t col, double W) const {
    if (nothing) return 0;
    double e = of_W(row) * std::abs(W) + by_row(row) + of_col(row) * by_col(col), size = size_of_W(row) * std::abs(W);
    for (const piece& p : pieces) {
      double d = 0;
      for (index_t k = 0; k < p.A.rows(); ++k) d += p.B(row, k) * p.A(k, col);
      e += p.error(row) * d;
      size += p.size(row) * d;
    }
    const double bound = e + stored.u * (size + e) + stored.eta / 2;
    return is_finite(bound) ? bound : std::numeric_limits<double>::infinity();
  }
};

/// The base of all: the deltas of a dora_bound, for a count of roundings, and the underflow eta (R
/// + 2 + S_A).
template <class Acc>
dora_error dora_deltas(const dora_bound<Acc>& sure, index_t roundings, rounding_unit stored) {
  const auto unit = dora_bound<Acc>::unit();
  dora_error e;
  e.stored = stored;
  e.nothing = sure.changes_nothing();
  e.by_row = Eigen::VectorXd::Constant(sure.out_features(), unit.eta * static_cast<double>(sure.rank() + 2));
  e.of_col = Eigen::VectorXd::Ones(sure.out_features());
  e.by_col = Eigen::RowVectorXd::Zero(sure.in_features());
  for (const auto& p : sure.pieces()) {
    e.pieces.push_back({p.part.A.cwiseAbs(), std::abs(p.part.s) * p.part.B.cwiseAbs(),
                        dora_bound<Acc>::share(p.g, p.P, sure.rank() + roundings), p.g});
    if (p.part.rank() != 0) e.by_col += unit.eta * p.part.A.cwiseAbs().colwise().sum();
  }
  return e;
}

template <class Rows, class Acc>
void check_dora_weight(const char* operation, const Rows& W, const dora_bound<Acc>& sure) {
  dora_detail::check_stored(operation, W.rows(), W.cols(), sure, false);
}

/// Of y before it is stored, and its size: base is |g_0| times it with its error, for which there
/// is |x| of the deltas.
template <class Acc>
void add_dora_deltas(const dora_bound<Acc>& sure, const Eigen::MatrixXd& ax, Eigen::MatrixXd& e, Eigen::MatrixXd& size) {
  const auto unit = dora_bound<Acc>::unit();
  const index_t n = sure.in_features(), R = sure.rank();
  Eigen::VectorXd sums = Eigen::VectorXd::Ones(sure.out_features()) + sure.base_scale();
  for (const auto& p : sure.pieces()) {
    if (p.part.rank() == 0) continue;
    const Eigen::MatrixXd U = p.part.A.cwiseAbs() * ax, B = std::abs(p.part.s) * p.part.B.cwiseAbs(), through = B * U;
    e += dora_bound<Acc>::share(p.g, p.P, n + R + 4).asDiagonal() * through;
    size += p.g.asDiagonal() * through;
    sums += p.g.cwiseProduct(B.rowwise().sum());
    e.rowwise() += unit.eta * U.colwise().sum();
  }
  e.colwise() += unit.eta * static_cast<double>(n + R + 3) * sums;
}

}  // namespace detail

/// The norms of attach(W, l...) with their errors; see the top of this file. W is not looked at any
/// more.
template <class M, class... L>
  requires matrix_like<M> && (attachable<L> && ...)
auto attach_bound(const M& W, const L&... l) {
  const detail::default_environment environment;
  const auto weight = detail::rows_of_weight(W);
  using rows = std::remove_const_t<decltype(weight)>;
  detail::dora_bounder<dora_detail::acc_t<typename rows::value_type, L...>, rows> result(weight);
  (result.add(l), ...);
  return std::move(result).finish();
}

/// Of merge(W, what was attached): the error of W' = diag(g_0) W + sum of diag(g_k) D_k.
template <class M, class Acc>
  requires matrix_like<M>
auto merge_bound(const M& W, const dora_bound<Acc>& sure) {
  const detail::default_environment environment;
  const auto weight = detail::rows_of_weight(W);
  using rows = std::remove_const_t<decltype(weight)>;
  detail::check_dora_weight("merge_bound", weight, sure);
  auto e = detail::dora_deltas(sure, 3, detail::unit_of_stored<typename rows::value_type, Acc>());
  e.of_W = sure.share(3).array() + dora_bound<Acc>::unit().eta;
  e.size_of_W = sure.base_scale();
  return weight_bound<Acc, rows, detail::dora_error>(weight, std::move(e), 1);
}

/// Of unmerge(W, what was attached), W the merged weight: the error of (W - sum of diag(g_k) D_k) /
/// diag(g_0), for |quotient| <= (|W| + sum |g_k| d_k) / |g_0|. unmerge(merge(W)) is within both
/// bounds.
template <class M, class Acc>
  requires matrix_like<M>
auto unmerge_bound(const M& W, const dora_bound<Acc>& sure) {
  const detail::default_environment environment;
  const auto weight = detail::rows_of_weight(W);
  using rows = std::remove_const_t<decltype(weight)>;
  using column = Eigen::ArrayXd;
  detail::check_dora_weight("unmerge_bound", weight, sure);
  const auto unit = dora_bound<Acc>::unit();
  auto e = detail::dora_deltas(sure, 2, detail::unit_of_stored<typename rows::value_type, Acc>());
  const column inverse = sure.base_scale().array().inverse(), P = sure.base_error().array();
  const column rest = ((P + 2 * unit.u) < 1)
                          .select((1 + 4 * unit.u) / (1 - P - 2 * unit.u),
                                  column::Constant(P.size(), std::numeric_limits<double>::infinity()));
  e.of_W = (P + 3 * unit.u) * inverse * rest;
  e.size_of_W = inverse;
  e.by_row = e.by_row.array() * inverse * rest + unit.eta;
  e.of_col = inverse * rest;
  for (auto& p : e.pieces) {
    p.error = ((P + 3 * unit.u) * p.size.array() + p.error.array()) * inverse * rest;
    p.size = p.size.array() * inverse;
  }
  return weight_bound<Acc, rows, detail::dora_error>(weight, std::move(e), -1);
}

/// Of forward(W, x, y, what was attached). W is out x in, or with_bias(it, b). Of y the shape and
/// the scalar count.
template <class M, class X, class Y, class Acc>
  requires(matrix_like<M> || detail::is_biased<M>) && activations<X> && activations<Y>
Eigen::MatrixXd forward_bound(const M& W, const X& x, const Y& y, const dora_bound<Acc>& sure) {
  const detail::default_environment environment;
  decltype(auto) input = detail::in_memory(x);
  const auto from = detail::input_view(input);
  const auto to = detail::input_view(y);
  const auto weight = detail::rows_of_weight(detail::weight_of_base(W));
  using value = typename std::remove_const_t<decltype(weight)>::value_type;
  using acc = std::conditional_t<detail::bias_is_double<M>, double, accumulator_t<value, X, Y, Acc>>;
  detail::check_dora_weight("forward_bound", weight, sure);
  dora_detail::check_tokens("forward_bound", from, to, sure);
  const Eigen::MatrixXd bias = detail::bias_of_base("forward_bound", sure.out_features(), W);
  const Eigen::MatrixXd ax = detail::widened(from).cwiseAbs();
  const auto unit = dora_bound<Acc>::unit();
  const index_t out = sure.out_features(), n = sure.in_features();
  Eigen::MatrixXd through(out, ax.cols());
  Eigen::VectorXd row_sums(out);
  detail::each_block(out, n, [&](index_t first, index_t rows) {
    detail::weight_error::block block(rows, n);
    weight.read(first, block);
    through.middleRows(first, rows) = block.cwiseAbs() * ax;
    row_sums.segment(first, rows) = block.cwiseAbs().rowwise().sum();
  });
  Eigen::MatrixXd e = sure.share(n + 4).asDiagonal() * through, size = sure.base_scale().asDiagonal() * through;
  detail::add_dora_deltas(sure, ax, e, size);
  if constexpr (smallest_in_product<acc, value, detail::element_t<X>>() != 0) {
    // What dot products take for zero in W x, times g_0.
    const double flushed = smallest_in_product<acc, value, detail::element_t<X>>();
    const Eigen::VectorXd most = sure.base_scale() + sure.share(n + 4);
    const Eigen::RowVectorXd of_x = ax.colwise().sum().array() + 2 * static_cast<double>(n);
    e += flushed * (most * of_x);
    e.colwise() += flushed * most.cwiseProduct(row_sums);
  }
  if (bias.size() != 0) {
    e.colwise() += unit.u * bias.col(0).cwiseAbs();
    size.colwise() += bias.col(0).cwiseAbs();
  }
  return detail::stored_error(e, size, detail::unit_of_stored<detail::element_t<Y>, acc>());
}

/// Of apply(x, y, what was attached): y is its content before the call.
template <class X, class Y, class Acc>
  requires activations<X> && activations<Y>
Eigen::MatrixXd apply_bound(const X& x, const Y& y, const dora_bound<Acc>& sure) {
  const detail::default_environment environment;
  decltype(auto) input = detail::in_memory(x);
  const auto from = detail::input_view(input);
  const auto to = detail::input_view(y);
  dora_detail::check_tokens("apply_bound", from, to, sure);
  if (sure.changes_nothing()) return Eigen::MatrixXd::Zero(to.rows(), to.cols());
  const Eigen::MatrixXd before = detail::widened(to).cwiseAbs();
  Eigen::MatrixXd e = sure.share(3).asDiagonal() * before, size = sure.base_scale().asDiagonal() * before;
  detail::add_dora_deltas(sure, detail::widened(from).cwiseAbs(), e, size);
  return detail::stored_error(e, size, detail::unit_of_stored<detail::element_t<Y>, accumulator_t<Y, Acc>>());
}

namespace detail {

/// Of c (g_0 base + sum of g_k D_k), where |base| is out x columns and U(piece) the |U| that its B
/// multiplies; one more term for each rounding that c adds.
template <class Acc, class Of>
Eigen::MatrixXd dora_through(const dora_bound<Acc>& sure, const Eigen::MatrixXd& base, index_t more, double c, double last,
                             rounding_unit output, const Of& U_of) {
  const auto unit = dora_bound<Acc>::unit();
  Eigen::MatrixXd e = sure.share(3 + more).asDiagonal() * base, size = sure.base_scale().asDiagonal() * base;
  e += unit.eta * base;
  for (const auto& p : sure.pieces()) {
    if (p.part.rank() == 0) continue;
    const Eigen::MatrixXd U = U_of(p), through = std::abs(p.part.s) * (p.part.B.cwiseAbs() * U);
    e += dora_bound<Acc>::share(p.g, p.P, sure.rank() + 3 + more).asDiagonal() * through;
    size += p.g.asDiagonal() * through;
    e.rowwise() += unit.eta * U.colwise().sum();
  }
  e.array() += unit.eta * static_cast<double>(sure.rank() + 2);
  return stored_error((c * e.array() + last).matrix(), c * size, output);
}

}  // namespace detail

/// Of rows(W, ids, y, what was attached to W.transpose()); W is vocabulary x features, or
/// with_scale(it, c).
template <class M, class R, class Y, class Acc>
  requires(matrix_like<M> || rows_detail::is_scaled_embedding<M>) && token_range<R> && activations<Y>
Eigen::MatrixXd rows_bound(const M& W, const R& ids, const Y& y, const dora_bound<Acc>& sure) {
  const detail::default_environment environment;
  const auto run = [&](const auto& weight, double c) -> Eigen::MatrixXd {
    using value = typename std::remove_cvref_t<decltype(weight)>::value_type;
    using acc = accumulator_t<value, Y, Acc>;
    if (sure.changes_nothing()) return detail::rows_bound_of(weight, c, ids, y);
    const auto to = detail::input_view(y);
    const auto tokens = rows_detail::checked_ids("rows_bound", ids, weight.rows());
    rows_detail::check_y("rows_bound", to.rows(), to.cols(), weight.cols(), tokens.size());
    dora_detail::check_stored("rows_bound", weight.rows(), weight.cols(), sure, true);
    Eigen::MatrixXd base(to.rows(), to.cols());
    for (index_t t = 0; t < to.cols(); ++t)
      for (index_t i = 0; i < to.rows(); ++i)
        base(i, t) = std::abs(detail::widen<double>(weight(tokens[static_cast<std::size_t>(t)], i)));
    return detail::dora_through(sure, base, 2, std::abs(c), dora_bound<Acc>::unit().eta,
                                detail::unit_of_stored<detail::element_t<Y>, acc>(), [&](const auto& p) {
                                  Eigen::MatrixXd U(p.part.rank(), to.cols());
                                  for (index_t t = 0; t < to.cols(); ++t)
                                    U.col(t) = p.part.A.col(tokens[static_cast<std::size_t>(t)]).cwiseAbs();
                                  return U;
                                });
  };
  if constexpr (rows_detail::is_scaled_embedding<M>)
    return run(W.weight, W.scale);
  else
    return run(as_matrix(W), 1.0);
}

/// Of apply_through(down, y, what was attached): y is its content before the call. down gets lora_A
/// in attach's accumulator.
template <class Down, class Y, class Acc>
  requires activations<Y>
Eigen::MatrixXd apply_through_bound(const Down& down, const Y& y, const dora_bound<Acc>& sure) {
  const auto to = detail::input_view(y);
  if (to.rows() != sure.out_features())
    detail::raise_shape("apply_through_bound", "y has " + std::to_string(to.rows()) + " rows and the layer " +
                                                   std::to_string(sure.out_features()) + " outputs");
  if (sure.changes_nothing()) return Eigen::MatrixXd::Zero(to.rows(), to.cols());
  return detail::dora_through(sure, detail::widened(to).cwiseAbs(), 0, 1, 0,
                              detail::unit_of_stored<detail::element_t<Y>, accumulator_t<Y, Acc>>(), [&](const auto& p) {
                                const detail::row_major_matrix<Acc> lora_A = p.part.A.template cast<Acc>();
                                const auto& held = down(as_matrix(lora_A));
                                const auto U = as_matrix(held);
                                if (U.rows() != p.part.rank() || U.cols() != to.cols())
                                  detail::raise_shape("apply_through_bound",
                                                      "down(lora_A) is " + detail::shape_text(U.rows(), U.cols()) +
                                                          ", not rank x positions, which is " +
                                                          detail::shape_text(p.part.rank(), to.cols()));
                                return Eigen::MatrixXd(detail::widened(U).cwiseAbs());
                              });
}

}  // namespace lora::inline LORA_DETAIL_ABI
