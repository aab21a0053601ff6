// SPDX-License-Identifier: Apache-2.0
// expect: = delete.  // the view would outlive it
#include "lora/lora.hpp"

#include "lora/io/peft_entry.hpp"

lora::peft::entry<float> make();

double weight() {
#ifdef LORA_MUST_FAIL
  return lora::scaled(0.5, make()).weight();
#else
  const auto e = make();
  return lora::scaled(0.5, e).weight();
#endif
}
