// SPDX-License-Identifier: Apache-2.0
// expect: cannot convert .*scaling
#include "lora/lora.hpp"

double scaling(const Eigen::MatrixXf& A, const Eigen::MatrixXf& B) {
#ifdef LORA_MUST_FAIL
  const lora::adapter<float> l{A, B, {.rule = lora::scaling_rule::rank_stabilized}};
#else
  const lora::adapter<float> l{A, B, {.alpha = 4, .rule = lora::scaling_rule::rank_stabilized}};
#endif
  return l.scaling();
}
