// SPDX-License-Identifier: Apache-2.0
// What a PEFT directory holds, module by module, and what is refused: 06_inventory <data folder>
#include <filesystem>
#include <iostream>

#include "lora/io/peft.hpp"
#include "lora/io/peft_inventory.hpp"

int main(int, char** arguments) {
  const std::filesystem::path adapters = std::filesystem::path(arguments[1]) / "adapters";
  for (const char* name : {"capitals", "german"}) {
    const auto file = lora::peft::read(adapters / name);
    const auto list = lora::peft::inventory_of(file);
    std::cout << name << ": " << list.modules.size() << " modules, norm of all deltas " << list.norm
              << "\n"
              << list.text();
  }
  // What a reader cannot get right from the file alone, it refuses with what is missing.
  try {
    (void)lora::peft::parse_config(
        R"({"peft_type": "LORA", "init_lora_weights": "pissa_niter_16"})", "adapter_config.json");
  } catch (const lora::format_error& e) {
    std::cout << e.item() << " " << e.found() << " is refused: " << e.hint() << "\n";
  }
}
