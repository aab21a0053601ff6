// SPDX-License-Identifier: Apache-2.0
// expect: the matrix to write is an arithmetic expression, which has no memory
#include "lora/lora.hpp"

void use(const Eigen::MatrixXf& W, const Eigen::MatrixXf& x, Eigen::MatrixXf& y,
         const lora::adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  lora::forward(W, x, -y, l);
#else
  lora::forward(W, x, y, l);
#endif
}
