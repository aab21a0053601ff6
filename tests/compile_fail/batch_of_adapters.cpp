// SPDX-License-Identifier: Apache-2.0
// expect: lora::batch takes packed adapters, which stay where they are
#include "lora/lora.hpp"

lora::index_t use(const std::vector<lora::adapter<float>>& adapters) {
#ifdef LORA_MUST_FAIL
  const lora::batch who{adapters};
#else
  const std::vector<lora::packed_adapter<float>> served(adapters.begin(), adapters.end());
  const lora::batch who{served};
#endif
  return who.tokens();
}
