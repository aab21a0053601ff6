// SPDX-License-Identifier: Apache-2.0
// expect: no element type of a file is this C\+\+ type
#include "lora/lora.hpp"

#include "lora/io/dtype.hpp"

#ifdef LORA_MUST_FAIL
using element = bool;
#else
using element = unsigned char;
#endif
const auto type = lora::safetensors::dtype_of<element>();  // as file::copy<element> asks
