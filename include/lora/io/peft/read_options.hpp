// SPDX-License-Identifier: Apache-2.0
//
// What a caller of the PEFT reader knows beyond the files, and how strict the reader is.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "lora/version.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {

/// How to read names that a training wrapper changed (_orig_mod., module., _fsdp_wrapped_module.
/// ...).
enum class wrapper_names {
  refuse,  ///< an error that names the wrapper; with read_options::lenient as `strip`
  strip,   ///< read under the names without them
  keep,    ///< a base whose own modules are called so
};

/// What a caller knows beyond the files, and how strict to be.
struct read_options {
  /// Whether the base stores its weights as [in, out] (GPT-2's Conv1D). PEFT corrects this word of
  /// the config when it sees the base; a reader of files cannot, and a square weight takes a wrong
  /// one without a word.
  std::optional<bool> fan_in_fan_out = {};
  /// Config keys that this version does not know and the caller vouches for: they do not change the
  /// arithmetic.
  std::vector<std::string> ignore_keys = {};
  /// Read the adapters of a file that also holds whole modules (modules_to_save), and leave those
  /// out. They are listed by adapter_file::left_out(); without them the model is not the one that
  /// was trained.
  bool leave_out_saved_modules = false;
  /// Follow PEFT where it passes over things: unknown config keys, tensors that it would not use, a
  /// missing lora_B (which is zero then). adapter_file::ignored_keys() lists the keys and
  /// passed_over() the rest. A tensor under a base tensor's own name is none of these: PEFT loads
  /// it, and replacements() has it as `unasked`. What PEFT refuses, and what would be random, stays
  /// an error.
  bool lenient = false;
  /// Take every module that the file has an adapter for, whatever target_modules says. vLLM,
  /// diffusers and ComfyUI do so; PEFT adapts the modules of target_modules alone.
  bool select_by_tensors = false;
  wrapper_names wrappers = wrapper_names::refuse;
  /// target_parameters: the names of a module's parameters in the order in which the module
  /// registers them, for modules with more than one adapted parameter. Their names are not in the
  /// file, only their nesting, which follows that order. Where the file has fewer adapters than
  /// target_parameters names, list those that it has.
  std::vector<std::string> parameter_order = {};
  /// target_parameters: whether each slice of a stack takes the transpose of B A. It follows from
  /// the base and the writer:
  ///   written by PEFT      base [expert, out, in]    base [expert, in, out] (is_transposed)
  ///   0.19.1 and later     false                     true
  ///   0.19.0               true                      false
  ///   0.17, 0.18           true                      true
  /// Not said: false, as PEFT 0.21 reads every file; a square stack of a file before 0.19.1, or of
  /// no stated version, is refused. docs/formats.md says what expert(k) then is for mixing.
  std::optional<bool> parameters_in_out = {};
  /// target_parameters: whether the columns of a stack's lora_B are grouped by expert, for a file
  /// without lora_B_layout.
  std::optional<bool> experts_grouped_b = {};
  /// PEFT up to 0.21 adds the delta of an attention's out_proj twice, also while it trains. True:
  /// the same function, W + 2 D.
  bool attention_out_proj_twice = false;
};

}  // namespace lora::inline LORA_DETAIL_ABI::peft
