// SPDX-License-Identifier: Apache-2.0
//
// matrix_view looks at a matrix in memory that somebody else owns. row_major(...) and
// col_major(...) make one from a pointer, a span, an Eigen object or an mdspan; as_matrix(...)
// finds the storage order in the argument's type.
//
// Weights as PyTorch stores them ([out, in], row-major) are row_major(data, out, in). Tokens are
// columns: a row-major PyTorch activation [tokens, in] is the same memory as a column-major in x
// tokens matrix, col_major(data, in, tokens).
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <utility>

#include "lora/concepts.hpp"
#include "lora/detail/refusals.hpp"
#include "lora/error.hpp"

namespace lora::inline LORA_DETAIL_ABI {

namespace detail {

/// The most rows or columns that a view may have, with elements or without, so that a count of
/// tiles or panels fits index_t: below 2^48, more than a memory holds, and 2^27 where index_t has
/// 32 bits.
inline constexpr index_t most_extent = std::numeric_limits<index_t>::max() >>
                                       (sizeof(index_t) == 8 ? 15 : 4);

/// Whether `outer` runs of `inner` elements, `stride` apart, have an address each: one comparison
/// for usual sizes.
template <class T>
constexpr bool fits_memory(index_t outer, index_t inner, index_t stride) {
  constexpr index_t usual = index_t{1}
                            << (sizeof(index_t) == 8 ? 28 : 13);  // usual * usual elements do
  constexpr index_t most = std::numeric_limits<index_t>::max() / static_cast<index_t>(sizeof(T));
  if ((outer | inner | stride) < usual) return true;
  return outer <= most_extent && inner <= most_extent && (outer <= 1 || stride <= most / outer);
}

}  // namespace detail

/// A view of rows x cols scalars. Stored as pointer, sizes and the stride between rows (row_major)
/// or columns (col_major). Invariant: sizes are not negative and fit a memory, and outer_stride()
/// >= cols() (row_major) or rows() (col_major), so no element is named twice. T is const for a
/// read-only view. The distance inside a row (column) is 1 by type. It does not own, it does not
/// know the end of the buffer (row_major(span, ...) checks that once), and it is shallow-const: a
/// const view of mutable data may write.
template <class T, storage_order Order>
class matrix_view {
  static_assert(detail::refuse_element<std::remove_const_t<T>>());

 public:
  using value_type = std::remove_const_t<T>;
  static constexpr storage_order order = Order;
  static constexpr bool is_row_major = Order == storage_order::row_major;

  /// Throws shape_error when a size is negative, the stride is shorter than a row (column), or a
  /// size or the number of elements is larger than a memory.
  matrix_view(T* data, index_t rows, index_t cols, index_t outer_stride)
      : data_(data), rows_(rows), cols_(cols), outer_stride_(outer_stride) {
    if (rows < 0 || cols < 0 || outer_stride < inner_size() ||
        !detail::fits_memory<T>(outer_size(), inner_size(), outer_stride))
      raise_bad_shape();
  }
  matrix_view(T* data, index_t rows, index_t cols)
      : matrix_view(data, rows, cols, is_row_major ? cols : rows) {}

  /// A read-only view of the same memory.
  operator matrix_view<const T, Order>()
      const  // NOLINT(google-explicit-constructor): as T* to const T*
    requires(!std::is_const_v<T>)
  {
    return {data_, rows_, cols_, outer_stride_};
  }

  T* data() const { return data_; }
  index_t rows() const { return rows_; }
  index_t cols() const { return cols_; }
  index_t outer_stride() const { return outer_stride_; }
  index_t size() const { return rows_ * cols_; }
  index_t inner_size() const { return is_row_major ? cols_ : rows_; }
  index_t outer_size() const { return is_row_major ? rows_ : cols_; }
  /// Where row (column) k begins.
  T* outer(index_t k) const { return data_ + k * outer_stride_; }

  /// Unchecked, as Eigen's under NDEBUG.
  T& operator()(index_t row, index_t col) const {
    return is_row_major ? data_[row * outer_stride_ + col] : data_[col * outer_stride_ + row];
  }

  /// The same memory read as its transpose: no copy.
  auto transpose() const {
    constexpr auto flipped = is_row_major ? storage_order::col_major : storage_order::row_major;
    return matrix_view<T, flipped>(data_, cols_, rows_, outer_stride_);
  }

  /// A rectangle of it. Throws shape_error when it does not lie inside.
  matrix_view block(index_t row, index_t col, index_t rows, index_t cols) const {
    if (row < 0 || col < 0 || rows < 0 || cols < 0 || rows > rows_ - row || cols > cols_ - col)
      detail::raise_shape("matrix_view::block", detail::shape_text(rows, cols) + " at (" +
                                                    std::to_string(row) + ", " +
                                                    std::to_string(col) + ") does not lie inside " +
                                                    detail::shape_text(rows_, cols_));
    if (rows == 0 || cols == 0) return {data_, rows, cols, outer_stride_};
    return {data_ + (is_row_major ? row * outer_stride_ + col : col * outer_stride_ + row), rows,
            cols, outer_stride_};
  }
  matrix_view middle_rows(index_t first, index_t count) const {
    return block(first, 0, count, cols_);
  }
  matrix_view middle_cols(index_t first, index_t count) const {
    return block(0, first, rows_, count);
  }

 private:
  [[noreturn]] void raise_bad_shape() const {
    detail::raise_shape(
        "matrix_view",
        detail::shape_text(rows_, cols_) + " with an outer stride of " +
            std::to_string(outer_stride_) +
            ": sizes must not be negative or larger than a memory, and the stride must "
            "cover a row (row_major) or column (col_major)");
  }

  T* data_;
  index_t rows_, cols_, outer_stride_;
};

namespace detail {

template <storage_order Order, class T>
matrix_view<T, Order> checked_view(std::span<T> values, index_t rows, index_t cols,
                                   const char* name) {
  const auto available = static_cast<index_t>(values.size());
  if (rows < 0 || cols < 0 || (rows > 0 && cols > available / rows))
    raise_shape(name, shape_text(rows, cols) + " needs more elements than the " +
                          std::to_string(available) + " that the span holds");
  return {values.data(), rows, cols};
}

/// Rows, columns and the stride of an mdspan whose elements along `inner` must be adjacent.
template <storage_order Order, mdspan_like M>
auto mdspan_view(const M& m, const char* name) {
  using value = std::remove_pointer_t<decltype(m.data_handle())>;
  const auto rows = static_cast<index_t>(m.extent(0)), cols = static_cast<index_t>(m.extent(1));
  constexpr std::size_t inner = Order == storage_order::row_major ? 1 : 0;
  const index_t inner_size = inner == 1 ? cols : rows, outer_size = inner == 1 ? rows : cols;
  if (inner_size > 1 && static_cast<index_t>(m.stride(inner)) != 1)
    raise_shape(name, "the mdspan's stride along dimension " + std::to_string(inner) + " is " +
                          std::to_string(m.stride(inner)) +
                          ", not 1; try the other order or copy it");
  const index_t stride = outer_size > 1 ? static_cast<index_t>(m.stride(1 - inner)) : inner_size;
  return matrix_view<value, Order>(m.data_handle(), rows, cols, stride);
}

/// Whether the mapping puts neighbours along the last dimension side by side, asked of an example
/// of its type.
template <mdspan_like M>
constexpr bool mdspan_inner_is_last() {
  using extents = typename M::extents_type;
  using mapping = typename M::mapping_type;
  static_assert(std::is_constructible_v<mapping, extents>,
                "lora: this mdspan's layout has run-time strides: say which order it has with "
                "row_major(m) or col_major(m)");
  if constexpr (extents::rank_dynamic() == 0) {
    return mapping{extents{}}.stride(1) == 1;
  } else if constexpr (extents::rank_dynamic() == 1) {
    return mapping{extents{3}}.stride(1) == 1;
  } else {
    return mapping{extents{2, 3}}.stride(1) == 1;
  }
}

/// Writable through this expression, whatever constness sits on the outside: views are
/// shallow-const.
template <class M>
inline constexpr bool eigen_writable =
    (bare<M>::Flags & Eigen::LvalueBit) != 0 &&
    !(eigen_owner<M> && std::is_const_v<std::remove_reference_t<M>>);

template <class M>
inline constexpr bool eigen_direct = (bare<M>::Flags & Eigen::DirectAccessBit) != 0;

/// Adjacent elements along the storage order, or a vector, whose elements may then lie a stride
/// apart.
template <class M>
inline constexpr bool eigen_strided = eigen_direct<M> && (bare<M>::InnerStrideAtCompileTime == 1 ||
                                                          bool(bare<M>::IsVectorAtCompileTime));

template <class M>
constexpr storage_order eigen_order() {
  constexpr bool row_major = bool(bare<M>::IsRowMajor);
  constexpr bool as_stored = bare<M>::InnerStrideAtCompileTime == 1;
  return row_major == as_stored ? storage_order::row_major : storage_order::col_major;
}

template <class M>
auto eigen_view(M& m) {
  using plain = bare<M>;
  using value =
      std::conditional_t<eigen_writable<M>, typename plain::Scalar, const typename plain::Scalar>;
  auto* data = const_cast<value*>(m.data());
  if constexpr (plain::InnerStrideAtCompileTime == 1) {
    const index_t inner = plain::IsRowMajor ? m.cols() : m.rows();
    const index_t outer = plain::IsRowMajor ? m.rows() : m.cols();
    // Eigen reports any stride for a single row or column; none is needed.
    return matrix_view<value, eigen_order<M>()>(data, m.rows(), m.cols(),
                                                outer > 1 ? m.outerStride() : inner);
  } else {
    // A vector of elements a stride apart is one row (column) of a matrix in the other order.
    const index_t stride = m.size() > 1 ? m.innerStride() : 1;
    return matrix_view<value, eigen_order<M>()>(data, m.rows(), m.cols(), stride);
  }
}

}  // namespace detail

/// Views rows x cols adjacent scalars, row after row. Throws shape_error when the span is too
/// short.
template <class T, std::size_t N>
auto row_major(std::span<T, N> values, index_t rows, index_t cols) {
  static_assert(detail::refuse_element<std::remove_const_t<T>>());
  if constexpr (scalar<std::remove_const_t<T>>)
    return detail::checked_view<storage_order::row_major, T>(values, rows, cols, "row_major");
}
/// Views rows x cols adjacent scalars, column after column. Throws shape_error when the span is too
/// short.
template <class T, std::size_t N>
auto col_major(std::span<T, N> values, index_t rows, index_t cols) {
  static_assert(detail::refuse_element<std::remove_const_t<T>>());
  if constexpr (scalar<std::remove_const_t<T>>)
    return detail::checked_view<storage_order::col_major, T>(values, rows, cols, "col_major");
}
/// The same of a std::vector, std::array or other contiguous container that outlives the view.
template <detail::scalar_range V>
auto row_major(V& values, index_t rows, index_t cols) {
  return row_major(std::span(std::data(values), std::size(values)), rows, cols);
}
template <detail::scalar_range V>
auto col_major(V& values, index_t rows, index_t cols) {
  return col_major(std::span(std::data(values), std::size(values)), rows, cols);
}
/// A temporary container, and one of other elements, get a sentence.
template <class V>
  requires detail::refused_container<V>
auto row_major(V&&, index_t, index_t) {
  static_assert(detail::refuse_container<V>());
}
template <class V>
  requires detail::refused_container<V>
auto col_major(V&&, index_t, index_t) {
  static_assert(detail::refuse_container<V>());
}
/// The same of a bare pointer: the caller vouches for its length.
template <class T>
auto row_major(T* data, index_t rows, index_t cols) {
  static_assert(detail::refuse_element<std::remove_const_t<T>>());
  if constexpr (scalar<std::remove_const_t<T>>)
    return matrix_view<T, storage_order::row_major>(data, rows, cols);
}
template <class T>
auto col_major(T* data, index_t rows, index_t cols) {
  static_assert(detail::refuse_element<std::remove_const_t<T>>());
  if constexpr (scalar<std::remove_const_t<T>>)
    return matrix_view<T, storage_order::col_major>(data, rows, cols);
}
/// The same with a distance between rows (columns), counted in elements.
template <class T>
auto row_major(T* data, index_t rows, index_t cols, index_t outer_stride) {
  static_assert(detail::refuse_element<std::remove_const_t<T>>());
  if constexpr (scalar<std::remove_const_t<T>>)
    return matrix_view<T, storage_order::row_major>(data, rows, cols, outer_stride);
}
template <class T>
auto col_major(T* data, index_t rows, index_t cols, index_t outer_stride) {
  static_assert(detail::refuse_element<std::remove_const_t<T>>());
  if constexpr (scalar<std::remove_const_t<T>>)
    return matrix_view<T, storage_order::col_major>(data, rows, cols, outer_stride);
}
/// 16-bit integers as what their bits mean, where an engine stores them so:
/// row_major<lora::bfloat16>(bits, rows, cols), with the distance between rows (columns) in
/// elements, 0 for adjacent ones.
template <class F, class Bits>
  requires(std::is_same_v<F, bfloat16> || std::is_same_v<F, float16>) &&
          std::is_same_v<std::remove_const_t<Bits>, std::uint16_t>
auto row_major(Bits* bits, index_t rows, index_t cols, index_t outer_stride = 0) {
  using element = std::conditional_t<std::is_const_v<Bits>, const F, F>;
  return matrix_view<element, storage_order::row_major>(
      reinterpret_cast<element*>(bits), rows, cols, outer_stride == 0 ? cols : outer_stride);
}
template <class F, class Bits>
  requires(std::is_same_v<F, bfloat16> || std::is_same_v<F, float16>) &&
          std::is_same_v<std::remove_const_t<Bits>, std::uint16_t>
auto col_major(Bits* bits, index_t rows, index_t cols, index_t outer_stride = 0) {
  using element = std::conditional_t<std::is_const_v<Bits>, const F, F>;
  return matrix_view<element, storage_order::col_major>(
      reinterpret_cast<element*>(bits), rows, cols, outer_stride == 0 ? rows : outer_stride);
}
/// Views an mdspan whose stride along dimension 1 (row_major) or 0 (col_major) is 1; throws
/// shape_error otherwise.
template <detail::mdspan_like M>
auto row_major(const M& m) {
  return detail::mdspan_view<storage_order::row_major>(m, "row_major");
}
template <detail::mdspan_like M>
auto col_major(const M& m) {
  return detail::mdspan_view<storage_order::col_major>(m, "col_major");
}

/// The view of a matrix whose type tells its storage order: a matrix_view (itself), an Eigen object
/// in memory, an mdspan of layout_right or layout_left. Nothing is copied.
template <class M>
  requires matrix_like<M>
auto as_matrix(M&& m) {
  static_assert(std::is_lvalue_reference_v<M> || !detail::eigen_owner<M>,
                "lora::as_matrix: the matrix is a temporary that owns its elements, and the view "
                "would outlive it: give it a "
                "name first");
  if constexpr (detail::eigen_matrix<M>) {
    static_assert(detail::eigen_strided<M>,
                  "lora: this Eigen expression is not a matrix in memory with adjacent elements "
                  "(an arithmetic expression "
                  "has no memory, and an inner stride other than 1 is not supported): evaluate it "
                  "into a matrix first");
    return detail::eigen_view(m);
  } else if constexpr (detail::strided_matrix<M>) {
    using value = std::remove_reference_t<decltype(*m.data())>;
    return matrix_view<value, detail::bare<M>::order>(m.data(), m.rows(), m.cols(),
                                                      m.outer_stride());
  } else if constexpr (detail::mdspan_inner_is_last<detail::bare<M>>()) {
    return row_major(m);
  } else {
    return col_major(m);
  }
}

}  // namespace lora::inline LORA_DETAIL_ABI
