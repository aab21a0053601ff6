// SPDX-License-Identifier: Apache-2.0
// expect: this adapter is of another kind: make a form of it, lora::mixed\(W, l\)
#include "lora/lora.hpp"

#include "lora/kinds/oft.hpp"
#include "lora/mixed.hpp"

lora::index_t use(const Eigen::MatrixXf& W, const std::vector<lora::oft_adapter<float>>& all) {
#ifdef LORA_MUST_FAIL
  const lora::batch who{all};
  return W.rows() + who.tokens();
#else
  std::vector<lora::mixed_form<float>> forms;
  for (const auto& l : all) forms.push_back(lora::mixed(W, l));
  return lora::batch{forms}.tokens();
#endif
}
