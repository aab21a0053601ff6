// SPDX-License-Identifier: Apache-2.0
//
// Names of tensors that carry a wrapper of the training program: torch.compile, DataParallel, FSDP,
// activation checkpointing, a PeftModel around a PeftModel, a dict of state dicts. No base has a
// tensor of such a name, so merging by name would merge nothing.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "lora/io/detail/module_path.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

inline constexpr std::string_view peft_prefix = "base_model.model.";

/// Segments of a path that are never a module's own name, and who adds them.
struct wrapper_segment {
  std::string_view name, who;
};
inline constexpr std::array wrapper_segments = std::to_array<wrapper_segment>({
    {"_orig_mod", "torch.compile"},
    {"_fsdp_wrapped_module", "FSDP"},
    {"_fpw_module", "FSDP"},
    {"_checkpoint_wrapped_module", "activation checkpointing"},
    {"_forward_module", "Lightning or DeepSpeed"},
});

/// A name without its wrappers. base_model.model. stands at its front or nowhere.
class unwrapped_name {
 public:
  explicit unwrapped_name(std::string_view whole) {
    std::vector<std::string_view> rest;
    std::size_t prefixes = 0;
    const auto all = segments(whole);
    for (std::size_t k = 0; k < all.size(); ++k) {
      if (const auto* wrapper = known(all[k])) {
        note(wrapper->name, wrapper->who);
      } else if (const auto length = prefix_at(all, k); length != 0) {
        if (length == 3) note("module.", "DataParallel or DistributedDataParallel");
        if (++prefixes == 1) {
          for (const auto segment : rest) front_ += std::string(segment) + ".";
          rest.clear();
        }
        k += length - 1;
      } else if (all[k] == "module" && rest.empty()) {
        note("module.", "DataParallel or DistributedDataParallel");
      } else {
        rest.push_back(all[k]);
      }
    }
    nested_ = prefixes > 1;
    if (nested_) note(peft_prefix, "a PeftModel inside a PeftModel");
    if (!front_.empty())
      note(front_, "a dict that holds state dicts, or a model around the PeftModel");
    if (prefixes != 0) name_ = peft_prefix;
    name_ += joined(rest);
  }

  const std::string& name() const { return name_; }
  /// The first wrapper found, and who leaves it; empty for a name without one.
  const std::string& part() const { return part_; }
  const std::string& who() const { return who_; }
  /// Whether base_model.model. stands in the name more than once.
  bool nested() const { return nested_; }
  /// What stands before base_model.model.; not a known wrapper.
  const std::string& front() const { return front_; }

 private:
  static const wrapper_segment* known(std::string_view segment) {
    for (const auto& each : wrapper_segments)
      if (each.name == segment) return &each;
    return nullptr;
  }
  /// Segments of base_model.model or base_model.module.model at a place; 0 for none.
  static std::size_t prefix_at(const std::vector<std::string_view>& all, std::size_t k) {
    const auto is = [&](std::size_t at, std::string_view name) {
      return at < all.size() && all[at] == name;
    };
    if (!is(k, "base_model")) return 0;
    if (is(k + 1, "model")) return 2;
    return is(k + 1, "module") && is(k + 2, "model") ? 3 : 0;
  }
  void note(std::string_view part, std::string_view who) {
    if (!part_.empty()) return;
    part_ = part;
    who_ = who;
  }

  std::string name_, part_, who_, front_;
  bool nested_ = false;
};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
