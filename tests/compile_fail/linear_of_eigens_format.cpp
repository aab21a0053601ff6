// SPDX-License-Identifier: Apache-2.0
// expect: layers and panels hold float, double, lora::float16 or lora::bfloat16; Eigen's 16-bit types
#include "lora/lora.hpp"

#ifdef LORA_MUST_FAIL
using stored = Eigen::bfloat16;
#else
using stored = lora::bfloat16;
#endif
lora::linear<stored> make(const Eigen::Matrix<Eigen::bfloat16, Eigen::Dynamic, Eigen::Dynamic>& W) {
  return lora::linear<stored>(W);
}
