// SPDX-License-Identifier: Apache-2.0
//
// adapter_config.json of Hugging Face PEFT: what it says about the arithmetic of an adapter, and
// which modules it names.
//
//   const auto c = lora::peft::read_config("adapters/style/adapter_config.json");
//   c.rank_of("model.layers.0.self_attn.q_proj");  c.scaling_of(...);
//   lora::peft::matches_target(c, "model.layers.0.self_attn.q_proj");
//
// Every key is read, known to have no effect, or refused by name; docs/formats.md has the table.
#pragma once

#include "lora/io/peft/config.hpp"
#include "lora/io/peft/config_reader.hpp"
#include "lora/io/peft/read_options.hpp"
#include "lora/io/peft/target_rule.hpp"
