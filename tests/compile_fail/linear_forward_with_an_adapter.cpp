// SPDX-License-Identifier: Apache-2.0
// expect: lora::linear::forward takes x and y, .*: its adapters are those that are attached
#include "lora/lora.hpp"

void use(lora::linear<float>& q, const Eigen::VectorXf& x, Eigen::VectorXf& y,
         const lora::adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  q.forward(x, y, l);
#else
  q.attach("l", l);
  q.forward(x, y);
#endif
}
