// SPDX-License-Identifier: Apache-2.0
// expect: this Eigen expression is not a matrix in memory with adjacent elements
#include "lora/lora.hpp"

lora::linear<float> make(const Eigen::MatrixXf& W) {
#ifdef LORA_MUST_FAIL
  return lora::linear<float>(0.5F * W);
#else
  return lora::linear<float>((0.5F * W).eval());
#endif
}
