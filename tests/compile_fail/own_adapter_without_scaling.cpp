// SPDX-License-Identifier: Apache-2.0
// expect: this adapter has no const function scaling\(\) that returns a number
#include "lora/lora.hpp"

struct own {
  Eigen::MatrixXf A, B;
  const Eigen::MatrixXf& lora_A() const { return A; }
  const Eigen::MatrixXf& lora_B() const { return B; }
#ifndef LORA_MUST_FAIL
  double scaling() const { return 0.5; }
#endif
  lora::index_t rank() const { return A.rows(); }
};

void use(const Eigen::VectorXf& x, Eigen::VectorXf& y, const own& l) { lora::apply(x, y, l); }
