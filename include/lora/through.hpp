// SPDX-License-Identifier: Apache-2.0
//
// apply_through(down, y, l...)    y := round(y + sum of s * lora_B * down(lora_A))
// apply_through(down, y, form)    y := round(diag(g) y + sum of s * diag(g') lora_B * down(lora_A)
//                                 + c): a mixed form (mixed.hpp)
//
// An adapter whose first factor is not a matrix product but something that only the caller can do
// with it: a convolution with the base's stride, padding and dilation. down(lora_A) is called once
// for each adapter, with lora_A as a view rank x (in_channels * kernel), row-major, and returns
// rank x positions: the channels that lora_A, used as a kernel, makes of the input. For a
// convolution without groups, y then is what the merged kernel would give.
//   shapes   y out_features x positions (one image [out, H, W] is row_major(data, out, H * W));
//            lora_B out_features x rank
//   rounding once, to y's scalar: the sum over the stacked ranks is a chain of multiply-adds from
//            zero in float (double if y or a factor is double), with s folded into lora_B; then y
//            is added. down must not return double where that is float: it does not compile.
//   error    |result - exact| <= u_y |exact| + (1+u_y) (u |y| + gamma_{R+3} sum |s| |lora_B| |U| +
//            underflow) + eta_y/2 plus the error of U = down(lora_A) itself; underflow = eta (R +
//            1 + sum over ranks of |U|); the names are those of docs/numerics.md. down runs in the
//            caller's floating-point mode, all else in the default one.
//   overflow counted nowhere: y holds the infinity.
//   cost     2 R out FLOPs per position beside down; allocates R (out + positions) accumulators.
//   aliasing y must not overlap lora_B: shape_error; and not what down reads.
//   throws   shape_error, value_error (scaling not finite), before anything is written; what down
//            throws.
// A 1x1 convolution with stride 1 needs none of this: apply(x, y, l) with x in_channels x
// positions.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "lora/detail/eigen.hpp"
#include "lora/detail/operands.hpp"
#include "lora/detail/refusals.hpp"
#include "lora/forward.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace detail {

template <class Acc>
using matrix = Eigen::Matrix<Acc, Eigen::Dynamic, Eigen::Dynamic>;

/// What multiplies a lora_B beside U: a number, one more number for each of its rows (empty: none),
/// and the outputs that its rows are (all by default).
struct expanded_rows {
  double scaling;
  std::span<const double> gain = {};
  row_range rows = {};
};

/// sum of s * lora_B * U over the adapters, as one product: B has the lora_B beside each other, U
/// the U below each other. Outputs that are no rows of a lora_B do not meet its U.
template <class Acc>
struct expansion {
  matrix<Acc> B, U;

  expansion(index_t out, index_t rank, index_t columns) : B(out, rank), U(rank, columns) {}

  template <class V>
  void set_B(index_t at, const V& lora_B, const expanded_rows& of) {
    const row_range rows = of.rows.of(B.rows());
    // Where a slice has other ranks beside it, B may be multiplied whole.
    if (rows.count != B.rows()) B.middleCols(at, lora_B.cols()).setZero();
    used_.push_back({at, lora_B.cols(), rows});
    for (index_t j = 0; j < lora_B.cols(); ++j)
      for (index_t i = 0; i < lora_B.rows(); ++i) {
        const double s =
            of.gain.empty() ? of.scaling : of.gain[static_cast<std::size_t>(i)] * of.scaling;
        B(rows.first + i, at + j) = static_cast<Acc>(s * lora::detail::widen<double>(lora_B(i, j)));
      }
  }
  template <class V>
  void set_B(index_t at, const V& lora_B, double scaling) {
    set_B(at, lora_B, expanded_rows{.scaling = scaling});
  }
  /// lora_B, and U = down(lora_A), from rank `at` on.
  template <class Down, class VA, class VB>
  void set(const char* operation, const Down& down, index_t at, const VA& lora_A, const VB& lora_B,
           const expanded_rows& of) {
    const auto& held = down(lora_A);
    const lora::detail::default_environment environment;  // not for down, which is the caller's
    const auto from = as_matrix(held);
    static_assert(
        lora::detail::holds_exactly<Acc, typename std::remove_const_t<decltype(from)>::value_type>,
        "lora::apply_through: down(lora_A) returns double where y and the factors are narrower: "
        "return float");
    if (from.rows() != lora_A.rows() || from.cols() != U.cols())
      lora::detail::raise_shape(operation, "down(lora_A) is " +
                                               lora::detail::shape_text(from.rows(), from.cols()) +
                                               ", not rank x positions, which is " +
                                               lora::detail::shape_text(lora_A.rows(), U.cols()));
    set_B(at, lora_B, of);
    for (index_t j = 0; from.rows() != 0 && j < U.cols(); ++j)
      for (index_t i = 0; i < from.rows(); ++i) U(at + i, j) = lora::detail::widen<Acc>(from(i, j));
  }

  /// finish(y element, sum, output, column) for every element of y, in blocks of columns.
  template <class Y, class Finish>
  void run(const Y& y, const Finish& finish) const {
    if (y.rows() == 0) return;  // for any number of columns
    constexpr index_t block = 256;
    const std::vector<piece> pieces = cut();
    // The first block is the largest: what it does not allocate no later one does, and nothing is
    // written before.
    matrix<Acc> all(B.rows(), std::min(block, y.cols()));
    workspace space;
    for (index_t first = 0; first < y.cols(); first += block) {
      const index_t count = std::min(block, y.cols() - first);
      auto sums = all.leftCols(count);
      sums.setZero();
      for (const piece& one : pieces)
        lora::forward(space, one.B.size() != 0 ? one.B : B,
                      (one.B.size() != 0 ? one.U : U).middleCols(first, count),
                      sums.middleRows(one.rows.first, one.rows.count));
      for (index_t j = 0; j < count; ++j)
        for (index_t i = 0; i < y.rows(); ++i) finish(y(i, first + j), sums(i, j), i, first + j);
    }
  }

 private:
  struct used_ranks {
    index_t at, count;
    row_range rows;
  };
  /// Some rows with the ranks that they meet; without elements: B and U themselves.
  struct piece {
    row_range rows;
    matrix<Acc> B = {}, U = {};
  };

  std::vector<piece> cut() const {
    if (B.cols() == 0) return {};
    const std::vector<index_t> cuts =
        ends_of(used_, B.rows(), [](const used_ranks& one) { return one.rows; });
    std::vector<piece> result;
    if (cuts.size() == 2) result.push_back({{0, B.rows()}});
    for (std::size_t k = 0; cuts.size() > 2 && k + 1 < cuts.size(); ++k) {
      const row_range rows{cuts[k], cuts[k + 1] - cuts[k]};
      const auto meets = [&](const used_ranks& one) {
        return one.rows.first <= rows.first && rows.first < one.rows.end();
      };
      index_t ranks = 0;
      for (const used_ranks& one : used_) ranks += meets(one) ? one.count : 0;
      if (ranks == 0) continue;
      piece made{rows, matrix<Acc>(rows.count, ranks), matrix<Acc>(ranks, U.cols())};
      index_t at = 0;
      for (const used_ranks& one : used_) {
        if (!meets(one)) continue;
        made.B.middleCols(at, one.count) = B.block(rows.first, one.at, rows.count, one.count);
        made.U.middleRows(at, one.count) = U.middleRows(one.at, one.count);
        at += one.count;
      }
      result.push_back(std::move(made));
    }
    return result;
  }

  std::vector<used_ranks> used_;
};

/// The scaling of each adapter, and the ranks of those that take part. Decided once: down may
/// change the floating-point mode, and a scaling may be a product.
struct checked_adapters {
  index_t rank = 0;
  std::vector<double> scalings;
};

/// Checks everything of the adapters but their in_features, which the caller's product decides.
template <class Each>
checked_adapters check_all(const char* operation, const Each& each, index_t out_features) {
  const lora::detail::default_environment environment;
  checked_adapters result;
  each([&](const auto& l) {
    const auto& lora_A = l.lora_A();
    lora::detail::check_adapter(operation, l, out_features, as_matrix(lora_A).cols());
    result.scalings.push_back(static_cast<double>(l.scaling()));
    if (!lora::detail::is_zero(result.scalings.back()))
      result.rank += static_cast<index_t>(l.rank());
  });
  return result;
}

/// The expansion of all adapters, with U from down.
template <class Acc, class Down, class Each>
expansion<Acc> expand(const char* operation, const Down& down, const Each& each, index_t out,
                      index_t columns) {
  const auto checked = check_all(operation, each, out);
  expansion<Acc> result(out, checked.rank, columns);
  index_t at = 0;
  std::size_t k = 0;
  each([&](const auto& l) {
    const double scaling = checked.scalings[k++];
    if (lora::detail::is_zero(scaling)) return;
    const auto& lora_A = l.lora_A();
    const auto& lora_B = l.lora_B();
    result.set(operation, down, at, as_matrix(lora_A), as_matrix(lora_B), {scaling});
    at += as_matrix(lora_A).rows();
  });
  return result;
}

}  // namespace detail

/// y := round(y + sum of s * lora_B * down(lora_A)); see the top of this file.
template <class Down, class Y, class... L>
  requires activations<Y> && (detail::adapters<L> && ...)
void apply_through(const Down& down, Y&& y, const L&... l) {
  detail::refuse_temporary<Y>();
  const auto to = detail::output_view(y);
  using value = typename std::remove_const_t<decltype(to)>::value_type;
  using acc = accumulator_t<value, L...>;
  const auto each = detail::each_of(l...);
  detail::refuse_factor_overlap("apply_through", "y", to, each);
  const auto sum = detail::expand<acc>("apply_through", down, each, to.rows(), to.cols());
  if (sum.B.cols() == 0) return;  // not y + 0, which turns -0 into +0
  const detail::default_environment environment;
  sum.run(to, [](value& element, acc delta, index_t, index_t) {
    element = detail::narrow<value>(detail::widen<acc>(element) + delta);
  });
}

/// y := round(diag(g) y + sum of s * diag(g') lora_B * down(lora_A) + c) for y the base's
/// convolution without bias; g is the product of all gains and g' that of the gains after the
/// adapter, which is folded into lora_B with s. Throws value_error for a form with an input map, or
/// with a delta that no factors give: down multiplies by factors alone.
template <class Down, class Y, class Acc>
  requires activations<Y>
void apply_through(const Down& down, Y&& y, const mixed_form<Acc>& form) {
  detail::refuse_temporary<Y>();
  const auto to = detail::output_view(y);
  using value = typename std::remove_const_t<decltype(to)>::value_type;
  using acc = accumulator_t<value, Acc>;
  if (to.rows() != form.out_features())
    detail::raise_shape("apply_through", "y has " + std::to_string(to.rows()) +
                                             " rows and the form " +
                                             std::to_string(form.out_features()) + " outputs");
  const detail::folded_steps<Acc> folded(form.steps(), form.out_features());
  if (form.has_input_map() || !folded.deltas().empty())
    detail::raise_value(
        "apply_through",
        std::string(form.has_input_map()
                        ? "an adapter changes what the kernel is multiplied by"
                        : "an adapter has no factors that a convolution could take") +
            ": merge it");
  detail::expansion<acc> sum(to.rows(), folded.rank(), to.cols());
  index_t at = 0;
  for (const auto& one : folded.factors())
    one.factors->visit([&](const auto& l) {
      detail::refuse_overlap("apply_through", "y", to, "lora_B", l.lora_B());
      sum.set("apply_through", down, at, l.lora_A(), l.lora_B(), {one.scaling, one.gain, one.rows});
      at += l.rank();
    });
  if (form.changes_nothing()) return;
  const detail::default_environment environment;
  const Acc* const gain = form.gain().empty() ? nullptr : form.gain().data();
  const Acc* const shift = form.state().term(1).shift;
  sum.run(to, [gain, shift](value& element, acc delta, index_t i, index_t) {
    const acc base = gain == nullptr ? detail::widen<acc>(element)
                                     : static_cast<acc>(gain[i]) * detail::widen<acc>(element);
    element = detail::narrow<value>(
        detail::plus(base, shift == nullptr ? delta : delta + static_cast<acc>(shift[i])));
  });
}
/// The same with adapters of any kind that need no W: makes their form in the call, at its cost.
template <class Down, class Y, class... L>
  requires activations<Y> && (detail::any_adapters<L> && ...) && (detail::kinds<L> || ...)
void apply_through(const Down& down, Y&& y, const L&... l) {
  detail::refuse_temporary<Y>();
  using acc = accumulator_t<Y, L...>;
  index_t in = 0;
  const auto look = [&in]<class K>(const K& one) {
    if constexpr (low_rank<K>)
      in = as_matrix(one.lora_A()).cols();
    else
      in = one.in_features();
  };
  (detail::visit_kinds(look, l), ...);
  apply_through(down, y,
                detail::form_alone<acc>("apply_through", step_use::through,
                                        detail::output_view(y).rows(), in, l...));
}

/// A mistaken call of it gets a sentence.
template <class... A>
  requires detail::mistaken_on_product<A...>
auto apply_through(const A&...) {
  static_assert(detail::refuse_on_product<A...>());
}

}  // namespace lora::inline LORA_DETAIL_ABI
