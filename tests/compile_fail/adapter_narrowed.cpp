// SPDX-License-Identifier: Apache-2.0
// expect: the factors have a wider scalar than the adapter, so storing them would round silently
#include "lora/lora.hpp"

lora::adapter<float> make(const Eigen::MatrixXd& A, const Eigen::MatrixXd& B) {
#ifdef LORA_MUST_FAIL
  return {A, B, {.alpha = 16}};
#else
  return {A.cast<float>(), B.cast<float>(), {.alpha = 16}};
#endif
}
