// SPDX-License-Identifier: Apache-2.0
//
// (IA)^3 in a PEFT file (peft_type IA3): config keys, tensors, and lora::ia3_adapter.
//
//   .ia3_l [out, 1]            a factor for each output
//   .ia3_l [1, in]             a factor for each input: the module is one of feedforward_modules
//   .ia3_l [1, out, 1, 1 (1)]  a convolution's outputs; those of its inputs are refused
//
// A file does not say the other size of a layer: see open_kind.hpp. Where feedforward_modules is
// null PEFT takes it from the model's architecture, and the shape says it here. PEFT 0.21,
// tuners/ia3/layer.py and model.py.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>

#include "lora/io/detail/pattern.hpp"
#include "lora/io/peft/common_keys.hpp"
#include "lora/io/peft/kind_module.hpp"
#include "lora/io/peft/open_kind.hpp"
#include "lora/kinds/ia3.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

inline constexpr std::array ia3_fixed_keys = std::to_array<fixed_key>({{"init_ia3_weights"}});

inline peft::module_selection read_feedforward(config_object& keys) {
  return keys.selection("feedforward_modules");
}
inline void read_ia3_keys(config_object& keys, peft::config& c) {
  read_module_keys(keys, c);
  c.fan_in_fan_out = keys.options().fan_in_fan_out.value_or(keys.flag("fan_in_fan_out"));
  read_feedforward(keys);
}

inline constexpr std::array ia3_suffixes = std::to_array<std::string_view>({".ia3_l"});

/// Whether the config names the module in feedforward_modules: an end of its name, also in the
/// middle of a word, or an expression for the whole name. Nothing where the key is null.
inline std::optional<bool> is_feedforward(const kind_module& m) {
  const auto selection = m.settings(read_feedforward);
  if (selection.names)
    return std::any_of(selection.names->begin(), selection.names->end(),
                       [&](const auto& name) { return m.name().ends_with(name); });
  if (!selection.expression) return std::nullopt;
  const pattern expression(*selection.expression);
  const auto verdict = expression.fault().empty() ? expression.matches_all(code_points(m.name()))
                                                  : pattern::verdict::not_ascii;
  if (verdict == pattern::verdict::not_ascii)
    m.refuse_key("feedforward_modules", "an expression that this reader supports",
                 in_quotes(*selection.expression), "list the modules' names");
  return verdict == pattern::verdict::yes;
}

inline any_kind decode_ia3(const kind_module& m) {
  const auto& t = m.at(".ia3_l");
  if (t.empty()) m.refuse(t, "values", t.text(), "the file is incomplete");
  const auto& shape = t.shape;
  const auto ones_from = [&](std::size_t k) {
    return std::all_of(shape.begin() + static_cast<std::ptrdiff_t>(std::min(k, shape.size())),
                       shape.end(), [](auto extent) { return extent == 1; });
  };
  const bool kernel = (shape.size() == 4 || shape.size() == 5) && shape[0] == 1 && ones_from(2);
  const bool column = shape.size() == 2 && shape[1] == 1;
  const bool row = shape.size() == 2 && shape[0] == 1;
  if (!kernel && !column && !row)
    m.refuse(t, "[out, 1], [1, in], or [1, out, 1, 1] of a convolution", t.text());
  const auto said = is_feedforward(m);
  if ((kernel || (row && column)) && !said)
    m.refuse_key("feedforward_modules", "the modules whose inputs are multiplied", "null",
                 sentence({"the tensor of ", in_quotes(m.name()),
                           " does not say whether it is for inputs or outputs: list them"}));
  const bool inputs = said.value_or(row);
  if (kernel && inputs)
    m.refuse(t, "a convolution whose outputs are multiplied", "one in feedforward_modules",
             "factors of a convolution's inputs are no map of the unfolded input that is offered");
  if (!kernel && !(inputs ? row : column))
    m.refuse(t,
             inputs ? "[1, in], as feedforward_modules says"
                    : "[out, 1]: the module is not in "
                      "feedforward_modules",
             t.text(), "PEFT refuses to load this shape: correct feedforward_modules");
  const bool in_out = m.config().fan_in_fan_out && !kernel;
  return m.in_stored_format([&]<scalar T>(std::type_identity<T>) -> any_kind {
    using peft::layer_size;
    auto l = m.template values<T>(t);
    if (inputs)
      return peft::open_kind(ia3_adapter<T>::of_inputs(std::move(l), 0), layer_size::open,
                             layer_size::stored, in_out);
    return peft::open_kind(ia3_adapter<T>::of_outputs(std::move(l), 0), layer_size::stored,
                           layer_size::open, in_out);
  });
}

inline std::optional<kind_parts> encode_ia3(const any_kind& any) {
  kind_parts parts;
  const bool is = any_format([&]<scalar T>(std::type_identity<T>) {
    const auto* open = any.get_if<peft::open_kind<ia3_adapter<T>>>();
    const auto* kind = open == nullptr ? any.get_if<ia3_adapter<T>>() : &open->kind();
    if (kind == nullptr) return false;
    const auto count = static_cast<std::uint64_t>(kind->l().size());
    const bool inputs = kind->side() == ia3_side::inputs;
    parts.tensors.push_back(kind_parts::of<T>(
        ".ia3_l",
        inputs ? std::vector<std::uint64_t>{1, count} : std::vector<std::uint64_t>{count, 1},
        kind->l()));
    parts.lists["feedforward_modules"] = inputs;
    parts.settings["fan_in_fan_out"] = open != nullptr && open->stored_in_out() ? "true" : "false";
    return true;
  });
  return is ? std::optional(std::move(parts)) : std::nullopt;
}

inline constexpr peft_kind ia3_kind{
    {"IA3", read_ia3_keys, ia3_fixed_keys}, ia3_suffixes, {}, decode_ia3, encode_ia3};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
