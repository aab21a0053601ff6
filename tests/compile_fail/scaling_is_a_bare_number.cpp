// SPDX-License-Identifier: Apache-2.0
// expect: an adapter needs its alpha by name
#include "lora/lora.hpp"

double scaling(const Eigen::MatrixXf& A, const Eigen::MatrixXf& B) {
#ifdef LORA_MUST_FAIL
  const lora::adapter<float> l{A, B, 2.0};
#else
  const lora::adapter<float> l{A, B, {.alpha = 2.0}};
#endif
  return l.scaling();
}
