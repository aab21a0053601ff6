// SPDX-License-Identifier: Apache-2.0
//
// VeRA: a low-rank difference whose matrices all layers share, with trained factors of each layer.
//
//   W' = W + w diag(lambda_b) B[:out, :] diag(lambda_d) A[:, :in]
//
//   shapes   A rank x at least in_features, B at least out_features x rank, lambda_b out_features
//            and lambda_d rank values; W out_features x in_features. There is no alpha.
//   strength w; at strength 0 there is no step.
//   rounding lambda_d is multiplied into A and lambda_b into B in the accumulator's format: one
//            rounding of each element (none for float16 and bfloat16, whose products float holds,
//            but for overflow and underflow). The rest is a low_rank step.
//   error    as that of an adapter with these factors (docs/numerics.md), with gamma_{rank+2} for
//            gamma_{rank}.
//   cost     A and B once for all layers; steps makes rank (in + out) accumulators; then as any
//            adapter.
//   throws   value_error without A or B; shape_error where they do not fit; std::bad_alloc.
// Kopiczko et al., arXiv 2310.11454; PEFT 0.21, tuners/vera/layer.py.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "lora/adapter.hpp"
#include "lora/concepts.hpp"
#include "lora/detail/convert.hpp"
#include "lora/error.hpp"
#include "lora/kernel/environment.hpp"
#include "lora/steps.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// The factors of one layer in the format that they are stored in, and the matrices that it shares.
/// Immutable. Invariant: A and B have one rank and cover the layer. Values are not looked at. Not
/// low_rank: A and B alone are another difference.
template <scalar T>
class [[nodiscard]] vera_adapter {
 public:
  using value_type = T;
  using matrix = detail::row_major_matrix<T>;

  vera_adapter(std::shared_ptr<const matrix> A, std::shared_ptr<const matrix> B,
               std::vector<T> lambda_b, std::vector<T> lambda_d, index_t in_features)
      : A_(std::move(A)),
        B_(std::move(B)),
        lambda_b_(std::move(lambda_b)),
        lambda_d_(std::move(lambda_d)),
        in_(in_features) {
    if (A_ == nullptr || B_ == nullptr) detail::raise_value("vera_adapter", "A or B is not there");
    if (A_->rows() != rank() || B_->cols() != rank())
      detail::raise_shape("vera_adapter",
                          "A is " + detail::shape_text<index_t>(A_->rows(), A_->cols()) +
                              ", B is " + detail::shape_text<index_t>(B_->rows(), B_->cols()) +
                              " and lambda_d has " + std::to_string(rank()) +
                              " values; the ranks must be one");
    if (in_ < 0 || in_ > A_->cols() || out_features() > B_->rows())
      detail::raise_shape("vera_adapter", "the layer is " +
                                              detail::shape_text(out_features(), in_) +
                                              " (out_features x in_features), of which A has " +
                                              std::to_string(A_->cols()) + " inputs and B " +
                                              std::to_string(B_->rows()) + " outputs");
  }

  const std::shared_ptr<const matrix>& A() const { return A_; }
  const std::shared_ptr<const matrix>& B() const { return B_; }
  const std::vector<T>& lambda_b() const { return lambda_b_; }
  const std::vector<T>& lambda_d() const { return lambda_d_; }
  index_t rank() const { return static_cast<index_t>(lambda_d_.size()); }
  index_t out_features() const { return static_cast<index_t>(lambda_b_.size()); }
  index_t in_features() const { return in_; }

  /// One low_rank step.
  template <class Acc>
  std::vector<step<Acc>> steps(const step_request<Acc>& request) const {
    if (detail::is_zero(request.strength) || rank() == 0) return {};
    const detail::default_environment environment;
    using widened = detail::row_major_matrix<Acc>;
    const auto product = [](const T& a, const T& b) {
      return static_cast<Acc>(detail::widen<double>(a) * detail::widen<double>(b));
    };
    const auto A = widened::NullaryExpr(rank(), in_, [&](index_t i, index_t j) {
      return product(lambda_d_[static_cast<std::size_t>(i)], (*A_)(i, j));
    });
    const auto B = widened::NullaryExpr(out_features(), rank(), [&](index_t i, index_t j) {
      return product(lambda_b_[static_cast<std::size_t>(i)], (*B_)(i, j));
    });
    const scaling unit{.alpha = 1, .rule = scaling_rule::fixed};
    return {low_rank_step{any_factors(std::make_shared<const adapter<Acc>>(A, B, unit)),
                          request.strength}};
  }

 private:
  std::shared_ptr<const matrix> A_, B_;
  std::vector<T> lambda_b_, lambda_d_;
  index_t in_;
};
static_assert(adapter_kind<vera_adapter<float>> && !low_rank<vera_adapter<float>>);

}  // namespace lora::inline LORA_DETAIL_ABI
