// SPDX-License-Identifier: Apache-2.0
// expect: an entry of a PEFT file may hold more than an adapter .*: pass entry.plain\(\)
#include "lora/lora.hpp"

#include "lora/io/peft_entry.hpp"

lora::index_t use(const lora::peft::entry<float>& e) {
#ifdef LORA_MUST_FAIL
  return lora::packed_adapter{e}.rank();
#else
  return lora::packed_adapter{e.plain()}.rank();
#endif
}
