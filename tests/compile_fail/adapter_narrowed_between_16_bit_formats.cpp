// SPDX-License-Identifier: Apache-2.0
// expect: the factors have a wider scalar than the adapter, so storing them would round silently
#include "lora/lora.hpp"

using factor = Eigen::Matrix<lora::bfloat16, Eigen::Dynamic, Eigen::Dynamic>;

#ifdef LORA_MUST_FAIL
using other = lora::float16;
#else
using other = float;
#endif
lora::adapter<other> make(const factor& A, const factor& B) { return {A, B, {.alpha = 16}}; }
