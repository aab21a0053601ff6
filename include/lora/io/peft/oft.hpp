// SPDX-License-Identifier: Apache-2.0
//
// OFT in a PEFT file (peft_type OFT): config keys, tensors, and lora::oft_adapter.
//
//   .oft_R.weight [blocks, b (b - 1) / 2]   blocks of b inputs
//   .oft_R.weight [1, b (b - 1) / 2]        one block for all (block_share)
//
// A file does not say the outputs of a layer, and with block_share not its inputs: they are those
// of the weight. It does not say either whether the layer is a convolution, whose patches PEFT
// turns: do not use such an adapter. Refused: files of PEFT before 0.14 (no oft_block_size) and
// the names that PEFT before 0.16 wrote, whose numbers mean something else; fan_in_fan_out, which
// PEFT has for no layer that it can turn. With use_cayley_neumann, PEFT before 0.18 summed another
// series: it is refused too. PEFT 0.21, tuners/oft/layer.py and config.py.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/io/detail/peft_version.hpp"
#include "lora/io/peft/common_keys.hpp"
#include "lora/io/peft/kind_module.hpp"
#include "lora/io/peft/open_kind.hpp"
#include "lora/kinds/oft.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace peft {

/// One block that turns all neighbours alike, of a layer of any size that it divides.
template <scalar T>
class [[nodiscard]] shared_oft {
 public:
  using value_type = T;

  /// `block` is for a layer of one block.
  explicit shared_oft(oft_adapter<T> block) : block_(std::move(block)) {}

  const oft_adapter<T>& block() const { return block_; }
  index_t out_features() const { return 0; }
  index_t in_features() const { return 0; }
  bool holds_double() const { return std::is_same_v<T, double>; }
  /// Throws shape_error unless blocks cover the inputs.
  void check_fits(const char* operation, index_t, index_t in) const {
    if (in % block_.block_size() != 0)
      lora::detail::raise_shape(operation, "a block turns " + std::to_string(block_.block_size()) +
                                               " inputs, which do not divide the weight's " +
                                               std::to_string(in));
  }
  template <class Acc>
  std::vector<step<Acc>> steps(const step_request<Acc>& request) const {
    if (request.weight == nullptr)
      lora::detail::raise_value(request.operation,
                                "an OFT with a shared block takes the layer's size from its "
                                "weight: give the weight (forward, merge, mixed)");
    oft_settings settings = block_.settings();
    settings.in_features = request.weight->in_features();
    settings.out_features = request.weight->out_features();
    return oft_adapter<T>(block_.blocks(), settings).template steps<Acc>(request);
  }

 private:
  oft_adapter<T> block_;
};

}  // namespace peft

namespace io_detail {

inline constexpr std::array oft_fixed_keys = std::to_array<fixed_key>({
    {"module_dropout"},
    {"init_weights"},
    {"fan_in_fan_out", fixed_key::rule::refused,
     "PEFT turns no layer that stores its weight in x out"},
});

/// What only OFT's config says, with PEFT's defaults.
struct oft_config {
  index_t r = 0, block_size = 32;
  bool coft = false, block_share = false, cayley_neumann = true;
  double eps = 6e-5;
  index_t terms = 5;
};
inline oft_config read_oft_settings(config_object& keys) {
  oft_config c;
  const auto number = [&](const char* key, index_t otherwise) {
    const auto* value = keys.take(key);
    if (value == nullptr) return otherwise;
    const bool zero = value->kind == json_kind::unsigned_integer && value->unsigned_integer == 0;
    return zero ? index_t{0} : keys.positive_in(*value, key, "a number");
  };
  c.r = number("r", 0);
  c.block_size = number("oft_block_size", 32);
  c.coft = keys.flag("coft");
  c.block_share = keys.flag("block_share");
  if (keys.take("use_cayley_neumann") != nullptr)
    c.cayley_neumann = keys.flag("use_cayley_neumann");
  if (const auto* eps = keys.take("eps")) c.eps = keys.finite_in(*eps, "eps");
  c.terms = number("num_cayley_neumann_terms", 5);
  return c;
}
inline void read_oft_bias(config_object& keys, peft::config& c) {
  const auto* bias = keys.take_value("bias");
  if (bias == nullptr || (bias->kind == json_kind::string && bias->string == "none")) return;
  if (bias->kind != json_kind::string || (bias->string != "all" && bias->string != "oft_only"))
    keys.refuse(*bias, "bias", "\"none\", \"all\" or \"oft_only\"", bias->text());
  c.bias = bias->string == "all" ? peft::trained_biases::all : peft::trained_biases::lora_only;
}
inline void read_oft_keys(config_object& keys, peft::config& c) {
  read_oft_settings(keys);
  read_oft_bias(keys, c);
  read_module_keys(keys, c);
}

inline constexpr std::array oft_suffixes = std::to_array<std::string_view>({".oft_R.weight"});

/// PEFT's adjust_oft_parameters: the divisor of `in` that is nearest to a wanted number.
inline index_t nearest_divisor(index_t wanted, index_t in) {
  if (wanted >= in) return in;
  index_t above = wanted, below = wanted;
  while (above <= in && in % above != 0) ++above;
  while (below > 1 && in % below != 0) --below;
  return wanted - below <= above - wanted ? below : above;
}

/// Throws where the config is of a version, or of numbers, that PEFT refuses.
inline void check_oft_config(const kind_module& m, const oft_config& c) {
  const json_node& keys = *m.config().source;
  const bool has_size = std::any_of(keys.items.begin(), keys.items.end(),
                                    [](const auto& item) { return item.key == "oft_block_size"; });
  if (!has_size)
    m.refuse_key("oft_block_size", "the size of a block", "none",
                 "PEFT before 0.14 wrote such files, whose numbers mean something else; PEFT "
                 "refuses them too: train again");
  if ((c.r != 0) == (c.block_size != 0))
    m.refuse_key("oft_block_size", "r or oft_block_size, and 0 for the other",
                 sentence({"r ", std::to_string(c.r), " and oft_block_size ",
                           std::to_string(c.block_size)}));
  if (c.cayley_neumann && comes_before(m.config().peft_version, {0, 18, 0}).value_or(false))
    m.refuse_key("use_cayley_neumann", "a file of PEFT 0.18 or later",
                 in_quotes(m.config().peft_version),
                 "earlier versions summed another series; PEFT warns that the adapter must be "
                 "trained again");
  if (c.cayley_neumann && (c.terms < 1 || c.terms > 1000))
    m.refuse_key("num_cayley_neumann_terms", "1 to 1000 terms", std::to_string(c.terms));
  if (c.coft && c.eps < 0) m.refuse_key("eps", "a number of at least 0", "a negative one");
}

/// b of a tensor [blocks, b (b - 1) / 2]. Throws where no b has that number.
inline index_t oft_block_size(const kind_module& m, const kind_module::tensor& t) {
  const auto packed = static_cast<double>(t.shape[1]);
  const auto b = static_cast<std::uint64_t>((1 + std::sqrt(1 + 8 * packed)) / 2);
  if (b > 0xffff || b * (b - 1) / 2 != t.shape[1])
    m.refuse(t, "[blocks, b (b - 1) / 2], for blocks of b inputs", t.text());
  return static_cast<index_t>(b);
}

inline any_kind decode_oft(const kind_module& m) {
  const auto c = m.settings(read_oft_settings);
  check_oft_config(m, c);
  const auto& t = m.matrix_at(".oft_R.weight");
  const index_t b = oft_block_size(m, t), blocks = static_cast<index_t>(t.shape[0]);
  if (c.block_share) m.check_extent(t, 0, 1, "one block, as block_share says");
  if (blocks > detail::most_extent / b) m.refuse(t, "inputs that a memory can hold", t.text());
  const index_t in = b * blocks;
  if (!c.block_share) {
    const bool by_r = c.r != 0;
    const index_t wanted = by_r ? c.r : c.block_size, got = by_r ? blocks : b;
    if (nearest_divisor(wanted, in) != got)
      m.refuse(t,
               sentence({by_r ? "r = " : "oft_block_size = ", std::to_string(wanted),
                         ", as the config says, for ", std::to_string(in), " inputs"}),
               sentence({std::to_string(blocks), " blocks of ", std::to_string(b)}),
               "the config and the tensors do not belong together");
  } else if (c.block_size != 0 && c.block_size != b) {
    m.refuse(t, sentence({"a block of oft_block_size = ", std::to_string(c.block_size)}),
             sentence({"one of ", std::to_string(b)}),
             "PEFT takes the nearest size that divides the inputs, which a shared block does not "
             "say: write it into the config");
  }
  return m.in_stored_format([&]<scalar T>(std::type_identity<T>) -> any_kind {
    const oft_settings settings{
        .out_features = 0,
        .in_features = in,
        .rotation = c.cayley_neumann ? oft_rotation::neumann : oft_rotation::cayley,
        .neumann_terms = c.cayley_neumann ? static_cast<int>(c.terms) : 5,
        .coft_eps = c.coft ? std::optional(c.eps) : std::nullopt};
    oft_adapter<T> kind(m.template matrix<T>(t), settings);
    if (c.block_share) return peft::shared_oft<T>(std::move(kind));
    return peft::open_kind(std::move(kind), peft::layer_size::open, peft::layer_size::stored,
                           false);
  });
}

template <scalar T>
kind_parts oft_parts(const oft_adapter<T>& kind, bool share) {
  kind_parts parts;
  const auto& s = kind.settings();
  const bool neumann = s.rotation == oft_rotation::neumann;
  parts.tensors.push_back(kind_parts::of_matrix(".oft_R.weight", kind.blocks()));
  parts.settings = {{"r", "0"},
                    {"oft_block_size", std::to_string(kind.block_size())},
                    {"block_share", share ? "true" : "false"},
                    {"use_cayley_neumann", neumann ? "true" : "false"},
                    {"num_cayley_neumann_terms", std::to_string(s.neumann_terms)},
                    {"coft", s.coft_eps ? "true" : "false"}};
  if (s.coft_eps) parts.settings["eps"] = json_real(*s.coft_eps);
  return parts;
}
inline std::optional<kind_parts> encode_oft(const any_kind& any) {
  std::optional<kind_parts> parts;
  any_format([&]<scalar T>(std::type_identity<T>) {
    if (const auto* shared = any.get_if<peft::shared_oft<T>>())
      parts = oft_parts(shared->block(), true);
    else if (const auto* open = any.get_if<peft::open_kind<oft_adapter<T>>>())
      parts = oft_parts(open->kind(), false);
    else if (const auto* kind = any.get_if<oft_adapter<T>>())
      parts = oft_parts(*kind, kind->in_features() != kind->blocks().rows() * kind->block_size());
    return parts.has_value();
  });
  return parts;
}

inline constexpr peft_kind oft_kind{
    {"OFT", read_oft_keys, oft_fixed_keys}, oft_suffixes, {}, decode_oft, encode_oft};

}  // namespace io_detail
}  // namespace lora::inline LORA_DETAIL_ABI
