// SPDX-License-Identifier: Apache-2.0
// expect: 16-bit integers do not say which format their bits are
#include "lora/lora.hpp"

#ifdef LORA_MUST_FAIL
using stored = std::uint16_t;
#else
using stored = lora::float16;
#endif
void use(std::vector<stored>& values, const lora::adapter<float>& l) {
  lora::merge(lora::row_major(values, 4, 3), l);
}
