// SPDX-License-Identifier: Apache-2.0
// expect: lora_A\(\) or lora_B\(\) of this adapter returns no matrix of float
#include "lora/lora.hpp"

#ifdef LORA_MUST_FAIL
using factor = Eigen::MatrixXi;
#else
using factor = Eigen::MatrixXf;
#endif
struct own {
  factor A, B;
  const factor& lora_A() const { return A; }
  const factor& lora_B() const { return B; }
  double scaling() const { return 0.5; }
  lora::index_t rank() const { return A.rows(); }
};

void use(Eigen::MatrixXf& W, const std::vector<own>& all) { lora::unmerge(W, all); }
