// SPDX-License-Identifier: Apache-2.0
// expect: this adapter is of another kind: make a form of it, lora::mixed\(W, l\)
#include "lora/lora.hpp"

#include "lora/kinds/loha.hpp"

void use(Eigen::MatrixXf& D, const lora::loha_adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  D = lora::delta_weight(l);
#else
  D = Eigen::MatrixXf::Zero(l.out_features(), l.in_features());
  lora::merge(D, l);
#endif
}
