// SPDX-License-Identifier: Apache-2.0
// expect: the vector to write is read-only
#include "lora/lora.hpp"

#ifdef LORA_MUST_FAIL
void use(std::span<const float> x, std::span<const float> y, const lora::adapter<float>& l) {
#else
void use(std::span<const float> x, std::span<float> y, const lora::adapter<float>& l) {
#endif
  lora::apply(x, y, l);
}
