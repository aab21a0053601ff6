// SPDX-License-Identifier: Apache-2.0
// expect: the matrix to write is a temporary that owns its elements, so the result would be lost
#include "lora/lora.hpp"

void use(const Eigen::MatrixXf& W, const Eigen::VectorXf& x, const lora::adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  lora::forward(W, x, Eigen::VectorXf(W.rows()), l);
#else
  Eigen::VectorXf y(W.rows());
  lora::forward(W, x, y, l);
#endif
}
