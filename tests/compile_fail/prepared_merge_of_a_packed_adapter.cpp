// SPDX-License-Identifier: Apache-2.0
// expect: a packed_adapter can only be mixed, by forward and apply, because its panels do not give the factors back
#include "lora/lora.hpp"

#include "lora/prepared_merge.hpp"

lora::index_t use(const lora::adapter<float>& l) {
  [[maybe_unused]] const lora::packed_adapter<float> packed{l};
#ifdef LORA_MUST_FAIL
  return lora::prepared_merge<float>(6, 8, packed).out_features();
#else
  return lora::prepared_merge<float>(6, 8, l).out_features();
#endif
}
