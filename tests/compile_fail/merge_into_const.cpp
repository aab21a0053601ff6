// SPDX-License-Identifier: Apache-2.0
// expect: the matrix to write is read-only
#include "lora/lora.hpp"

void use(Eigen::MatrixXf& W, const lora::adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  lora::merge(std::as_const(W), l);
#else
  lora::merge(W, l);
#endif
}
