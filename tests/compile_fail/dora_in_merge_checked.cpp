// SPDX-License-Identifier: Apache-2.0
// expect: lora::merged and lora::merge_checked take no DoRA adapter
#include "lora/lora.hpp"

#include "lora/dora.hpp"

void use(Eigen::MatrixXf& W, const lora::dora_adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  lora::merge_checked(W, lora::scaled(0.5, l));
#else
  lora::merge(W, lora::scaled(0.5, l));
#endif
}
