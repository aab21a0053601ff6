// SPDX-License-Identifier: Apache-2.0
//
// batch: which adapters each token of a call gets, so that requests with different adapters share
// one product.
//
//   lora::batch who{adapters};               // packed adapters, which live elsewhere
//   who.add();                               // token 0: the base alone
//   who.add({{0}});                          // token 1: adapter 0
//   who.add({{0, 0.7}, {2, 0.3}});           // token 2: two of them, weighted
//   lora::forward(space, packed, X, Y, who);
//   Y.noalias() = W * X;   lora::apply(space, X, Y, who);     // your product, our correction
//
// A vector of mixed forms (mixed.hpp) takes adapters of any kind, which may differ from token to
// token. Vectors of pointers to packed adapters or to forms serve adapters that come and go: those
// that stay are not moved.
//
// Ranks are exact, nothing is padded to a common one; a token without adapters costs what the base
// costs; tokens with the same adapters share their panels wherever they stand; and a token's result
// does not depend on what else is in the batch, bit for bit.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "lora/detail/refusals.hpp"
#include "lora/kernel/environment.hpp"
#include "lora/kernel/product/token_plan.hpp"
#include "lora/mixed.hpp"
#include "lora/packed_adapter.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// An adapter of a batch, by its place in the list, and its strength for one token.
struct assignment {
  index_t adapter;
  double weight = 1;
};

namespace detail {

/// What a batch of F lists, and what it keeps of one that a token uses.
template <class F>
struct batch_item {
  static_assert(refuse_panels<F>());
  using type = packed_adapter<F>;
  struct used {
    const type* adapter;
    index_t rank;    ///< when it was added
    double scaling;  ///< when it was added
  };
};
template <class Acc>
struct batch_item<mixed_form<Acc>> {
  using type = mixed_form<Acc>;
  struct used {
    const type* adapter;
    const form_state<Acc>* state;  ///< when it was added
    index_t first_part;
  };
};

}  // namespace detail

/// The adapters of each token, in the order in which they are added to its result: packed adapters,
/// or mixed forms (of any kinds; then F is mixed_form<Acc>, and forward takes W as out_features x
/// in_features). Looks at the adapters, which must stay where they are and as they are until
/// clear() (forward refuses a batch whose adapters are others by then). clear() keeps the memory,
/// so that a batch that is filled again allocates nothing. A list of pointers may grow while the
/// adapters stay: assign the list again.
template <class F>
class batch {
  static constexpr bool of_forms = detail::is_mixed_form<F>;

 public:
  /// packed_adapter<F>, or the mixed form.
  using item = typename detail::batch_item<F>::type;

  explicit batch(std::span<const item> adapters) { assign(adapters); }
  explicit batch(const std::vector<item>& adapters) : batch(std::span(adapters)) {}
  explicit batch(std::span<const item* const> adapters) { assign(adapters); }
  explicit batch(const std::vector<const item*>& adapters)
      : batch(std::span<const item* const>(adapters)) {}
  explicit batch(const std::vector<item>&&) {
    static_assert(detail::never<F>,
                  "lora::batch: the vector of adapters is a temporary, and the batch would look at "
                  "it: give it a name first");
  }
  template <class G>
    requires std::is_same_v<G, F>
  explicit batch(const packed_adapters<G>&&) {
    static_assert(
        detail::never<G>,
        "lora::batch: the packed adapters are a temporary, and the batch would look at them: give "
        "them a name first");
  }
  /// A mistaken list gets a sentence.
  template <class R>
    requires detail::mistaken_list<R> &&
             (!std::is_convertible_v<const R&, std::span<const item>> &&
              !std::is_convertible_v<const R&, std::span<const item* const>>)
  explicit batch(const R&) {
    static_assert(detail::refuse_adapter<detail::verb::batch, R>());
  }
  // Copied where it is moved: nothing is worth a batch that lost its tokens.
  batch(const batch&) = default;
  batch& operator=(const batch&) = default;
  ~batch() = default;

  /// Looks at another list: no tokens.
  void assign(std::span<const item> adapters) {
    adapters_ = adapters;
    pointers_ = {};
    slot_of_.resize(adapters.size());
    clear();
  }
  void assign(std::span<const item* const> adapters) {
    adapters_ = {};
    pointers_ = adapters;
    slot_of_.resize(adapters.size());
    clear();
  }

  /// The next token gets these; none: the base alone. Strength 0 means that the adapter is not
  /// read. Throws value_error when an adapter is not in the list or its strength, alone or times
  /// its scaling, is not finite; of forms also for one that is not additive at another strength
  /// than 1 or 0, and for one with an input map before others (make one form of them by mixed).
  /// Then nothing is added.
  void add(std::span<const assignment> entries) {
    const detail::default_environment environment;
    for (const assignment& e : entries) check(e, tokens());
    if constexpr (of_forms) check_order(entries);
    make_room(1, entries.size(), parts_of(entries));
    index_t rank = 0;
    for (const assignment& e : entries) {
      const item& l = at(e.adapter);
      if (strength_of(l, e.weight) == 0) continue;
      index_t& slot = slot_of_[static_cast<std::size_t>(e.adapter)];
      if (slot < 0) {
        slot = static_cast<index_t>(used_.size());
        use(l);
      }
      rank += add_parts(l, slot, e.weight);
    }
    most_rank_ = std::max(most_rank_, rank);
    begin_.push_back(static_cast<index_t>(index_.size()));
    if constexpr (of_forms) {
      term_begin_.push_back(terms_.size());
      gain_begin_.push_back(gains_.size());
    }
  }
  void add(std::initializer_list<assignment> entries) {
    add(std::span(entries.begin(), entries.size()));
  }
  void add() { add(std::span<const assignment>()); }
  /// The next tokens get one adapter each, -1 for none. Throws as add; then none is added.
  void add_each(std::span<const index_t> adapters) {
    std::size_t parts = 0;
    for (std::size_t k = 0; k < adapters.size(); ++k) {
      if (adapters[k] == -1) continue;
      const assignment e{adapters[k]};
      check(e, tokens() + static_cast<index_t>(k));
      parts += parts_of({&e, 1});
    }
    make_room(adapters.size(), adapters.size(), parts);
    for (const index_t a : adapters) a == -1 ? add() : add({{a}});
  }

  /// No tokens.
  void clear() {
    begin_.resize(1);
    index_.clear();
    weight_.clear();
    used_.clear();
    states_.clear();
    terms_.clear();
    term_begin_.resize(1);
    gains_.clear();
    gain_begin_.resize(1);
    parts_ = 0;
    std::fill(slot_of_.begin(), slot_of_.end(), index_t{-1});
    most_rank_ = 0;
  }
  index_t tokens() const { return static_cast<index_t>(begin_.size()) - 1; }
  /// The list; empty for a list of pointers.
  std::span<const item> adapters() const { return adapters_; }

  // For the library's own verbs: the adapters in use, and the tokens' lists of places among those
  // (of forms: among the parts of all of them).
  using used_adapter = typename detail::batch_item<F>::used;
  std::span<const used_adapter> used() const { return used_; }
  index_t most_rank() const { return most_rank_; }
  detail::token_parts parts() const {
    return {
        .parts = parts_, .begin = begin_.data(), .index = index_.data(), .weight = weight_.data()};
  }
  /// The place of a used adapter in the list.
  index_t place_of(const used_adapter& one) const {
    const auto found =
        std::find(slot_of_.begin(), slot_of_.end(), static_cast<index_t>(&one - used_.data()));
    return static_cast<index_t>(found - slot_of_.begin());
  }
  /// Of forms: the content of the used ones, and what is added to a token's outputs last.
  auto states() const { return std::span(states_); }
  auto terms_of(index_t token) const {
    const auto t = static_cast<std::size_t>(token);
    return std::span(terms_).subspan(term_begin_[t], term_begin_[t + 1] - term_begin_[t]);
  }
  bool any_terms() const { return !terms_.empty(); }
  /// Of forms: the products of the gains of a token's forms, in order; out_features numbers each.
  auto gains_of(index_t token) const {
    const auto t = static_cast<std::size_t>(token);
    return std::span(gains_).subspan(gain_begin_[t], gain_begin_[t + 1] - gain_begin_[t]);
  }

 private:
  template <class A>
  struct of_accumulator {
    using state = const void*;
    using term = char;
    using gain = const void*;
  };
  template <class Acc>
  struct of_accumulator<mixed_form<Acc>> {
    using state = const detail::form_state<Acc>*;
    using term = detail::bias_term<Acc>;
    using gain = const Acc*;
  };

  index_t count() const { return static_cast<index_t>(slot_of_.size()); }
  const item& at(index_t n) const {
    const auto k = static_cast<std::size_t>(n);
    return pointers_.empty() ? adapters_[k] : *pointers_[k];
  }
  static double strength_of(const item& l, double weight) {
    if constexpr (of_forms)
      return weight;
    else
      return weight * l.scaling();
  }

  void use(const item& l) {
    if constexpr (of_forms) {
      used_.push_back({&l, &l.state(), parts_});
      states_.push_back(&l.state());
      parts_ += static_cast<index_t>(l.state().parts().size());
    } else {
      used_.push_back({&l, l.rank(), l.scaling()});
      ++parts_;
    }
  }
  /// Returns the ranks.
  index_t add_parts(const item& l, index_t slot, double weight) {
    if constexpr (of_forms) {
      const auto parts = static_cast<index_t>(l.state().parts().size());
      for (index_t k = 0; k < parts; ++k) {
        index_.push_back(used_[static_cast<std::size_t>(slot)].first_part + k);
        weight_.push_back(weight);
      }
      if (l.state().has_term()) terms_.push_back(l.state().term(weight));
      if (!l.gain().empty()) gains_.push_back(l.gain().data());
      return l.state().rank();
    } else {
      index_.push_back(slot);
      weight_.push_back(weight);
      return l.rank();
    }
  }
  std::size_t parts_of(std::span<const assignment> entries) const {
    if constexpr (of_forms) {
      std::size_t all = 0;
      for (const assignment& e : entries) all += at(e.adapter).state().parts().size();
      return all;
    } else {
      return entries.size();
    }
  }
  void make_room(std::size_t tokens, std::size_t entries, std::size_t parts) {
    grow(index_, parts);
    grow(weight_, parts);
    grow(used_, entries);
    grow(begin_, tokens);
    if constexpr (of_forms) {
      grow(states_, entries);
      grow(terms_, entries);
      grow(term_begin_, tokens);
      grow(gains_, entries);
      grow(gain_begin_, tokens);
    }
  }
  /// Room for more, so that what follows cannot throw; twice as much each time.
  template <class V>
  static void grow(V& v, std::size_t more) {
    if (v.capacity() - v.size() < more) v.reserve(std::max(v.size() + more, 2 * v.size()));
  }
  void check(const assignment& e, index_t token) const {
    const auto of_token = [&] {
      return std::to_string(e.adapter) + " of token " + std::to_string(token);
    };
    if (e.adapter < 0 || e.adapter >= count())
      detail::raise_value("batch::add", "adapter " + of_token() + " is not one of the " +
                                            std::to_string(count()) +
                                            " that the batch was made with");
    if (!detail::is_finite(e.weight) || !detail::is_finite(strength_of(at(e.adapter), e.weight)))
      detail::raise_value("batch::add", "the weight of adapter " + std::to_string(e.adapter) +
                                            " for token " + std::to_string(token) +
                                            ", alone or times its scaling, is not finite");
    if constexpr (of_forms)
      if (e.weight != 0 && e.weight != 1 && !at(e.adapter).additive())
        detail::raise_value("batch::add",
                            "adapter " + of_token() + " has the strength " +
                                std::to_string(e.weight) +
                                ", but it is not additive: make a form at that strength, "
                                "mixed(W, scaled(strength, adapter))");
  }
  /// A form's input map changes what all forms of its token before it see, and none after it: it
  /// must be the last.
  void check_order(std::span<const assignment> entries) const {
    for (std::size_t k = 0; k + 1 < entries.size(); ++k)
      if (entries[k].weight != 0 && at(entries[k].adapter).has_input_map())
        detail::raise_value(
            "batch::add",
            "adapter " + std::to_string(entries[k].adapter) + " of token " +
                std::to_string(tokens()) +
                " changes the input, so that no other may follow it: make one form of them, "
                "mixed(W, adapters...)");
  }

  std::span<const item> adapters_;
  std::span<const item* const> pointers_;
  std::vector<index_t> begin_{0}, index_, slot_of_;
  std::vector<double> weight_;
  std::vector<used_adapter> used_;
  std::vector<typename of_accumulator<F>::state> states_;
  std::vector<typename of_accumulator<F>::term> terms_;
  std::vector<typename of_accumulator<F>::gain> gains_;
  std::vector<std::size_t> term_begin_{0}, gain_begin_{0};
  index_t most_rank_ = 0, parts_ = 0;
};

template <class F>
batch(const std::vector<packed_adapter<F>>&) -> batch<F>;
template <class F>
batch(std::span<const packed_adapter<F>>) -> batch<F>;
template <class F>
batch(const packed_adapters<F>&) -> batch<F>;
template <class F>
batch(const std::vector<const packed_adapter<F>*>&) -> batch<F>;
template <class F>
batch(std::span<const packed_adapter<F>* const>) -> batch<F>;
template <class Acc>
batch(const std::vector<mixed_form<Acc>>&) -> batch<mixed_form<Acc>>;
template <class Acc>
batch(std::span<const mixed_form<Acc>>) -> batch<mixed_form<Acc>>;
template <class Acc>
batch(const std::vector<const mixed_form<Acc>*>&) -> batch<mixed_form<Acc>>;
template <class Acc>
batch(std::span<const mixed_form<Acc>* const>) -> batch<mixed_form<Acc>>;
template <detail::mistaken_list R>
batch(const R&) -> batch<float>;  // for the sentence
static_assert(detail::batch_like<batch<float>>);

namespace detail {
template <class F>
inline constexpr bool holds_double<batch<F>> = std::is_same_v<F, double>;
}  // namespace detail

}  // namespace lora::inline LORA_DETAIL_ABI
