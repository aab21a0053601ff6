// SPDX-License-Identifier: Apache-2.0
//
// A LORA file as adapters of a set: its entries, which keep their factors once, and what they
// replace.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/adapter_set.hpp"
#include "lora/io/detail/peft_keys.hpp"
#include "lora/io/peft/stored_format.hpp"
#include "lora/io/peft_entry.hpp"
#include "lora/io/peft_file.hpp"
#include "lora/io/safetensors_index.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {
namespace adapters_detail {

using io_detail::in_quotes;

/// The factors of one expert of a stack, where they lie. Its slice is taken as the base stores it.
template <scalar T>
class expert_of {
 public:
  using value_type = T;

  expert_of(std::shared_ptr<const entry<T>> of, index_t k) : of_(std::move(of)), k_(k) {}
  index_t out_features() const { return of_->out_features(); }
  index_t in_features() const { return of_->in_features(); }
  bool stored_in_out() const { return of_->fan_in_fan_out(); }
  template <class Acc>
  std::vector<step<Acc>> steps(const step_request<Acc>& request) const {
    const auto& l = of_->expert(k_);
    if (lora::detail::is_zero(request.strength * l.scaling())) return {};
    return {low_rank_step{any_factors(adapter_view<T>(l), of_), request.strength}};
  }

 private:
  std::shared_ptr<const entry<T>> of_;
  index_t k_;
};

/// T for all entries of a LORA file.
inline safetensors::dtype lora_format(const safetensors::index& tensors) {
  std::vector<safetensors::dtype> all;
  for (const auto& t : tensors) {
    const bool factor = t.name.find(".lora_") != std::string_view::npos ||
                        t.name.ends_with(".trainable_tokens_delta");
    // Any other dtype is refused by the reader, with its reasons.
    if (factor && io_detail::common_format({t.dtype})) all.push_back(t.dtype);
  }
  return *io_detail::common_format(all);
}

template <scalar T>
void add_entry(adapter_set& set, const entry<T>& e, const std::string& file) {
  adapter_target target{e.name(), e.weight_name(), e.bias_name()};
  std::vector<any_kind> experts;
  if (e.experts() == 1) {
    experts.emplace_back(e);
  } else {
    const auto shared = std::make_shared<const entry<T>>(e);
    for (index_t k = 0; k < e.experts(); ++k) experts.emplace_back(expert_of<T>(shared, k));
  }
  set.add(module_adapter(std::move(target), std::move(experts),
                         e.magnitude().empty() ? "LORA" : "DORA", file + ": " + e.parts().path));
}

/// The replacements of a file, whose values are still in `from`.
template <scalar T>
void add_replaced(adapter_set& set, const adapter_file<T>& file,
                  const std::vector<io_detail::replacing_tensor>& from,
                  const safetensors::index& tensors) {
  for (std::size_t k = 0; k < from.size(); ++k) {
    const replacement& r = file.replacements()[k];
    if (!r.applies()) continue;
    if (!io_detail::common_format({r.dtype}))
      io_detail::refuse(
          {.path = tensors.name(), .item = r.key}, "F64, F32, F16 or BF16",
          std::string(name_of(r.dtype)),
          "an adapter_set holds no such values: peft::read<T> has its bytes in replacements()");
    replaced_tensor t{r.name, tensors.name() + ": " + r.key, {}, {}};
    for (const auto extent : r.shape) t.shape.push_back(static_cast<index_t>(extent));
    io_detail::visit_format(r.dtype, [&]<scalar V>(std::type_identity<V>) {
      t.values = tensors.template copy<V>(from[k].tensor->name);
    });
    set.add(std::move(t));
    if (r.shared)
      set.add_note("tensor " + in_quotes(r.name) +
                   ": other layers of layer_replication use it too, each with its own");
  }
}

template <scalar T>
void add_rest(adapter_set& set, const adapter_file<T>& file, const safetensors::index& tensors) {
  for (const auto& [name, rows] : file.token_rows()) {
    const auto& values = rows.values();
    set.add(trained_rows{name, tensors.name(), rows.ids(), values.cols(),
                         std::vector<T>(values.data(), values.data() + values.size())});
  }
  for (const auto* notes : {&file.notes(), &file.unused_patterns(), &file.passed_over()})
    for (const auto& note : *notes) set.add_note(note);
  for (const auto& name : file.left_out())
    set.add_note("tensor " + in_quotes(name) + " of a saved module was left out");
  for (const auto& key : file.ignored_keys())
    set.add_note("config key " + in_quotes(key) + " was ignored");
}

}  // namespace adapters_detail
}  // namespace lora::inline LORA_DETAIL_ABI::peft
