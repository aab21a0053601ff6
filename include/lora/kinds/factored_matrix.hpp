// SPDX-License-Identifier: Apache-2.0
//
// factored_matrix<T>: a matrix in the form in which an adapter file stores it. There are three:
//   {W}                  W itself, rows x cols
//   {left, right}        left right: rows x rank times rank x cols (PEFT's w_a and w_b)
//   {core, left, right}  a product through a core, for convolutions (PEFT's "effective" form; CP)
//
// The product through a core is einsum("i j k, i p, j c -> p (c k)") of core, left and right, where
// the core is PEFT's tensor t [r, q, kernel] as a row-major r x (q * kernel) matrix, left is w_a,
// r x rows, right is w_b, q x channels, and cols = channels * kernel. To compute, it becomes
//   lora_B = left^T,  which is exact, and
//   lora_A(i, (c, k)) = sum over j of core(i, (j, k)) right(j, c),
// a chain of q in double that is rounded once to the accumulator: |lora_A - exact| <= gamma_{q+1}
// |core| |right|, with u of the accumulator. That is done each time that steps are asked for.
// LyCORIS, arXiv 2309.14859; PEFT 0.21, make_weight_cp in tuners/loha/layer.py and lokr/layer.py.
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>

#include "lora/adapter.hpp"
#include "lora/detail/delta_rows.hpp"
#include "lora/steps.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace detail {

/// A value that is made when it is first asked for. Thread-safe.
template <class V>
class made_once {
 public:
  template <class Make>
  const V& get(const Make& make) const {
    const std::lock_guard lock(mutex_);
    if (!value_) value_.emplace(make());
    return *value_;
  }

 private:
  mutable std::mutex mutex_;
  mutable std::optional<V> value_;
};

/// A copy of a view in another scalar, each element rounded at most once.
template <class Acc, class V>
row_major_matrix<Acc> converted_copy(const V& view) {
  row_major_matrix<Acc> copy(view.rows(), view.cols());
  for (index_t i = 0; view.cols() != 0 && i < view.rows(); ++i)
    for (index_t j = 0; j < view.cols(); ++j) copy(i, j) = converted<Acc>(view(i, j));
  return copy;
}

}  // namespace detail

/// Owns what it was made of, row-major in T. Immutable; copies share the elements. Invariant: the
/// parts fit each other, and a factored one has a rank of at least 1. Values are not looked at.
template <scalar T>
class factored_matrix {
  static_assert(detail::is_own_format<T>,
                "lora: a factored_matrix holds float, double, float16 or bfloat16");
  using matrix = detail::row_major_matrix<T>;

 public:
  using value_type = T;

  /// Each copies, or takes a row-major matrix in T that is moved in; a narrower scalar is widened
  /// exactly, a wider one is refused at compile time.
  template <class M>
    requires matrix_like<std::remove_cvref_t<M>>
  factored_matrix(M&& W)  // NOLINT(google-explicit-constructor): written as {W}, {left, right}
      : parts_{nullptr, nullptr, share(std::forward<M>(W))},
        rows_(parts_.right->rows()),
        cols_(parts_.right->cols()) {}
  /// Throws shape_error when left has not as many columns as right has rows, or none.
  template <class L, class R>
    requires matrix_like<std::remove_cvref_t<L>> && matrix_like<std::remove_cvref_t<R>>
  factored_matrix(L&& left, R&& right)
      : parts_{nullptr, share(std::forward<L>(left)), share(std::forward<R>(right))},
        rows_(parts_.left->rows()),
        cols_(parts_.right->cols()),
        rank_(parts_.right->rows()) {
    if (parts_.left->cols() != rank_ || rank_ == 0)
      raise_shapes("left must be rows x rank and right rank x cols");
  }
  /// Throws shape_error when left has not as many rows as the core, or the core's columns are no
  /// multiple of right's rows.
  template <class C, class L, class R>
    requires matrix_like<std::remove_cvref_t<C>> && matrix_like<std::remove_cvref_t<L>> &&
                 matrix_like<std::remove_cvref_t<R>>
  factored_matrix(C&& core, L&& left, R&& right)
      : parts_{share(std::forward<C>(core)), share(std::forward<L>(left)),
               share(std::forward<R>(right))},
        rows_(parts_.left->cols()),
        rank_(parts_.core->rows()) {
    const index_t q = parts_.right->rows();
    if (parts_.left->rows() != rank_ || rank_ == 0 || q == 0 || parts_.core->cols() % q != 0)
      raise_shapes("the core must be r x (q * kernel), left r x rows and right q x channels");
    cols_ = parts_.right->cols() * (parts_.core->cols() / q);
  }

  index_t rows() const { return rows_; }
  index_t cols() const { return cols_; }
  /// Of left and right; 0 for a dense one.
  index_t rank() const { return rank_; }
  bool is_dense() const { return parts_.left == nullptr; }
  bool has_core() const { return parts_.core != nullptr; }
  /// As stored: W where it is dense, else right; left and core where there are such.
  const matrix& dense() const { return *parts_.right; }
  const matrix& right() const { return *parts_.right; }
  const matrix& left() const { return *parts_.left; }
  const matrix& core() const { return *parts_.core; }

  /// Factors with lora_B lora_A = this matrix and scaling 1; not for a dense one. Shares left and
  /// right where there is no core.
  template <class Acc>
  any_factors low_rank() const {
    constexpr scaling unit{.alpha = 1, .rule = scaling_rule::fixed};
    if (!has_core())
      return any_factors(adapter_view<T>(as_matrix(right()), as_matrix(left()), unit),
                         std::make_shared<const parts>(parts_));
    const auto &t = core(), &b = right();
    const index_t channels = b.cols(), kernel = t.cols() / b.rows();
    detail::row_major_matrix<Acc> A(rank_, cols_);
    for (index_t i = 0; i < rank_; ++i)
      for (index_t c = 0; c < channels; ++c)
        for (index_t k = 0; k < kernel; ++k) {
          double sum = 0;
          for (index_t j = 0; j < b.rows(); ++j)
            sum += detail::widen<double>(t(i, j * kernel + k)) * detail::widen<double>(b(j, c));
          A(i, c * kernel + k) = detail::narrow<Acc>(sum);
        }
    return any_factors(std::make_shared<const adapter<Acc>>(
        A, detail::converted_copy<Acc>(as_matrix(left()).transpose()), unit));
  }

  /// The matrix, formed: in double, each element rounded once to Acc. Costs rows * cols
  /// accumulators.
  template <class Acc>
  detail::row_major_matrix<Acc> formed() const {
    if (is_dense()) return detail::converted_copy<Acc>(as_matrix(dense()));
    const low_rank_step all{low_rank<double>()};
    const detail::delta_rows<double> delta("factored_matrix", std::span(&all, 1), rows_, cols_,
                                           1.0);
    detail::row_major_matrix<double> some(std::min<index_t>(detail::tile_rows, rows_), cols_);
    detail::row_major_matrix<Acc> result(rows_, cols_);
    for (index_t i = 0; cols_ != 0 && i < rows_; i += some.rows()) {
      const index_t count = std::min(some.rows(), rows_ - i);
      delta.write(i, count, some.data(), cols_);
      result.middleRows(i, count) = some.topRows(count).template cast<Acc>();
    }
    return result;
  }

 private:
  struct parts {
    std::shared_ptr<const matrix> core, left, right;
  };
  template <class M>
  static std::shared_ptr<const matrix> share(M&& m) {
    return std::make_shared<const matrix>(detail::taken<T>(std::forward<M>(m)));
  }
  [[noreturn]] void raise_shapes(const std::string& wanted) const {
    const auto text = [](const auto& m) {
      return detail::shape_text<index_t>(m->rows(), m->cols());
    };
    detail::raise_shape("factored_matrix",
                        (has_core() ? "the core is " + text(parts_.core) + ", " : std::string()) +
                            "left is " + text(parts_.left) + " and right is " + text(parts_.right) +
                            "; " + wanted + ", with a rank of at least 1 (swapped or transposed?)");
  }

  parts parts_;
  index_t rows_ = 0, cols_ = 0, rank_ = 0;
};

}  // namespace lora::inline LORA_DETAIL_ABI
