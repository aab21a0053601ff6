// SPDX-License-Identifier: Apache-2.0
// expect: the container is a temporary, and the view would outlive it: give it a name first
#include "lora/lora.hpp"

std::vector<float> load();

float first() {
#ifdef LORA_MUST_FAIL
  return lora::row_major(load(), 2, 3)(0, 0);
#else
  const auto values = load();
  return lora::row_major(values, 2, 3)(0, 0);
#endif
}
