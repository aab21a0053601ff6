// SPDX-License-Identifier: Apache-2.0
// expect: lora::merged and lora::merge_checked take no DoRA adapter
#include "lora/lora.hpp"

#include "lora/dora.hpp"

void use(Eigen::MatrixXf& W, const lora::dora_adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  const auto merged = lora::merged(W, l);
#else
  auto merged = W;
  lora::merge(merged, l);
#endif
}
