// SPDX-License-Identifier: Apache-2.0
//
// packed_weight<T>: a base weight in the layout that products read, packed once and multiplied
// often.
//
//   lora::packed_weight packed{W};            // out_features x in_features, any order
//   lora::forward(packed, X, Y, style);              // as forward(W, X, Y, style), the same bits
//   lora::merge(packed, style);                      // as merge(W, style), the same bits
//   packed.copy_to(W);                               // the elements back, bit for bit
//
// A plain weight is packed anew by every call of forward, which reads and writes it once more: that
// hides behind the arithmetic of a hundred tokens, and doubles the time of one.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <limits>
#include <string>
#include <utility>

#include "lora/detail/eigen.hpp"
#include "lora/detail/operands.hpp"
#include "lora/detail/refusals.hpp"
#include "lora/kernel/memory.hpp"
#include "lora/kernel/merge/tile_sinks.hpp"
#include "lora/kernel/panels.hpp"
#include "lora/kernel/threads.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// Owns out_features x in_features elements T (float, double, float16, bfloat16). Stored in panels
/// of as many outputs as a register tile has columns (16 floats with AVX2, 32 with AVX-512), the
/// last one padded with zeros; bfloat16 in pairs of in_features. Huge pages as for a
/// packed_adapter. Copying it copies the weight. The layout depends on the instruction set and is
/// not a file format.
template <class T>
class packed_weight {
  static_assert(detail::refuse_panels<T>());

 public:
  using value_type = T;

  packed_weight() = default;
  packed_weight(const packed_weight&) = default;
  packed_weight& operator=(const packed_weight&) = default;
  /// Leaves 0 x 0 behind.
  packed_weight(packed_weight&& other) noexcept
      : out_features_(std::exchange(other.out_features_, 0)),
        in_features_(std::exchange(other.in_features_, 0)),
        elements_(std::move(other.elements_)) {}
  packed_weight& operator=(packed_weight&& other) noexcept {
    out_features_ = std::exchange(other.out_features_, 0);
    in_features_ = std::exchange(other.in_features_, 0);
    elements_ = std::move(other.elements_);
    return *this;
  }
  ~packed_weight() = default;
  /// All zero.
  packed_weight(index_t out_features, index_t in_features)
      : packed_weight(unfilled(out_features, in_features)) {
    each_panel([&](index_t p, index_t, index_t) {
      std::fill_n(elements_.data() + p * panel(), panel(), T(0));
    });
  }
  /// Elements that are not set, for who writes all of them at once; the padding is zero.
  static packed_weight unfilled(index_t out_features, index_t in_features) {
    constexpr index_t most =
        std::numeric_limits<index_t>::max() / static_cast<index_t>(2 * width * sizeof(T));
    if (out_features < 0 || in_features < 0 ||
        std::max(out_features, in_features) > detail::most_extent ||
        (out_features > 0 && in_features > most / out_features))
      detail::raise_shape(
          "packed_weight",
          detail::shape_text(out_features, in_features) +
              ": a size is negative, or there are more elements than memory can hold");
    packed_weight result;
    result.out_features_ = out_features;
    result.in_features_ = in_features;
    result.elements_ = detail::array<T>(result.count() * result.panel());
    result.clear_padding();
    return result;
  }
  /// Copies and packs W; a narrower scalar is widened exactly, a wider one is refused at compile
  /// time. Shares the work among threads. Throws std::bad_alloc.
  template <matrix_like M>
  explicit packed_weight(const M& W) {
    const auto view = as_matrix(W);
    out_features_ = view.rows();
    in_features_ = view.cols();
    elements_ = detail::array<T>(count() * panel());
    pack(view);
  }
  /// A mistaken matrix gets a sentence.
  template <class M>
    requires detail::mistaken_base<M>
  explicit packed_weight(const M&) {
    static_assert(detail::refuse_weight<detail::verb::pack, M>());
  }

  /// Packs another matrix of the same shape into the memory that is there. Throws shape_error when
  /// the shape differs.
  template <matrix_like M>
  void assign(const M& W) {
    const auto view = as_matrix(W);
    if (view.rows() != out_features_ || view.cols() != in_features_)
      detail::raise_shape(
          "packed_weight::assign",
          "the matrix is " + detail::shape_text(view.rows(), view.cols()) + " but the weight is " +
              detail::shape_text(out_features_, in_features_) + " (out_features x in_features)");
    pack(view);
  }

  index_t out_features() const { return out_features_; }
  index_t in_features() const { return in_features_; }
  /// Bytes of the panels: those of the weight and the padding of the last panel.
  std::size_t bytes() const { return static_cast<std::size_t>(elements_.size()) * sizeof(T); }
  /// One element; for looking at, not for loops.
  T operator()(index_t output, index_t input) const {
    return elements_
        .data()[output / width * panel() + detail::panel_offset<T>(output % width, input, width)];
  }

  /// Writes the elements, bit for bit, into a matrix of the same scalar and shape, whose memory
  /// must not be the panels'. Throws shape_error when it has another shape.
  template <matrix_like M>
  void copy_to(M&& W) const {
    detail::refuse_temporary<M>();
    const auto to = detail::output_view(W);
    static_assert(std::is_same_v<detail::storage_t<typename decltype(to)::value_type>, T>,
                  "lora::packed_weight::copy_to: the matrix has another scalar than the weight");
    if (to.rows() != out_features_ || to.cols() != in_features_)
      detail::raise_shape(
          "packed_weight::copy_to",
          "the matrix is " + detail::shape_text(to.rows(), to.cols()) + " but the weight is " +
              detail::shape_text(out_features_, in_features_) + " (out_features x in_features)");
    each_panel([&](index_t p, index_t first, index_t rows) {
      const T* const from = elements_.data() + p * panel();
      for (index_t i = 0; i < rows; ++i)
        for (index_t k = 0; k < in_features_; ++k)
          to(first + i, k) = std::bit_cast<typename decltype(to)::value_type>(
              from[detail::panel_offset<T>(i, k, width)]);
    });
  }
  /// The elements as a row-major matrix.
  auto matrix() const {
    Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> W(out_features_,
                                                                        in_features_);
    copy_to(W);
    return W;
  }

  /// The panels, for the library's own verbs.
  const T* panels() const { return elements_.data(); }
  T* panels() { return elements_.data(); }

 private:
  static constexpr index_t width = detail::tile_cols<accumulator_t<T>>;

  index_t count() const { return detail::pieces(out_features_, width); }
  index_t panel() const { return detail::panel_size<T>(in_features_, width); }

  template <class V>
  void pack(const V& view) {
    static_assert(detail::holds_exactly<T, typename V::value_type>,
                  "lora::packed_weight: the weight has a wider scalar than its panels, which would "
                  "round it silently: cast "
                  "it first or use that scalar");
    each_panel([&](index_t p, index_t first, index_t rows) {
      detail::pack_padded(elements_.data() + p * panel(), width, view.middle_rows(first, rows));
    });
  }

  void clear_padding() {
    if (elements_.size() == 0) return;
    T* const elements = elements_.data();
    if (count() != 0 && out_features_ % width != 0)
      std::fill_n(elements + (count() - 1) * panel(), panel(), T(0));
    const index_t rest = in_features_ % detail::depth_group<T>;
    for (index_t p = 0; rest != 0 && p < count(); ++p)
      std::fill_n(elements + (p + 1) * panel() - detail::panel_size<T>(rest, width),
                  detail::panel_size<T>(rest, width), T(0));
  }

  /// work(panel, first output, outputs) on the threads that would multiply by it, so that memory of
  /// its own lies near them.
  template <class Work>
  void each_panel(const Work& work) const {
    if (elements_.size() == 0) return;  // without in_features there is nothing to pack
    detail::parallel(detail::threads_for(static_cast<double>(elements_.size())),
                     [&](const detail::team& team) {
                       team.for_each(count(), [&](index_t p) {
                         work(p, p * width, std::min(width, out_features_ - p * width));
                       });
                     });
  }

  index_t out_features_ = 0, in_features_ = 0;
  detail::array<T> elements_;
};

template <matrix_like M>
packed_weight(const M&) -> packed_weight<detail::storage_t<detail::element_t<M>>>;
template <class M>
  requires detail::mistaken_base<M>
packed_weight(const M&) -> packed_weight<float>;  // for the sentence
static_assert(detail::packed_weight_like<packed_weight<float>>);

namespace detail {
template <class W>
inline constexpr bool is_packed_weight = false;
template <class T>
inline constexpr bool is_packed_weight<packed_weight<T>> = true;
template <class T>
inline constexpr bool holds_double<packed_weight<T>> = std::is_same_v<T, double>;

/// The update that panels take: a panel is the transpose of some rows of the weight.
template <class Acc, bool Dots>
using panel_update = rank_update<Acc, storage_order::col_major, columns::in_order, Dots>;

/// destination := round(source - the update), of one shape; possibly the same weight.
template <class Acc, bool Dots, class T>
tally write_panels(const panel_update<Acc, Dots>& update, const packed_weight<T>& source,
                   packed_weight<T>& destination) {
  return update.run(panel_sink<panel_update<Acc, Dots>, Acc, T>(
      source.panels(), destination.panels(), source.in_features()));
}
/// What write_panels would see.
template <class Acc, bool Dots, class T>
tally check_panels(const panel_update<Acc, Dots>& update, packed_weight<T>& W) {
  return update.run(
      panel_sink<panel_update<Acc, Dots>, Acc, T, false>(W.panels(), W.panels(), W.in_features()));
}
}  // namespace detail

}  // namespace lora::inline LORA_DETAIL_ABI
