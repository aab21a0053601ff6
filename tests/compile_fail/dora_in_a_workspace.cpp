// SPDX-License-Identifier: Apache-2.0
// expect: this verb takes these arguments, but not together
#include "lora/lora.hpp"

#include "lora/dora.hpp"

void use(Eigen::MatrixXf& W, const lora::dora_adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  lora::workspace space;
  lora::merge(space, W, l);
#else
  lora::merge(W, l);
#endif
}
