// SPDX-License-Identifier: Apache-2.0
// expect: this Eigen expression is not a matrix in memory with adjacent elements
#include "lora/lora.hpp"

lora::adapter<double> make(const Eigen::MatrixXf& A, const Eigen::MatrixXf& B) {
#ifdef LORA_MUST_FAIL
  return {2 * A, B, {.alpha = 16}};
#else
  return {(2 * A).eval(), B, {.alpha = 16}};
#endif
}
