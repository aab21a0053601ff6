// SPDX-License-Identifier: Apache-2.0
// expect: this is a range, and one adapter is expected: walk the range and pass each
#include "lora/lora.hpp"

void use(Eigen::MatrixXf& W, const std::vector<lora::adapter<float>>& adapters) {
#ifdef LORA_MUST_FAIL
  lora::merge(W, lora::scaled(0.5, adapters));
#else
  for (const auto& l : adapters) lora::merge(W, lora::scaled(0.5, l));
#endif
}
