// SPDX-License-Identifier: Apache-2.0
//
// The bounds of docs/numerics.md for DoRA, in long double: W' = diag(g_0) W + sum of diag(g_k) D_k,
// merged, unmerged, mixed and looked up.
#pragma once

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

/// An adapter of the list, exact: D, d = |s| |B| |A|, the magnitude (none: empty).
struct dora_piece {
  exact_matrix delta, size, A, B;  ///< B with s
  std::vector<double> magnitude;

  template <class L>
  dora_piece(const L& l, std::vector<double> m)
      : delta(exact_delta(l)),
        size(std::abs(static_cast<long double>(l.scaling())) *
             times(exact(l.lora_B()).cwiseAbs(), exact(l.lora_A()).cwiseAbs())),
        A(exact(l.lora_A()).cwiseAbs()),
        B(std::abs(static_cast<long double>(l.scaling())) * exact(l.lora_B()).cwiseAbs()),
        magnitude(std::move(m)) {}
  lora::index_t rank() const { return A.rows(); }
};

struct dora_bound {
  exact_matrix W, merged;  ///< the base, and W' exactly
  std::vector<dora_piece> pieces;
  std::vector<exact_column> g, P;  ///< of each piece: |g_k| and the bound of its relative error; the first is g_0's
  exact_column sign_g0;
  long double u, eta;
  lora::index_t rank = 0;

  template <class Acc>
  static dora_bound of(const exact_matrix& W, std::vector<dora_piece> list) {
    return dora_bound(W, std::move(list), std::numeric_limits<Acc>::epsilon() / 2,
                      static_cast<long double>(std::numeric_limits<Acc>::denorm_min()));
  }
  dora_bound(const exact_matrix& base, std::vector<dora_piece> list, long double unit, long double step)
      : W(base), merged(base), pieces(std::move(list)), u(unit), eta(step) {
    exact_column product = exact_column::Ones(W.rows()), grown = product;
    g.resize(pieces.size() + 1);
    P.resize(pieces.size() + 1);
    std::vector<exact_column> signed_g(pieces.size() + 1);
    for (std::size_t k = pieces.size(); k-- > 0;) {
      const dora_piece& p = pieces[k];
      rank += p.rank();
      for (lora::index_t i = 0; !p.magnitude.empty() && i < W.rows(); ++i) {
        const long double norm = (W.row(i) + p.delta.row(i)).norm(), f = p.magnitude[static_cast<std::size_t>(i)] / norm;
        product(i) *= f;
        grown(i) *= 1 + relative(p, i, norm);
      }
      signed_g[k] = product;
      g[k + 1] = product.cwiseAbs();
      P[k + 1] = grown.array() - 1;
    }
    g[0] = product.cwiseAbs();
    P[0] = grown.array() - 1;
    sign_g0 = product;
    merged = product.asDiagonal() * W;
    for (std::size_t k = 0; k < pieces.size(); ++k) merged += signed_g[k].asDiagonal() * pieces[k].delta;
  }

  /// What the computed m / n may be off, relative: by the delta under the norm, and by sums and
  /// roots in double.
  long double relative(const dora_piece& p, lora::index_t row, long double norm) const {
    const exact_matrix off = gamma(p.rank() + 2, u) * p.size.row(row) +
                             eta * (p.A.colwise().sum().array() + static_cast<long double>(p.rank() + 1)).matrix();
    const long double e = off.norm() / norm, t = e + (1 + e) * gamma(W.cols() + 5, 0x1p-53L);
    return t < 1 ? t / (1 - t) : std::numeric_limits<long double>::infinity();
  }

  /// (P_k + (1 + P_k) gamma) |g_k|, of piece k (0: the base).
  exact_column share(std::size_t k, lora::index_t roundings) const {
    return (P[k].array() + (1 + P[k].array()) * gamma(roundings, u)) * g[k].array();
  }
  exact_matrix deltas(lora::index_t roundings) const {
    exact_matrix sum = exact_matrix::Zero(W.rows(), W.cols());
    for (std::size_t k = 0; k < pieces.size(); ++k) sum += share(k + 1, roundings).asDiagonal() * pieces[k].size;
    sum.array() += eta * static_cast<long double>(rank + 2);
    for (const dora_piece& p : pieces) sum.rowwise() += (eta * p.A.colwise().sum()).eval().row(0);
    return sum;
  }

  /// Of W' before it is stored: base and deltas of a merge, or of rows with their constant.
  exact_matrix weight(lora::index_t of_base = 3, lora::index_t of_deltas = 3) const {
    return exact_matrix(share(0, of_base).asDiagonal() * W.cwiseAbs()) + deltas(rank + of_deltas) + eta * W.cwiseAbs();
  }
  /// Of the unmerged weight q, before it is stored.
  exact_matrix unmerged(const exact_matrix& q) const {
    const exact_column inverse = g[0].cwiseInverse(), rest = (1 - P[0].array() - 2 * u).inverse() * (1 + 4 * u);
    const exact_matrix e = exact_matrix((P[0].array() + 3 * u).matrix().asDiagonal() * q.cwiseAbs()) +
                           exact_matrix(inverse.asDiagonal() * deltas(rank + 2));
    return exact_matrix(rest.asDiagonal() * e).array() + eta;  // the quotient may be subnormal
  }
  /// Of y = W' x + b before it is stored, by forward: a gain rounds once when it is stored and once when it multiplies.
  exact_matrix mixed(const exact_matrix& x, const exact_column& bias) const {
    const exact_matrix ax = x.cwiseAbs();
    const lora::index_t n = W.cols();
    const auto gains = 2 * static_cast<lora::index_t>(pieces.size());
    exact_matrix e = times(exact_matrix(share(0, n + rank + gains + 1).asDiagonal() * W.cwiseAbs()), ax);
    for (std::size_t k = 0; k < pieces.size(); ++k) {
      e += times(exact_matrix(share(k + 1, n + rank + gains + 2).asDiagonal() * pieces[k].size), ax);
      e.colwise() +=
          (eta * static_cast<long double>(n + 1) * g[k + 1].array() * pieces[k].B.rowwise().sum().array()).matrix();
      e.rowwise() += (eta * times(pieces[k].A, ax).colwise().sum()).eval().row(0);
    }
    e.colwise() +=
        (u * bias.cwiseAbs() + (eta * static_cast<long double>(n + rank + 3)) * (1 + g[0].array()).matrix()).eval();
    return e;
  }
};

/// |got - want| <= e + what storing in T rounds, element by element; false for NaN.
template <class T, class Acc>
bool stored_within(const matrix<T>& got, const exact_matrix& want, const exact_matrix& e) {
  const bool rounds = !std::is_same_v<T, Acc>;
  const long double u = rounds ? static_cast<long double>(static_cast<double>(std::numeric_limits<T>::epsilon())) / 2 : 0;
  const long double eta = rounds ? static_cast<long double>(static_cast<double>(std::numeric_limits<T>::denorm_min())) : 0;
  const exact_matrix bound = (e + u * (want.cwiseAbs() + e)).array() + eta / 2;
  return ((want - exact(got)).cwiseAbs().array() <= bound.array()).all();
}

}  // namespace test
