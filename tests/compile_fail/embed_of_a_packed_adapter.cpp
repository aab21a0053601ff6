// SPDX-License-Identifier: Apache-2.0
// expect: a packed_adapter can only be mixed, by forward and apply, because its panels do not give the factors back
#include "lora/lora.hpp"

#include "lora/embed.hpp"

void use(const Eigen::MatrixXf& W, const std::vector<int>& ids, Eigen::MatrixXf& y,
         const lora::adapter<float>& l) {
#ifdef LORA_MUST_FAIL
  lora::embed(W, ids, y, lora::packed_adapter<float>{l});
#else
  lora::embed(W, ids, y, l);
#endif
}
