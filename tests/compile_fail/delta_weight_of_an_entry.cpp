// SPDX-License-Identifier: Apache-2.0
// expect: an entry of a PEFT file may hold more than an adapter .*: pass entry.plain\(\)
#include "lora/lora.hpp"

#include "lora/io/peft_entry.hpp"

void use(Eigen::MatrixXf& D, const lora::peft::entry<float>& e) {
#ifdef LORA_MUST_FAIL
  D = lora::delta_weight(e);
#else
  D = lora::delta_weight(e.plain());
#endif
}
