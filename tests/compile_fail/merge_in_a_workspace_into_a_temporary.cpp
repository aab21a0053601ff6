// SPDX-License-Identifier: Apache-2.0
// expect: the matrix to write is a temporary that owns its elements, so the result would be lost
#include "lora/lora.hpp"

Eigen::MatrixXf load();

void use(lora::workspace& space, const lora::adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  lora::merge(space, load(), l);
#else
  Eigen::MatrixXf W = load();
  lora::merge(space, W, l);
#endif
}
