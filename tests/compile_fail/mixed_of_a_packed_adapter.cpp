// SPDX-License-Identifier: Apache-2.0
// expect: a packed_adapter can only be mixed, by forward and apply, because its panels do not give the factors back
#include "lora/lora.hpp"

#include "lora/dora.hpp"

lora::index_t use(const Eigen::MatrixXf& W, const lora::adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  return lora::mixed(W, lora::packed_adapter<float>{l}).out_features();
#else
  return lora::mixed(W, l).out_features();
#endif
}
