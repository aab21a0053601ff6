// SPDX-License-Identifier: Apache-2.0
// expect: the elements of x, y or a bias are not float, double, float16 or bfloat16
#include "lora/lora.hpp"

#ifdef LORA_MUST_FAIL
using input = std::vector<int>;
#else
using input = std::vector<float>;
#endif
void use(const lora::linear<float>& q, const input& x, std::vector<float>& y) { q.forward(x, y); }
