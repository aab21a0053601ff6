// SPDX-License-Identifier: Apache-2.0
// expect: an entry of a PEFT file may hold more than an adapter .*: pass entry.plain\(\)
#include "lora/lora.hpp"

#include "lora/io/peft_entry.hpp"

lora::index_t use(const std::vector<lora::peft::entry<float>>& entries) {
#ifdef LORA_MUST_FAIL
  const lora::batch who{entries};
#else
  std::vector<lora::packed_adapter<float>> served;
  for (const auto& e : entries) served.emplace_back(e.plain());
  const lora::batch who{served};
#endif
  return who.tokens();
}
