// SPDX-License-Identifier: Apache-2.0
// expect: the elements of x, y or a bias are not float, double, float16 or bfloat16
#include "lora/lora.hpp"

#ifdef LORA_MUST_FAIL
using input = Eigen::MatrixXi;
#else
using input = Eigen::MatrixXf;
#endif
void use(const Eigen::MatrixXf& W, const input& x, Eigen::MatrixXf& y,
         const lora::adapter<float>& l) {
  lora::forward(W, x, y, l);
}
