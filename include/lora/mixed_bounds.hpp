// SPDX-License-Identifier: Apache-2.0
//
// How far the results of a mixed form (mixed.hpp) may be from exact arithmetic; see bounds.hpp.
//
//   const auto form = lora::mixed(W, style);                // for the verbs
//   const auto sure = lora::mixed_bound(W, style);          // for their bounds: the same arguments
//   merge_bound(W, sure)                 of merge(W, form), merge(W, style), merge(W, b, style)
//   unmerge_bound(W, sure)               of unmerge(W, form); W as it is before, the merged weight
//   forward_bound(W, x, y, sure)         of forward(W, x, y, form), also with a bias
//   apply_bound(x, y, sure)              of apply(x, y, form); y as it is before
//   embed_bound(W, ids, y, sure)         of embed(W, ids, y, form), also scaled_embedding
//   apply_through_bound(down, y, sure)   of apply_through(down, y, form), beside the error of what
//                                        down returns
//
//   kinds    those whose steps are low-rank, gain and shift steps: plain adapters, DoRA, entries of
//            PEFT files, IA3 of outputs, ranges of them, and slices of these (in_rows.hpp).
//            any_kind where it holds DoRA or IA3, or has no gain. value_error for an input map, a
//            delta step, steps of some rows whose slice is not seen (a module_adapter of a fused
//            weight), and gains of a kind that is not seen.
//   formula  docs/numerics.md, "DoRA and other gains". The norms of magnitudes are found again, and
//            P, the relative error of each product g of gains. Where W + D cancels, P is large, and
//            so are all bounds of that output; where nothing can be said they are infinite. A gain
//            of a kind of your own counts as exact: its own error comes on top.
//   result   merge_bound and unmerge_bound: a weight_bound, out x in, also of a W stored in x out.
//            The others: Eigen::MatrixXd of y's shape.
//   W        as mixed and the verb take it.
//   cost     mixed_bound: steps as mixed, and 4 r out in FLOPs for each magnitude, in blocks of
//            rows; copies the factors as doubles. The others as those of bounds.hpp and
//            embed_bounds.hpp.
//   throws   as mixed; shape_error
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "lora/bounds.hpp"
#include "lora/detail/eigen.hpp"
#include "lora/dora.hpp"
#include "lora/embed_bounds.hpp"
#include "lora/in_rows.hpp"
#include "lora/kinds/ia3.hpp"
#include "lora/mixed.hpp"

LORA_DETAIL_QUIET_BEGIN
namespace lora::inline LORA_DETAIL_ABI {
namespace detail {

/// A factor of each output: its magnitude, and how far the computed one may be off before it is
/// rounded to the accumulator. off = P size.
struct row_factor {
  Eigen::VectorXd size, off;

  static row_factor none(index_t out) {
    return {Eigen::VectorXd::Ones(out), Eigen::VectorXd::Zero(out)};
  }
  /// For a weight of `out` outputs, of which these are some; the others have no factor.
  row_factor placed(const row_range& rows, index_t out) const {
    auto result = none(out);
    result.size.segment(rows.first, rows.count) = size;
    result.off.segment(rows.first, rows.count) = off;
    return result;
  }
  // Of products of 1 + P the small digits would be lost.
  row_factor& operator*=(const row_factor& o) {
    off = (off.array() * (o.size + o.off).array() + size.array() * o.off.array()).eval();
    size = size.cwiseProduct(o.size).eval();
    return *this;
  }
  row_factor inverse() const {
    row_factor result{size.cwiseInverse(), off};
    for (index_t i = 0; i < size.size(); ++i)
      result.off(i) = off(i) < size(i) ? off(i) / (size(i) * (size(i) - off(i)))
                                       : std::numeric_limits<double>::infinity();
    return result;
  }
  Eigen::VectorXd reach() const { return size + off; }
  /// The error of what it multiplies, with k roundings: (P + (1 + P) gamma_k) size.
  Eigen::VectorXd share(index_t k, double u) const { return off + gamma(k, u) * reach(); }
};

}  // namespace detail

/// What the bounds of a mixed form need: its low-rank steps, gains and shifts in order, with the
/// errors of the gains. Owns them; immutable. Right for the W that mixed saw. Acc is the form's
/// accumulator.
template <class Acc>
class mixed_form_bound {
 public:
  /// A low-rank step that adds something, behind `at` gains.
  struct piece {
    low_rank_step step;
    detail::error_part part;
    index_t at;
  };
  struct gain {
    detail::row_factor factor;
    bool scales_bias;
  };
  /// |c|, behind `at` gains.
  struct shift {
    Eigen::VectorXd size;
    index_t at;
  };

  mixed_form_bound(index_t out_features, index_t in_features)
      : out_(out_features), in_(in_features) {}

  index_t out_features() const { return out_; }
  index_t in_features() const { return in_; }
  index_t rank() const {
    index_t sum = 0;
    for (const piece& p : pieces_) sum += p.part.rank();
    return sum;
  }
  bool stored_in_out() const { return stored_in_out_; }
  const std::vector<piece>& pieces() const { return pieces_; }
  const std::vector<gain>& gains() const { return gains_; }
  const std::vector<shift>& shifts() const { return shifts_; }
  index_t gains_count() const { return static_cast<index_t>(gains_.size()); }
  bool changes_weight() const { return !pieces_.empty() || !gains_.empty(); }
  bool changes_nothing() const { return !changes_weight() && shifts_.empty(); }

  /// The product of the gains from number `at` on.
  detail::row_factor after(index_t at) const {
    auto result = detail::row_factor::none(out_);
    for (index_t k = at; k < gains_count(); ++k)
      result *= gains_[static_cast<std::size_t>(k)].factor;
    return result;
  }
  /// 1 / (the product of the gains before number `at`).
  detail::row_factor undone_before(index_t at) const {
    auto result = detail::row_factor::none(out_);
    for (index_t k = 0; k < at; ++k) result *= gains_[static_cast<std::size_t>(k)].factor.inverse();
    return result;
  }
  /// The product of those of the gains from number `at` on that scale a bias, and their number.
  std::pair<detail::row_factor, index_t> of_bias_after(index_t at) const {
    std::pair<detail::row_factor, index_t> result{detail::row_factor::none(out_), 0};
    for (index_t k = at; k < gains_count(); ++k)
      if (const gain& one = gains_[static_cast<std::size_t>(k)]; one.scales_bias) {
        result.first *= one.factor;
        ++result.second;
      }
    return result;
  }
  /// Ranks between the gains: element k is what lies behind k of them.
  std::vector<index_t> ranks() const {
    std::vector<index_t> result(gains_.size() + 1, 0);
    for (const piece& p : pieces_) result[static_cast<std::size_t>(p.at)] += p.part.rank();
    return result;
  }

  static detail::rounding_unit unit() { return detail::unit_of<Acc>(); }

  // For mixed_bound.
  void add(piece p) { pieces_.push_back(std::move(p)); }
  void add(gain g) { gains_.push_back(std::move(g)); }
  void add(shift s) { shifts_.push_back(std::move(s)); }
  void set_stored_in_out() { stored_in_out_ = true; }

 private:
  index_t out_, in_;
  bool stored_in_out_ = false;
  std::vector<piece> pieces_;
  std::vector<gain> gains_;
  std::vector<shift> shifts_;
};

namespace detail {

template <class K>
inline constexpr bool is_ia3 = false;
template <class T>
inline constexpr bool is_ia3<ia3_adapter<T>> = true;

/// The |magnitudes| of a DoRA adapter or an entry, scaled or not; none: empty.
template <class K>
std::vector<double> magnitude_of(const K& k) {
  std::vector<double> result;
  if constexpr (is_scaled_kind<K>)
    return magnitude_of(k.of());
  else if constexpr (dora_like<K> || entry_like<K>)
    for (const auto& m : k.magnitude()) result.push_back(std::abs(widen<double>(m)));
  return result;
}

/// The gains of (IA)^3 at a strength w, with the error of 1 + w (l - 1) in double.
template <class Acc, class T>
row_factor factor_of_ia3(const ia3_adapter<T>& k, double w) {
  auto result = row_factor::none(static_cast<index_t>(k.l().size()));
  for (index_t i = 0; i < result.size.size(); ++i) {
    const auto l = widen<double>(k.l()[static_cast<std::size_t>(i)]);
    const long double exact =
        w == 1 ? static_cast<long double>(l)
               : 1 + static_cast<long double>(w) * (static_cast<long double>(l) - 1);
    result.size(i) = std::abs(static_cast<double>(exact));
    if (w != 1)
      result.off(i) = 0x1p-53 * (2 * std::abs(w * (l - 1)) + result.size(i)) + unit_of<Acc>().eta;
  }
  return result;
}

/// Whether a kind is known at run time alone.
template <class K>
inline constexpr bool is_held = std::is_same_v<K, any_kind> || requires(const K& k) {
  requires std::is_same_v<bare<decltype(k.expert(index_t()))>, any_kind>;
};
template <class K>
  requires is_scaled_kind<K>
inline constexpr bool is_held<K> = is_held<bare<decltype(std::declval<const K&>().of())>>;

template <class K>
inline constexpr bool is_row_slice = false;
template <class K>
inline constexpr bool is_row_slice<row_slice<K>> = true;

/// A block of rows of what mixed_bounder reads.
template <class Rows>
struct slice_of_rows {
  const Rows& weight;
  index_t first_row;

  template <class Block>
  void read(index_t first, Block& block) const {
    weight.read(first_row + first, block);
  }
};

/// Collects the steps of adapters in order. Rows reads W; null where there is none.
template <class Acc, class Rows>
class mixed_bounder {
 public:
  mixed_bounder(const lora::weight_rows<Acc>* base, const Rows* W, index_t out, index_t in,
                double strength = 1)
      : W_(W), request_{"mixed_bound", strength, base, step_use::prepare}, result_(out, in) {}

  template <class... L>
  mixed_form_bound<Acc> of(const L&... l) && {
    [[maybe_unused]] const auto add = [this](const auto& one) { this->add_one(one); };
    (visit_kinds(add, l), ...);
    return std::move(result_);
  }

 private:
  // Norms in double, or in long double where the form's own are in double.
  using wide = std::conditional_t<std::is_same_v<Acc, double>, long double, double>;

  template <class K>
  void add_one(const K& k) {
    if constexpr (is_scaled_kind<K>) {
      if constexpr (is_row_slice<bare<decltype(k.of())>>) return add_slice(k.of(), k.strength());
      if constexpr (std::is_same_v<bare<decltype(k.of())>, any_kind>)
        if (add_held(k.of(), k.strength())) return;
    }
    if constexpr (std::is_same_v<K, any_kind>)
      if (add_held(k, 1)) return;
    if constexpr (is_row_slice<K>)
      add_slice(k, 1);
    else
      add_steps(k);
  }

  /// What an any_kind holds, if its gains have an error of their own.
  bool add_held(const any_kind& k, double strength) {
    const auto held = [&]<class K>(std::type_identity<K>) {
      const K* const one = k.get_if<K>();
      if (one != nullptr) add_one(scaled(strength, *one));
      return one != nullptr;
    };
    const auto of_format = [&]<class T>(std::type_identity<T>) {
      return held(std::type_identity<dora_adapter<T>>()) ||
             held(std::type_identity<ia3_adapter<T>>());
    };
    return of_format(std::type_identity<float>()) || of_format(std::type_identity<double>()) ||
           of_format(std::type_identity<float16>()) || of_format(std::type_identity<bfloat16>());
  }

  /// The bound of the slice's rows as a weight of their own, in their place.
  template <class K>
  void add_slice(const row_slice<K>& k, double strength) {
    check_kind(request_.operation, k, result_.out_features(), result_.in_features());
    const index_t in = result_.in_features();
    const row_range rows = k.rows();
    const auto of_block = [&](const auto* W, const lora::weight_rows<Acc>* base) {
      using rows_of_W = bare<decltype(*W)>;
      mixed_bounder<Acc, rows_of_W> block(base, W, rows.count, in,
                                          request_.strength * strength * k.strength());
      if constexpr (adapter_kind<K> && !low_rank<K>)
        if (const K* const kind = k.of().template get_if<K>(); kind != nullptr)
          return std::move(block).of(*kind);
      return std::move(block).of(k.of());
    };
    const auto place = [&](const mixed_form_bound<Acc>& some) {
      const index_t before = result_.gains_count(), out = result_.out_features();
      for (auto piece : some.pieces()) {
        Eigen::MatrixXd B = Eigen::MatrixXd::Zero(out, piece.part.B.cols());
        B.middleRows(rows.first, rows.count) = piece.part.B;
        piece.part.B = std::move(B);
        piece.at += before;
        result_.add(std::move(piece));
      }
      for (const auto& shift : some.shifts()) {
        Eigen::VectorXd size = Eigen::VectorXd::Zero(out);
        size.segment(rows.first, rows.count) = shift.size;
        result_.add({std::move(size), shift.at + before});
      }
      for (const auto& gain : some.gains())
        result_.add({gain.factor.placed(rows, out), gain.scales_bias});
    };
    if (request_.weight == nullptr) return place(of_block(W_, nullptr));
    const block_reader<Acc> base(*request_.weight, rows);
    const slice_of_rows<Rows> W{*W_, rows.first};
    place(of_block(&W, &base));
  }

  template <class K>
  void add_steps(const K& k) {
    const auto steps = steps_of(request_, result_.out_features(), result_.in_features(), k);
    const std::vector<double> magnitude = magnitude_of(k);
    error_part low = nothing();
    for (const step<Acc>& one : steps) {
      if (!std::visit([](const auto& s) { return s.rows.all(); }, one))
        raise_value(
            "mixed_bound",
            "an adapter changes some rows of the weight: pass in_rows(first, rows, adapter)");
      if (const auto* l = std::get_if<low_rank_step>(&one)) {
        low = part_of(*l);
        if (low.rank() != 0) result_.add({*l, low, result_.gains_count()});
      } else if (const auto* g = std::get_if<gain_step<Acc>>(&one)) {
        result_.add({factor_of(k, magnitude, low, *g), g->scales_bias});
      } else if (const auto* s = std::get_if<shift_step>(&one)) {
        Eigen::VectorXd size(result_.out_features());
        for (index_t i = 0; i < size.size(); ++i)
          size(i) = std::abs(s->shift[static_cast<std::size_t>(i)]);
        result_.add({std::move(size), result_.gains_count()});
      } else {
        raise_value("mixed_bound",
                    std::string(std::holds_alternative<input_step<Acc>>(one)
                                    ? "an adapter changes the inputs (an input map)"
                                    : "an adapter has a delta that is no low-rank product") +
                        ": there is no bound for that yet");
      }
    }
  }

  error_part nothing() const {
    error_part result{};
    result.A.resize(0, result_.in_features());
    result.B.resize(result_.out_features(), 0);
    return result;
  }
  error_part part_of(const low_rank_step& l) const {
    if (is_zero(l.strength * l.factors.scaling())) return nothing();
    return l.factors.visit(
        [&]<class V>(const V& v) { return error_part_of<Acc>(scaled_adapter<V>(l.strength, v)); });
  }

  template <class K>
  row_factor factor_of(const K& k, const std::vector<double>& magnitude, const error_part& low,
                       const gain_step<Acc>& g) const {
    if constexpr (is_scaled_kind<K>) {
      if constexpr (is_ia3<bare<decltype(k.of())>>)
        return factor_of_ia3<Acc>(k.of(), request_.strength * k.strength());
    } else if constexpr (is_ia3<K>) {
      return factor_of_ia3<Acc>(k, request_.strength);
    }
    if constexpr (is_held<K>) {
      raise_value("mixed_bound",
                  "the gains of an adapter have an error that its kind would tell, and the kind is "
                  "not seen: pass the adapter itself");
    }
    auto result = row_factor::none(result_.out_features());
    if (!magnitude.empty())
      each_block(result_.out_features(), result_.in_features(),
                 [&](index_t first, index_t rows) { norms(low, magnitude, first, rows, result); });
    else
      for (index_t i = 0; i < result.size.size(); ++i)
        result.size(i) = std::abs(static_cast<double>(g.gain[static_cast<std::size_t>(i)]));
    return result;
  }

  /// m / n, and its error, for a block of rows.
  void norms(const error_part& p, const std::vector<double>& magnitude, index_t first, index_t rows,
             row_factor& to) const {
    using block = Eigen::Matrix<wide, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    const index_t in = result_.in_features();
    const auto unit = unit_of<Acc>();
    block sum(rows, in);
    W_->read(first, sum);
    Eigen::MatrixXd off = Eigen::MatrixXd::Zero(rows, in);
    if (p.rank() != 0) {
      const Eigen::MatrixXd A = p.A.cwiseAbs(), B = p.B.middleRows(first, rows).cwiseAbs();
      sum += static_cast<wide>(p.s) * multiplied(p.B.middleRows(first, rows).template cast<wide>(),
                                                 p.A.template cast<wide>());
      off = (gamma(p.rank() + 2, unit.u) * std::abs(p.s)) * multiplied(B, A);
      const double each = p.flushed * std::abs(p.s), ranks = static_cast<double>(p.rank());
      off.rowwise() += ((unit.eta + each) * A.colwise().sum().array() + unit.eta * (ranks + 1) +
                        each * 2 * ranks)
                           .matrix();
      off.colwise() += each * B.rowwise().sum();
    }
    const double own = gamma(in + 5, 0x1p-53);
    for (index_t i = 0; i < rows; ++i) {
      const wide norm = sum.row(i).stableNorm();
      const auto e = static_cast<double>(static_cast<wide>(off.row(i).stableNorm()) / norm);
      const double t = e + (1 + e) * own;
      const auto f = static_cast<double>(
          static_cast<wide>(magnitude[static_cast<std::size_t>(first + i)]) / norm);
      to.size(first + i) = f;
      // The quotient may be subnormal in the accumulator.
      to.off(first + i) =
          t < 1 ? f * (t / (1 - t)) + unit.eta : std::numeric_limits<double>::infinity();
    }
  }

  const Rows* W_;
  step_request<Acc> request_;
  mixed_form_bound<Acc> result_;
};

/// The rows of a weight that may be stored the other way round.
template <class Rows>
class oriented_rows {
 public:
  using value_type = typename Rows::value_type;

  oriented_rows(Rows stored, bool in_out) : stored_(std::move(stored)), in_out_(in_out) {}
  index_t rows() const { return in_out_ ? stored_.cols() : stored_.rows(); }
  index_t cols() const { return in_out_ ? stored_.rows() : stored_.cols(); }
  double operator()(index_t i, index_t j) const { return in_out_ ? stored_(j, i) : stored_(i, j); }
  template <class Block>
  void read(index_t first, Block& block) const {
    for (index_t i = 0; i < block.rows(); ++i)
      for (index_t j = 0; j < block.cols(); ++j)
        block(i, j) = static_cast<typename Block::Scalar>((*this)(first + i, j));
  }

 private:
  Rows stored_;
  bool in_out_;
};
/// W as the form takes it, out x in.
template <class M, class Acc>
auto rows_of_form(const char* operation, const M& W, const mixed_form_bound<Acc>& sure) {
  static_assert(std::is_same_v<Acc, double> || !holds_double<M>,
                "lora: W holds double and the form float: use mixed<double>(W, l...) and "
                "mixed_bound<double>(W, l...)");
  const auto stored = rows_of_weight(W);
  const oriented_rows<std::remove_const_t<decltype(stored)>> weight(
      stored, sure.stored_in_out() && !is_packed_weight<M>);
  if (weight.rows() != sure.out_features() || weight.cols() != sure.in_features())
    raise_shape(operation, "W is " + shape_text(weight.rows(), weight.cols()) +
                               " (out_features x in_features) and the form is for " +
                               shape_text(sure.out_features(), sure.in_features()));
  return weight;
}

/// The error of a merge with gains: of an element e = a |W| + sum of (c |s B| |A| + h col) + row,
/// of a value of the size b |W| + sum of g |s B| |A|; a, b, c, g, h and row for each output.
class gained_error {
 public:
  using block = weight_error::block;
  using column = Eigen::VectorXd;
  struct piece {
    Eigen::MatrixXd A, B;       ///< |A|, |s| |B|
    column error, size, reach;  ///< c, g, h
    Eigen::RowVectorXd by_col;
  };

  column of_W, size_of_W, by_row;
  std::vector<piece> pieces;
  rounding_unit stored;
  bool nothing = false;  ///< every bit stays

  template <class Block>
  void of_rows(index_t first, Block& size, Block& error) const {
    const index_t rows = size.rows();
    if (nothing) return error.setZero(rows, size.cols()), void();
    error = of_W.segment(first, rows).asDiagonal() * size;
    size = (size_of_W.segment(first, rows).asDiagonal() * size).eval();
    for (const piece& p : pieces) {
      const Block d = multiplied(p.B.middleRows(first, rows), p.A);
      error += p.error.segment(first, rows).asDiagonal() * d;
      error += p.reach.segment(first, rows) * p.by_col;
      size += p.size.segment(first, rows).asDiagonal() * d;
    }
    error.colwise() += by_row.segment(first, rows);
    error = or_infinite(
        (error.array() + stored.u * (size + error).array() + stored.eta / 2).matrix().eval());
  }
  double of_element(index_t row, index_t col, double W) const {
    if (nothing) return 0;
    double e = of_W(row) * std::abs(W) + by_row(row), size = size_of_W(row) * std::abs(W);
    for (const piece& p : pieces) {
      double d = 0;
      for (index_t k = 0; k < p.A.rows(); ++k) d += p.B(row, k) * p.A(k, col);
      e += p.error(row) * d + p.reach(row) * p.by_col(col);
      size += p.size(row) * d;
    }
    const double bound = e + stored.u * (size + e) + stored.eta / 2;
    return is_finite(bound) ? bound : std::numeric_limits<double>::infinity();
  }
};

/// Of a merge, or undone. A term meets the roundings of its own chain, one for each chain that is
/// added to it or after it, and two for each gain: of the gain itself, and of its product.
template <class Acc>
gained_error gained_error_of(const mixed_form_bound<Acc>& sure, bool undone, rounding_unit stored) {
  const auto unit = mixed_form_bound<Acc>::unit();
  const index_t gains = sure.gains_count();
  const std::vector<index_t> ranks = sure.ranks();
  const auto factor = [&](index_t at) { return undone ? sure.undone_before(at) : sure.after(at); };
  const auto chains_behind = [&](index_t at) {  // -1 or gains + 1: all
    index_t count = 0;
    for (index_t k = 0; k <= gains; ++k)
      count += ranks[static_cast<std::size_t>(k)] != 0 && (undone ? k < at : k > at) ? 1 : 0;
    return count;
  };
  gained_error e;
  e.stored = stored;
  e.nothing = !sure.changes_weight();
  const row_factor base = factor(undone ? gains : 0);
  e.of_W = base.share(chains_behind(undone ? gains + 1 : -1) + 2 * gains, unit.u);
  e.size_of_W = base.size;
  e.by_row = Eigen::VectorXd::Zero(sure.out_features());
  // Products and quotients by a gain, and the chains' own steps, may be subnormal.
  for (index_t k = 0; k < gains; ++k) e.by_row += unit.eta * factor(undone ? k : k + 1).reach();
  for (index_t k = 0; k <= gains; ++k)
    if (const index_t own = ranks[static_cast<std::size_t>(k)]; own != 0)
      e.by_row += unit.eta * static_cast<double>(own + 1) * factor(k).reach();
  for (const auto& p : sure.pieces()) {
    const row_factor g = factor(p.at);
    const index_t left = undone ? p.at : gains - p.at;
    const index_t count =
        ranks[static_cast<std::size_t>(p.at)] + 3 + chains_behind(p.at) + 2 * left;
    const Eigen::MatrixXd A = p.part.A.cwiseAbs(), B = p.part.B.cwiseAbs();
    const double each = p.part.flushed * std::abs(p.part.s);
    e.by_row += (each * g.reach().array() *
                 (B.rowwise().sum().array() + 2 * static_cast<double>(p.part.rank())))
                    .matrix();
    e.pieces.push_back({A, std::abs(p.part.s) * B, g.share(count, unit.u), g.size, g.reach(),
                        (unit.eta + each) * A.colwise().sum()});
  }
  return e;
}

template <class M, class Acc>
auto gained_bound(const char* operation, bool undone, const M& W,
                  const mixed_form_bound<Acc>& sure) {
  const default_environment environment;
  const auto weight = rows_of_form(operation, W, sure);
  using rows = std::remove_const_t<decltype(weight)>;
  auto e = gained_error_of(sure, undone, unit_of_stored<typename rows::value_type, Acc>());
  return weight_bound<Acc, rows, gained_error>(weight, std::move(e), undone ? -1 : 1);
}

/// An error and the size of the exact result, of activations before they are stored.
struct error_and_size {
  Eigen::MatrixXd e, size;

  error_and_size(index_t out, index_t tokens) : e(Eigen::MatrixXd::Zero(out, tokens)), size(e) {}
  /// What a factor makes of `through`, with k roundings.
  template <class M>
  void add(const row_factor& g, index_t k, double u, const M& through) {
    e += g.share(k, u).asDiagonal() * through;
    size += g.size.asDiagonal() * through;
  }
  /// The same of a column, for every token.
  void add_column(const row_factor& g, index_t k, double u, const Eigen::VectorXd& c) {
    e.colwise() += g.share(k, u).cwiseProduct(c);
    size.colwise() += g.size.cwiseProduct(c);
  }
};

/// What the low-rank steps add to a chain in which the gains stand; `more` roundings come after it.
/// flushed: numbers below it count as zero in A x.
template <class Acc>
void add_pieces(const mixed_form_bound<Acc>& sure, const Eigen::MatrixXd& ax, index_t more,
                double flushed, error_and_size& to) {
  const auto unit = mixed_form_bound<Acc>::unit();
  const index_t n = sure.in_features(), R = sure.rank(), m = sure.gains_count(),
                out = sure.out_features();
  const double steps = static_cast<double>(n);
  Eigen::VectorXd most = Eigen::VectorXd::Ones(out), sums = Eigen::VectorXd::Zero(out),
                  sum_B = sums, pairs = sums;
  for (index_t k = 0; k <= m; ++k) most = most.cwiseMax(sure.after(k).reach()).eval();
  for (const auto& p : sure.pieces()) {
    const row_factor g = sure.after(p.at);
    const Eigen::MatrixXd A = p.part.A.cwiseAbs(), B = p.part.B.cwiseAbs(),
                          sB = std::abs(p.part.s) * B;
    const Eigen::VectorXd of_ranks = sB.rowwise().sum();
    to.add(g, n + R + 2 + 2 * (m - p.at) + more, unit.u, multiplied(sB, multiplied(A, ax)));
    sums += g.reach().cwiseProduct(of_ranks);
    sum_B += g.reach().cwiseProduct(B.rowwise().sum());
    if (flushed == 0 || !p.part.in_pairs) continue;
    pairs += g.reach().cwiseProduct(of_ranks);
    to.e.colwise() += flushed * g.reach().cwiseProduct(sB * A.rowwise().sum());
  }
  // Results below the normal range: half a step for each operation, times what multiplies it after.
  to.e.colwise() += unit.eta * (static_cast<double>(n + R + m + 2) * (most + sums) + sum_B);
  if (flushed != 0) to.e += flushed * pairs * (ax.colwise().sum().array() + 2 * steps).matrix();
}

/// What the shifts add: their sum is rounded to the accumulator, then two sums round.
template <class Acc>
void add_shifts(const mixed_form_bound<Acc>& sure, error_and_size& to) {
  const auto unit = mixed_form_bound<Acc>::unit();
  const auto count = static_cast<index_t>(sure.shifts().size());
  for (const auto& s : sure.shifts()) {
    const auto [g, gains] = sure.of_bias_after(s.at);
    to.add_column(g, gains + count + 3, unit.u, s.size);
    to.e.colwise() += unit.eta * static_cast<double>(gains + 2) * (g.reach().array() + 1).matrix();
  }
}

/// What the product of all gains makes of the base's own part, where it multiplies it once: of y or
/// of a row. `more` roundings come after it; without gains nothing is multiplied.
template <class Acc>
void add_base(const mixed_form_bound<Acc>& sure, const Eigen::MatrixXd& base, index_t more,
              error_and_size& to) {
  const auto unit = mixed_form_bound<Acc>::unit();
  const index_t m = sure.gains_count();
  to.add(sure.after(0), (m == 0 ? 0 : m + 2) + more, unit.u, base);
  if (m != 0) to.e.array() += unit.eta * (base.array() + 1);
}

/// What low-rank steps add whose gains are folded into lora_B. `more` roundings come after the sum
/// over the ranks; U_of(piece) is what its B multiplies.
template <class Acc, class Of>
void add_folded(const mixed_form_bound<Acc>& sure, index_t more, const Of& U_of,
                error_and_size& to) {
  const auto unit = mixed_form_bound<Acc>::unit();
  for (const auto& p : sure.pieces()) {
    const Eigen::MatrixXd U = U_of(p),
                          through = std::abs(p.part.s) * multiplied(p.part.B.cwiseAbs(), U);
    to.add(sure.after(p.at), sure.rank() + 2 + sure.gains_count() - p.at + more, unit.u, through);
    to.e.rowwise() += unit.eta * U.colwise().sum();
  }
  to.e.array() += unit.eta * static_cast<double>(sure.rank() + 1);
}

/// x and y of one call.
template <class Acc, class X, class Y>
void check_tokens_of(const char* operation, const X& x, const Y& y,
                     const mixed_form_bound<Acc>& sure) {
  if (x.rows() != sure.in_features() || y.rows() != sure.out_features() || x.cols() != y.cols())
    raise_shape(operation,
                "x is " + shape_text(x.rows(), x.cols()) + ", y is " +
                    shape_text(y.rows(), y.cols()) + " and the form is for " +
                    shape_text(sure.out_features(), sure.in_features()) +
                    " (out_features x in_features): both need one column for each token");
}

}  // namespace detail

/// The steps of mixed(W, l...) with the errors of their gains; see the top of this file. W is not
/// looked at any more.
template <class Acc = void, class M, detail::any_adapters... L>
  requires matrix_like<M> || detail::is_packed_weight<detail::bare<M>>
[[nodiscard]] auto mixed_bound(const M& W, const L&... l) {
  using acc = detail::form_accumulator<Acc, M, L...>;
  static_assert(
      std::is_same_v<acc, double> ||
          !(detail::holds_double<detail::bare<M>> || ... || detail::holds_double<L>),
      "lora::mixed_bound: W or an adapter holds double, which a form of float would round");
  const detail::default_environment environment;
  const auto make = [&](const auto& weight) {
    const auto base = detail::reader_of<acc>(weight);
    const auto rows = detail::rows_of_weight(weight);
    return detail::mixed_bounder<acc, detail::bare<decltype(rows)>>(&base, &rows, rows.rows(),
                                                                    rows.cols())
        .of(l...);
  };
  if constexpr (detail::is_packed_weight<detail::bare<M>>) {
    return make(W);
  } else {
    const auto weight = as_matrix(W);
    if (!detail::are_stored_in_out("mixed_bound", l...)) return make(weight);
    auto result = make(weight.transpose());
    result.set_stored_in_out();
    return result;
  }
}
/// The same where W is no matrix at hand: kinds that look at W throw value_error.
template <class Acc = void, std::integral I, detail::any_adapters... L>
[[nodiscard]] auto mixed_bound(I out_features, std::type_identity_t<I> in_features, const L&... l) {
  using acc = detail::form_accumulator<Acc, L...>;
  static_assert(std::is_same_v<acc, double> || !(false || ... || detail::holds_double<L>),
                "lora::mixed_bound: an adapter holds double, which a form of float would round");
  const detail::default_environment environment;
  const auto out = static_cast<index_t>(out_features), in = static_cast<index_t>(in_features);
  return detail::mixed_bounder<acc, detail::no_weight>(nullptr, nullptr, out, in).of(l...);
}

/// Of merge(W, form): W' = W, then W' := W' + D or diag(f) W', step by step.
template <class M, class Acc>
  requires detail::mergeable<M>
auto merge_bound(const M& W, const mixed_form_bound<Acc>& sure) {
  return detail::gained_bound("merge_bound", false, W, sure);
}

/// Of unmerge(W, form), W the merged weight: the steps in reverse, W := W - D or diag(f)^-1 W.
/// unmerge(merge(W)) is within both bounds.
template <class M, class Acc>
  requires detail::mergeable<M>
auto unmerge_bound(const M& W, const mixed_form_bound<Acc>& sure) {
  return detail::gained_bound("unmerge_bound", true, W, sure);
}

/// Of forward(W, x, y, form). W is as forward takes it, or with_bias(it, b). Of y the shape and the
/// scalar count.
template <class M, class X, class Y, class Acc>
  requires detail::base<M> && activations<X> && activations<Y>
Eigen::MatrixXd forward_bound(const M& W, const X& x, const Y& y,
                              const mixed_form_bound<Acc>& sure) {
  const detail::default_environment environment;
  decltype(auto) input = detail::in_memory(x);
  const auto from = detail::input_view(input);
  const auto to = detail::input_view(y);
  const auto weight = detail::rows_of_form("forward_bound", detail::weight_of_base(W), sure);
  using value = typename std::remove_const_t<decltype(weight)>::value_type;
  // In which the bias is added.
  using wide = std::conditional_t<detail::bias_is_double<M>, double, Acc>;
  detail::check_tokens_of("forward_bound", from, to, sure);
  const auto unit = detail::unit_of<Acc>();
  const index_t out = sure.out_features(), n = sure.in_features(), m = sure.gains_count();
  const Eigen::MatrixXd bias = detail::bias_of_base("forward_bound", out, W),
                        ax = detail::widened(from).cwiseAbs();
  constexpr double flushed = flush_threshold_of_product<Acc, value, detail::element_t<X>>();
  const detail::row_factor base = sure.after(0);
  detail::error_and_size sum(out, ax.cols());
  Eigen::MatrixXd through(out, ax.cols());
  Eigen::VectorXd row_sums(out);
  detail::each_block(out, n, [&](index_t first, index_t rows) {
    detail::weight_error::block block(rows, n);
    weight.read(first, block);
    through.middleRows(first, rows) = detail::multiplied(block.cwiseAbs(), ax);
    row_sums.segment(first, rows) = block.cwiseAbs().rowwise().sum();
  });
  sum.add(base, n + sure.rank() + 2 * m + 1, unit.u, through);
  detail::add_pieces(sure, ax, 1, flushed, sum);
  if (flushed != 0) {
    // What dot products take for zero in W x, times g_0.
    sum.e +=
        flushed * base.reach() * (ax.colwise().sum().array() + 2 * static_cast<double>(n)).matrix();
    sum.e.colwise() += flushed * base.reach().cwiseProduct(row_sums);
  }
  if (bias.size() != 0) {
    const auto [h, gains] = sure.of_bias_after(0);
    const Eigen::VectorXd b = bias.col(0).cwiseAbs();
    sum.add_column(h, (gains == 0 ? 1 : gains + 3) + (sure.shifts().empty() ? 0 : 1), unit.u, b);
    if (gains != 0) sum.e.colwise() += (unit.eta * (b.array() + 1)).matrix();
  }
  detail::add_shifts(sure, sum);
  return detail::stored_error(sum.e, sum.size,
                              detail::unit_of_stored<detail::element_t<Y>, wide>());
}

/// Of apply(x, y, form): y is its content before the call.
template <class X, class Y, class Acc>
  requires activations<X> && activations<Y>
Eigen::MatrixXd apply_bound(const X& x, const Y& y, const mixed_form_bound<Acc>& sure) {
  const detail::default_environment environment;
  decltype(auto) input = detail::in_memory(x);
  const auto from = detail::input_view(input);
  const auto to = detail::input_view(y);
  detail::check_tokens_of("apply_bound", from, to, sure);
  if (sure.changes_nothing()) return Eigen::MatrixXd::Zero(to.rows(), to.cols());
  detail::error_and_size sum(to.rows(), to.cols());
  detail::add_base(sure, detail::widened(to).cwiseAbs(), 1, sum);
  detail::add_pieces(sure, detail::widened(from).cwiseAbs(), sure.shifts().empty() ? 1 : 2, 0, sum);
  detail::add_shifts(sure, sum);
  return detail::stored_error(sum.e, sum.size, detail::unit_of_stored<detail::element_t<Y>, Acc>());
}

/// Of embed(W, ids, y, form), the form of W.transpose(); W is vocabulary x features, or
/// scaled_embedding(it, c).
template <class M, class R, class Y, class Acc>
  requires(matrix_like<M> || detail::is_embedding_view<M>) && token_range<R> && activations<Y>
Eigen::MatrixXd embed_bound(const M& W, const R& ids, const Y& y,
                            const mixed_form_bound<Acc>& sure) {
  const detail::default_environment environment;
  const auto run = [&](const auto& weight, double c) -> Eigen::MatrixXd {
    using value = typename std::remove_cvref_t<decltype(weight)>::value_type;
    using acc = accumulator_t<value, Y, Acc>;
    if (!sure.shifts().empty())
      detail::raise_value("embed_bound",
                          "an adapter has a bias of its own, and an embedding has none");
    if (weight.rows() != sure.in_features() || weight.cols() != sure.out_features())
      detail::raise_shape("embed_bound",
                          "W is " + detail::shape_text(weight.rows(), weight.cols()) +
                              " (vocabulary x features) and the form is for " +
                              detail::shape_text(sure.out_features(), sure.in_features()) +
                              " (features x vocabulary)");
    if (sure.changes_nothing()) return detail::embed_bound_of(weight, c, ids, y);
    const auto to = detail::input_view(y);
    const auto tokens = detail::checked_ids("embed_bound", ids, weight.rows());
    detail::check_y("embed_bound", to.rows(), to.cols(), weight.cols(), tokens.size());
    const auto id = [&](index_t t) { return tokens[static_cast<std::size_t>(t)]; };
    Eigen::MatrixXd base(to.rows(), to.cols());
    for (index_t t = 0; t < to.cols(); ++t)
      for (index_t i = 0; i < to.rows(); ++i)
        base(i, t) = std::abs(detail::widen<double>(weight(id(t), i)));
    detail::error_and_size sum(to.rows(), to.cols());
    detail::add_base(sure, base, 3, sum);
    detail::add_folded(
        sure, 3,
        [&](const auto& p) {
          Eigen::MatrixXd U(p.part.rank(), to.cols());
          for (index_t t = 0; t < to.cols(); ++t) U.col(t) = p.part.A.col(id(t)).cwiseAbs();
          return U;
        },
        sum);
    const Eigen::MatrixXd e =
        (std::abs(c) * sum.e.array() + mixed_form_bound<Acc>::unit().eta).matrix();
    return detail::stored_error(e, std::abs(c) * sum.size,
                                detail::unit_of_stored<detail::element_t<Y>, acc>());
  };
  if constexpr (detail::is_embedding_view<M>)
    return run(W.weight, W.scale);
  else
    return run(as_matrix(W), 1.0);
}

/// Of apply_through(down, y, form): y is its content before the call. down is called as the verb
/// calls it.
template <class Down, class Y, class Acc>
  requires activations<Y>
Eigen::MatrixXd apply_through_bound(const Down& down, const Y& y,
                                    const mixed_form_bound<Acc>& sure) {
  const auto to = detail::input_view(y);
  if (to.rows() != sure.out_features())
    detail::raise_shape("apply_through_bound",
                        "y has " + std::to_string(to.rows()) + " rows and the form " +
                            std::to_string(sure.out_features()) + " outputs");
  if (sure.changes_nothing()) return Eigen::MatrixXd::Zero(to.rows(), to.cols());
  const auto U_of = [&](const auto& p) {
    return p.step.factors.visit([&](const auto& l) -> Eigen::MatrixXd {
      const auto& held = down(l.lora_A());
      const detail::default_environment environment;
      const auto U = as_matrix(held);
      if (U.rows() != p.part.rank() || U.cols() != to.cols())
        detail::raise_shape("apply_through_bound",
                            "down(lora_A) is " + detail::shape_text(U.rows(), U.cols()) +
                                ", not rank x positions, which is " +
                                detail::shape_text(p.part.rank(), to.cols()));
      return detail::widened(U).cwiseAbs();
    });
  };
  detail::error_and_size sum(to.rows(), to.cols());
  detail::add_base(sure, detail::widened(to).cwiseAbs(), 1, sum);
  detail::add_folded(sure, sure.shifts().empty() ? 1 : 2, U_of, sum);
  const detail::default_environment environment;
  detail::add_shifts(sure, sum);
  using acc = accumulator_t<Y, Acc>;
  return detail::stored_error(sum.e, sum.size, detail::unit_of_stored<detail::element_t<Y>, acc>());
}

}  // namespace lora::inline LORA_DETAIL_ABI
LORA_DETAIL_QUIET_END
