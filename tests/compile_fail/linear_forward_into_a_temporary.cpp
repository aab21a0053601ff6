// SPDX-License-Identifier: Apache-2.0
// expect: the matrix to write is a temporary that owns its elements, so the result would be lost
#include "lora/lora.hpp"

void use(const lora::linear<float>& q, const Eigen::VectorXf& x) {
#ifdef LORA_MUST_FAIL
  q.forward(x, Eigen::VectorXf(4));
#else
  Eigen::VectorXf y(4);
  q.forward(x, y);
#endif
}
