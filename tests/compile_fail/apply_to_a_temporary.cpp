// SPDX-License-Identifier: Apache-2.0
// expect: the matrix to write is a temporary that owns its elements, so the result would be lost
#include "lora/lora.hpp"

void use(const Eigen::VectorXf& x, const lora::adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  lora::apply(x, Eigen::VectorXf(4), l);
#else
  Eigen::VectorXf y = Eigen::VectorXf::Zero(4);
  lora::apply(x, y, l);
#endif
}
