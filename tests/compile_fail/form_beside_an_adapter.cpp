// SPDX-License-Identifier: Apache-2.0
// expect: what lora::mixed returned goes alone, as the last argument
#include "lora/lora.hpp"

#include "lora/dora.hpp"

void use(Eigen::MatrixXf& W, const lora::dora_adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  lora::merge(W, lora::mixed(W, l), l.factors());
#else
  lora::merge(W, lora::mixed(W, l, l.factors()));
#endif
}
