// SPDX-License-Identifier: Apache-2.0
//
// batch: which adapters each token of a call gets, so that requests with different adapters share one product.
//
//   lora::batch who{adapters};               // packed adapters, which live elsewhere
//   who.add();                               // token 0: the base alone
//   who.add({{0}});                          // token 1: adapter 0
//   who.add({{0, 0.7}, {2, 0.3}});           // token 2: two of them, weighted
//   lora::forward(space, packed, X, Y, who);
//
// Ranks are exact, nothing is padded to a common one; a token without adapters costs what the base costs; tokens with the
// same adapters share their panels wherever they stand; and a token's result does not depend on what else is in the batch,
// bit for bit.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "lora/detail/environment.hpp"
#include "lora/detail/plan.hpp"
#include "lora/detail/refusals.hpp"
#include "lora/packed_adapter.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// An adapter of a batch, by its place in the list, and its strength for one token.
struct batch_entry {
  index_t adapter;
  double weight = 1;
};

/// The adapters of each token, in the order in which they are added to its result. Looks at the adapters, which must stay
/// where they are and as they are until clear() (forward refuses a batch whose adapters have another rank or scaling by
/// then). clear() keeps the memory, so that a batch that is filled again allocates nothing.
template <class F>
class batch {
  static_assert(detail::refuse_panels<F>());

 public:
  explicit batch(std::span<const packed_adapter<F>> adapters) : adapters_(adapters), slot_of_(adapters.size(), -1) {}
  explicit batch(const std::vector<packed_adapter<F>>& adapters) : batch(std::span(adapters)) {}
  explicit batch(const std::vector<packed_adapter<F>>&&) {
    static_assert(
        detail::never<F>,
        "lora::batch: the vector of adapters is a temporary, and the batch would look at it: give it a name first");
  }
  /// A mistaken list gets a sentence.
  template <class R>
    requires detail::mistaken_list<R> && (!std::is_convertible_v<const R&, std::span<const packed_adapter<F>>>)
  explicit batch(const R&) {
    static_assert(detail::refuse_adapter<detail::verb::batch, R>());
  }
  // Copied where it is moved: nothing is worth a batch that lost its tokens.
  batch(const batch&) = default;
  batch& operator=(const batch&) = default;
  ~batch() = default;

  /// The next token gets these; none: the base alone. Strength 0 means that the adapter is not read. Throws value_error when
  /// an adapter is not in the list or its strength, alone or times its scaling, is not finite; then nothing is added.
  void add(std::span<const batch_entry> entries) {
    const detail::default_environment environment;
    for (const batch_entry& e : entries) check(e, tokens());
    make_room(1, entries.size());
    index_t rank = 0;
    for (const batch_entry& e : entries) {
      const auto& l = adapters_[static_cast<std::size_t>(e.adapter)];
      if (e.weight * l.scaling() == 0) continue;
      index_t& slot = slot_of_[static_cast<std::size_t>(e.adapter)];
      if (slot < 0) {
        slot = static_cast<index_t>(used_.size());
        used_.push_back({&l, l.rank(), l.scaling()});
      }
      index_.push_back(slot);
      weight_.push_back(e.weight);
      rank += l.rank();
    }
    most_rank_ = std::max(most_rank_, rank);
    begin_.push_back(static_cast<index_t>(index_.size()));
  }
  void add(std::initializer_list<batch_entry> entries) { add(std::span(entries.begin(), entries.size())); }
  void add() { add(std::span<const batch_entry>()); }
  /// The next tokens get one adapter each, -1 for none. Throws as add; then none is added.
  void add_each(std::span<const index_t> adapters) {
    for (std::size_t k = 0; k < adapters.size(); ++k)
      if (adapters[k] != -1) check({adapters[k]}, tokens() + static_cast<index_t>(k));
    make_room(adapters.size(), adapters.size());
    for (const index_t a : adapters) a == -1 ? add() : add({{a}});
  }

  /// No tokens.
  void clear() {
    begin_.resize(1);
    index_.clear();
    weight_.clear();
    used_.clear();
    slot_of_.assign(adapters_.size(), -1);
    most_rank_ = 0;
  }
  index_t tokens() const { return static_cast<index_t>(begin_.size()) - 1; }
  std::span<const packed_adapter<F>> adapters() const { return adapters_; }

  // For the library's own verbs: the adapters in use, and the tokens' lists of places among those.
  struct used_adapter {
    const packed_adapter<F>* adapter;
    index_t rank;    ///< when it was added
    double scaling;  ///< when it was added
  };
  std::span<const used_adapter> used() const { return used_; }
  index_t most_rank() const { return most_rank_; }
  detail::token_parts parts() const {
    return {.parts = static_cast<index_t>(used_.size()),
            .begin = begin_.data(),
            .index = index_.data(),
            .weight = weight_.data()};
  }

 private:
  void make_room(std::size_t tokens, std::size_t entries) {
    grow(index_, entries);
    grow(weight_, entries);
    grow(used_, entries);
    grow(begin_, tokens);
  }
  /// Room for more, so that what follows cannot throw; twice as much each time.
  template <class V>
  static void grow(V& v, std::size_t more) {
    if (v.capacity() - v.size() < more) v.reserve(std::max(v.size() + more, 2 * v.size()));
  }
  void check(const batch_entry& e, index_t token) const {
    const auto count = static_cast<index_t>(adapters_.size());
    if (e.adapter < 0 || e.adapter >= count)
      detail::raise_value("batch::add", "adapter " + std::to_string(e.adapter) + " of token " + std::to_string(token) +
                                            " is not one of the " + std::to_string(count) + " that the batch was made with");
    if (!detail::is_finite(e.weight) ||
        !detail::is_finite(e.weight * adapters_[static_cast<std::size_t>(e.adapter)].scaling()))
      detail::raise_value("batch::add", "the weight of adapter " + std::to_string(e.adapter) + " for token " +
                                            std::to_string(token) + ", alone or times its scaling, is not finite");
  }

  std::span<const packed_adapter<F>> adapters_;
  std::vector<index_t> begin_{0}, index_, slot_of_;
  std::vector<double> weight_;
  std::vector<used_adapter> used_;
  index_t most_rank_ = 0;
};

template <class F>
batch(const std::vector<packed_adapter<F>>&) -> batch<F>;
template <class F>
batch(std::span<const packed_adapter<F>>) -> batch<F>;
template <detail::mistaken_list R>
batch(const R&) -> batch<float>;  // for the sentence
static_assert(detail::batch_like<batch<float>>);

namespace detail {
template <class F>
inline constexpr bool holds_double<batch<F>> = std::is_same_v<F, double>;
}  // namespace detail

}  // namespace lora::inline LORA_DETAIL_ABI
