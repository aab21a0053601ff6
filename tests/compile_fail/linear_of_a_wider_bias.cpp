// SPDX-License-Identifier: Apache-2.0
// expect: the bias has a wider scalar than the layer computes in
#include "lora/lora.hpp"

#ifdef LORA_MUST_FAIL
using vector = Eigen::VectorXd;
#else
using vector = Eigen::VectorXf;
#endif
lora::linear<float> make(const Eigen::MatrixXf& W, const vector& b) {
  return lora::linear<float>(lora::with_bias(W, b));
}
