// SPDX-License-Identifier: Apache-2.0
//
// What the verbs accept: scalars, matrices and low-rank adapters, and the type in which a set of
// operands accumulates. The waist of the library is `low_rank`: owners, views, scaled(...) and a
// user's own types satisfy it, and every verb is written over it.
#pragma once

#include <concepts>
#include <cstddef>
#include <iterator>
#include <type_traits>

#include "lora/detail/eigen.hpp"
#include "lora/float16.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// Signed, as Eigen's.
using index_t = std::ptrdiff_t;

enum class storage_order { row_major, col_major };

/// Element types of weights, factors and activations. Eigen's 16-bit types are storage here,
/// exactly as ours: their bits are widened and narrowed by float16.hpp and never multiplied.
template <class T>
concept scalar =
    std::same_as<T, float> || std::same_as<T, double> || std::same_as<T, float16> ||
    std::same_as<T, bfloat16> || std::same_as<T, Eigen::half> || std::same_as<T, Eigen::bfloat16>;

namespace detail {

template <class M>
using bare = std::remove_cvref_t<M>;

/// Declared only: whether M is or derives from an Eigen matrix expression, or one that owns its
/// elements.
template <class D>
void eigen_expression(const Eigen::MatrixBase<D>&);
template <class D>
void eigen_plain_object(const Eigen::PlainObjectBase<D>&);

/// Derived from: v.segment(2, 4) is a VectorBlock, a class of its own on top of Block.
template <class M>
concept eigen_matrix = requires(const bare<M>& m) { detail::eigen_expression(m); };
template <class M>
concept eigen_owner =
    eigen_matrix<M> && requires(const bare<M>& m) { detail::eigen_plain_object(m); };

/// lora::matrix_view and anything of its shape: contiguous inside a row or column, a stride between
/// them.
template <class M>
concept strided_matrix = !eigen_matrix<M> && requires(const bare<M>& m) {
  { bare<M>::order } -> std::convertible_to<storage_order>;
  { *m.data() };
  { m.rows() } -> std::convertible_to<index_t>;
  { m.cols() } -> std::convertible_to<index_t>;
  { m.outer_stride() } -> std::convertible_to<index_t>;
};

/// False for an mdspan whose accessor makes another value of an element (std::linalg::scaled),
/// which would be passed over.
template <class M>
inline constexpr bool refers_to_elements = true;
template <class M>
  requires requires { typename M::reference; }
inline constexpr bool refers_to_elements<M> = std::is_lvalue_reference_v<typename M::reference>;

/// std::mdspan and Kokkos' mdspan of rank 2, told by their members so that no mdspan header is
/// included.
template <class M>
concept mdspan_like = !eigen_matrix<M> && !strided_matrix<M> && requires(const bare<M>& m) {
  typename bare<M>::extents_type;
  typename bare<M>::layout_type;
  typename bare<M>::mapping_type;
  requires bare<M>::rank() == 2;
  requires refers_to_elements<bare<M>>;
  { *m.data_handle() };
  { m.extent(std::size_t{0}) } -> std::convertible_to<std::size_t>;
  { m.stride(std::size_t{0}) } -> std::convertible_to<std::size_t>;
};

/// std::vector, std::span, std::array of scalars: one column where a vector is asked for.
template <class V>
concept scalar_range = !eigen_matrix<V> && !strided_matrix<V> && !mdspan_like<V> && requires(V& v) {
  { std::size(v) } -> std::convertible_to<std::size_t>;
  { *std::data(v) };
  requires scalar<std::remove_cv_t<std::remove_pointer_t<decltype(std::data(v))>>>;
};

template <class M>
struct element;
template <eigen_matrix M>
struct element<M> {
  using type = typename M::Scalar;
};
template <strided_matrix M>
struct element<M> {
  using type = bare<decltype(*std::declval<const M&>().data())>;
};
template <mdspan_like M>
struct element<M> {
  using type = bare<decltype(*std::declval<const M&>().data_handle())>;
};
template <scalar_range V>
struct element<V> {
  using type = bare<decltype(*std::data(std::declval<V&>()))>;
};

/// The scalar that a matrix or vector argument holds.
template <class M>
using element_t = typename element<bare<M>>::type;

}  // namespace detail

namespace detail {
template <class M>
concept any_matrix = eigen_matrix<M> || strided_matrix<M> || mdspan_like<M>;
}  // namespace detail

/// A matrix: any Eigen matrix expression, a matrix_view, or a rank-2 mdspan, of a scalar of the
/// library.
template <class M>
concept matrix_like = detail::any_matrix<M> && scalar<detail::element_t<M>>;

/// One column (a token) or a matrix of them: a matrix_like, or a contiguous range of scalars.
template <class V>
concept activations = matrix_like<V> || detail::scalar_range<V>;

/// An adapter: delta weight = scaling() * lora_B() * lora_A(), with lora_A() rank() x in_features
/// and lora_B() out_features x rank(). Both return a matrix or a reference to one; neither may be
/// an unevaluated expression.
template <class L>
concept low_rank = requires(const detail::bare<L>& l) {
  { l.lora_A() } -> matrix_like;
  { l.lora_B() } -> matrix_like;
  { l.scaling() } -> std::convertible_to<double>;
  { l.rank() } -> std::convertible_to<index_t>;
};

/// A run-time number of adapters: any container or view whose elements are low_rank.
template <class R>
concept low_rank_range = !low_rank<R> && requires(const detail::bare<R>& r) {
  { *std::begin(r) } -> low_rank;
  { std::end(r) };
};

namespace detail {

template <low_rank L>
using factor_scalar_A = element_t<decltype(std::declval<const bare<L>&>().lora_A())>;
template <low_rank L>
using factor_scalar_B = element_t<decltype(std::declval<const bare<L>&>().lora_B())>;

template <class T>
inline constexpr bool holds_double = false;
template <>
inline constexpr bool holds_double<double> = true;
template <class T>
  requires activations<T>
inline constexpr bool holds_double<T> = holds_double<element_t<T>>;
template <low_rank L>
inline constexpr bool holds_double<L> =
    holds_double<factor_scalar_A<L>> || holds_double<factor_scalar_B<L>>;
template <low_rank_range R>
inline constexpr bool holds_double<R> =
    holds_double<bare<decltype(*std::begin(std::declval<const bare<R>&>()))>>;

template <class... Operands>
struct accumulator {
  using type = std::conditional_t<(holds_double<bare<Operands>> || ...), double, float>;
};

}  // namespace detail

/// The type in which operands accumulate: double if any of them holds double, else float. Operands
/// are scalars, matrices, adapters or ranges of adapters.
template <class... Operands>
using accumulator_t = typename detail::accumulator<Operands...>::type;

}  // namespace lora::inline LORA_DETAIL_ABI
