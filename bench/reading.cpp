// SPDX-License-Identifier: Apache-2.0
//
// What reading an adapter from disk takes: seconds, and the peak of resident memory.
//
//   reading make DIR [MB]      a bfloat16 LoRA of rank 64 in DIR, of 500 MB if not said otherwise
//   reading adapters DIR       peft::adapters: as stored
//   reading bfloat16 DIR       peft::read<bfloat16>
//   reading float DIR          peft::read<float>: twice the bytes of the file
//   reading file DIR           safetensors::read: the whole file
//   reading index DIR          safetensors::open: its header
//
// The peak is that of the process, so that each way is a run of its own. Run it twice: the first
// reads from the disk, the second from the system's cache.
#include <sys/resource.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

#include "lora/io/peft_adapters.hpp"
#include "lora/io/safetensors_write.hpp"

namespace {

void make(const std::filesystem::path& directory, double megabytes) {
  constexpr std::uint64_t features = 4096, rank = 64;
  // Every tensor looks at the same values: what is measured does not depend on them.
  const std::vector<lora::bfloat16> values(features * rank, lora::bfloat16(0.25F));
  std::vector<lora::safetensors::tensor> tensors;
  for (std::uint64_t layer = 0, bytes = 0; static_cast<double>(bytes) < megabytes * 1e6; ++layer)
    for (const std::string module : {"q_proj", "v_proj"})
      for (const bool is_A : {true, false}) {
        const std::string name = "base_model.model.model.layers." + std::to_string(layer) +
                                 ".self_attn." + module + (is_A ? ".lora_A" : ".lora_B") +
                                 ".weight";
        std::vector<std::uint64_t> shape{features, rank};
        if (is_A) shape = {rank, features};
        tensors.push_back(lora::safetensors::tensor_of<lora::bfloat16>(name, shape, values));
        bytes += 2 * values.size();
      }
  std::filesystem::create_directories(directory);
  lora::safetensors::write(directory / "adapter_model.safetensors", tensors, {{"format", "pt"}});
  std::ofstream(directory / "adapter_config.json")
      << R"({"peft_type": "LORA", "r": 64, "lora_alpha": 16, )"
      << R"("target_modules": ["q_proj", "v_proj"]})";
}

double peak_megabytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) * 1024 / 1e6;  // Linux counts in KiB
}

/// Reads, and prints before what was read is freed.
template <class Read>
int measure(const char* what, const Read& read) {
  const double before = peak_megabytes();
  const auto start = std::chrono::steady_clock::now();
  const auto result = read();
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  std::printf("%s: %zu entries, %.2f s, peak %.1f MB (%.1f before)\n", what, result.size(),
              taken.count(), peak_megabytes(), before);
  return EXIT_SUCCESS;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string_view what = count > 2 ? arguments[1] : "";
  const std::filesystem::path directory = count > 2 ? arguments[2] : "";
  const auto weights = directory / "adapter_model.safetensors";
  if (what == "make")
    return make(directory, count > 3 ? std::atof(arguments[3]) : 500), EXIT_SUCCESS;
  if (what == "adapters")
    return measure("adapters", [&] { return lora::peft::adapters(directory); });
  if (what == "bfloat16")
    return measure("bfloat16", [&] { return lora::peft::read<lora::bfloat16>(directory); });
  if (what == "float") return measure("float", [&] { return lora::peft::read<float>(directory); });
  if (what == "file") return measure("file", [&] { return lora::safetensors::read(weights); });
  if (what == "index") return measure("index", [&] { return lora::safetensors::open(weights); });
  std::puts("reading make|adapters|bfloat16|float|file|index DIR [MB]");
  return EXIT_FAILURE;
}
