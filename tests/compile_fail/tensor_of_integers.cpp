// SPDX-License-Identifier: Apache-2.0
// expect: elements are float, double, float16 or bfloat16 \(lora's or Eigen's\), and no other type
#include "lora/lora.hpp"

#ifdef LORA_MUST_FAIL
using element = int;
#else
using element = float;
#endif
lora::tensor_view<element, 2> make(std::span<element> values) { return {values, {2, 3}}; }
