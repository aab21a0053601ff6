// SPDX-License-Identifier: Apache-2.0
// expect: layers and panels hold float, double, lora::float16 or lora::bfloat16; Eigen's 16-bit types
#include "lora/lora.hpp"

#ifdef LORA_MUST_FAIL
using stored = Eigen::half;
#else
using stored = lora::float16;
#endif
lora::packed_weight<stored> make(
    const Eigen::Matrix<Eigen::half, Eigen::Dynamic, Eigen::Dynamic>& W) {
  return lora::packed_weight<stored>(W);
}
