// SPDX-License-Identifier: Apache-2.0
// expect: a packed_adapter can only be mixed, by forward and apply, because its panels do not give the factors back
#include "lora/lora.hpp"

void use([[maybe_unused]] Eigen::MatrixXf& W, const lora::adapter<float>& l) {
  const lora::packed_adapter<float> packed{l};
#ifdef LORA_MUST_FAIL
  lora::merge(W, packed);
#else
  lora::merge(W, l);
#endif
}
