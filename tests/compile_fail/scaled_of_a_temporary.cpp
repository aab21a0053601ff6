// SPDX-License-Identifier: Apache-2.0
// expect: the adapter is a temporary that owns its factors, and the view would outlive it
#include "lora/lora.hpp"

lora::adapter<float> make();

double scaling() {
#ifdef LORA_MUST_FAIL
  return lora::scaled(0.5, make()).scaling();
#else
  const auto l = make();
  return lora::scaled(0.5, l).scaling();
#endif
}
