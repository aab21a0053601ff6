// SPDX-License-Identifier: Apache-2.0
// expect: this verb takes these arguments, but not together
#include "lora/lora.hpp"

#include "lora/rounding.hpp"

void use(Eigen::MatrixXf& W, const lora::adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  lora::workspace space;
  lora::merge(lora::rounding::as_peft, space, W, l);
#else
  lora::merge(lora::rounding::as_peft, W, l);
#endif
}
