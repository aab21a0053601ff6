// SPDX-License-Identifier: Apache-2.0
// expect: a packed_adapter can only be mixed, by forward and apply, because its panels do not give the factors back
#include "lora/lora.hpp"

#include "lora/through.hpp"

void use(Eigen::MatrixXf& y, const lora::adapter<float>& l) {
  [[maybe_unused]] const lora::packed_adapter<float> packed{l};
  const auto down = [](const auto& lora_A) {
    return Eigen::MatrixXf::Ones(lora_A.rows(), 3).eval();
  };
#ifdef LORA_MUST_FAIL
  lora::apply_through(down, y, packed);
#else
  lora::apply_through(down, y, l);
#endif
}
