// SPDX-License-Identifier: Apache-2.0
// expect: this Eigen expression is not a matrix in memory with adjacent elements
#include "lora/lora.hpp"

Eigen::MatrixXf use(const Eigen::MatrixXf& W, const lora::adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  return lora::merged(2 * W, l);
#else
  return lora::merged((2 * W).eval(), l);
#endif
}
