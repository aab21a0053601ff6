// SPDX-License-Identifier: Apache-2.0
// expect: this Eigen expression is not a matrix in memory with adjacent elements
#include "lora/lora.hpp"

struct tied {
  Eigen::MatrixXf A, B;
#ifdef LORA_MUST_FAIL
  auto lora_A() const { return 2 * A; }
#else
  Eigen::MatrixXf lora_A() const { return 2 * A; }
#endif
  const Eigen::MatrixXf& lora_B() const { return B; }
  double scaling() const { return 0.5; }
  lora::index_t rank() const { return A.rows(); }
};

void use(Eigen::MatrixXf& W, const tied& l) { lora::merge(W, l); }
