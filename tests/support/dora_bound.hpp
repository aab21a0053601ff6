// SPDX-License-Identifier: Apache-2.0
//
// The bounds of docs/numerics.md for DoRA and other gains, in long double: merged, unmerged, mixed
// and looked up.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "support/bits.hpp"

namespace test {

using exact_column = Eigen::Matrix<long double, Eigen::Dynamic, 1>;

inline long double gamma(lora::index_t k, long double u) {
  const long double ku = static_cast<long double>(k) * u;
  return ku / (1 - ku);
}

/// k roundings after what is off by v, relative: no digits are lost as in 1 + v.
struct growth {
  long double v = 0;

  growth& times(long double p) { return v += p + v * p, *this; }
  growth& rounds(lora::index_t k, long double u) {
    for (; k > 0; --k) times(u);
    return *this;
  }
};

/// An adapter of the list, exact: D, d = |s| |B| |A|, and the gain behind it: of a magnitude, or
/// given. None: empty.
struct dora_piece {
  exact_matrix delta, size, A, B;  ///< |A|, |s B|
  exact_matrix sB = {};
  std::vector<double> magnitude;
  std::vector<long double> given = {}, off = {};  ///< a gain, and how far the computed one is off
  bool scales_bias = false;
  exact_column shift = {};  ///< what it adds to the bias

  template <class L>
  dora_piece(const L& l, std::vector<double> m)
      : delta(exact_delta(l)),
        size(std::abs(static_cast<long double>(l.scaling())) *
             times(exact(l.lora_B()).cwiseAbs(), exact(l.lora_A()).cwiseAbs())),
        A(exact(l.lora_A()).cwiseAbs()),
        B(std::abs(static_cast<long double>(l.scaling())) * exact(l.lora_B()).cwiseAbs()),
        sB(static_cast<long double>(l.scaling()) * exact(l.lora_B())),
        magnitude(std::move(m)) {}
  /// Without a delta.
  dora_piece(lora::index_t out, lora::index_t in)
      : delta(exact_matrix::Zero(out, in)), size(delta), A(0, in), B(out, 0) {}
  lora::index_t rank() const { return A.rows(); }
  bool has_gain() const { return !magnitude.empty() || !given.empty(); }
};

/// The errors of a mixed form, found step by step as the verbs compute: what a sum of magnitudes
/// is, and how far the computed value may be off. The library has closed formulas.
struct dora_bound {
  exact_matrix W, merged;  ///< the base, and W' exactly
  std::vector<dora_piece> pieces;
  /// Of each piece the gain, and its relative error; no gain: empty.
  std::vector<exact_column> f, off;
  exact_column g0;     ///< the product of all gains
  exact_column shift;  ///< the sum of the shifts, with the gains that scale them
  long double u, eta;
  lora::index_t rank = 0;

  /// A sum of magnitudes, and its error.
  struct running {
    exact_matrix size, e;

    running(exact_matrix of, lora::index_t k, long double unit) : size(std::move(of)), e(size) {
      e *= growth().rounds(k, unit).v;
    }
    void rounds(lora::index_t k, long double unit) { e += growth().rounds(k, unit).v * (size + e); }
    void add(const running& more) {
      size += more.size;
      e += more.e;
    }
    /// Times a factor of each output that is off by p, relative.
    void multiply(const exact_column& by, const exact_column& p, long double least) {
      e = (by.cwiseAbs().asDiagonal() * exact_matrix(e + p.asDiagonal() * (size + e))).eval();
      e.array() += least;
      size = (by.cwiseAbs().asDiagonal() * size).eval();
    }
    /// Of what is stored in T.
    template <class T, class Acc>
    exact_matrix stored() const {
      if (std::is_same_v<T, Acc>) return e;
      const auto us =
          static_cast<long double>(static_cast<double>(std::numeric_limits<T>::epsilon())) / 2;
      const auto step =
          static_cast<long double>(static_cast<double>(std::numeric_limits<T>::denorm_min()));
      return (e + us * (size + e)).array() + step / 2;
    }
  };

  template <class Acc>
  static dora_bound of(const exact_matrix& W, std::vector<dora_piece> list) {
    return dora_bound(W, std::move(list), std::numeric_limits<Acc>::epsilon() / 2,
                      static_cast<long double>(std::numeric_limits<Acc>::denorm_min()));
  }
  dora_bound(const exact_matrix& base, std::vector<dora_piece> list, long double unit,
             long double step)
      : W(base), merged(base), pieces(std::move(list)), u(unit), eta(step) {
    const exact_column ones = exact_column::Ones(W.rows());
    g0 = ones;
    shift = 0 * ones;
    for (const dora_piece& p : pieces) {
      rank += p.rank();
      merged += p.delta;
      exact_column gain, p_of;
      if (p.has_gain()) gain = p_of = ones;
      for (lora::index_t i = 0; p.has_gain() && i < W.rows(); ++i) {
        const auto at = static_cast<std::size_t>(i);
        if (p.magnitude.empty()) {
          gain(i) = p.given[at];
          p_of(i) = p.off[at] / std::abs(p.given[at]);
        } else {
          const long double norm = (W.row(i) + p.delta.row(i)).norm();
          gain(i) = p.magnitude[at] / norm;
          p_of(i) = relative(p, i, norm) + eta / std::abs(gain(i));
        }
      }
      if (p.has_gain()) {
        g0 = g0.cwiseProduct(gain).eval();
        merged = (gain.asDiagonal() * merged).eval();
        if (p.scales_bias) shift = shift.cwiseProduct(gain).eval();
      }
      if (p.shift.size() != 0) shift += p.shift;
      f.push_back(std::move(gain));
      off.push_back(std::move(p_of));
    }
  }

  /// What the computed m / n may be off, relative: by the delta under the norm, and by sums and
  /// roots in double.
  long double relative(const dora_piece& p, lora::index_t row, long double norm) const {
    const exact_matrix q =
        gamma(p.rank() + 2, u) * p.size.row(row) +
        eta * (p.A.colwise().sum().array() + static_cast<long double>(p.rank() + 1)).matrix();
    const long double e = q.norm() / norm, t = e + (1 + e) * gamma(W.cols() + 5, 0x1p-53L);
    return t < 1 ? t / (1 - t) : std::numeric_limits<long double>::infinity();
  }

  /// A gain in its place: it is rounded to the accumulator, and its product is.
  void multiply(running& to, std::size_t k) const {
    exact_column p = off[k];
    for (long double& v : p) v = growth{v}.rounds(2, u).v;
    to.multiply(f[k], p, eta);
  }
  void divide(running& to, std::size_t k) const {
    exact_column p = off[k];
    for (long double& v : p)
      v = growth{v < 1 ? v / (1 - v) : std::numeric_limits<long double>::infinity()}.rounds(2, u).v;
    to.multiply(f[k].cwiseInverse(), p, eta);
  }
  /// Deltas of neighbours in one chain, which is added at once.
  void add_chain(running& to, std::size_t begin, std::size_t end) const {
    lora::index_t ranks = 0;
    for (std::size_t k = begin; k < end; ++k) ranks += pieces[k].rank();
    if (ranks == 0) return;
    for (std::size_t k = begin; k < end; ++k) {
      to.size += pieces[k].size;
      to.e += growth().rounds(ranks + 2, u).v * pieces[k].size;
      to.e.rowwise() += (eta * pieces[k].A.colwise().sum()).eval().row(0);
    }
    to.e.array() += eta * static_cast<long double>(ranks + 1);
    to.rounds(1, u);
  }
  /// visit(first piece, behind the last one, whether a gain stands behind them) of each chain.
  template <class Visit>
  void each_chain(const Visit& visit) const {
    std::size_t begin = 0;
    for (std::size_t k = 0; k < pieces.size(); ++k)
      if (pieces[k].has_gain()) visit(begin, k + 1, true), begin = k + 1;
    visit(begin, pieces.size(), false);
  }

  running weight() const {
    running to(W.cwiseAbs(), 0, u);
    each_chain([&](std::size_t begin, std::size_t end, bool gain) {
      add_chain(to, begin, end);
      if (gain) multiply(to, end - 1);
    });
    return to;
  }
  /// Of a merged weight, and what exact arithmetic makes of it.
  running unmerged(const exact_matrix& stored, exact_matrix& base) const {
    running to(stored.cwiseAbs(), 0, u);
    base = stored;
    std::vector<std::pair<std::size_t, std::size_t>> all;
    std::vector<bool> gains;
    each_chain([&](std::size_t begin, std::size_t end, bool gain) {
      all.emplace_back(begin, end), gains.push_back(gain);
    });
    for (std::size_t n = all.size(); n-- > 0;) {
      const auto [begin, end] = all[n];
      if (gains[n]) {
        divide(to, end - 1);
        base = (f[end - 1].cwiseInverse().asDiagonal() * base).eval();
      }
      add_chain(to, begin, end);
      for (std::size_t k = begin; k < end; ++k) base -= pieces[k].delta;
    }
    return to;
  }

  /// The chain of a product: n roundings of W x, r more of each adapter, two of each gain.
  void mix(running& to, const exact_matrix& ax) const {
    const lora::index_t n = W.cols();
    for (std::size_t k = 0; k < pieces.size(); ++k) {
      const dora_piece& p = pieces[k];
      if (p.rank() != 0) {
        to.add(running(times(p.B, times(p.A, ax)), n + 2, u));  // U, its fold, the product with B
        to.rounds(p.rank(), u);
      }
      if (p.has_gain()) multiply(to, k);
    }
  }
  /// b times the gains that scale it, plus all shifts, before they are added to the product.
  running terms(const exact_column& b, bool has_shift) const {
    running of_b(b.cwiseAbs(), 0, u), sum(exact_matrix::Zero(W.rows(), 1), 0, u);
    lora::index_t gains = 0;
    for (std::size_t k = 0; k < pieces.size(); ++k) {
      if (pieces[k].scales_bias) {
        exact_column once = off[k];
        for (long double& v : once) v = growth{v}.rounds(1, u).v;
        of_b.multiply(f[k], once, eta);
        sum.multiply(f[k], once, eta);
        sum.rounds(1, 0x1p-53L);
        ++gains;
      }
      if (pieces[k].shift.size() != 0) sum.add(running(pieces[k].shift.cwiseAbs(), 2, 0x1p-53L));
    }
    if (gains != 0) of_b.rounds(2, u);
    sum.rounds(1, u);
    of_b.add(sum);
    if (has_shift) of_b.rounds(1, u);
    return of_b;
  }
  bool has_shift() const {
    return std::any_of(pieces.begin(), pieces.end(),
                       [](const dora_piece& p) { return p.shift.size() != 0; });
  }
  running mixed(const exact_matrix& x, const exact_column& bias) const {
    const exact_matrix ax = x.cwiseAbs();
    running to(times(W.cwiseAbs(), ax), W.cols(), u);
    mix(to, ax);
    add_terms(to, terms(bias, has_shift()));
    to.rounds(1, u);
    return to;
  }
  running applied(const exact_matrix& x, const exact_matrix& y) const {
    running to(exact_matrix::Zero(y.rows(), y.cols()), 0, u);
    mix(to, x.cwiseAbs());
    if (has_shift()) {
      add_terms(to, terms(exact_column::Zero(W.rows()), false));
      to.rounds(1, u);
    }
    to.add(scaled(y.cwiseAbs(), 0));
    to.rounds(1, u);
    return to;
  }
  static void add_terms(running& to, const running& column) {
    to.size.colwise() += column.size.col(0);
    to.e.colwise() += column.e.col(0);
  }
  /// What the product of the gains from a piece on makes of something that is off by itself; it is
  /// rounded once more where it is one factor.
  running scaled(const exact_matrix& of, std::size_t from, lora::index_t k = 0,
                 bool apart = true) const {
    running to(of, k, u);
    bool any = false;
    for (std::size_t j = from; j < pieces.size(); ++j) {
      if (!pieces[j].has_gain()) continue;
      exact_column once = off[j];
      for (long double& v : once) v = growth{v}.rounds(1, u).v;
      to.multiply(f[j], once, eta);
      any = true;
    }
    if (any && apart) to.rounds(2, u);
    return to;
  }
  /// Of rows and apply_through: U(piece) is what its lora_B multiplies, with the gains folded in.
  template <class Of>
  running folded(const exact_matrix& base, const Of& U, lora::index_t more) const {
    running to = scaled(base, 0);
    for (std::size_t k = 0; k < pieces.size(); ++k)
      if (pieces[k].rank() != 0)
        to.add(scaled(times(pieces[k].B, U(pieces[k])), k, rank + 2, false));
    to.rounds(more, u);
    return to;
  }
};

/// |got - want| <= e + what storing in T rounds, element by element; false for NaN.
template <class T, class Acc>
bool stored_within(const matrix<T>& got, const exact_matrix& want, const exact_matrix& e) {
  const bool rounds = !std::is_same_v<T, Acc>;
  const long double u =
      rounds ? static_cast<long double>(static_cast<double>(std::numeric_limits<T>::epsilon())) / 2
             : 0;
  const long double eta =
      rounds ? static_cast<long double>(static_cast<double>(std::numeric_limits<T>::denorm_min()))
             : 0;
  const exact_matrix bound = (e + u * (want.cwiseAbs() + e)).array() + eta / 2;
  return ((want - exact(got)).cwiseAbs().array() <= bound.array()).all();
}

}  // namespace test
