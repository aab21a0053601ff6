// SPDX-License-Identifier: Apache-2.0
// expect: lora::delta_weight takes no DoRA adapter: it scales the rows of W, too
#include "lora/lora.hpp"

#include "lora/dora.hpp"

void use(Eigen::MatrixXf& D, const lora::dora_adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  D = lora::delta_weight(l);
#else
  D = lora::delta_weight(l.factors());
#endif
}
