// SPDX-License-Identifier: Apache-2.0
// expect: the ids are a vector, span or array of integers
#include "lora/lora.hpp"

#include "lora/embed.hpp"

#ifdef LORA_MUST_FAIL
using id = float;
#else
using id = int;
#endif
void use(const Eigen::MatrixXf& W, const std::vector<id>& ids, Eigen::MatrixXf& y,
         const lora::adapter<float>& l) {
  lora::embed(W, ids, y, l);
}
