// SPDX-License-Identifier: Apache-2.0
// expect: a matrix stands where an adapter is expected
#include "lora/lora.hpp"

void use(Eigen::MatrixXf& W, const Eigen::MatrixXf& A, const Eigen::MatrixXf& B) {
#ifdef LORA_MUST_FAIL
  lora::merge(W, lora::adapter<float>{A, B, {.alpha = 16}}, B);
#else
  lora::merge(W, lora::adapter<float>{A, B, {.alpha = 16}});
#endif
}
