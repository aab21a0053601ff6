// SPDX-License-Identifier: Apache-2.0
// expect: lora::forward takes no entry of a PEFT file, .*: pass entry.plain\(\)
#include "lora/lora.hpp"

#include "lora/io/peft_entry.hpp"

void use(const Eigen::MatrixXf& W, const Eigen::MatrixXf& x, Eigen::MatrixXf& y, const lora::peft::entry<float>& e) {
#ifdef LORA_MUST_FAIL
  lora::forward(W, x, y, e);  // its orientation would be ignored
#else
  lora::forward(W, x, y, e.plain());
#endif
}
