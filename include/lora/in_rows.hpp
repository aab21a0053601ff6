// SPDX-License-Identifier: Apache-2.0
//
// in_rows(first, out_features, adapter): an adapter of some outputs of a larger weight, such as q,
// k or v of a fused qkv.
//
//   const auto q = lora::in_rows(0, 12288, q_adapter), v = lora::in_rows(8192, 12288, v_adapter);
//   lora::merge(W_qkv, q, v);                 // both, one rounding; the rows of k keep their bits
//   lora::forward(W_qkv, x, y, q, v);         // both mixed into one product
//
//   formula  W'(first + i, :) = row i of what the adapter makes of W(first ... first + rows - 1,
//            :); all other rows of W, and their outputs, keep their bits.
//   shapes   the adapter is for a weight rows x in_features, rows = adapter.out_features(); the
//            result is an adapter for one of out_features x in_features. It is a kind (steps.hpp):
//            every verb takes it where it takes an adapter of any kind, and linear, any_kind and
//            module_adapter keep it. A weight stored in x out is passed as for every adapter.
//   kinds    all. DoRA's norms are those of its own rows. A kind that changes the inputs (OFT, IA3
//            of inputs) does so for these rows of a merge; a product has one x for all rows, so
//            that mixed, and what makes a form, throws value_error for it.
//   bits     merge, unmerge, prepared_merge, forward and apply with a form give the rows of the
//            slice the bits that the adapter alone gives a weight of these rows: also with other
//            adapters beside it whose rows are others. (Where a form has a bias to add, an output
//            of another row that is -0 becomes +0.)
//   cost     that of its rows: no row of lora_B beside them is stored or multiplied, but for the
//            rest of the first and last panel of outputs (tile_cols: 16 or 32); lora_A x is
//            computed once for each adapter, and apply passes over all of y, as always. A merge of
//            low-rank slices into a matrix reads and writes these rows alone, and reports of these
//            alone; other merges write back the bits of neighbouring rows (a tile, a panel, or with
//            PEFT's rounding all), and count what is not finite there. Copies the factors of a low-rank adapter once; kinds share
//            what they hold.
//   error    that of the verb with the adapter: mixed_bound takes slices (mixed_bounds.hpp).
//   throws   shape_error for rows that a weight of out_features outputs does not have.
#pragma once

#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/any_kind.hpp"
#include "lora/detail/row_norms.hpp"
#include "lora/error.hpp"
#include "lora/steps.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// An adapter K, of any kind, at a strength, for rows of a larger weight; made by in_rows. Keeps
/// the adapter (a low-rank one as a copy). Immutable. Invariant: the weight has the rows.
template <class K>
class [[nodiscard]] row_slice {
 public:
  using value_type = std::conditional_t<detail::holds_double<K>, double, float>;

  /// See in_rows.
  row_slice(index_t first, index_t out_features, any_kind of, double strength = 1)
      : of_(std::move(of)),
        rows_{first, of_.out_features()},
        out_features_(out_features),
        strength_(strength) {
    if (first < 0 || out_features < rows_.count || first > out_features - rows_.count)
      detail::raise_shape("in_rows", "the adapter has " + std::to_string(rows_.count) +
                                         " outputs and shall begin at row " +
                                         std::to_string(first) + " of a weight with " +
                                         std::to_string(out_features) + " rows");
  }

  /// The rows of W that it changes.
  const row_range& rows() const { return rows_; }
  /// The adapter of these rows.
  const any_kind& of() const { return of_; }
  double strength() const { return strength_; }

  // As an adapter kind.
  index_t out_features() const { return out_features_; }
  index_t in_features() const { return of_.in_features(); }
  bool holds_double() const { return of_.holds_double(); }
  bool stored_in_out() const { return of_.stored_in_out(); }
  void check_fits(const char* operation, index_t out_features, index_t in_features) const {
    if (out_features != out_features_)
      detail::raise_shape(operation, "the adapter is for rows " + std::to_string(rows_.first) +
                                         " ... " + std::to_string(rows_.end() - 1) +
                                         " of a weight with " + std::to_string(out_features_) +
                                         " outputs, and the weight has " +
                                         std::to_string(out_features));
    of_.check_fits(operation, rows_.count, in_features);
  }
  /// The adapter's steps, for these rows.
  template <class Acc>
  std::vector<step<Acc>> steps(step_request<Acc> request) const {
    request.strength *= strength_;
    if (request.weight == nullptr) return placed(of_.steps(request));
    const detail::block_reader<Acc> block(*request.weight, rows_);
    request.weight = &block;
    return placed(of_.steps(request));
  }

 private:
  template <class Acc>
  std::vector<step<Acc>> placed(std::vector<step<Acc>> steps) const {
    const bool all = rows_.count == out_features_;
    for (step<Acc>& one : steps)
      std::visit(
          [&](auto& s) {
            const row_range of = s.rows.of(rows_.count);
            s.rows = all ? s.rows : row_range{rows_.first + of.first, of.count};
          },
          one);
    return steps;
  }

  any_kind of_;
  row_range rows_;
  index_t out_features_;
  double strength_;
};

/// The adapter on rows first ... first + adapter.out_features() - 1 of a weight with out_features
/// rows; see the top of this file.
template <class K>
  requires(low_rank<K> || adapter_kind<K>)
row_slice<K> in_rows(index_t first, index_t out_features, const K& adapter) {
  return {first, out_features, adapter};
}
/// The same at a strength: in_rows(first, out, scaled(0.7, adapter)).
template <class K>
row_slice<K> in_rows(index_t first, index_t out_features, const scaled_kind<K>& adapter) {
  return {first, out_features, adapter.of(), adapter.strength()};
}
static_assert(adapter_kind<row_slice<any_kind>>);

}  // namespace lora::inline LORA_DETAIL_ABI
