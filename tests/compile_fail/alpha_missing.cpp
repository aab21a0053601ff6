// SPDX-License-Identifier: Apache-2.0
// expect: cannot convert .*scaling
#include "lora/lora.hpp"

double scaling(const Eigen::MatrixXf& A, const Eigen::MatrixXf& B) {
#ifdef LORA_MUST_FAIL
  const lora::adapter<float> l{A, B, {}};
#else
  const lora::adapter<float> l{A, B, {.alpha = 16}};
#endif
  return l.scaling();
}
