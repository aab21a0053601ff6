// SPDX-License-Identifier: Apache-2.0
//
// The files of a PEFT directory: where they are, and what is there instead.
#pragma once

#include <algorithm>
#include <array>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "lora/io/format_error.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

class peft_directory {
 public:
  static constexpr const char* config_name = "adapter_config.json";
  static constexpr const char* weights_name = "adapter_model.safetensors";

  explicit peft_directory(const std::filesystem::path& path) : path_(path) {
    std::error_code failure;
    std::filesystem::directory_iterator entries(path, failure);
    // As many names as a message could need: a directory may hold anything.
    for (; !failure && entries != std::filesystem::directory_iterator() && names_.size() < 4096;
         entries.increment(failure)) {
      std::error_code unknown;
      auto name = entries->path().filename().string();
      if (entries->is_directory(unknown)) {
        if (std::filesystem::exists(entries->path() / config_name, unknown)) adapters_below_.push_back(std::move(name));
      } else {
        names_.push_back(std::move(name));
      }
    }
    std::sort(names_.begin(), names_.end());
    std::sort(adapters_below_.begin(), adapters_below_.end());
  }

  bool has(std::string_view name) const { return std::binary_search(names_.begin(), names_.end(), name); }
  std::filesystem::path config() const { return path_ / config_name; }
  std::filesystem::path weights() const { return path_ / weights_name; }

  [[noreturn]] void refuse_config() const {
    refuse(config(), config_name, "no such file",
           has(weights_name) ? "PEFT saves adapter_config.json beside the weights; without it the scaling is not known"
                             : hint_for_nothing());
  }
  [[noreturn]] void refuse_weights() const { refuse(weights(), weights_name, "no such file", hint_for_weights()); }

  /// Files beside the adapter that hold trained weights of their own, in sentences.
  std::vector<std::string> trained_files() const {
    std::vector<std::string> result;
    for (const auto& name : names_) {
      const bool weights = ends_in(name, {".safetensors", ".bin", ".pt", ".pth", ".ckpt"});
      if (!weights || name == weights_name || name == "adapter_model.bin" || is_of_training(name)) continue;
      result.push_back("file " + in_quotes(name) + " beside the adapter may hold trained weights; it is not read");
    }
    return result;
  }

 private:
  static bool ends_in(std::string_view name, std::initializer_list<std::string_view> endings) {
    return std::any_of(endings.begin(), endings.end(), [&](auto ending) { return name.ends_with(ending); });
  }
  /// State of the training program, which no model needs.
  static bool is_of_training(std::string_view name) {
    constexpr std::array<std::string_view, 6> beginnings{"training_args", "optimizer", "scheduler",
                                                         "rng_state",     "scaler",    "random_states"};
    return std::any_of(beginnings.begin(), beginnings.end(), [&](auto each) { return name.starts_with(each); });
  }
  std::string first_with(std::string_view beginning, std::string_view ending) const {
    const auto found = std::find_if(names_.begin(), names_.end(),
                                    [&](const auto& n) { return n.starts_with(beginning) && n.ends_with(ending); });
    return found == names_.end() ? std::string() : *found;
  }

  std::string hint_for_weights() const {
    if (has("adapter_model.bin"))
      return "adapter_model.bin is a PyTorch file, which can run code when loaded: convert it to safetensors";
    const auto shard = first_with("adapter_model", ".index.json").empty() ? first_with("adapter_model-", ".safetensors")
                                                                          : first_with("adapter_model", ".index.json");
    if (!shard.empty())
      return in_quotes(shard) + " is of weights in several files, which PEFT does not load either: join them into one file";
    if (has("model.safetensors"))
      return "model.safetensors is a whole model, or an adapter that another tool saved: PEFT's adapters are called "
             "adapter_model.safetensors";
    const auto other = first_with("", ".safetensors");
    return other.empty() ? below()
                         : "PEFT loads no other name; " + in_quotes(other) + " is there: rename it if it is the adapter";
  }
  std::string hint_for_nothing() const {
    const auto hint = below();
    if (!hint.empty()) return hint;
    if (has("model.safetensors") || has("model.safetensors.index.json") || has("config.json"))
      return "this is the directory of a whole model, not of an adapter";
    const auto other = first_with("", ".safetensors");
    return other.empty() ? "" : "read " + in_quotes(other) + " by its own path if its metadata holds the config";
  }
  std::string below() const {
    return adapters_below_.empty() ? ""
                                   : "there is an adapter in " + listed(adapters_below_) +
                                         ": PEFT saves one that is not called default in a directory of its own name";
  }

  [[noreturn]] void refuse(const std::filesystem::path& path, const char* name, std::string found, std::string hint) const {
    detail::raise(format_error({.path = path.string(),
                                .expected = "an adapter's directory with " + std::string(name),
                                .found = std::move(found),
                                .hint = std::move(hint)}));
  }

  std::filesystem::path path_;
  std::vector<std::string> names_, adapters_below_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
