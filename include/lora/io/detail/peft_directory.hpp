// SPDX-License-Identifier: Apache-2.0
//
// The files of a PEFT directory: where they are, and what is there instead.
#pragma once

#include <algorithm>
#include <array>
#include <filesystem>
#include <initializer_list>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "lora/io/format_error.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

inline constexpr const char* peft_config_name = "adapter_config.json";
inline constexpr const char* peft_weights_name = "adapter_model.safetensors";

/// The names in a directory, for messages alone: it may hold anything, and may not be listable.
class directory_listing {
 public:
  explicit directory_listing(const std::filesystem::path& path) {
    std::error_code failure;
    std::filesystem::directory_iterator entries(path, failure);
    // As many names as a message could need: a directory may hold anything.
    for (; !failure && entries != std::filesystem::directory_iterator() && names_.size() < 4096;
         entries.increment(failure)) {
      std::error_code unknown;
      auto name = entries->path().filename().string();
      if (entries->is_directory(unknown)) {
        if (std::filesystem::exists(entries->path() / peft_config_name, unknown))
          adapters_below_.push_back(std::move(name));
      } else {
        names_.push_back(std::move(name));
      }
    }
    std::sort(names_.begin(), names_.end());
    std::sort(adapters_below_.begin(), adapters_below_.end());
  }

  /// Files beside the adapter that hold trained weights of their own, in sentences.
  std::vector<std::string> trained_files() const {
    std::vector<std::string> result;
    for (const auto& name : names_) {
      const bool weights = ends_in(name, {".safetensors", ".bin", ".pt", ".pth", ".ckpt"});
      if (!weights || name == peft_weights_name || name == "adapter_model.bin" ||
          is_of_training(name))
        continue;
      result.push_back("file " + in_quotes(name) +
                       " beside the adapter may hold trained weights; it is not read");
    }
    return result;
  }

  std::string hint_for_weights() const {
    if (has("adapter_model.bin"))
      return "adapter_model.bin is a PyTorch file, which can run code when loaded: convert it to "
             "safetensors";
    const auto shard = first_with("adapter_model", ".index.json").empty()
                           ? first_with("adapter_model-", ".safetensors")
                           : first_with("adapter_model", ".index.json");
    if (!shard.empty())
      return in_quotes(shard) +
             " is of weights in several files, which PEFT does not load either: join them into one "
             "file";
    if (has("model.safetensors"))
      return "model.safetensors is a whole model, or an adapter that another tool saved: PEFT's "
             "adapters are called "
             "adapter_model.safetensors";
    const auto other = first_with("", ".safetensors");
    return other.empty() ? below()
                         : "PEFT loads no other name; " + in_quotes(other) +
                               " is there: rename it if it is the adapter";
  }
  std::string hint_for_nothing() const {
    const auto hint = below();
    if (!hint.empty()) return hint;
    if (has("model.safetensors") || has("model.safetensors.index.json") || has("config.json"))
      return "this is the directory of a whole model, not of an adapter";
    const auto other = first_with("", ".safetensors");
    return other.empty()
               ? ""
               : "read " + in_quotes(other) + " by its own path if its metadata holds the config";
  }

 private:
  bool has(std::string_view name) const {
    return std::binary_search(names_.begin(), names_.end(), name);
  }
  static bool ends_in(std::string_view name, std::initializer_list<std::string_view> endings) {
    return std::any_of(endings.begin(), endings.end(),
                       [&](auto ending) { return name.ends_with(ending); });
  }
  /// State of the training program, which no model needs.
  static bool is_of_training(std::string_view name) {
    constexpr std::array<std::string_view, 6> beginnings{
        "training_args", "optimizer", "scheduler", "rng_state", "scaler", "random_states"};
    return std::any_of(beginnings.begin(), beginnings.end(),
                       [&](auto each) { return name.starts_with(each); });
  }
  std::string first_with(std::string_view beginning, std::string_view ending) const {
    const auto found = std::find_if(names_.begin(), names_.end(), [&](const auto& n) {
      return n.starts_with(beginning) && n.ends_with(ending);
    });
    return found == names_.end() ? std::string() : *found;
  }

  std::string below() const {
    return adapters_below_.empty() ? ""
                                   : "there is an adapter in " + listed(adapters_below_) +
                                         ": PEFT puts one that is not called default in a "
                                         "directory of its own name, and "
                                         "trainers put checkpoints there";
  }

  std::vector<std::string> names_, adapters_below_;
};

/// The two files of an adapter in a directory.
class peft_directory {
 public:
  explicit peft_directory(const std::filesystem::path& path) : path_(path) {}

  std::filesystem::path config() const { return path_ / peft_config_name; }
  std::filesystem::path weights() const { return path_ / peft_weights_name; }
  bool has_config() const { return exists(config()); }
  bool has_weights() const { return exists(weights()); }

  [[noreturn]] void refuse_config() const {
    refuse(config(), peft_config_name, "no such file",
           has_weights() ? "PEFT saves adapter_config.json beside the weights; without it the "
                           "scaling is not known"
                         : directory_listing(path_).hint_for_nothing());
  }
  [[noreturn]] void refuse_weights() const {
    refuse(weights(), peft_weights_name, "no such file",
           directory_listing(path_).hint_for_weights());
  }
  /// Files beside the adapter that may hold trained weights of their own, in sentences.
  std::vector<std::string> trained_files() const {
    return directory_listing(path_).trained_files();
  }

 private:
  static bool exists(const std::filesystem::path& path) {
    std::error_code failure;
    return std::filesystem::exists(path, failure);
  }
  [[noreturn]] static void refuse(const std::filesystem::path& path, const char* name,
                                  std::string_view found, std::string_view hint) {
    io_detail::refuse({.path = path.string()}, sentence({"an adapter's directory with ", name}),
                      found, hint);
  }

  std::filesystem::path path_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
