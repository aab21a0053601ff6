// SPDX-License-Identifier: Apache-2.0
// expect: the elements of this matrix are not float, double, float16 or bfloat16
#include "lora/lora.hpp"

#ifdef LORA_MUST_FAIL
void use(Eigen::MatrixXi& W, const lora::adapter<float>& l) {
#else
void use(Eigen::MatrixXf& W, const lora::adapter<float>& l) {
#endif
  lora::merge(W, l);
}
