// SPDX-License-Identifier: Apache-2.0
//
// An adapter of any kind as a test makes it up: a list of steps of every sort, with its own dense
// oracle.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <Eigen/LU>
#include "lora/detail/eigen.hpp"

#include "lora/steps.hpp"
#include "support/random.hpp"

namespace test {

/// x := T x by plain loops, in the accumulator.
template <class Acc>
class dense_map final : public lora::input_map<Acc> {
 public:
  explicit dense_map(const exact_matrix& T) : T_(T.template cast<Acc>()) {}
  void columns(Acc* x, lora::index_t tokens, lora::index_t stride) const override {
    for (lora::index_t t = 0; t < tokens; ++t) multiply(T_, x + t * stride);
  }
  void rows(Acc* rows, lora::index_t count, lora::index_t stride) const override {
    for (lora::index_t i = 0; i < count; ++i) multiply(T_.transpose(), rows + i * stride);
  }
  void undo_rows(const char*, Acc* rows, lora::index_t count, lora::index_t stride) const override {
    const matrix inverse = T_.inverse();
    for (lora::index_t i = 0; i < count; ++i) multiply(inverse.transpose(), rows + i * stride);
  }

 private:
  using matrix = Eigen::Matrix<Acc, Eigen::Dynamic, Eigen::Dynamic>;
  static constexpr lora::index_t most =
      2048;  // no allocation, so that a test can count those of a call
  template <class M>
  static void multiply(const M& m, Acc* x) {
    Acc result[most];
    for (lora::index_t i = 0; i < m.rows(); ++i) {
      Acc sum = 0;
      for (lora::index_t k = 0; k < m.cols(); ++k) sum += m(i, k) * x[k];
      result[i] = sum;
    }
    std::copy_n(result, m.rows(), x);
  }
  matrix T_;
};

/// D in full.
template <class Acc>
class dense_delta final : public lora::delta_source<Acc> {
 public:
  explicit dense_delta(const exact_matrix& D) : D_(D.template cast<Acc>()) {}
  void rows(lora::index_t first, lora::index_t count, Acc* to,
            lora::index_t stride) const override {
    for (lora::index_t i = 0; i < count; ++i)
      for (lora::index_t k = 0; k < D_.cols(); ++k) to[i * stride + k] = D_(first + i, k);
  }
  void product(const Acc* x, lora::index_t tokens, Acc* y) const override {
    for (lora::index_t t = 0; t < tokens; ++t)
      for (lora::index_t i = 0; i < D_.rows(); ++i) {
        Acc sum = 0;
        for (lora::index_t k = 0; k < D_.cols(); ++k) sum += D_(i, k) * x[t * D_.cols() + k];
        y[t * D_.rows() + i] = sum;
      }
  }

 private:
  Eigen::Matrix<Acc, Eigen::Dynamic, Eigen::Dynamic> D_;
};

/// What a list of steps makes of a call, and how far a result may be off.
struct expected {
  exact_matrix y, size;  ///< exact; the same of absolute values
  lora::index_t roundings;
  long double least = 0;  ///< what one product may lose to underflow, for all of them

  template <class Acc, class Y>
  bool holds(const Y& got) const {
    using value = typename Y::Scalar;
    const long double u = std::numeric_limits<Acc>::epsilon() / 2;
    const long double u_y =
        std::is_same_v<value, Acc>
            ? 0
            : static_cast<long double>(static_cast<double>(std::numeric_limits<value>::epsilon())) /
                  2;
    const long double n = static_cast<long double>(roundings) * u, g = n / (1 - n);
    const exact_matrix e = g * size;
    const exact_matrix bound = (e + u_y * (y.cwiseAbs() + e)).array() + least;
    return ((y - exact(got)).cwiseAbs().array() <= bound.array()).all();
  }
};

/// A list of steps, with elements of T.
template <class T>
class recipe {
 public:
  using value_type = T;

  lora::index_t out_features() const { return out_; }
  lora::index_t in_features() const { return in_; }

  recipe& low_rank(random& g, lora::index_t out, lora::index_t in, lora::index_t rank) {
    one s{'l'};
    s.factors = std::make_shared<const lora::adapter<T>>(
        g.reals<T>(rank, in, 0.5), g.reals<T>(out, rank, 0.5),
        lora::scaling{.alpha = 0.7, .rule = lora::scaling_rule::fixed});
    return add(s, out, in);
  }
  /// A copy of an adapter.
  recipe& of(const lora::adapter<T>& l) {
    one s{'l'};
    s.factors = std::make_shared<const lora::adapter<T>>(l);
    return add(s, l.out_features(), l.in_features());
  }
  recipe& delta(random& g, lora::index_t out, lora::index_t in) {
    return add({.sort = 'd', .dense = exact(g.reals<T>(out, in, 0.5))}, out, in);
  }
  recipe& gain(random& g, lora::index_t out, bool scales_bias) {
    one s{.sort = scales_bias ? 'h' : 'g', .dense = exact(g.reals<T>(out, 1, 1))};
    s.dense.array() += 1.5L;
    s.dense = exact(rounded<T>(s.dense));
    return add(s, out, in_);
  }
  recipe& map(random& g, lora::index_t in) {
    const exact_matrix T_ =
        exact_matrix::Identity(in, in) + exact(g.reals<T>(in, in, 0.5 / static_cast<double>(in)));
    return add({.sort = 'm', .dense = exact(rounded<T>(T_))}, out_, in);
  }
  recipe& shift(random& g, lora::index_t out) {
    return add({.sort = 's', .dense = exact(g.reals<T>(out, 1, 1))}, out, in_);
  }

  /// So many steps of any sort.
  static recipe drawn(random& g, lora::index_t out, lora::index_t in, lora::index_t count,
                      bool maps = true) {
    recipe result;
    result.out_ = out;
    result.in_ = in;
    for (; count > 0; --count) switch (g.integer(0, maps ? 5 : 4)) {
        case 0:
        case 1: result.low_rank(g, out, in, g.integer(1, 40)); break;
        case 2: result.delta(g, out, in); break;
        case 3: result.gain(g, out, g.one_in(2)); break;
        case 4: result.shift(g, out); break;
        default: result.map(g, in);
      }
    return result;
  }
  std::string text() const {
    std::string all;
    for (const one& s : list_) all += s.sort;
    return all;
  }

  template <class Acc>
  std::vector<lora::step<Acc>> steps(const lora::step_request<Acc>& request) const {
    std::vector<lora::step<Acc>> all;
    for (const one& s : list_) switch (s.sort) {
        case 'l':
          all.emplace_back(lora::low_rank_step{lora::any_factors(s.factors), request.strength});
          break;
        case 'd':
          all.emplace_back(lora::delta_step<Acc>{std::make_shared<const dense_delta<Acc>>(s.dense),
                                                 request.strength});
          break;
        case 'g':
        case 'h': {
          lora::gain_step<Acc> step{.gain = {}, .scales_bias = s.sort == 'h'};
          for (lora::index_t i = 0; i < s.dense.rows(); ++i)
            step.gain.push_back(static_cast<Acc>(s.dense(i, 0)));
          all.emplace_back(std::move(step));
          break;
        }
        case 'm':
          all.emplace_back(lora::input_step<Acc>{std::make_shared<const dense_map<Acc>>(s.dense)});
          break;
        default: {
          lora::shift_step step;
          for (lora::index_t i = 0; i < s.dense.rows(); ++i)
            step.shift.push_back(request.strength * static_cast<double>(s.dense(i, 0)));
          all.emplace_back(std::move(step));
        }
      }
    return all;
  }

  /// W and b as the steps leave them, with `strength`.
  std::pair<exact_matrix, exact_matrix> merged(exact_matrix W, exact_matrix b,
                                               bool absolute = false, double strength = 1) const {
    const auto of = [absolute](const exact_matrix& m) -> exact_matrix {
      return absolute ? m.cwiseAbs().eval() : m;
    };
    const auto s = static_cast<long double>(absolute ? std::abs(strength) : strength);
    W = of(W);
    b = of(b);
    for (const one& step : list_) switch (step.sort) {
        case 'l':
          W += s * static_cast<long double>(step.factors->scaling()) *
               times(of(exact(step.factors->lora_B())), of(exact(step.factors->lora_A())));
          break;
        case 'd': W += s * of(step.dense); break;
        case 'g':
        case 'h':
          W = of(step.dense).col(0).asDiagonal() * W;
          if (step.sort == 'h') b = of(step.dense).col(0).asDiagonal() * b;
          break;
        case 'm': W = times(W, of(step.dense)); break;
        default: b += s * of(step.dense);
      }
    return {W, b};
  }
  template <class W, class X>
  expected oracle(const W& weight, const exact_matrix& b, const X& x) const {
    const auto [W_, b_] = merged(exact(weight), b);
    const auto [size, b_size] = merged(exact(weight), b, true);
    const exact_matrix ex = exact(x);
    expected result{times(W_, ex), times(size, ex.cwiseAbs()), 0};
    result.y.colwise() += b_.col(0);
    result.size.colwise() += b_size.col(0);
    result.roundings = in_ + roundings() + 4;
    // Dot products of bfloat16 take what is below the smallest normal float for zero.
    result.least =
        0x1p-126L * static_cast<long double>(2 * result.roundings) * (1 + result.size.maxCoeff());
    return result;
  }
  lora::index_t roundings() const {
    lora::index_t all = 0;
    for (const one& s : list_) {
      all += s.sort == 'm' || s.sort == 'd' ? in_ + 3 : 3;
      if (s.sort == 'l') all += in_ + s.factors->rank();
    }
    return all;
  }

 private:
  struct one {
    char sort;
    std::shared_ptr<const lora::adapter<T>> factors = nullptr;
    exact_matrix dense = {};
  };
  recipe& add(one s, lora::index_t out, lora::index_t in) {
    out_ = out;
    in_ = in;
    list_.push_back(std::move(s));
    return *this;
  }

  std::vector<one> list_;
  lora::index_t out_ = 0, in_ = 0;
};

}  // namespace test
