// SPDX-License-Identifier: Apache-2.0
// expect: the elements of x, y or a bias are not float, double, float16 or bfloat16
#include "lora/lora.hpp"

#ifdef LORA_MUST_FAIL
void use(const std::vector<int>& x, std::vector<float>& y, const lora::adapter<float>& l) {
#else
void use(const std::vector<float>& x, std::vector<float>& y, const lora::adapter<float>& l) {
#endif
  lora::apply(x, y, l);
}
