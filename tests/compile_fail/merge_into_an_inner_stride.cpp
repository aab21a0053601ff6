// SPDX-License-Identifier: Apache-2.0
// expect: the matrix to write has an inner stride other than 1
#include "lora/lora.hpp"

#ifdef LORA_MUST_FAIL
using stride = Eigen::InnerStride<2>;
#else
using stride = Eigen::InnerStride<1>;
#endif
void use(float* data, const lora::adapter<float>& l) {
  Eigen::Map<Eigen::MatrixXf, 0, stride> W(data, 4, 3);
  lora::merge(W, l);
}
