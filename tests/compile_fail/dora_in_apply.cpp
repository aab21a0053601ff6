// SPDX-License-Identifier: Apache-2.0
// expect: a DoRA adapter scales the base's part, too: call lora::attach\(W, l...\) once and pass what it returns
#include "lora/lora.hpp"

#include "lora/dora.hpp"

void use([[maybe_unused]] const Eigen::MatrixXf& W, const Eigen::VectorXf& x, Eigen::VectorXf& y,
         const lora::dora_adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  lora::apply(x, y, l);
#else
  lora::apply(x, y, lora::attach(W, l));
#endif
}
