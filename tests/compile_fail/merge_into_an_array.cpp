// SPDX-License-Identifier: Apache-2.0
// expect: this is an Eigen array, whose product is another one: pass its matrix, W.matrix\(\)
#include "lora/lora.hpp"

void use(Eigen::ArrayXXf& W, const lora::adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  lora::merge(W, l);
#else
  lora::merge(W.matrix(), l);
#endif
}
