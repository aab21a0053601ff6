// SPDX-License-Identifier: Apache-2.0
// expect: the elements of x, y or a bias are not float
#include "lora/lora.hpp"

#ifdef LORA_MUST_FAIL
using bias = std::vector<int>;
#else
using bias = std::vector<float>;
#endif
lora::linear<float> make(const Eigen::MatrixXf& W, const bias& b) {
  return lora::linear{lora::with_bias(W, b)};
}
