// SPDX-License-Identifier: Apache-2.0
// expect: the factors have a wider scalar than the adapter, so storing them would round silently
#include "lora/lora.hpp"

auto make(const Eigen::MatrixXf& A, const Eigen::MatrixXd& B) {
#ifdef LORA_MUST_FAIL
  return lora::adapter{A, B, {.alpha = 16}};  // the scalar of lora_A
#else
  return lora::adapter<double>{A, B, {.alpha = 16}};
#endif
}
