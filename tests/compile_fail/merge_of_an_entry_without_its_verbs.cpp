// SPDX-License-Identifier: Apache-2.0
// expect: the verbs of lora/io/peft_verbs.hpp honour all of it
#include "lora/lora.hpp"

#include "lora/io/peft_entry.hpp"

void use(Eigen::MatrixXf& W, const lora::peft::entry<float>& e) {
#ifdef LORA_MUST_FAIL
  lora::merge(W, e);
#else
  lora::merge(W, e.plain());
#endif
}
