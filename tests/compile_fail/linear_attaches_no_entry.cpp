// SPDX-License-Identifier: Apache-2.0
// expect: an entry of a PEFT file may hold more than an adapter .*: pass entry.plain\(\)
#include "lora/lora.hpp"

#include "lora/io/peft_entry.hpp"

void use(lora::linear<float>& q, const lora::peft::entry<float>& e) {
#ifdef LORA_MUST_FAIL
  q.attach("style", e);
#else
  q.attach("style", e.plain());
#endif
}
