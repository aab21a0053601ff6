// SPDX-License-Identifier: Apache-2.0
//
// Compiled with some flags: the tag of the library's names says what they change.
#include <string_view>

#include "lora/version.hpp"

#define TEXT_OF(a) #a
#define TEXT(a) TEXT_OF(a)
static_assert(std::string_view(TEXT(LORA_DETAIL_ABI)).find("_" TEXT(EXPECTED_TAG) "_") !=
              std::string_view::npos);
