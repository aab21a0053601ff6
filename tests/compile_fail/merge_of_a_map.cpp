// SPDX-License-Identifier: Apache-2.0
// expect: this is a \(name, adapter\) pair, as a map gives when it is walked: pass its second part
#include "lora/lora.hpp"

void use(Eigen::MatrixXf& W, const std::map<std::string, lora::adapter<float>>& all) {
#ifdef LORA_MUST_FAIL
  lora::merge(W, all);
#else
  for (const auto& [name, l] : all) lora::merge(W, l);
#endif
}
