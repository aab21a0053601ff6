// SPDX-License-Identifier: Apache-2.0
// expect: = delete.  // the adapter is a temporary: name it first
#include "lora/lora.hpp"

lora::adapter<float> make();

double scaling() {
#ifdef LORA_MUST_FAIL
  const lora::adapter_view<float> view = make();
#else
  const lora::adapter<float> owner = make();
  const lora::adapter_view<float> view = owner;
#endif
  return view.scaling();
}
