// SPDX-License-Identifier: Apache-2.0
// expect: this is a whole file, and an adapter belongs to one module
#include "lora/lora.hpp"

#include "lora/io/peft.hpp"

void use(Eigen::MatrixXf& W, const lora::peft::adapter_file<float>& file) {
#ifdef LORA_MUST_FAIL
  lora::merge(W, file);
#else
  for (const auto& name : file.names()) lora::merge(W, file.at(name));
#endif
}
