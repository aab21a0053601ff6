// SPDX-License-Identifier: Apache-2.0
// expect: lora_A\(\) or lora_B\(\) of this adapter is not a const function
#include "lora/lora.hpp"

struct own {
  Eigen::MatrixXf A, B;
#ifdef LORA_MUST_FAIL
  const Eigen::MatrixXf& lora_A() { return A; }
#else
  const Eigen::MatrixXf& lora_A() const { return A; }
#endif
  const Eigen::MatrixXf& lora_B() const { return B; }
  double scaling() const { return 0.5; }
  lora::index_t rank() const { return A.rows(); }
};

auto use(own& l) { return lora::delta_weight(l); }
