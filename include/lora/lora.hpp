// SPDX-License-Identifier: Apache-2.0
//
// The verbs of plain adapters, and their bounds. Included by name: what fewer need (lora/dora.hpp,
// embed.hpp, through.hpp, rounding.hpp, residual.hpp; mixed_bounds.hpp, embed_bounds.hpp,
// rounding_bounds.hpp) and the file formats (lora/io/safetensors.hpp, lora/io/peft.hpp).
#pragma once

#include "lora/adapter.hpp"
#include "lora/advise.hpp"
#include "lora/apply.hpp"
#include "lora/batch.hpp"
#include "lora/bounds.hpp"
#include "lora/concepts.hpp"
#include "lora/delta.hpp"
#include "lora/error.hpp"
#include "lora/float16.hpp"
#include "lora/forward.hpp"
#include "lora/linear.hpp"
#include "lora/machine.hpp"
#include "lora/matrix_view.hpp"
#include "lora/merge.hpp"
#include "lora/packed_adapter.hpp"
#include "lora/packed_weight.hpp"
#include "lora/scaled.hpp"
#include "lora/scaling.hpp"
#include "lora/tensor_view.hpp"
#include "lora/version.hpp"
#include "lora/workspace.hpp"
