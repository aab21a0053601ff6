// SPDX-License-Identifier: Apache-2.0
//
// VeRA in a PEFT file (peft_type VERA): config keys, tensors, and lora::vera_adapter.
//
//   .vera_lambda_b [out], .vera_lambda_d [r]
//   base_model.vera_A [r, the most inputs], base_model.vera_B [the most outputs, r], for all
//   modules
//
// A file does not say the inputs of a layer: they are those of the weight. Refused without the two
// shared matrices (save_projection = false): PEFT draws them again with torch's random numbers.
// PEFT 0.21, tuners/vera/layer.py and model.py.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/io/peft/common_keys.hpp"
#include "lora/io/peft/kind_module.hpp"
#include "lora/kinds/vera.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace peft {

/// A VeRA of a layer with any number of inputs that A covers.
template <scalar T>
class [[nodiscard]] open_vera {
 public:
  using value_type = T;

  /// `widest` is for as many inputs as A has.
  open_vera(vera_adapter<T> widest, bool stored_in_out)
      : widest_(std::move(widest)), stored_in_out_(stored_in_out) {}

  const vera_adapter<T>& widest() const { return widest_; }
  index_t out_features() const { return widest_.out_features(); }
  index_t in_features() const { return 0; }
  bool stored_in_out() const { return stored_in_out_; }
  /// Throws shape_error for other outputs, or for more inputs than A has.
  void check_fits(const char* operation, index_t out, index_t in) const {
    if (out == out_features() && in <= widest_.in_features()) return;
    lora::detail::raise_shape(operation,
                              "the weight is " + lora::detail::shape_text(out, in) +
                                  " and the adapter is for " + std::to_string(out_features()) +
                                  " outputs and at most " + std::to_string(widest_.in_features()) +
                                  " inputs (stored the other way round?)");
  }
  template <class Acc>
  std::vector<step<Acc>> steps(const step_request<Acc>& request) const {
    if (request.weight == nullptr)
      lora::detail::raise_value(request.operation,
                                "a VeRA of a file takes the layer's inputs from its weight: give "
                                "the weight (forward, merge, mixed)");
    const vera_adapter<T> fitted(widest_.A(), widest_.B(), widest_.lambda_b(), widest_.lambda_d(),
                                 request.weight->in_features());
    return fitted.template steps<Acc>(request);
  }

 private:
  vera_adapter<T> widest_;
  bool stored_in_out_;
};

}  // namespace peft

namespace io_detail {

inline constexpr std::array vera_fixed_keys = std::to_array<fixed_key>({
    {"projection_prng_key"},
    {"vera_dropout"},
    {"d_initial"},
    {"init_weights"},
});

inline void read_vera_keys(config_object& keys, peft::config& c) {
  c.r = 256;
  if (const auto* r = keys.take("r")) c.r = keys.positive_in(*r, "r");
  c.fan_in_fan_out = keys.options().fan_in_fan_out.value_or(keys.flag("fan_in_fan_out"));
  if (const auto* saved = keys.take("save_projection");
      saved != nullptr && !keys.flag("save_projection"))
    keys.refuse(*saved, "save_projection", "true", saved->text(),
                "vera_A and vera_B are then drawn with torch's random numbers, which are not those "
                "of this library: save the adapter again with save_projection");
  if (const auto* bias = keys.take_value("bias")) {
    const bool text = bias->kind == json_kind::string;
    if (!text || (bias->string != "none" && bias->string != "all" && bias->string != "vera_only"))
      keys.refuse(*bias, "bias", "\"none\", \"all\" or \"vera_only\"", bias->text());
    if (bias->string == "all") c.bias = peft::trained_biases::all;
    if (bias->string == "vera_only") c.bias = peft::trained_biases::lora_only;
  }
  read_module_keys(keys, c);
}

inline constexpr std::array vera_suffixes =
    std::to_array<std::string_view>({".vera_lambda_b", ".vera_lambda_d"});
inline constexpr std::array vera_shared =
    std::to_array<std::string_view>({"base_model.vera_A", "base_model.vera_B"});

inline any_kind decode_vera(const kind_module& m) {
  const auto projection = [&](std::string_view name) -> const kind_module::tensor& {
    const auto* t = m.shared(name);
    if (t == nullptr)
      m.refuse(m.any(), sentence({"a tensor ", name, " beside it"}), "none",
               "PEFT draws it with torch's random numbers, which are not those of this library: "
               "save the adapter again with save_projection");
    if (t->shape.size() != 2 || t->empty()) m.refuse(*t, "two dimensions", t->text());
    return *t;
  };
  const auto &A = projection(vera_shared[0]), &B = projection(vera_shared[1]);
  const auto &b = m.at(".vera_lambda_b"), &d = m.at(".vera_lambda_d");
  for (const auto* t : {&b, &d})
    if (t->shape.size() != 1 || t->empty()) m.refuse(*t, "one dimension", t->text());
  const index_t rank = m.config().r;
  m.check_extent(A, 0, rank, "the config's r");
  m.check_extent(B, 1, rank, "the config's r");
  m.check_extent(d, 0, rank, "the config's r");
  if (b.shape[0] > B.shape[0])
    m.refuse(
        b, sentence({"at most as many outputs as base_model.vera_B, ", std::to_string(B.shape[0])}),
        b.text());
  return m.in_stored_format([&]<scalar T>(std::type_identity<T>) -> any_kind {
    return peft::open_vera<T>(
        vera_adapter<T>(m.template shared_matrix<T>(A), m.template shared_matrix<T>(B),
                        m.template values<T>(b), m.template values<T>(d),
                        static_cast<index_t>(A.shape[1])),
        m.config().fan_in_fan_out);
  });
}

inline std::optional<kind_parts> encode_vera(const any_kind& any) {
  kind_parts parts;
  const bool is = any_format([&]<scalar T>(std::type_identity<T>) {
    const auto* open = any.get_if<peft::open_vera<T>>();
    const auto* kind = open == nullptr ? any.get_if<vera_adapter<T>>() : &open->widest();
    if (kind == nullptr) return false;
    const auto count = [](const auto& values) {
      return std::vector<std::uint64_t>{static_cast<std::uint64_t>(values.size())};
    };
    const auto &b = kind->lambda_b(), &d = kind->lambda_d();
    parts.tensors.push_back(kind_parts::of<T>(".vera_lambda_b", count(b), b));
    parts.tensors.push_back(kind_parts::of<T>(".vera_lambda_d", count(d), d));
    parts.shared.push_back(kind_parts::of_matrix(std::string(vera_shared[0]), *kind->A()));
    parts.shared.push_back(kind_parts::of_matrix(std::string(vera_shared[1]), *kind->B()));
    parts.settings = {
        {"r", std::to_string(kind->rank())},
        {"save_projection", "true"},
        {"fan_in_fan_out", open != nullptr && open->stored_in_out() ? "true" : "false"}};
    return true;
  });
  return is ? std::optional(std::move(parts)) : std::nullopt;
}

inline constexpr peft_kind vera_kind{{"VERA", read_vera_keys, vera_fixed_keys},
                                     vera_suffixes,
                                     vera_shared,
                                     decode_vera,
                                     encode_vera};

}  // namespace io_detail
}  // namespace lora::inline LORA_DETAIL_ABI
