// SPDX-License-Identifier: Apache-2.0
// expect: the vector to write is read-only
#include "lora/lora.hpp"

#ifdef LORA_MUST_FAIL
void use(const std::vector<float>& x, const std::vector<float>& y, const lora::adapter<float>& l) {
#else
void use(const std::vector<float>& x, std::vector<float>& y, const lora::adapter<float>& l) {
#endif
  lora::apply(x, y, l);
}
