// SPDX-License-Identifier: Apache-2.0
//
// leading_part of a base whose first columns are nearly dependent: its error grows with their
// condition, and no faster.
#include <Eigen/QR>
#include <Eigen/SVD>
#include <cmath>

#include "lora/residual.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

namespace {

using lora::index_t;
using real_matrix = Eigen::Matrix<long double, Eigen::Dynamic, Eigen::Dynamic>;

/// W projected on the span of some columns, in long double, which are far from dependent.
real_matrix projected(const real_matrix& columns, const real_matrix& W) {
  const real_matrix gram = columns.transpose() * columns;
  return columns * gram.ldlt().solve(columns.transpose() * W);
}

}  // namespace

TEST_CASE("the error of leading_part is that of a base nearby, times the condition of its columns",
          "[residual]") {
  test::random g(20261210);
  for (int k = 0; k < 60; ++k) {
    const index_t out = g.integer(4, 20), in = g.integer(4, 20), r = g.integer(2, 4);
    // Whole numbers; then each column becomes the first plus 2^-bits of itself, which is exact and
    // spans the same.
    Eigen::MatrixXd W = g.integers<double>(out, in, 50);
    const int bits = static_cast<int>(g.integer(0, 44));
    const real_matrix plain = W.leftCols(r).cast<long double>();
    for (index_t j = 1; j < r; ++j) W.col(j) = W.col(0) + std::ldexp(1.0, -bits) * W.col(j);
    const Eigen::VectorXd values =
        Eigen::JacobiSVD<Eigen::MatrixXd>(W.leftCols(r)).singularValues();
    const double condition = values(0) / values(r - 1);
    const Eigen::VectorXd of_plain =
        Eigen::JacobiSVD<Eigen::MatrixXd>(plain.cast<double>()).singularValues();
    if (of_plain(r - 1) < 1) continue;  // whole numbers may be dependent themselves
    CAPTURE(g.seed(), k, out, in, r, bits, condition);
    const auto part = lora::leading_part(W, r);
    const real_matrix want = projected(plain, W.cast<long double>());
    const real_matrix got = part.B.cast<long double>() * part.A.cast<long double>();
    const double error = static_cast<double>((got - want).norm());
    CHECK(error <= static_cast<double>(out * r) * 0x1p-53 * 4 * condition * W.norm());
    // B has orthonormal columns whatever the condition, and the first columns come back without it.
    CHECK((part.B.transpose() * part.B - Eigen::MatrixXd::Identity(r, r)).norm() <=
          static_cast<double>(out * r) * 0x1p-50);
    CHECK((part.B * part.A - W).leftCols(r).norm() <=
          static_cast<double>(out * r) * 0x1p-50 * W.norm());
  }
}
