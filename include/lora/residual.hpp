// SPDX-License-Identifier: Apache-2.0
//
// Parts of a weight as low-rank factors (B, A), with B * A the part:
//   principal_part(W, r)   the r largest singular components           PiSSA (arXiv 2404.02948)
//   leading_part(W, r)     W projected on the span of its first r columns, which is Q_r R_r of W =
//                          Q R     OLoRA (2406.01775)
//   smallest_part(W, r)    the r smallest of min(out, in) singular components
//                          KaSA (2412.06071)
//
// Initializations of LoRA that also change the base subtract such a part from it. Given the base as
// it was published, the part can be computed again, and an adapter of the changed base becomes a
// plain adapter of the published one: its delta minus the part (peft::converted). Computed in
// double, from W widened exactly.
//   error    B * A is the part of a W + E, with |E| of the order of 2^-53 |W| times the sizes. From
//            W's own part it is as far as |E| times the condition number of the first r columns
//            (leading), or about sigma / (sigma - sigma') of the two singular values between which
//            the part is cut (principal, smallest): nearly dependent columns, or nearly equal
//            values, lose digits. Unique where those columns are independent, or those values
//            differ. Signs of vectors and of Q cancel in B * A.
//   shapes   W out x in; B out x r, A r x in
//   cost     a full singular value decomposition, O(out in min(out, in)), or a QR of r columns
//   throws   value_error when r is not in [0, min(out, in)] or W is not finite.
// This header compiles slowly (Eigen's decompositions); nothing else of the library includes it.
#pragma once

#include "lora/detail/eigen.hpp"

#include <Eigen/QR>
#include <Eigen/SVD>
#include <algorithm>
#include <string>

#include "lora/concepts.hpp"
#include "lora/detail/convert.hpp"
#include "lora/error.hpp"
#include "lora/kernel/environment.hpp"
#include "lora/matrix_view.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// A matrix as the product B * A of two thin ones.
struct low_rank_part {
  Eigen::MatrixXd B, A;
};

namespace detail {

template <class M>
Eigen::MatrixXd checked(const char* operation, const M& W, index_t rank) {
  const auto view = as_matrix(W);
  if (rank < 0 || rank > std::min(view.rows(), view.cols()))
    detail::raise_value(operation, "rank " + std::to_string(rank) + " of a weight " +
                                       detail::shape_text(view.rows(), view.cols()));
  Eigen::MatrixXd result(view.rows(), view.cols());
  for (index_t j = 0; view.rows() != 0 && j < view.cols(); ++j)
    for (index_t i = 0; i < view.rows(); ++i) {
      if (!detail::is_finite(view(i, j)))
        detail::raise_value(operation, "the weight holds a value that is not finite");
      result(i, j) = detail::widen<double>(view(i, j));
    }
  return result;
}

/// Components [first, first + count) in falling order of their singular values.
/// A template, so that only who calls it compiles the decomposition, which takes 20 seconds.
template <class M>
low_rank_part components(const M& W, index_t first, index_t count) {
  if (count == 0)
    return {Eigen::MatrixXd(W.rows(), 0), Eigen::MatrixXd(0, W.cols())};  // W may be empty
  const Eigen::BDCSVD<M> svd(W, Eigen::ComputeThinU | Eigen::ComputeThinV);
  return {svd.matrixU().middleCols(first, count) *
              svd.singularValues().segment(first, count).asDiagonal(),
          svd.matrixV().middleCols(first, count).transpose()};
}

}  // namespace detail

template <class M>
  requires matrix_like<M>
low_rank_part principal_part(const M& W, index_t rank) {
  const detail::default_environment environment;
  return detail::components(detail::checked("principal_part", W, rank), 0, rank);
}

template <class M>
  requires matrix_like<M>
low_rank_part smallest_part(const M& W, index_t rank) {
  const detail::default_environment environment;
  const auto values = detail::checked("smallest_part", W, rank);
  return detail::components(values, std::min(values.rows(), values.cols()) - rank, rank);
}

template <class M>
  requires matrix_like<M>
low_rank_part leading_part(const M& W, index_t rank) {
  const detail::default_environment environment;
  const auto values = detail::checked("leading_part", W, rank);
  if (rank == 0) return {Eigen::MatrixXd(values.rows(), 0), Eigen::MatrixXd(0, values.cols())};
  const Eigen::HouseholderQR<Eigen::MatrixXd> qr(values.leftCols(rank));
  const Eigen::MatrixXd Q = qr.householderQ() * Eigen::MatrixXd::Identity(values.rows(), rank);
  return {Q, Q.transpose() * values};
}

}  // namespace lora::inline LORA_DETAIL_ABI
