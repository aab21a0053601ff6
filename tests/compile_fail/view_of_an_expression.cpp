// SPDX-License-Identifier: Apache-2.0
// expect: this Eigen expression is not a matrix in memory with adjacent elements
#include "lora/lora.hpp"

lora::index_t rows(const Eigen::MatrixXf& m) {
#ifdef LORA_MUST_FAIL
  return lora::as_matrix(m.cwiseAbs()).rows();
#else
  return lora::as_matrix(m.transpose()).rows();
#endif
}
