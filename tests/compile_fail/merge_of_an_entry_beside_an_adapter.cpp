// SPDX-License-Identifier: Apache-2.0
// expect: the verbs of lora/io/peft_verbs.hpp honour all of it and take entries alone
#include "lora/lora.hpp"

#include "lora/io/peft_verbs.hpp"

void use(Eigen::MatrixXf& W, const lora::peft::entry<float>& e, const lora::adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  lora::merge(W, l, lora::scaled(0.5, e));
#else
  lora::merge(W, e);
  lora::merge(W, l);
#endif
}
