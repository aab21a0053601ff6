// SPDX-License-Identifier: Apache-2.0
//
// (IA)^3: one factor for each output of a layer, or for each input.
//
//   of_outputs   W' = diag(l) W,  b' = diag(l) b      a layer that is not in feedforward_modules
//   of_inputs    W' = W diag(l),  b' = b              a layer that is
//
//   shapes   W out_features x in_features; l out_features or in_features. A weight that is stored
//            in x out (Conv1D) has the same l. A convolution's weight is passed as out x (in *
//            kernel), for of_outputs; of_inputs is not offered for one.
//   strength w: l becomes 1 + w (l - 1), which is W + w (W' - W). PEFT defines no strength for this
//            kind. At strength 0 there is no step.
//   rounding at strength 1 l is exact; otherwise l' is computed in double, with an error of at most
//            2^-53 (2 |w (l - 1)| + |l'|), and rounded once to the accumulator. Then each element
//            of W, b or x is multiplied once.
//   error    of one element of W in the accumulator, unit roundoff u: (2 u + u^2) |W'|, and at
//            strength 1 u |W'|, and what underflows; the error of l' in double comes on top.
//   undo     divides by l'; PEFT divides by l + 1e-8. An l' of 0 is refused: its part of W is lost.
//   cost     one multiplication for each element of W, or of the layer's outputs or inputs.
//   throws   shape_error for a negative number of features.
// Liu et al., arXiv 2205.05638; PEFT 0.21, tuners/ia3/layer.py (ia3_l).
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "lora/concepts.hpp"
#include "lora/detail/convert.hpp"
#include "lora/error.hpp"
#include "lora/kernel/environment.hpp"
#include "lora/steps.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace detail {

/// diag(l).
template <class Acc>
class diagonal final : public input_map<Acc> {
 public:
  explicit diagonal(std::vector<Acc> l) : l_(std::move(l)) {}

  void columns(Acc* x, index_t tokens, index_t stride) const override { rows(x, tokens, stride); }
  void rows(Acc* rows, index_t count, index_t stride) const override {
    for (index_t i = 0; i < count; ++i, rows += stride)
      for (std::size_t j = 0; j < l_.size(); ++j) rows[j] *= l_[j];
  }
  void undo_rows(const char* operation, Acc* rows, index_t count, index_t stride) const override {
    for (std::size_t j = 0; j < l_.size(); ++j)
      if (detail::is_zero(l_[j]))
        detail::raise_value(operation, "input " + std::to_string(j) +
                                           " has the factor 0, so its column of W is lost");
    for (index_t i = 0; i < count; ++i, rows += stride)
      for (std::size_t j = 0; j < l_.size(); ++j) rows[j] /= l_[j];
  }

 private:
  std::vector<Acc> l_;
};

}  // namespace detail

/// What an ia3_adapter multiplies.
enum class ia3_side { outputs, inputs };

/// The factors l of one layer, in the format that they are stored in. Owns them; immutable.
/// Invariant: there is one for each feature of its side. Values are not looked at. Not an addition
/// to W: two of them on one layer multiply.
template <scalar T>
class [[nodiscard]] ia3_adapter {
 public:
  using value_type = T;

  /// One factor for each output of a layer with that many inputs.
  static ia3_adapter of_outputs(std::vector<T> l, index_t in_features) {
    return ia3_adapter(ia3_side::outputs, std::move(l), in_features, "in_features");
  }
  /// One factor for each input of a layer with that many outputs.
  static ia3_adapter of_inputs(std::vector<T> l, index_t out_features) {
    return ia3_adapter(ia3_side::inputs, std::move(l), out_features, "out_features");
  }

  ia3_side side() const { return side_; }
  const std::vector<T>& l() const { return l_; }
  index_t out_features() const { return side_ == ia3_side::outputs ? factors() : others_; }
  index_t in_features() const { return side_ == ia3_side::inputs ? factors() : others_; }

  /// A gain of the outputs, which scales the bias, or a diagonal map of the inputs.
  template <class Acc>
  std::vector<step<Acc>> steps(const step_request<Acc>& request) const {
    if (detail::is_zero(request.strength)) return {};
    const detail::default_environment environment;
    std::vector<Acc> l = at_strength<Acc>(request.strength);
    if (side_ == ia3_side::outputs) return {gain_step<Acc>{std::move(l), true}};
    return {input_step<Acc>{std::make_shared<const detail::diagonal<Acc>>(std::move(l))}};
  }

 private:
  ia3_adapter(ia3_side side, std::vector<T> l, index_t others, const char* name)
      : side_(side), l_(std::move(l)), others_(others) {
    if (others < 0)
      detail::raise_shape("ia3_adapter", std::string(name) + " is " + std::to_string(others) +
                                             "; it must not be negative");
  }

  index_t factors() const { return static_cast<index_t>(l_.size()); }

  template <class Acc>
  std::vector<Acc> at_strength(double w) const {
    std::vector<Acc> result;
    result.reserve(l_.size());
    for (const T& stored : l_) {
      const auto l = detail::widen<double>(stored);
      result.push_back(static_cast<Acc>(w == 1 ? l : 1 + w * (l - 1)));
    }
    return result;
  }

  ia3_side side_;
  std::vector<T> l_;
  index_t others_;
};

}  // namespace lora::inline LORA_DETAIL_ABI
