// SPDX-License-Identifier: Apache-2.0
//
// The graph language of case.json: a model as a list of operations on named values, run on matrices
// of T (tokens are columns) or on values with a bound of their error, which it carries from layer
// to layer.
#pragma once

#include <cmath>
#include <map>
#include <stdexcept>
#include <string>

#include "support/golden.hpp"

namespace golden {

/// A value and how far an evaluation in a format of unit roundoff u may be from it.
struct tracked {
  MatrixXd value, bound;
  double u;
};
inline tracked relu(const tracked& v) { return {v.value.cwiseMax(0.0), v.bound, v.u}; }
/// Monotonic; where it is flat, little is left of an error. Four units in the last place for the
/// function itself: C libraries, torch and numpy stay below.
inline tracked tanh(const tracked& v) {
  const auto of = [](double a) { return std::tanh(a); };
  const MatrixXd value = v.value.unaryExpr(of);
  const MatrixXd above = (v.value + v.bound).unaryExpr(of) - value,
                 below = value - (v.value - v.bound).unaryExpr(of);
  return {value, above.cwiseMax(below) + 8 * v.u * value.cwiseAbs(), v.u};
}
inline tracked add(const tracked& a, const tracked& b) {
  const MatrixXd value = a.value + b.value, bound = a.bound + b.bound;
  return {value, bound + a.u * (value.cwiseAbs() + bound), a.u};
}
inline tracked mul(const tracked& a, const tracked& b) {
  const MatrixXd value = a.value.cwiseProduct(b.value);
  const MatrixXd bound = a.value.cwiseAbs().cwiseProduct(b.bound) +
                         b.value.cwiseAbs().cwiseProduct(a.bound) + a.bound.cwiseProduct(b.bound);
  return {value, bound + a.u * (value.cwiseAbs() + bound), a.u};
}

template <class T>
test::col_matrix<T> relu(const test::col_matrix<T>& v) {
  return v.cwiseMax(T{0});
}
template <class T>
test::col_matrix<T> tanh(const test::col_matrix<T>& v) {
  return v.unaryExpr([](T a) { return std::tanh(a); });
}
template <class T>
test::col_matrix<T> add(const test::col_matrix<T>& a, const test::col_matrix<T>& b) {
  return a + b;
}
template <class T>
test::col_matrix<T> mul(const test::col_matrix<T>& a, const test::col_matrix<T>& b) {
  return a.cwiseProduct(b);
}

/// Whether an operation is a layer with a weight; layer(op, input) computes it.
inline bool is_layer(const json& op) {
  return op.at("op") == "linear" || op.at("op") == "conv1d_t";
}

template <class Value, class Layer>
Value run_graph(const json& graph, const Value& x, const Layer& layer) {
  std::map<std::string, Value> values{{"h", x}};
  for (const json& op : graph) {
    const json source = op.value("src", json("h"));
    const std::string kind = op.at("op");
    const auto input = [&](std::size_t k) -> const Value& {
      return values.at((source.is_array() ? source.at(k) : source).template get<std::string>());
    };
    const auto result = [&]() -> Value {
      if (is_layer(op)) return layer(op, input(0));
      if (kind == "relu") return relu(input(0));
      if (kind == "tanh") return tanh(input(0));
      if (kind == "add") return add(input(0), input(1));
      if (kind == "mul") return mul(input(0), input(1));
      throw std::runtime_error("this runner does not know the graph operation " + kind);
    }();
    values.insert_or_assign(op.value("dst", "h"), result);
  }
  return values.at("h");
}

}  // namespace golden
