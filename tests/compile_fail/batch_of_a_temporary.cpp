// SPDX-License-Identifier: Apache-2.0
// expect: the vector of adapters is a temporary, and the batch would look at it
#include "lora/lora.hpp"

std::vector<lora::packed_adapter<float>> load();

lora::index_t use() {
#ifdef LORA_MUST_FAIL
  const lora::batch<float> who(load());
#else
  const auto served = load();
  const lora::batch<float> who(served);
#endif
  return who.tokens();
}
