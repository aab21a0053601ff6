// SPDX-License-Identifier: Apache-2.0
//
// What no example does: writes files.
#include "lora/io/peft_write.hpp"
#include "lora/io/safetensors_write.hpp"

void write_tensors(const std::vector<lora::safetensors::tensor>& tensors) {
  lora::safetensors::write("weights.safetensors", tensors, {{"format", "pt"}});
}
void write_adapters(const lora::peft::adapter_file<float>& file) {
  lora::peft::write("style", file);
}
