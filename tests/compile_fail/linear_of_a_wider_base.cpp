// SPDX-License-Identifier: Apache-2.0
// expect: the base weight has a wider scalar than the layer stores, which would round it silently
#include "lora/lora.hpp"

lora::linear<lora::bfloat16> make(const Eigen::MatrixXf& W) {
#ifdef LORA_MUST_FAIL
  return lora::linear<lora::bfloat16>(W);
#else
  return lora::linear<lora::bfloat16>(W.cast<lora::bfloat16>().eval());
#endif
}
