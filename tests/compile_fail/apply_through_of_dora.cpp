// SPDX-License-Identifier: Apache-2.0
// expect: a DoRA adapter scales the base's part, too: call lora::attach\(W, l...\) once and pass what it returns
#include "lora/lora.hpp"

#include "lora/dora.hpp"

void use(const Eigen::MatrixXf& W, Eigen::MatrixXf& y, const lora::dora_adapter<float>& l) {
  const auto down = [&](const auto& A) { return Eigen::MatrixXf(A.rows(), y.cols()); };
#ifdef LORA_MUST_FAIL
  lora::apply_through(down, y, l);
#else
  lora::apply_through(down, y, lora::attach(W, l));
#endif
}
