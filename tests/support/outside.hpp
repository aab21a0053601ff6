// SPDX-License-Identifier: Apache-2.0
//
// The folder with reference files of other projects, for tests that are worth running without it.
#pragma once

#include <filesystem>

#include "support/catch.hpp"

namespace test {

inline const std::filesystem::path outside = LORA_OUTSIDE_DIR;

/// False with a message when the files are not there.
inline bool have_outside() {
  if (std::filesystem::is_directory(outside)) return true;
  WARN("skipped: there is no " << outside.string());
  CHECK_FALSE(std::filesystem::exists(outside));
  return false;
}

}  // namespace test
