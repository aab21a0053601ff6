// SPDX-License-Identifier: Apache-2.0
// expect: this Eigen expression is not a matrix in memory with adjacent elements
#include "lora/lora.hpp"

void use(const Eigen::MatrixXf& W, const Eigen::VectorXf& b, const Eigen::MatrixXf& x,
         Eigen::MatrixXf& y) {
#ifdef LORA_MUST_FAIL
  lora::forward(lora::with_bias(W, 2 * b), x, y);
#else
  lora::forward(lora::with_bias(W, (2 * b).eval()), x, y);
#endif
}
