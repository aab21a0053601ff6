// SPDX-License-Identifier: Apache-2.0
// expect: lora::merge: these rows replace rows of W and add nothing: assign_rows.W, rows.
#include "lora/embed.hpp"

void use(Eigen::MatrixXf& W, const lora::replaced_rows<float>& rows) {
#ifdef LORA_MUST_FAIL
  lora::merge(W, rows);
#else
  lora::assign_rows(W, rows);
#endif
}
