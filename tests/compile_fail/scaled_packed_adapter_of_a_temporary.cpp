// SPDX-License-Identifier: Apache-2.0
// expect: the packed adapter is a temporary, and the result would look at it
#include "lora/lora.hpp"

lora::packed_adapter<float> load();

double use() {
#ifdef LORA_MUST_FAIL
  return lora::scaled(0.5, load()).scaling();
#else
  const auto packed = load();
  return lora::scaled(0.5, packed).scaling();
#endif
}
