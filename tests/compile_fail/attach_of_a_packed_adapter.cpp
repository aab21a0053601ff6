// SPDX-License-Identifier: Apache-2.0
// expect: a packed_adapter can only be mixed, by forward and apply, because its panels do not give the factors back
#include "lora/lora.hpp"

void use(lora::linear<float>& layer, const lora::adapter<float>& l) {
  [[maybe_unused]] const lora::packed_adapter<float> packed{l};
#ifdef LORA_MUST_FAIL
  layer.attach("style", packed);
#else
  layer.attach("style", l);
#endif
}
