// SPDX-License-Identifier: Apache-2.0
// expect: an adapter stands where the weight is expected: the weight comes first
#include "lora/lora.hpp"

void use(Eigen::MatrixXf& W, const lora::adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  lora::merge(l, W);
#else
  lora::merge(W, l);
#endif
}
