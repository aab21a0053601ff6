// SPDX-License-Identifier: Apache-2.0
//
// An adapter: the factors lora_A (rank x in_features) and lora_B (out_features x rank) and the
// number s of
//   delta weight = s * lora_B * lora_A          (out_features x in_features)
// adapter<T> owns its factors, adapter_view<T> looks at them, basic_adapter<MatA, MatB> is both,
// over any matrix types.
// Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
#pragma once

#include <string>
#include <type_traits>
#include <utility>

#include "lora/concepts.hpp"
#include "lora/detail/convert.hpp"
#include "lora/detail/eigen.hpp"
#include "lora/detail/refusals.hpp"
#include "lora/error.hpp"
#include "lora/kernel/environment.hpp"
#include "lora/matrix_view.hpp"
#include "lora/scaled.hpp"
#include "lora/scaling.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace detail {

template <class T>
using row_major_matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// A row-major copy in another format, exact.
template <class T, class M>
row_major_matrix<T> exact_copy(const M& source) {
  static_assert(holds_exactly<T, element_t<M>>,
                "lora: the factors have a wider scalar than the adapter, so storing them would "
                "round silently: give the "
                "adapter that scalar, or cast the factors yourself");
  if constexpr (eigen_matrix<M> && std::is_same_v<T, element_t<M>>) {
    return source;  // any expression: evaluated straight into the copy
  } else {
    const default_environment environment;
    const auto view = as_matrix(source);
    row_major_matrix<T> copy(view.rows(), view.cols());
    for (index_t i = 0; view.cols() != 0 && i < view.rows(); ++i)
      for (index_t j = 0; j < view.cols(); ++j) copy(i, j) = exactly<T>(view(i, j));
    return copy;
  }
}

/// A row-major matrix that is moved in, or an exact copy of any other.
template <class T, class M>
row_major_matrix<T> taken(M&& source) {
  if constexpr (std::is_same_v<M, row_major_matrix<T>>)
    return std::move(source);
  else
    return exact_copy<T>(source);
}

template <class MatA, class MatB>
index_t checked_rank(const MatA& a, const MatB& b) {
  const auto [rank, columns] = std::pair<index_t, index_t>(a.rows(), b.cols());
  if (rank != columns)
    raise_shape("adapter", "lora_A is " + shape_text<index_t>(a.rows(), a.cols()) +
                               " and lora_B is " + shape_text<index_t>(b.rows(), b.cols()) +
                               "; lora_A must be rank x in_features and lora_B out_features x rank "
                               "(swapped or transposed?)");
  return rank;
}

/// Sentences for arguments that make no adapter. They return what the constructor of a class goes
/// on with.
template <class A, class B, class Result>
[[noreturn]] Result refuse_factors_of() {
  if constexpr (!matrix_like<A>)
    static_assert(refuse_weight<verb::factors, A>());
  else
    static_assert(refuse_weight<verb::factors, B>());
}

}  // namespace detail

/// Factors of any matrix types with their scaling. Invariant: lora_A has as many rows as lora_B has
/// columns, and scaling() is finite. Values in the factors are not looked at. Owns what MatA and
/// MatB own; immutable.
template <matrix_like MatA, matrix_like MatB>
class [[nodiscard]] basic_adapter {
 public:
  /// Throws shape_error when the ranks differ, value_error as resolve(scale, rank).
  basic_adapter(MatA lora_A, MatB lora_B, const lora::scaling& scale)
      : lora_A_(std::move(lora_A)),
        lora_B_(std::move(lora_B)),
        scaling_(resolve(scale, detail::checked_rank(as_matrix(lora_A_), as_matrix(lora_B_)))) {}

  const MatA& lora_A() const { return lora_A_; }
  const MatB& lora_B() const { return lora_B_; }
  index_t rank() const { return as_matrix(lora_A_).rows(); }
  double scaling() const { return scaling_; }
  index_t in_features() const { return as_matrix(lora_A_).cols(); }
  index_t out_features() const { return as_matrix(lora_B_).rows(); }

 private:
  MatA lora_A_;
  MatB lora_B_;
  double scaling_;
};

template <class MatA, class MatB>
basic_adapter(MatA, MatB, scaling) -> basic_adapter<MatA, MatB>;

template <class T, storage_order OrderA, class U, storage_order OrderB>
inline constexpr bool
    enable_adapter_view<basic_adapter<matrix_view<T, OrderA>, matrix_view<U, OrderB>>> = true;

/// An adapter that owns its factors, stored row-major in T as PyTorch stores them.
template <scalar T>
class [[nodiscard]] adapter
    : public basic_adapter<detail::row_major_matrix<T>, detail::row_major_matrix<T>> {
  using base = basic_adapter<detail::row_major_matrix<T>, detail::row_major_matrix<T>>;

 public:
  /// Copies the factors; a narrower scalar is widened exactly, a wider one is refused at compile
  /// time. A is rank x in_features, B out_features x rank, of any storage order. Throws as
  /// basic_adapter.
  template <matrix_like A, matrix_like B>
  adapter(const A& lora_A, const B& lora_B, const lora::scaling& scale)
      : base(detail::exact_copy<T>(lora_A), detail::exact_copy<T>(lora_B), scale) {}

  /// Takes row-major factors in T that are moved in, without a copy. Throws as basic_adapter.
  template <class A, class B>
    requires std::is_same_v<A, detail::row_major_matrix<T>> && std::is_same_v<B, A>
  adapter(A&& lora_A, B&& lora_B, const lora::scaling& scale)
      : base(std::move(lora_A), std::move(lora_B), scale) {}

  /// A copy of any adapter, with its scaling as it stands.
  template <low_rank L>
    requires(!std::is_same_v<L, adapter>)
  explicit adapter(const L& other)
      : adapter(other.lora_A(), other.lora_B(),
                {.alpha = other.scaling(), .rule = scaling_rule::fixed}) {}

  /// What makes no adapter gets a sentence: factors of integers or arrays, a bare number.
  template <class A, class B>
    requires detail::mistaken_factors<A, B>
  adapter(const A&, const B&, const lora::scaling&)
      : base(detail::refuse_factors_of<A, B, base>()) {}
  template <matrix_like A, matrix_like B, class S>
    requires std::is_arithmetic_v<S>
  adapter(const A&, const B&, S) = delete;  // an adapter needs its alpha by name: {.alpha = 16}
};

template <matrix_like A, matrix_like B>
adapter(const A&, const B&, scaling) -> adapter<detail::element_t<A>>;

/// An adapter that looks at row-major factors which live elsewhere and must outlive it.
template <scalar T>
class [[nodiscard]] adapter_view
    : public basic_adapter<matrix_view<const T, storage_order::row_major>,
                           matrix_view<const T, storage_order::row_major>> {
  using factor = matrix_view<const T, storage_order::row_major>;
  using base = basic_adapter<factor, factor>;

 public:
  /// Throws as basic_adapter.
  adapter_view(factor lora_A, factor lora_B, const lora::scaling& scale)
      : base(lora_A, lora_B, scale) {}
  /// Looks at an owner.
  adapter_view(
      const adapter<T>&
          owner)  // NOLINT(google-explicit-constructor): as std::string_view of std::string
      : base(as_matrix(owner.lora_A()), as_matrix(owner.lora_B()),
             {.alpha = owner.scaling(), .rule = scaling_rule::fixed}) {}
  adapter_view(const adapter<T>&&) = delete;  // the adapter is a temporary: name it first
};

template <class T, class U, storage_order Order>
adapter_view(matrix_view<T, Order>, matrix_view<U, Order>, scaling)
    -> adapter_view<std::remove_const_t<T>>;
template <scalar T>
adapter_view(const adapter<T>&) -> adapter_view<T>;

template <class T>
inline constexpr bool enable_adapter_view<adapter_view<T>> = true;

}  // namespace lora::inline LORA_DETAIL_ABI
