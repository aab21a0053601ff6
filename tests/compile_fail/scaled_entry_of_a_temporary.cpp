// SPDX-License-Identifier: Apache-2.0
// expect: = delete.  // the result would look at it
#include "lora/lora.hpp"

#include "lora/io/peft_entry.hpp"

lora::peft::entry<float> make();

double weight() {
#ifdef LORA_MUST_FAIL
  return lora::scaled(0.5, make()).strength();
#else
  const auto e = make();
  return lora::scaled(0.5, e).strength();
#endif
}
