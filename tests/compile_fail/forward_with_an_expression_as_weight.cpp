// SPDX-License-Identifier: Apache-2.0
// expect: this Eigen expression is not a matrix in memory with adjacent elements
#include "lora/lora.hpp"

void use(const Eigen::MatrixXf& W, const Eigen::MatrixXf& x, Eigen::MatrixXf& y,
         const lora::adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  lora::forward(W + W, x, y, l);
#else
  lora::forward((W + W).eval(), x, y, l);
#endif
}
