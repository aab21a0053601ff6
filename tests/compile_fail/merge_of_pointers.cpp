// SPDX-License-Identifier: Apache-2.0
// expect: this is a pointer where an adapter is expected: pass the adapter, \*pointer
#include <memory>

#include "lora/lora.hpp"

void use(Eigen::MatrixXf& W, const std::vector<std::unique_ptr<lora::adapter<float>>>& all) {
#ifdef LORA_MUST_FAIL
  lora::merge(W, all);
#else
  std::vector<lora::scaled_adapter<lora::adapter<float>>> views;
  for (const auto& l : all) views.push_back(lora::scaled(1, *l));
  lora::merge(W, views);
#endif
}
