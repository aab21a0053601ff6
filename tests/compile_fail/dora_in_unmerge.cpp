// SPDX-License-Identifier: Apache-2.0
// expect: lora::unmerge takes no DoRA adapter, whose norms are those of W before the merge
#include "lora/lora.hpp"

#include "lora/dora.hpp"

void use(Eigen::MatrixXf& W, const lora::dora_adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  lora::unmerge(W, l);
#else
  const auto layer = lora::mixed(W, l);
  lora::merge(W, layer);
  lora::unmerge(W, layer);
#endif
}
