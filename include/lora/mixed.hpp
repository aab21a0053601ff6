// SPDX-License-Identifier: Apache-2.0
//
// The mixed form of adapters of any kind: what a layer computes with them while its weight stays as
// it is,
//   y = diag(g) W (T x) + sum of s * lora_B * (lora_A x) + c.
//
//   const auto form = lora::mixed(W, style);             // once: norms, panels, gains
//   lora::forward(W, x, y, form);                        // often: one product, nothing is packed
//   lora::forward(lora::with_bias(W, b), x, y, form);
//   y.noalias() = W * x;   lora::apply(x, y, form);      // your product, our correction
//
// mixed(W, l...)             the steps (steps.hpp) of all l in order, for this W: adapters of any
//                            kind, ranges of them
// mixed(out, in, l...)       the same where W is no matrix at hand; kinds that need W throw
//                            value_error
// mixed<double>(...)         for calls that accumulate in double although W and adapters are
//                            narrower
//
// A form is right for the W that it was made from alone: after W changed, make it again.
//   shapes   W out_features x in_features, any storage order, or a packed_weight. Weights stored in
//            x out, and embeddings, are passed as their transpose; where the adapters know how
//            their base is stored, as they are.
//   order    Each output is one chain: W x over in_features, then the steps in order. A low-rank
//            step continues the chain over its ranks; a gain multiplies the chain so far and rounds
//            once more; what is no low-rank sum is computed beforehand and added. The bias goes
//            last: y := round(chain + (h b + c)), with h the product of the gains that scale a bias
//            and c all shifts.
//   input    W and the steps before an input map see T x; the steps after it see x. Of several maps
//            the last one of the list meets x first: W' = W T_1 T_2.
//   cost     One pass over W for the kinds that look at it; the factors are packed in their format
//            (rank * (in_features + out_features) elements), and kept.
//   throws   shape_error where an adapter is for another shape; value_error for a strength, gain or
//            shift that is not finite, and what a kind throws; std::bad_alloc.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "lora/detail/row_norms.hpp"
#include "lora/kernel/memory.hpp"
#include "lora/kernel/product/packed_factors.hpp"
#include "lora/packed_weight.hpp"
#include "lora/steps.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace detail {

/// A step of a form as a call makes a part of it.
template <class Acc>
struct form_part {
  part<Acc> made;                             ///< an addend: without its values
  part<Acc> later = {};                       ///< the factors of an addend
  const delta_source<Acc>* source = nullptr;  ///< or its source
  index_t level = 0;  ///< input maps before the step: it sees x after the others alone
};

/// What is added to an output last: strength * shift, and the bias times gain. Null: absent.
template <class Acc>
struct bias_term {
  const Acc* gain = nullptr;
  const Acc* shift = nullptr;
  double strength = 1;
};

/// The immutable content of a form.
template <class Acc>
class form_state {
 public:
  form_state(const char* operation, index_t out_features, index_t in_features,
             std::vector<step<Acc>> steps)
      : out_(out_features), in_(in_features), steps_(std::move(steps)) {
    for (const step<Acc>& one : steps_) std::visit([&](const auto& s) { add(operation, s); }, one);
    for (std::size_t i = 0; i < product_.size(); ++i)
      gain_.push_back(held(operation, "the product of the gains", i, product_[i]));
    if (scales_bias_)
      for (std::size_t i = 0; i < of_bias_.size(); ++i)
        bias_gain_.push_back(
            held(operation, "the product of the gains of the bias", i, of_bias_[i]));
    for (std::size_t i = 0; i < shifts_.size(); ++i)
      shift_.push_back(held(operation, "the sum of the shifts", i, shifts_[i]));
  }
  form_state(const form_state&) = delete;
  form_state& operator=(const form_state&) = delete;

  index_t out_features() const { return out_; }
  index_t in_features() const { return in_; }
  const std::vector<step<Acc>>& steps() const { return steps_; }
  const std::vector<form_part<Acc>>& parts() const { return parts_; }
  index_t rank() const { return rank_; }
  bool all_pairs() const { return all_pairs_; }
  const std::vector<std::shared_ptr<const input_map<Acc>>>& maps() const { return maps_; }
  bool has_addends() const { return has_addends_; }
  /// Product of all gains; empty where there is none.
  const std::vector<Acc>& gain() const { return gain_; }
  bias_term<Acc> term(double strength) const {
    return {bias_gain_.empty() ? nullptr : bias_gain_.data(),
            shift_.empty() ? nullptr : shift_.data(), strength};
  }
  bool has_term() const { return !bias_gain_.empty() || !shift_.empty(); }
  bool additive() const { return gain_.empty() && maps_.empty(); }
  bool changes_nothing() const {
    const auto is = [](const std::vector<Acc>& all, Acc value) {
      return std::all_of(all.begin(), all.end(), [value](Acc one) { return one == value; });
    };
    return rank_ == 0 && !has_addends_ && maps_.empty() && is(gain_, 1) && is(bias_gain_, 1) &&
           is(shift_, 0);
  }

 private:
  static Acc held(const char* operation, const char* what, std::size_t output, double value) {
    const Acc result = static_cast<Acc>(value);
    if (!is_finite(result))
      raise_value(operation, std::string(what) + " of output " + std::to_string(output) + " is " +
                                 std::to_string(value) + ", which the accumulator does not hold");
    return result;
  }
  template <class V>
  void check_outputs(const char* operation, const char* what, const V& values,
                     const row_range& rows) const {
    if (static_cast<index_t>(values.size()) != rows.count)
      raise_shape(operation, std::to_string(values.size()) + " " + what + " for " +
                                 std::to_string(rows.count) + " outputs");
    for (std::size_t i = 0; i < values.size(); ++i)
      if (!is_finite(values[i]))
        raise_value(operation, "one of the " + std::string(what) + ", that of output " +
                                   std::to_string(i) + ", is not finite");
  }
  index_t level() const { return static_cast<index_t>(maps_.size()); }

  void add(const char* operation, const low_rank_step& s) {
    const row_range rows = checked_rows(operation, s.rows, out_);
    refuse_double_factors<Acc>(operation, s.factors);
    s.factors.visit([&](const auto& l) { check_adapter(operation, l, rows.count, in_); });
    if (!is_finite(s.strength) || !is_finite(s.strength * s.factors.scaling()))
      raise_value(operation,
                  "the strength of a low-rank step, alone or times its scaling, is not finite");
    const double scale = s.strength * s.factors.scaling();
    if (is_zero(scale) || s.factors.rank() == 0) return;
    add_factors(s.factors, scale, rows);
  }
  void add_factors(const any_factors& factors, double scale, const row_range& rows) {
    // A sum computed beforehand has the step's rows alone, from 0 on.
    part<Acc> made = packed(factors, level() == 0 ? rows : row_range{0, rows.count});
    made.scale = scale;
    if (level() == 0) {
      rank_ += made.rank;
      all_pairs_ = all_pairs_ && made.format == panel_format::bfloat16;
      parts_.push_back({made});
    } else {
      has_addends_ = true;
      parts_.push_back(
          {.made = {.first_row = rows.first, .rows = rows.count, .sort = part_sort::addend},
           .later = made,
           .level = level()});
    }
  }
  void add(const char* operation, const delta_step<Acc>& s) {
    const row_range rows = checked_rows(operation, s.rows, out_);
    if (s.source == nullptr) raise_value(operation, "a delta step has no source");
    if (!is_finite(s.scale)) raise_value(operation, "the scale of a delta step is not finite");
    if (is_zero(s.scale)) return;
    if (const any_factors* const factors = s.source->expanded(); factors != nullptr)
      return add(operation, low_rank_step{*factors, s.scale, s.rows});
    has_addends_ = true;
    parts_.push_back({.made = {.first_row = rows.first,
                               .rows = rows.count,
                               .scale = s.scale,
                               .sort = part_sort::addend},
                      .source = s.source.get(),
                      .level = level()});
  }
  void add(const char* operation, const gain_step<Acc>& s) {
    const row_range rows = checked_rows(operation, s.rows, out_);
    check_outputs(operation, "gains", s.gain, rows);
    const index_t skipped = rows.first % tile_cols<Acc>;
    const auto size =
        static_cast<std::size_t>(pieces(skipped + rows.count, tile_cols<Acc>) * tile_cols<Acc>);
    auto padded = std::make_shared<std::vector<Acc>>(
        size, Acc(1));  // outputs that are not the step's keep their bits
    std::copy(s.gain.begin(), s.gain.end(), padded->begin() + skipped);
    parts_.push_back({.made = {.first_row = rows.first,
                               .rows = rows.count,
                               .sort = part_sort::gain,
                               .values = padded->data()},
                      .level = level()});
    owned_.push_back(std::move(padded));
    multiply(product_, s.gain, rows);
    if (!s.scales_bias) return;
    scales_bias_ = true;
    multiply(of_bias_, s.gain, rows);
    if (!shifts_.empty()) multiply(shifts_, s.gain, rows);
  }
  void multiply(std::vector<double>& product, const std::vector<Acc>& gain,
                const row_range& rows) const {
    if (product.empty()) product.assign(static_cast<std::size_t>(out_), 1.0);
    const auto first = static_cast<std::size_t>(rows.first);
    for (std::size_t i = 0; i < gain.size(); ++i)
      product[first + i] *= static_cast<double>(gain[i]);
  }
  void add(const char* operation, const input_step<Acc>& s) {
    const row_range rows = checked_rows(operation, s.rows, out_);
    if (s.map == nullptr) raise_value(operation, "an input step has no map");
    if (rows.count != out_)
      raise_value(operation, "an adapter changes the inputs (OFT, IA3 of inputs) of rows " +
                                 std::to_string(rows.first) + " ... " +
                                 std::to_string(rows.end() - 1) + " of " + std::to_string(out_) +
                                 " alone, and a product has one x for all rows: merge it, or make "
                                 "a layer of these rows");
    if (maps_.empty()) parts_.push_back({.made = {.sort = part_sort::mark}});
    maps_.push_back(s.map);
  }
  void add(const char* operation, const shift_step& s) {
    const row_range rows = checked_rows(operation, s.rows, out_);
    check_outputs(operation, "shifts", s.shift, rows);
    if (shifts_.empty()) shifts_.assign(static_cast<std::size_t>(out_), 0.0);
    for (std::size_t i = 0; i < s.shift.size(); ++i)
      shifts_[static_cast<std::size_t>(rows.first) + i] += s.shift[i];
  }

  /// The factors in panels of their own format, or of the accumulator where a tile reads no other.
  part<Acc> packed(const any_factors& factors, const row_range& rows) {
    return factors.visit([&]<class L>(const L& l) {
      using stored = factor_scalar_A<L>;
      using F = std::conditional_t<std::is_same_v<accumulator_t<stored>, Acc>, stored, Acc>;
      const index_t skipped = rows.first % tile_cols<Acc>;
      const factor_layout<Acc, F> where{skipped + rows.count, in_, l.rank()};
      auto panels = std::make_shared<array<F>>(where.size());
      part<Acc> made{.first_row = rows.first,
                     .rows = rows.count,
                     .rank = l.rank(),
                     .format = format_of_panels<Acc, F>()};
      if (panels->size() != 0) {
        made.A = panels->data();
        made.B = panels->data() + where.B_begin();
        pack_factors<Acc>(where, l, panels->data(), panels->data() + where.B_begin(), skipped);
      }
      owned_.push_back(std::move(panels));
      return made;
    });
  }

  index_t out_, in_;
  std::vector<step<Acc>> steps_;
  std::vector<form_part<Acc>> parts_;
  std::vector<std::shared_ptr<const void>> owned_;  ///< what parts_ looks at
  std::vector<std::shared_ptr<const input_map<Acc>>> maps_;
  index_t rank_ = 0;  ///< of the parts that are factors
  bool all_pairs_ = true, has_addends_ = false, scales_bias_ = false;
  std::vector<double> product_, of_bias_, shifts_;
  std::vector<Acc> gain_, bias_gain_, shift_;
};

}  // namespace detail

template <class Acc>
class mixed_form;

/// What form.input(x) makes of x for an engine that multiplies by W itself: compute W * matrix(),
/// then apply(input, y, form). Owns both; copies of the form may be used with it.
template <class Acc>
class mixed_input {
 public:
  using dense = Eigen::Matrix<Acc, Eigen::Dynamic, Eigen::Dynamic>;

  /// T x, in_features x tokens.
  const dense& matrix() const { return input_; }

 private:
  template <class>
  friend class mixed_form;
  dense x_, input_;
  const void* form_ = nullptr;
};

/// Adapters of one module, of any kinds, as a call of forward, apply, embed or apply_through mixes
/// them in; see the top of this file. Owns what it needs: it looks at no W and no adapter any more.
/// Immutable, and cheap to copy: copies share the content.
template <class Acc>
class [[nodiscard]] mixed_form {
  static_assert(std::is_same_v<Acc, float> || std::is_same_v<Acc, double>);

 public:
  using accumulator = Acc;

  /// Of a 0 x 0 weight, without steps.
  mixed_form() : mixed_form("mixed", 0, 0, {}) {}
  /// From steps, for an out_features x in_features weight. Throws shape_error and value_error,
  /// naming the operation.
  mixed_form(const char* operation, index_t out_features, index_t in_features,
             std::vector<step<Acc>> steps)
      : state_(std::make_shared<const detail::form_state<Acc>>(
            operation, checked(operation, out_features), checked(operation, in_features),
            std::move(steps))) {}
  // Copied where it is moved: a form is never without its content.
  mixed_form(const mixed_form&) = default;
  mixed_form& operator=(const mixed_form&) = default;
  ~mixed_form() = default;

  index_t out_features() const { return state_->out_features(); }
  index_t in_features() const { return state_->in_features(); }
  /// The steps in order, with the factors in the format that they came in.
  const std::vector<step<Acc>>& steps() const { return state_->steps(); }
  /// No gain and no input map: the form adds to W x, and forms may be added to each other in any
  /// order.
  bool additive() const { return state_->additive(); }
  /// Every bit of W x stays as it is.
  bool changes_nothing() const { return state_->changes_nothing(); }
  bool has_input_map() const { return !state_->maps().empty(); }
  /// T x for an engine that multiplies by W itself. x is in_features x tokens. Throws shape_error
  /// when it is not.
  template <activations X>
  mixed_input<Acc> input(const X& x) const {
    static_assert(std::is_same_v<Acc, double> || !detail::holds_double<detail::bare<X>>,
                  "lora::mixed_form::input: x holds double and the form float: make the form by "
                  "mixed<double>(W, l...)");
    const detail::default_environment environment;
    decltype(auto) held = detail::in_memory(x);
    const auto from = detail::input_view(held);
    if (from.rows() != in_features())
      detail::raise_shape("mixed_form::input",
                          "x is " + detail::shape_text(from.rows(), from.cols()) +
                              " and the form has " + std::to_string(in_features()) + " inputs");
    mixed_input<Acc> result;
    result.x_.resize(from.rows(), from.cols());
    for (index_t t = 0; from.rows() != 0 && t < from.cols(); ++t)
      for (index_t k = 0; k < from.rows(); ++k) result.x_(k, t) = detail::widen<Acc>(from(k, t));
    result.input_ = result.x_;
    for (std::size_t m = state_->maps().size(); m-- > 0;)
      state_->maps()[m]->columns(result.input_.data(), from.cols(), from.rows());
    result.form_ = state_.get();
    return result;
  }
  /// The x that an input was made of. Throws value_error when another form made it.
  const typename mixed_input<Acc>::dense& raw(const char* operation,
                                              const mixed_input<Acc>& of) const {
    if (of.form_ != state_.get()) detail::raise_value(operation, "another form made this input");
    return of.x_;
  }
  /// Product of all gains, out_features numbers; empty where there is no gain.
  const std::vector<Acc>& gain() const { return state_->gain(); }

  /// Whether forward takes a matrix W in_features x out_features, and embed an embedding.
  bool stored_in_out() const { return stored_in_out_; }
  /// The same for a W that is stored, and passed, in_features x out_features. A packed_weight is
  /// out_features x in_features always.
  mixed_form for_in_out() const {
    mixed_form result = *this;
    result.stored_in_out_ = true;
    return result;
  }

  // For the library's own verbs.
  const detail::form_state<Acc>& state() const { return *state_; }

 private:
  static index_t checked(const char* operation, index_t features) {
    if (features < 0 || features > detail::most_extent)
      detail::raise_shape(operation,
                          "a weight with " + std::to_string(features) + " outputs or inputs");
    return features;
  }

  std::shared_ptr<const detail::form_state<Acc>> state_;
  bool stored_in_out_ = false;
};

namespace detail {
template <class Acc>
inline constexpr bool holds_double<mixed_form<Acc>> = std::is_same_v<Acc, double>;

template <class L>
inline constexpr bool is_mixed_form = false;
template <class Acc>
inline constexpr bool is_mixed_form<mixed_form<Acc>> = true;

/// Throws value_error for adapters of double, known at run time alone, in a form of float.
template <class Acc, class... L>
void refuse_double(const char* operation, const L&... l) {
  if (!std::is_same_v<Acc, double> && any_holds_double_now(l...))
    raise_value(operation,
                "an adapter holds double, which a form of float would round: pass what "
                "mixed<double>(W, l...) returns");
}

/// The form of adapters beside a weight: a view or a packed weight, out_features x in_features.
template <class Acc, class W, class... L>
mixed_form<Acc> form_beside(const char* operation, step_use use, const W& weight, const L&... l) {
  const default_environment environment;
  refuse_double<Acc>(operation, l...);
  const auto base = reader_of<Acc>(weight);
  const index_t out = base.out_features(), in = base.in_features();
  return mixed_form<Acc>(operation, out, in,
                         steps_of(step_request<Acc>{operation, 1.0, &base, use}, out, in, l...));
}

/// The same for a weight as the adapters' base stores it: a matrix may be in_features x
/// out_features.
template <class Acc, class W, class... L>
mixed_form<Acc> form_beside_stored(const char* operation, step_use use, const W& weight,
                                   const L&... l) {
  if constexpr (!is_packed_weight<W>)
    if (are_stored_in_out(operation, l...))
      return form_beside<Acc>(operation, use, weight.transpose(), l...).for_in_out();
  return form_beside<Acc>(operation, use, weight, l...);
}

/// The same without a weight.
template <class Acc, class... L>
mixed_form<Acc> form_alone(const char* operation, step_use use, index_t out_features,
                           index_t in_features, const L&... l) {
  const default_environment environment;
  refuse_double<Acc>(operation, l...);
  const mixed_form<Acc> form(
      operation, out_features, in_features,
      steps_of(step_request<Acc>{operation, 1.0, nullptr, use}, out_features, in_features, l...));
  return are_stored_in_out(operation, l...) ? form.for_in_out() : form;
}

template <class Acc, class... Operands>
using form_accumulator = std::conditional_t<std::is_void_v<Acc>, accumulator_t<Operands...>, Acc>;

/// Adapters of a kind that is not low-rank.
template <class L>
concept kinds = any_adapters<L> && !adapters<L>;

/// A form's low-rank and delta steps, each with the product of the gains that follow it (in double;
/// empty: none): what embed and apply_through fold into lora_B. Looks at the steps.
template <class Acc>
class folded_steps {
 public:
  struct low_rank_part {
    const any_factors* factors;
    double scaling;
    row_range rows;
    std::vector<double> gain;  ///< of the rows
  };
  struct delta_part {
    const delta_source<Acc>* source;
    double scale;
    row_range rows;
    std::vector<double> gain;  ///< of the rows
  };

  folded_steps(const std::vector<step<Acc>>& steps, index_t out_features) : out_(out_features) {
    std::vector<double> product;
    for (std::size_t k = steps.size(); k-- > 0;) {
      if (const auto* l = std::get_if<low_rank_step>(&steps[k])) {
        add(l->factors, l->strength * l->factors.scaling(), l->rows, product);
      } else if (const auto* d = std::get_if<delta_step<Acc>>(&steps[k]);
                 d != nullptr && !is_zero(d->scale)) {
        if (const any_factors* const factors = d->source->expanded(); factors != nullptr)
          add(*factors, d->scale * factors->scaling(), d->rows, product);
        else
          deltas_.push_back(
              {d->source.get(), d->scale, d->rows.of(out_), of_rows(product, d->rows)});
      } else if (const auto* g = std::get_if<gain_step<Acc>>(&steps[k])) {
        product.resize(static_cast<std::size_t>(out_), 1.0);
        const auto first = static_cast<std::size_t>(g->rows.first);
        for (std::size_t i = 0; i < g->gain.size(); ++i)
          product[first + i] *= static_cast<double>(g->gain[i]);
      }
    }
    std::reverse(factors_.begin(), factors_.end());
    std::reverse(deltas_.begin(), deltas_.end());
  }

  const std::vector<low_rank_part>& factors() const { return factors_; }
  const std::vector<delta_part>& deltas() const { return deltas_; }
  index_t rank() const { return rank_; }

 private:
  void add(const any_factors& factors, double scaling, const row_range& rows,
           const std::vector<double>& gain) {
    if (is_zero(scaling)) return;
    factors_.push_back({&factors, scaling, rows.of(out_), of_rows(gain, rows)});
    rank_ += factors.rank();
  }
  std::vector<double> of_rows(const std::vector<double>& all, const row_range& rows) const {
    if (all.empty()) return all;
    const auto first = all.begin() + rows.first;
    return {first, first + rows.of(out_).count};
  }

  std::vector<low_rank_part> factors_;
  std::vector<delta_part> deltas_;
  index_t out_, rank_ = 0;
};
}  // namespace detail

/// The mixed form of adapters of any kind beside W; see the top of this file.
template <class Acc = void, class M, detail::any_adapters... L>
  requires matrix_like<M> || detail::is_packed_weight<detail::bare<M>>
[[nodiscard]] auto mixed(const M& W, const L&... l) {
  using acc = detail::form_accumulator<Acc, M, L...>;
  static_assert(std::is_same_v<acc, double> ||
                    !(detail::holds_double<detail::bare<M>> || ... || detail::holds_double<L>),
                "lora::mixed: W or an adapter holds double, which a form of float would round");
  if constexpr (detail::is_packed_weight<detail::bare<M>>) {
    return detail::form_beside_stored<acc>("mixed", step_use::prepare, W, l...);
  } else {
    return detail::form_beside_stored<acc>("mixed", step_use::prepare, as_matrix(W), l...);
  }
}

/// The same where W is no matrix at hand (an engine's quantized weight): kinds that look at W throw
/// value_error.
template <class Acc = void, std::integral I, detail::any_adapters... L>
[[nodiscard]] auto mixed(I out_features, std::type_identity_t<I> in_features, const L&... l) {
  using acc = detail::form_accumulator<Acc, L...>;
  static_assert(std::is_same_v<acc, double> || !(false || ... || detail::holds_double<L>),
                "lora::mixed: an adapter holds double, which a form of float would round");
  return detail::form_alone<acc>("mixed", step_use::prepare, static_cast<index_t>(out_features),
                                 static_cast<index_t>(in_features), l...);
}

/// A mistaken call of it gets a sentence.
template <class... A>
  requires detail::mistaken_on_weight<A...>
auto mixed(const A&...) {
  static_assert(detail::refuse_on_weight<detail::verb::mixed, A...>());
}

}  // namespace lora::inline LORA_DETAIL_ABI
