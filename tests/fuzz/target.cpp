// SPDX-License-Identifier: Apache-2.0
//
// libFuzzer's entry for the target that FUZZ_TARGET names.
#include "targets.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  // A buffer of its own, so that the sanitizer sees the first byte behind it.
  std::vector<std::byte> bytes(size);
  if (size != 0) std::memcpy(bytes.data(), data, size);
  fuzz::FUZZ_TARGET(bytes);
  return 0;
}
