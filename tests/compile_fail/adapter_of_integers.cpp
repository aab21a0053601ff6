// SPDX-License-Identifier: Apache-2.0
// expect: the elements of this matrix are not float, double, float16 or bfloat16
#include "lora/lora.hpp"

double scaling(const Eigen::MatrixXi& A, const Eigen::MatrixXi& B) {
#ifdef LORA_MUST_FAIL
  const lora::adapter<float> l{A, B, {.alpha = 16}};
#else
  const lora::adapter<float> l{A.cast<float>(), B.cast<float>(), {.alpha = 16}};
#endif
  return l.scaling();
}
