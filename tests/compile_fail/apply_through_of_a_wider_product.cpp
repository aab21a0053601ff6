// SPDX-License-Identifier: Apache-2.0
// expect: down\(lora_A\) returns double where y and the factors are narrower
#include "lora/lora.hpp"

#include "lora/through.hpp"

#ifdef LORA_MUST_FAIL
using product = Eigen::MatrixXd;
#else
using product = Eigen::MatrixXf;
#endif

void add(Eigen::MatrixXf& y, const lora::adapter<float>& l) {
  lora::apply_through([&](const auto&) { return product(l.rank(), y.cols()); }, y, l);
}
