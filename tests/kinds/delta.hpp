// SPDX-License-Identifier: Apache-2.0
//
// Checks of a kind whose only step is a delta: rows and product against a matrix in long double,
// the bits, and PEFT's cases.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "lora/kernel/threads.hpp"
#include "lora/kinds/factored_matrix.hpp"
#include "support/bits.hpp"
#include "support/golden.hpp"
#include "support/outside.hpp"
#include "support/random.hpp"

namespace delta {

using lora::index_t;
using test::exact_matrix;

inline exact_matrix hadamard(const exact_matrix& a, const exact_matrix& b) {
  return a.cwiseProduct(b);
}
inline exact_matrix kron(const exact_matrix& a, const exact_matrix& b) {
  exact_matrix result(a.rows() * b.rows(), a.cols() * b.cols());
  for (index_t i = 0; i < result.rows(); ++i)
    for (index_t j = 0; j < result.cols(); ++j)
      result(i, j) = a(i / b.rows(), j / b.cols()) * b(i % b.rows(), j % b.cols());
  return result;
}

/// A matrix and the same of its parts' absolute values; how many roundings make an element of it.
struct known {
  exact_matrix value, size;
  index_t roundings;
};
/// What a factored_matrix is by its definition.
template <class T>
known known_of(const lora::factored_matrix<T>& m) {
  if (m.is_dense()) return {test::exact(m.dense()), test::exact(m.dense()).cwiseAbs(), 0};
  exact_matrix left = test::exact(m.left()), right = test::exact(m.right());
  exact_matrix size = right.cwiseAbs();
  index_t core = 0;
  if (m.has_core()) {
    const exact_matrix t = test::exact(m.core()), b = right;
    const index_t q = b.rows(), kernel = t.cols() / q;
    core = q + 1;
    left.transposeInPlace();
    right.setZero(t.rows(), b.cols() * kernel);
    size = right;
    for (index_t i = 0; i < t.rows(); ++i)
      for (index_t j = 0; j < q; ++j)
        for (index_t k = 0; k < kernel; ++k)
          for (index_t c = 0; c < b.cols(); ++c) {
            right(i, c * kernel + k) += t(i, j * kernel + k) * b(j, c);
            size(i, c * kernel + k) += std::abs(t(i, j * kernel + k) * b(j, c));
          }
  }
  return {test::times(left, right), test::times(left.cwiseAbs(), size), m.rank() + core};
}

template <class Acc>
long double gamma(index_t k) {
  const long double u = std::numeric_limits<Acc>::epsilon() / 2;
  return static_cast<long double>(k) * u / (1 - static_cast<long double>(k) * u);
}
inline bool within(const exact_matrix& got, const exact_matrix& want, const exact_matrix& bound) {
  return got.size() == want.size() && ((got - want).cwiseAbs().array() <= bound.array()).all();
}

/// The one step of a kind, at a strength.
template <class Acc, class K>
lora::delta_step<Acc> step_of(const K& kind, double strength = 1) {
  const auto all = kind.template steps<Acc>({.operation = "test", .strength = strength});
  REQUIRE(all.size() == 1);
  REQUIRE(std::holds_alternative<lora::delta_step<Acc>>(all[0]));
  return std::get<lora::delta_step<Acc>>(all[0]);
}

template <class Acc>
test::matrix<Acc> rows_of(const lora::delta_source<Acc>& source, index_t out, index_t in) {
  test::matrix<Acc> result(out, in);
  source.rows(0, out, result.data(), in);
  return result;
}
template <class Acc>
test::col_matrix<Acc> product_of(const lora::delta_source<Acc>& source,
                                 const test::col_matrix<Acc>& x, index_t out) {
  test::col_matrix<Acc> y =
      test::col_matrix<Acc>::Constant(out, x.cols(), std::numeric_limits<Acc>::quiet_NaN());
  source.product(x.data(), x.cols(), y.data());
  return y;
}

/// rows and product are D within gamma_{roundings} and gamma_{roundings + depth}, and the same bits
/// by any block of rows, by two threads, and for a token alone.
template <class Acc, class K>
void check(const K& kind, const known& D, index_t depth, test::random& g) {
  const index_t out = D.value.rows(), in = D.value.cols();
  REQUIRE(kind.out_features() == out);
  REQUIRE(kind.in_features() == in);
  const auto source = step_of<Acc>(kind).source;
  const test::matrix<Acc> whole = rows_of(*source, out, in);
  CHECK(within(test::exact(whole), D.value, gamma<Acc>(D.roundings) * D.size));

  const index_t stride = in + g.integer(0, 3);
  test::matrix<Acc> blocks = test::matrix<Acc>::Constant(out, stride, Acc(7));
  for (index_t first = 0, count = 0; first < out; first += count) {
    count = g.integer(1, std::min<index_t>(out - first, 11));
    source->rows(first, count, blocks.row(first).data(), stride);
  }
  CHECK(test::same_bits(blocks.leftCols(in).eval(), whole));
  CHECK((blocks.rightCols(stride - in).array() == Acc(7)).all());
  test::matrix<Acc> shared(out, in);
  lora::detail::parallel(2, [&](const lora::detail::team& team) {
    team.for_each(out, [&](index_t i) { source->rows(i, 1, shared.row(i).data(), in); });
  });
  CHECK(test::same_bits(shared, whole));

  for (const index_t tokens : {index_t{1}, index_t{3}, index_t{64}}) {
    const test::col_matrix<Acc> x = g.reals<Acc>(in, tokens, 1.0);
    const auto y = product_of(*source, x, out);
    CHECK(within(test::exact(y), test::times(D.value, test::exact(x)),
                 gamma<Acc>(D.roundings + depth) * test::times(D.size, test::exact(x).cwiseAbs())));
    const index_t t = g.integer(0, tokens - 1);
    const test::col_matrix<Acc> alone = x.col(t);
    CHECK(test::same_bits(product_of(*source, alone, out), y.col(t).eval()));
  }
}

// --- PEFT's cases ---

/// Adapter `name` of a case, in double: s D is what PEFT's formula adds to each weight, and the
/// network with s D x added to each layer's output is y64. make(file, "base_model.model.<module>.",
/// r, alpha) makes a module's kind.
template <class Make>
void check_case(const std::string& folder, const std::string& name, const Make& make) {
  CAPTURE(folder, name);
  const golden::case_files c{golden::root() / folder};
  const auto file = lora::safetensors::read(c.folder / name / "adapter_model.safetensors");
  const auto& config = c.about.at("adapters").at(name);
  const index_t r = config.at("r");
  const auto alphas = config.value("alpha_pattern", golden::json::object());
  Eigen::MatrixXd h = golden::input<double>(c);
  index_t layers = 0;
  for (const auto& op : c.about.at("graph")) {
    if (op.at("op") == "tanh") h = h.array().tanh();
    if (!op.contains("module")) continue;
    const std::string module = op.at("module");
    CAPTURE(module);
    const double alpha = alphas.value(module, config.at("alpha").get<double>());
    const auto kind = make(file, "base_model.model." + module + ".", r, alpha);
    const auto step = step_of<double>(kind);
    const auto W = golden::kernel<double>(c.base, module + ".weight");
    const auto merged = golden::kernel<double>(c.io, "merged64." + name + "." + module + ".weight");
    REQUIRE(kind.out_features() == W.rows());
    REQUIRE(kind.in_features() == W.cols());
    const auto D = rows_of(*step.source, W.rows(), W.cols());
    CHECK(D.cwiseAbs().maxCoeff() > 1e-3);
    CHECK((merged - (W + step.scale * D)).cwiseAbs().maxCoeff() <= 1e-9);
    const test::col_matrix<double> x = h;
    h = W * x + step.scale * product_of(*step.source, x, W.rows());
    h.colwise() += golden::kernel<double>(c.base, module + ".bias").col(0);
    ++layers;
  }
  REQUIRE(layers > 0);
  const Eigen::MatrixXd y = golden::columns<double>(c.io, "y64_" + name);
  REQUIRE(h.rows() == y.rows());
  REQUIRE(h.cols() == y.cols());
  CHECK((h - y).cwiseAbs().maxCoeff() <= 1e-9);
}

}  // namespace delta
