// SPDX-License-Identifier: Apache-2.0
// expect: the matrix to write is a temporary that owns its elements, so the result would be lost
#include "lora/lora.hpp"

#include "lora/io/peft_verbs.hpp"

Eigen::MatrixXf load();

void use(const lora::peft::entry<float>& e) {
#ifdef LORA_MUST_FAIL
  lora::merge(load(), e);
#else
  Eigen::MatrixXf W = load();
  lora::merge(W, e);
#endif
}
