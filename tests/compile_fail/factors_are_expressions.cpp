// SPDX-License-Identifier: Apache-2.0
// expect: this Eigen expression is not a matrix in memory with adjacent elements
#include "lora/lora.hpp"

double scaling(const Eigen::MatrixXf& A, const Eigen::MatrixXf& B) {
  const lora::scaling s{.alpha = 16};
#ifdef LORA_MUST_FAIL
  return lora::basic_adapter(A + A, B, s).scaling();
#else
  return lora::basic_adapter((A + A).eval(), B, s).scaling();
#endif
}
