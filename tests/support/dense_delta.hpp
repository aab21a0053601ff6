// SPDX-License-Identifier: Apache-2.0
//
// An adapter of a kind that the library does not know: a delta that is there already, as a matrix.
#pragma once

#include <memory>

#include "lora/steps.hpp"

namespace test {

template <class M>
class dense_delta {
 public:
  using value_type = typename M::Scalar;
  explicit dense_delta(M values) : values_(std::make_shared<const M>(std::move(values))) {}
  lora::index_t out_features() const { return values_->rows(); }
  lora::index_t in_features() const { return values_->cols(); }

  template <class Acc>
  std::vector<lora::step<Acc>> steps(const lora::step_request<Acc>& request) const {
    return {lora::delta_step<Acc>{std::make_shared<const source<Acc>>(values_), request.strength}};
  }

 private:
  template <class Acc>
  class source final : public lora::delta_source<Acc> {
   public:
    explicit source(std::shared_ptr<const M> values) : values_(std::move(values)) {}
    void rows(lora::index_t first, lora::index_t count, Acc* to,
              lora::index_t stride) const override {
      for (lora::index_t i = 0; i < count; ++i)
        for (lora::index_t k = 0; k < values_->cols(); ++k)
          to[i * stride + k] = lora::detail::widen<Acc>((*values_)(first + i, k));
    }
    void product(const Acc* x, lora::index_t tokens, Acc* y) const override {
      for (lora::index_t t = 0; t < tokens; ++t)
        for (lora::index_t i = 0; i < values_->rows(); ++i) {
          Acc sum = 0;
          for (lora::index_t k = 0; k < values_->cols(); ++k)
            sum += lora::detail::widen<Acc>((*values_)(i, k)) * x[t * values_->cols() + k];
          y[t * values_->rows() + i] = sum;
        }
    }

   private:
    std::shared_ptr<const M> values_;
  };

  std::shared_ptr<const M> values_;
};

}  // namespace test
