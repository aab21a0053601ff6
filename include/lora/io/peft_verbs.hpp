// SPDX-License-Identifier: Apache-2.0
//
// The verbs with entries of a PEFT file. Entries are adapters of a kind, which every verb takes
// (peft_entry.hpp says what each honours); stacks of experts have verbs of their own. This header
// includes them all, and has no code.
#pragma once

#include "lora/apply.hpp"
#include "lora/dora.hpp"
#include "lora/embed.hpp"
#include "lora/forward.hpp"
#include "lora/io/peft_entry.hpp"
#include "lora/io/peft_stacks.hpp"
#include "lora/merge.hpp"
#include "lora/mixed.hpp"
#include "lora/rounding.hpp"
#include "lora/through.hpp"
