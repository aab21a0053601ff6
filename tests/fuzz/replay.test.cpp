// SPDX-License-Identifier: Apache-2.0
//
// The fuzzer's corpus, replayed: inputs that once reached something new. scripts/fuzz makes and
// grows it.
#include <filesystem>
#include <fstream>

#include "fuzz/targets.hpp"
#include "support/catch.hpp"

namespace {

template <class Target>
std::size_t replay(const std::string& name, const Target& target) {
  std::size_t count = 0;
  std::ifstream file(std::filesystem::path(LORA_SOURCE_DIR) / "tests/fuzz" / (name + ".corpus"),
                     std::ios::binary);
  // Inputs one after the other, each behind its length in four bytes.
  for (std::uint32_t size = 0; file.read(reinterpret_cast<char*>(&size), 4); ++count) {
    std::vector<std::byte> bytes(size);
    file.read(reinterpret_cast<char*>(bytes.data()), size);
    target(bytes);
  }
  return count;
}

}  // namespace

TEST_CASE("the fuzzer's corpus still gives no finding", "[fuzz]") {
  CHECK(replay("safetensors", [](const auto& bytes) { fuzz::safetensors(bytes); }) > 100);
  CHECK(replay("peft", [](const auto& bytes) { fuzz::peft(bytes); }) > 100);
}
