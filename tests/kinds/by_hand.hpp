// SPDX-License-Identifier: Apache-2.0
//
// The steps of a kind, taken by hand as the table at the top of steps.hpp says: merged and mixed.
// And PEFT's reference cases of two layers with a tanh between them.
#pragma once

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

#include "lora/io/safetensors.hpp"
#include "lora/lora.hpp"
#include "lora/steps.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/golden.hpp"
#include "support/outside.hpp"
#include "support/random.hpp"
#include "support/refused.hpp"

namespace by_hand {

using lora::index_t;
template <class Acc>
using vector = Eigen::Matrix<Acc, Eigen::Dynamic, 1>;
template <class Acc>
using steps = std::vector<lora::step<Acc>>;

/// The accumulator of adapters held in T.
template <class T>
using acc_of = lora::accumulator_t<T>;
template <class Acc>
inline constexpr double u = std::numeric_limits<Acc>::epsilon() / 2.0;
/// gamma_n of a format.
template <class Acc>
double gamma(index_t n) {
  return static_cast<double>(n) * u<Acc> / (1 - static_cast<double>(n) * u<Acc>);
}

template <class Acc, class Kind>
steps<Acc> of(const Kind& kind, double strength = 1) {
  return kind.template steps<Acc>({.operation = "merge", .strength = strength});
}
/// The one step that a kind says, which must be of this type.
template <class Step, class Acc>
Step only(const steps<Acc>& all) {
  REQUIRE(all.size() == 1);
  REQUIRE(std::holds_alternative<Step>(all[0]));
  return std::get<Step>(all[0]);
}

/// got is within allowed of want, element by element; a NaN is not.
inline bool within(const test::exact_matrix& exact, const test::exact_matrix& want,
                   const test::exact_matrix& allowed) {
  if (exact.rows() != want.rows() || exact.cols() != want.cols()) return false;
  for (index_t i = 0; i < want.rows(); ++i)
    for (index_t j = 0; j < want.cols(); ++j)
      if (!(std::abs(exact(i, j) - want(i, j)) <= allowed(i, j))) {
        UNSCOPED_INFO("(" << i << ", " << j << "): " << static_cast<double>(exact(i, j)) << " for "
                          << static_cast<double>(want(i, j)) << ", allowed "
                          << static_cast<double>(allowed(i, j)));
        return false;
      }
  return true;
}
template <lora::matrix_like M>
bool within(const M& got, const test::exact_matrix& want, const test::exact_matrix& allowed) {
  return within(test::exact(got), want, allowed);
}

template <class Acc>
test::matrix<Acc> delta_of(const lora::low_rank_step& one) {
  return one.factors.visit([&](const auto& l) {
    return test::matrix<Acc>(
        (static_cast<long double>(one.strength) * test::exact_delta(l)).template cast<Acc>());
  });
}
template <class Acc>
test::matrix<Acc> delta_of(const lora::delta_step<Acc>& one, index_t out, index_t in) {
  test::matrix<Acc> D(out, in);
  one.source->rows(0, out, D.data(), in);
  return static_cast<Acc>(one.scale) * D;
}

/// W and its bias after the steps.
template <class Acc>
void merge(const steps<Acc>& all, test::matrix<Acc>& W, vector<Acc>& bias) {
  for (const auto& each : all) {
    if (const auto* low = std::get_if<lora::low_rank_step>(&each)) {
      W += delta_of<Acc>(*low);
    } else if (const auto* delta = std::get_if<lora::delta_step<Acc>>(&each)) {
      W += delta_of(*delta, W.rows(), W.cols());
    } else if (const auto* gain = std::get_if<lora::gain_step<Acc>>(&each)) {
      const Eigen::Map<const vector<Acc>> g(gain->gain.data(), W.rows());
      W = g.asDiagonal() * W;
      if (gain->scales_bias) bias = bias.cwiseProduct(g);
    } else if (const auto* input = std::get_if<lora::input_step<Acc>>(&each)) {
      input->map->rows(W.data(), W.rows(), W.cols());
    } else {
      FAIL("no kind of these tests shifts");
    }
  }
}

/// y = W x + bias with the steps mixed in.
template <class Acc>
test::col_matrix<Acc> mix(const steps<Acc>& all, const test::matrix<Acc>& W, vector<Acc> bias,
                          test::col_matrix<Acc> x) {
  std::vector<test::col_matrix<Acc>> seen(all.size());
  for (std::size_t k = all.size(); k-- > 0;) {
    seen[k] = x;
    if (const auto* input = std::get_if<lora::input_step<Acc>>(&all[k]))
      input->map->columns(x.data(), x.cols(), x.rows());
  }
  test::col_matrix<Acc> y = W * x;
  for (std::size_t k = 0; k < all.size(); ++k) {
    if (const auto* low = std::get_if<lora::low_rank_step>(&all[k])) {
      y += delta_of<Acc>(*low) * seen[k];
    } else if (const auto* delta = std::get_if<lora::delta_step<Acc>>(&all[k])) {
      test::col_matrix<Acc> product(y.rows(), y.cols());
      delta->source->product(seen[k].data(), x.cols(), product.data());
      y += static_cast<Acc>(delta->scale) * product;
    } else if (const auto* gain = std::get_if<lora::gain_step<Acc>>(&all[k])) {
      const Eigen::Map<const vector<Acc>> g(gain->gain.data(), y.rows());
      y = g.asDiagonal() * y;
      if (gain->scales_bias) bias = bias.cwiseProduct(g);
    }
  }
  return y.colwise() + bias;
}

/// A reference case of PEFT: layers l0 and l1 with the adapters `names`, each made by
/// make(file, module, out_features, in_features).
template <class Make>
void check_golden(const std::string& id, const std::vector<std::string>& names, const Make& make,
                  bool stored_in_out = false) {
  if (!test::have_outside()) return;
  INFO(id);
  const golden::case_files c{golden::root() / id};
  const auto tensor = [](const auto& file, const std::string& name) {
    return golden::tensor<double>(file, name);
  };
  const auto turned = [&](const test::matrix<double>& m) {
    return stored_in_out ? test::matrix<double>(m.transpose()) : m;
  };
  std::string scenario;
  for (const auto& name : names) scenario += (scenario.empty() ? "" : "+") + name;

  test::col_matrix<double> mixed = tensor(c.io, "x").transpose(), merged = mixed;
  for (const std::string module : {"l0", "l1"}) {
    INFO(module);
    auto W = turned(tensor(c.base, module + ".weight"));
    vector<double> bias = tensor(c.base, module + ".bias").transpose();
    steps<double> all;
    for (const auto& name : names) {
      const auto file = lora::safetensors::read(c.folder / name / "adapter_model.safetensors");
      const auto kind = make(file, "base_model.model." + module, W.rows(), W.cols());
      CHECK(kind.out_features() == W.rows());
      CHECK(kind.in_features() == W.cols());
      for (auto& each : of<double>(kind)) all.push_back(std::move(each));
    }
    if (module == "l1") {
      mixed = mixed.array().tanh().matrix().eval();
      merged = merged.array().tanh().matrix().eval();
    }
    mixed = mix(all, W, bias, mixed);
    merge(all, W, bias);
    merged = (W * merged).colwise() + bias;
    const auto want = [&](const std::string& what) {
      return tensor(c.io, "merged64." + scenario + "." + module + what);
    };
    CHECK((W - turned(want(".weight"))).cwiseAbs().maxCoeff() < 1e-9);
    if (c.io.contains("merged64." + scenario + "." + module + ".bias"))
      CHECK((bias - want(".bias").transpose()).cwiseAbs().maxCoeff() < 1e-9);
  }
  const test::matrix<double> y = tensor(c.io, "y64_" + scenario).transpose();
  CHECK((mixed - y).cwiseAbs().maxCoeff() < 1e-9);
  CHECK((merged - y).cwiseAbs().maxCoeff() < 1e-9);
}

}  // namespace by_hand
