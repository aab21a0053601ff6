// SPDX-License-Identifier: Apache-2.0
// expect: this adapter is of another kind: make a form of it, lora::mixed\(W, l\)
#include "lora/lora.hpp"

#include "lora/kinds/vera.hpp"
#include "lora/mixed.hpp"

lora::index_t use(const Eigen::MatrixXf& W, const lora::vera_adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  return W.rows() + lora::packed_adapter{l}.rank();
#else
  return lora::mixed(W, l).out_features();
#endif
}
