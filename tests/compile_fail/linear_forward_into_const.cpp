// SPDX-License-Identifier: Apache-2.0
// expect: the vector to write is read-only
#include "lora/lora.hpp"

void use(const lora::linear<float>& q, std::span<const float> x, std::span<float> y) {
#ifdef LORA_MUST_FAIL
  q.forward(x, std::span<const float>(y));
#else
  q.forward(x, y);
#endif
}
