// SPDX-License-Identifier: Apache-2.0
// expect: this is an Eigen array, whose product is another one: pass its matrix
#include "lora/lora.hpp"

lora::linear<float> make(const Eigen::ArrayXXf& W) {
#ifdef LORA_MUST_FAIL
  return lora::linear{W};
#else
  return lora::linear{W.matrix()};
#endif
}
