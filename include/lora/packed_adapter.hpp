// SPDX-License-Identifier: Apache-2.0
//
// packed_adapter<F>: an adapter in the layout that products read, packed once and mixed often.
//
//   const lora::packed_adapter<float> style{adapter};
//   lora::forward(packed, X, Y, style, lora::scaled(0.3, subject));   // packs nothing
//
// forward and apply take it wherever they take an adapter. A strength costs nothing: it multiplies
// lora_A * x.
#pragma once

#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/detail/refusals.hpp"
#include "lora/kernel/environment.hpp"
#include "lora/kernel/memory.hpp"
#include "lora/kernel/product/packed_factors.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// In what U = s * lora_A * x is kept until lora_B multiplies it: in the accumulator, or rounded
/// once more to the format of the packed factors, as a model in that format does.
enum class intermediate_format { accumulator, factors };

/// Holds the panels of lora_A and lora_B as F: float, double, or a 16-bit format. Their bytes are
/// what mixing reads: rank * (in_features + out_features) * sizeof(F), and padding. Immutable;
/// copies share the panels. The original factors cannot be read back from it, so it does not merge.
/// From 1 MiB on the panels lie in huge pages of their own; packed_adapters does that for many
/// small adapters.
template <class F>
class [[nodiscard]] packed_adapter {
  static_assert(detail::refuse_panels<F>());
  using acc = accumulator_t<F>;

 public:
  using value_type = F;

  packed_adapter() = default;
  packed_adapter(const packed_adapter&) = default;
  packed_adapter& operator=(const packed_adapter&) = default;
  /// Leaves an adapter of a 0 x 0 weight behind.
  packed_adapter(packed_adapter&& other) noexcept { *this = std::move(other); }
  packed_adapter& operator=(packed_adapter&& other) noexcept {
    out_features_ = std::exchange(other.out_features_, 0);
    in_features_ = std::exchange(other.in_features_, 0);
    rank_ = std::exchange(other.rank_, 0);
    scaling_ = other.scaling_;
    U_ = other.U_;
    panels_ = std::move(other.panels_);
    return *this;
  }
  ~packed_adapter() = default;
  /// Packs an adapter (or a scaled one, with its strength). Exact where F holds the factors'
  /// scalar. Where F is narrower, each element of a factor rounds once: a relative change of at
  /// most u_F of every |A| and |B|, so delta weights change by at most (2 u_F + u_F^2) sum |s| |B|
  /// |A| (u_F = 2^-8 for bfloat16, 2^-11 for float16; values below the format's normal range lose
  /// half its subnormal step: docs/numerics.md). Throws shape_error and value_error as the verbs,
  /// and value_error for a finite element that F does not hold.
  ///
  /// intermediate_format::factors, for bfloat16: each output changes by at most u_F (1 + gamma) sum
  /// |s| |lora_B| |lora_A| |x| more, with u_F = 2^-8, and what underflows in bfloat16. A build for
  /// AVX512-BF16 then multiplies lora_B * U by dot products, too, in half of the time, where W * x
  /// is computed by them (their sums count as zero below the smallest normal float).
  template <low_rank L>
  explicit packed_adapter(const L& l,
                          lora::intermediate_format U = lora::intermediate_format::accumulator)
    requires(std::is_same_v<F, bfloat16>)
      : packed_adapter(l, pack_tag{}) {
    U_ = U;
  }
  template <low_rank L>
  explicit packed_adapter(const L& l)
    requires(!std::is_same_v<F, bfloat16>)
      : packed_adapter(l, pack_tag{}) {}
  /// A mistaken adapter gets a sentence.
  template <class L>
    requires(detail::mistaken_adapter<L> && !std::is_same_v<L, packed_adapter>)
  explicit packed_adapter(const L&,
                          lora::intermediate_format = lora::intermediate_format::accumulator) {
    static_assert(detail::refuse_adapter<detail::verb::pack, L>());
  }

  index_t rank() const { return rank_; }
  double scaling() const { return scaling_; }
  index_t out_features() const { return out_features_; }
  index_t in_features() const { return in_features_; }
  lora::intermediate_format intermediate_format() const { return U_; }
  std::size_t bytes() const { return static_cast<std::size_t>(where().size()) * sizeof(F); }

  /// The panels, for the library's own verbs.
  const F* A_panels() const { return panels_.get(); }
  const F* B_panels() const { return panels_.get() + where().B_begin(); }
  detail::factor_layout<acc, F> where() const { return {out_features_, in_features_, rank_}; }

 private:
  template <class>
  friend class packed_adapters;
  struct pack_tag {};
  template <low_rank L>
  packed_adapter(const L& l, pack_tag) {
    const detail::default_environment environment;
    check(l);
    pack(l, std::make_shared<detail::array<F>>(where().size()), 0);
  }

  /// Takes over everything but the panels. Throws what the constructor throws.
  template <class L>
  void check(const L& l) {
    const auto& lora_A = l.lora_A();
    const auto& lora_B = l.lora_B();
    out_features_ = as_matrix(lora_B).rows();
    in_features_ = as_matrix(lora_A).cols();
    detail::check_adapter("packed_adapter", l, out_features_, in_features_);
    refuse_overflow("lora_A", as_matrix(lora_A));
    refuse_overflow("lora_B", as_matrix(lora_B));
    rank_ = static_cast<index_t>(l.rank());
    scaling_ = static_cast<double>(l.scaling());
  }
  /// Packs the factors into the block, from element `at` on. Does not throw.
  template <class L>
  void pack(const L& l, const std::shared_ptr<detail::array<F>>& block, index_t at) {
    F* const begin = block->data() + at;
    detail::pack_factors<acc>(where(), l, begin, begin + where().B_begin());
    panels_ = std::shared_ptr<const F>(block, begin);
  }

  template <class V>
  static void refuse_overflow(const char* factor, const V& view) {
    if constexpr (!detail::holds_exactly<F, typename V::value_type>)
      for (index_t i = 0; view.cols() != 0 && i < view.rows(); ++i)
        for (index_t k = 0; k < view.cols(); ++k)
          if (detail::is_finite(view(i, k)) && !detail::is_finite(detail::converted<F>(view(i, k))))
            detail::raise_value(
                "packed_adapter",
                "element " + std::to_string(i) + ", " + std::to_string(k) + " of " + factor +
                    " is finite, and too large for the format of the panels: pack it in "
                    "a wider one");
  }

  index_t out_features_ = 0, in_features_ = 0, rank_ = 0;
  double scaling_ = 0;
  lora::intermediate_format U_ = lora::intermediate_format::accumulator;
  std::shared_ptr<const F> panels_;
};

template <low_rank L>
packed_adapter(const L&) -> packed_adapter<accumulator_t<L>>;
template <detail::mistaken_adapter L>
packed_adapter(const L&) -> packed_adapter<float>;  // for the sentence

/// Many adapters, packed as packed_adapter<F> into one block of memory: those that a server keeps.
/// Small adapters then share huge pages, and a batch that reads many of them has fewer misses in
/// the processor's table of addresses. Immutable; an element that is copied keeps the whole block
/// alive.
///
///   const lora::packed_adapters<lora::bfloat16> served{adapters};
///   lora::batch requests{served};
template <class F>
class [[nodiscard]] packed_adapters {
 public:
  using value_type = packed_adapter<F>;

  packed_adapters() = default;
  /// Packs every adapter of a range. Throws what packed_adapter's constructor throws;
  /// std::bad_alloc.
  template <low_rank_range R>
  explicit packed_adapters(const R& range) {
    pack(range);
  }
  /// The same with U in this format (see packed_adapter).
  template <low_rank_range R>
  packed_adapters(const R& range, lora::intermediate_format U)
    requires(std::is_same_v<F, bfloat16>)
  {
    pack(range);
    for (value_type& one : all_) one.U_ = U;
  }
  /// A mistaken list gets a sentence.
  template <class R>
    requires(detail::recognisable<R> && !low_rank_range<R> && !std::is_same_v<R, packed_adapters>)
  explicit packed_adapters(const R&,
                           lora::intermediate_format = lora::intermediate_format::accumulator) {
    static_assert(detail::refuse_adapter<detail::verb::pack, R>());
  }

  std::size_t size() const { return all_.size(); }
  const value_type& operator[](std::size_t k) const { return all_[k]; }
  auto begin() const { return all_.begin(); }
  auto end() const { return all_.end(); }
  operator std::span<const value_type>() const {
    return all_;
  }  // NOLINT(google-explicit-constructor)

 private:
  template <class R>
  void pack(const R& range) {
    const detail::default_environment environment;
    constexpr auto line = static_cast<index_t>(detail::memory_alignment / sizeof(F));
    const auto lines = [](const value_type& one) {
      return detail::pieces(one.where().size(), line) * line;
    };
    index_t size = 0;
    for (const auto& l : range) {
      all_.emplace_back().check(l);
      size += lines(all_.back());
    }
    const auto block = std::make_shared<detail::array<F>>(size);
    index_t at = 0;
    auto to = all_.begin();
    for (const auto& l : range) {
      to->pack(l, block, at);
      at += lines(*to++);
    }
  }

  std::vector<value_type> all_;
};

template <low_rank_range R>
packed_adapters(const R&) -> packed_adapters<
    accumulator_t<detail::bare<decltype(*std::begin(std::declval<const R&>()))>>>;

/// w * (a packed adapter). Holds a pointer to it: the packed adapter must outlive this.
template <scalar F>
class [[nodiscard]] scaled_packed_adapter {
 public:
  /// Throws value_error when the strength is not finite.
  scaled_packed_adapter(double strength, const packed_adapter<F>& adapter)
      : adapter_(&adapter), strength_(strength) {
    if (!detail::is_finite(strength)) detail::raise_value("scaled", "the strength is not finite");
  }
  scaled_packed_adapter(double, const packed_adapter<F>&&) = delete;  // it would look at it

  const packed_adapter<F>& adapter() const { return *adapter_; }
  double strength() const { return strength_; }
  double scaling() const { return strength_ * adapter_->scaling(); }
  index_t rank() const { return adapter_->rank(); }
  index_t out_features() const { return adapter_->out_features(); }
  index_t in_features() const { return adapter_->in_features(); }

 private:
  const packed_adapter<F>* adapter_;
  double strength_;
};

static_assert(detail::packed_adapter_like<packed_adapter<float>>);
static_assert(detail::packed_adapter_like<scaled_packed_adapter<float>>);

/// As scaled(w, adapter): the packed adapter must outlive the result. Throws value_error when the
/// strength is not finite.
template <scalar F>
scaled_packed_adapter<F> scaled(double strength, const packed_adapter<F>& adapter) {
  return scaled_packed_adapter<F>(strength, adapter);
}
/// Strengths multiply.
template <scalar F>
scaled_packed_adapter<F> scaled(double strength, const scaled_packed_adapter<F>& adapter) {
  return scaled_packed_adapter<F>(strength * adapter.strength(), adapter.adapter());
}
template <scalar F>
auto scaled(double, const packed_adapter<F>&&) {
  static_assert(detail::never<F>,
                "lora::scaled: the packed adapter is a temporary, and the result would look at it: "
                "give it a name first");
}

namespace detail {

template <class L>
inline constexpr bool is_packed = false;
template <class F>
inline constexpr bool is_packed<packed_adapter<F>> = true;
template <class F>
inline constexpr bool is_packed<scaled_packed_adapter<F>> = true;
/// A packed adapter, with a strength or without.
template <class L>
concept packed_factors = is_packed<bare<L>>;

template <class F>
const packed_adapter<F>& adapter_of(const packed_adapter<F>& l) {
  return l;
}
template <class F>
const packed_adapter<F>& adapter_of(const scaled_packed_adapter<F>& l) {
  return l.adapter();
}
template <packed_factors L>
using packed_scalar = typename bare<decltype(adapter_of(std::declval<const L&>()))>::value_type;

template <class F>
inline constexpr bool holds_double<packed_adapter<F>> = std::is_same_v<F, double>;
template <class F>
inline constexpr bool holds_double<scaled_packed_adapter<F>> = std::is_same_v<F, double>;

/// What forward and apply mix in: adapters and packed adapters.
template <class L>
concept mixable = low_rank<L> || packed_factors<L>;
template <class R>
concept mixable_range = !mixable<R> && requires(const bare<R>& r) {
  { *std::begin(r) } -> mixable;
  { std::end(r) };
};
template <class L>
concept mixables = mixable<L> || mixable_range<L>;

template <class R>
  requires(mixable_range<R> && !low_rank_range<R>)
inline constexpr bool holds_double<R> =
    holds_double<bare<decltype(*std::begin(std::declval<const bare<R>&>()))>>;

}  // namespace detail
}  // namespace lora::inline LORA_DETAIL_ABI
