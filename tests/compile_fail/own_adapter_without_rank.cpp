// SPDX-License-Identifier: Apache-2.0
// expect: this adapter has no const function rank\(\) that returns an integer
#include "lora/lora.hpp"

struct own {
  Eigen::MatrixXf A, B;
  const Eigen::MatrixXf& lora_A() const { return A; }
  const Eigen::MatrixXf& lora_B() const { return B; }
  double scaling() const { return 0.5; }
#ifndef LORA_MUST_FAIL
  lora::index_t rank() const { return A.rows(); }
#endif
};

void use(Eigen::MatrixXf& W, const own& l) { lora::merge(W, l); }
