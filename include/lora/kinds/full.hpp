// SPDX-License-Identifier: Apache-2.0
//
// A full difference: one number for each element of the weight, as a trained weight minus its base
// (LyCORIS and ComfyUI: diff).
//
//   W' = W + w D
//
//   shapes   D and W out_features x in_features.
//   strength w; at strength 0 there is no step.
//   rounding D is read as it is stored, exactly. What is done with it is the verb's.
//   error    of a product D x in the accumulator, unit roundoff u: gamma_in |D| |x|, and what
//            underflows. Each output is one chain of multiply-adds over in_features: it does not
//            depend on the other tokens, or on threads.
//   cost     mixed 2 out in FLOPs for each token, as much as the base itself; merged one pass over
//            D. D is kept once, however often the adapter is copied and attached. A difference of
//            low rank is cheaper as an adapter.
//   throws   steps nothing of its own; product std::bad_alloc.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "lora/adapter.hpp"
#include "lora/concepts.hpp"
#include "lora/detail/convert.hpp"
#include "lora/detail/part_list.hpp"
#include "lora/kernel/environment.hpp"
#include "lora/matrix_view.hpp"
#include "lora/steps.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace detail {

/// A matrix in memory as the D of a step.
template <class T, class Acc>
class stored_delta final : public delta_source<Acc> {
 public:
  using matrix = detail::row_major_matrix<T>;

  explicit stored_delta(std::shared_ptr<const matrix> D) : D_(std::move(D)) {}

  void rows(index_t first, index_t count, Acc* to, index_t stride) const override {
    for (index_t i = 0; i < count; ++i, to += stride)
      for (index_t j = 0; j < D_->cols(); ++j)
        to[j] = static_cast<Acc>(detail::widen<accumulator_t<T, Acc>>((*D_)(first + i, j)));
  }
  void product(const Acc* x, index_t tokens, Acc* y) const override {
    const detail::default_environment environment;
    const auto pack = detail::weight_packer<Acc, Acc>(as_matrix(*D_));
    workspace space;
    detail::multiply_columns(space, detail::weight_source<Acc, Acc>{.pack = pack},
                             detail::no_adapters, D_->rows(), D_->cols(), x, tokens, y);
  }

 private:
  std::shared_ptr<const matrix> D_;
};

}  // namespace detail

/// D of one layer, row-major in the format that it is stored in. Immutable. Its copies and its
/// steps share D. Values are not looked at.
template <scalar T>
class [[nodiscard]] full_difference {
  using matrix = detail::row_major_matrix<T>;

 public:
  using value_type = T;

  /// Copies D, which is out_features x in_features of any storage order; a narrower scalar is
  /// widened exactly, a wider one is refused at compile time.
  template <matrix_like M>
  explicit full_difference(const M& D)
      : D_(std::make_shared<const matrix>(detail::exact_copy<T>(D))) {}
  /// Takes D without a copy.
  explicit full_difference(matrix&& D) : D_(std::make_shared<const matrix>(std::move(D))) {}

  const detail::row_major_matrix<T>& difference() const { return *D_; }
  index_t out_features() const { return D_->rows(); }
  index_t in_features() const { return D_->cols(); }

  /// One delta step, which keeps D alive.
  template <class Acc>
  std::vector<step<Acc>> steps(const step_request<Acc>& request) const {
    if (detail::is_zero(request.strength)) return {};
    return {delta_step<Acc>{std::make_shared<const detail::stored_delta<T, Acc>>(D_),
                            request.strength}};
  }

 private:
  std::shared_ptr<const matrix> D_;
};

}  // namespace lora::inline LORA_DETAIL_ABI
