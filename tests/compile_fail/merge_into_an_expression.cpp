// SPDX-License-Identifier: Apache-2.0
// expect: the matrix to write is an arithmetic expression, which has no memory
#include "lora/lora.hpp"

void use(Eigen::MatrixXf& W, const lora::adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  lora::merge(2 * W, l);
#else
  W *= 2;
  lora::merge(W, l);
#endif
}
