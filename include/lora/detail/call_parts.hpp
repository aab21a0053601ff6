// SPDX-License-Identifier: Apache-2.0
//
// What the tokens of a call get, as forward and apply hand it to the product: adapters for all of
// them, one form, or a batch.
#pragma once

#include <span>
#include <string>

#include "lora/batch.hpp"
#include "lora/detail/mix_forms.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// The parts that every token gets.
template <class Each>
struct same_for_all {
  const Each& each;

  void check(const char* operation, index_t out_features, index_t in_features, index_t) const {
    checked_total_rank(operation, each, out_features, in_features);
  }
  template <class Acc, class T>
  void run(workspace& space, index_t out_features, index_t in_features, index_t tokens,
           const weight_source<Acc, T>& W, const activation_source<Acc>& X,
           const finish_function<Acc>& finish) const {
    mix<Acc>(space, out_features, in_features, tokens, W, each, X, finish);
  }
};
inline void check_tokens(const char* operation, index_t of_batch, index_t of_x) {
  if (of_batch != of_x)
    raise_shape(operation, "the batch names adapters for " + std::to_string(of_batch) +
                               " tokens but x has " + std::to_string(of_x));
}
/// The parts of a batch.
template <class F>
struct by_token {
  const batch<F>& who;

  void check(const char* operation, index_t out_features, index_t in_features,
             index_t tokens) const {
    check_tokens(operation, who.tokens(), tokens);
    for (const auto& l : who.used()) {
      if (l.adapter->rank() != l.rank || l.adapter->scaling() != l.scaling)
        raise_value(operation,
                    "adapter " + std::to_string(who.place_of(l)) +
                        " has changed since it was added to the batch: clear() it and add again");
      check_adapter(operation, *l.adapter, out_features, in_features);
    }
  }
  template <class Acc, class T>
  void run(workspace& space, index_t out_features, index_t in_features, index_t tokens,
           const weight_source<Acc, T>& W, const activation_source<Acc>& X,
           const finish_function<Acc>& finish) const {
    const auto each = [this](const auto& visit) {
      for (const auto& l : who.used()) visit(*l.adapter);
    };
    part_list<Acc, decltype(each)> list(each, out_features, in_features);
    mix<Acc>(space, out_features, in_features, tokens, W, list, who.parts(), who.most_rank(), X,
             finish);
  }
};

/// The bias times the gains of a token's forms, and their shifts. One function for every caller:
/// its multiply-adds are fused in all of them or in none.
template <class Acc, class Wide>
LORA_DETAIL_APART void add_terms(std::span<const bias_term<Acc>> terms, index_t first,
                                 index_t count, Wide* more) {
  for (const bias_term<Acc>& term : terms) {
    if (term.gain != nullptr)
      for (index_t j = 0; j < count; ++j) more[j] *= static_cast<Wide>(term.gain[first + j]);
    if (term.shift == nullptr) continue;
    const Wide strength = static_cast<Wide>(term.strength);
    for (index_t j = 0; j < count; ++j)
      more[j] += strength * static_cast<Wide>(term.shift[first + j]);
  }
}

/// One form for every token.
template <class Acc>
class one_form {
 public:
  explicit one_form(const mixed_form<Acc>& form)
      : form_(&form.state()),
        gain_(form.gain().empty() ? nullptr : form.gain().data()),
        term_(form.state().term(1)) {}

  void check(const char* operation, index_t out_features, index_t in_features, index_t) const {
    check_fit(operation, form_->out_features(), form_->in_features(), 1.0, out_features,
              in_features);
  }
  bool changes(index_t) const { return true; }
  std::span<const Acc* const> gains_of(index_t) const {
    return {&gain_, gain_ == nullptr ? std::size_t{0} : 1};
  }
  bool any_terms() const { return form_->has_term(); }
  std::span<const bias_term<Acc>> terms_of(index_t) const {
    return {&term_, any_terms() ? std::size_t{1} : 0};
  }
  template <class A, class T>
  void run(workspace& space, index_t out_features, index_t in_features, index_t tokens,
           const weight_source<A, T>& W, const activation_source<A>& X,
           const finish_function<A>& finish) const {
    const form_list<Acc> list{
        {&form_, 1}, {.parts = static_cast<index_t>(form_->parts().size())}, form_->rank()};
    mix_forms<Acc>(space, out_features, in_features, tokens, W, list, X, finish);
  }

 private:
  const form_state<Acc>* form_;
  const Acc* gain_;
  bias_term<Acc> term_;
};

/// The forms of a batch.
template <class Acc>
struct by_token<mixed_form<Acc>> {
  const batch<mixed_form<Acc>>& who;

  void check(const char* operation, index_t out_features, index_t in_features,
             index_t tokens) const {
    check_tokens(operation, who.tokens(), tokens);
    for (const auto& l : who.used()) {
      if (&l.adapter->state() != l.state)
        raise_value(operation,
                    "form " + std::to_string(who.place_of(l)) +
                        " has changed since it was added to the batch: clear() it and add again");
      check_fit(operation, l.state->out_features(), l.state->in_features(), 1.0, out_features,
                in_features);
    }
  }
  /// Whether a token has a form that changes something.
  bool changes(index_t token) const {
    return who.parts().count(token) != 0 || !who.terms_of(token).empty();
  }
  std::span<const Acc* const> gains_of(index_t token) const { return who.gains_of(token); }
  bool any_terms() const { return who.any_terms(); }
  std::span<const bias_term<Acc>> terms_of(index_t token) const { return who.terms_of(token); }
  template <class A, class T>
  void run(workspace& space, index_t out_features, index_t in_features, index_t tokens,
           const weight_source<A, T>& W, const activation_source<A>& X,
           const finish_function<A>& finish) const {
    const form_list<Acc> list{who.states(), who.parts(), who.most_rank()};
    mix_forms<Acc>(space, out_features, in_features, tokens, W, list, X, finish);
  }
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
