// SPDX-License-Identifier: Apache-2.0
//
// LORA_TEST_ASAN: 1 in a build with AddressSanitizer, as gcc and clang say it, else 0.
#pragma once

#if defined(__SANITIZE_ADDRESS__)
#define LORA_TEST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define LORA_TEST_ASAN 1
#endif
#endif
#if !defined(LORA_TEST_ASAN)
#define LORA_TEST_ASAN 0
#endif

namespace test {

/// Trials of a random test: an eighth in a build with sanitizers, where one takes 20 times as long.
constexpr int trials(int count) { return LORA_TEST_ASAN ? (count + 7) / 8 : count; }

}  // namespace test
