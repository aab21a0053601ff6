// SPDX-License-Identifier: Apache-2.0
// expect: this is a \(name, adapter\) pair, as a map gives when it is walked: pass its second part
#include "lora/lora.hpp"

#include "lora/io/peft_verbs.hpp"

void use(Eigen::MatrixXf& W, const std::map<std::string, lora::peft::entry<float>>& entries) {
#ifdef LORA_MUST_FAIL
  for (const auto& e : entries) lora::merge(W, e);
#else
  for (const auto& e : entries) lora::merge(W, e.second);
#endif
}
