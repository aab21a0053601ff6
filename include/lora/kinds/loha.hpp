// SPDX-License-Identifier: Apache-2.0
//
// LoHa: the elementwise product (o) of two low-rank matrices.          D = s (B1 A1) o (B2 A2)
//
//   const lora::loha_adapter<float> style{{B1, A1}, {B2, A2}, {.alpha = 16}};
//   const lora::loha_adapter<float> conv{{t1, a1, b1}, {t2, a2, b2}, {.alpha = 4}};  // with cores
//
// In PEFT B1 is hada_w1_a and A1 hada_w1_b; factored_matrix.hpp says what a core is. The rank of D
// is up to r1 r2. For a convolution D is out x (in * kernel), and mixing needs x unfolded to that.
//   shapes   B1 out x r1, A1 r1 x in, B2 out x r2, A2 r2 x in, of any storage order.
//   scaling  s = alpha / r, or by its rule, for r = r1 = r2. Different ranks need
//            scaling_rule::fixed.
//   rows     Each element of B1 A1 and of B2 A2 is a chain of r1 or r2 multiply-adds from zero in
//            registers. The second is multiplied to the first in the first-level cache. Error of
//            D / s: at most gamma_{r1+r2+3} (|B1| |A1|) o (|B2| |A2|) and what underflows, with u
//            of the accumulator. A core with q columns adds q + 1 to the index.
//            2 (r1 + r2) + 1 FLOPs per element; reads the factors, writes D; no scratch.
//   product  Forms D in panels, which stay in the first-level cache, and multiplies x by them.
//            Error: index in + r1 + r2 + 3. (2 (r1 + r2) + 1) out in FLOPs for each block of tokens
//            (see forward.hpp), and 2 out in for each token.
//   expanded lora_B(:, i r2 + j) = B1(:, i) o B2(:, j), lora_A(i r2 + j, :) = A1(i, :) o A2(j, :),
//            the Khatri-Rao products. Offered where r1 r2 (in + out) <= in out: mixing by them
//            costs 2 r1 r2 (in + out) FLOPs per token, less than product for any number of tokens,
//            and they have no more elements than W. One rounding per element, none for 16-bit
//            factors (but for underflow and overflow): it adds 2 to the index of the low-rank
//            bound.
//   bits     Those of a row do not depend on the block of rows or the thread; those of a token's
//            result not on the other tokens.
//   throws   shape_error when the two have different shapes; value_error when one is dense or the
//            ranks differ (see scaling), and as resolve. steps: value_error when s times the
//            strength is not finite, std::bad_alloc. rows does not throw; product and expanded
//            std::bad_alloc.
// Hyeon-Woo et al., "FedPara", arXiv 2108.06098; LyCORIS; PEFT 0.21, tuners/loha/layer.py.
#pragma once

#include <algorithm>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "lora/detail/part_list.hpp"
#include "lora/kinds/factored_matrix.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace detail {

/// Sink: the sums or, where Multiply, what is there times the sums.
template <class Update, class Acc, bool Multiply, bool Down>
class hadamard_sink {
 public:
  using value_type = Acc;
  using counter = no_changes;
  static constexpr bool bands_down = Down, takes_tiles = true, writes = true;

  hadamard_sink(Acc* rows, index_t stride) : origin_{rows, stride} {}

  struct place {
    Acc* to;
    index_t stride;

    void next() { to += Down ? tile_rows * stride : Update::width; }
    void fetch() const {}
    LORA_DETAIL_INLINE bool store_checked(const typename Update::tile& sum, no_changes&) const {
      LORA_DETAIL_UNROLL
      for (int i = 0; i < tile_rows; ++i) write(to + i * stride, sum[i][0], sum[i][1]);
      return true;
    }
  };
  place at(index_t row, index_t col) const {
    return {origin_.to + row * origin_.stride + col, origin_.stride};
  }
  /// By the same instructions as a whole tile, for the same bits.
  void store_sums(tally&, index_t row, index_t col, index_t count, const Acc* sums) const {
    Acc* const to = at(row, col).to;
    Acc some[Update::width] = {}, by[Update::width] = {};
    std::copy_n(to, Multiply ? count : 0, some);
    std::copy_n(sums, count, by);
    write(some, simd<Acc>::load(by), simd<Acc>::load(by + simd<Acc>::width));
    std::copy_n(some, count, to);
  }
  void finish() const {}

 private:
  using v = simd<Acc>;
  LORA_DETAIL_INLINE static void write(Acc* to, typename v::vector first,
                                       typename v::vector second) {
    if constexpr (Multiply) {
      first = v::multiply_add(v::load(to), first, v::zero());
      second = v::multiply_add(v::load(to + v::width), second, v::zero());
    }
    v::store(to, first);
    v::store(to + v::width, second);
  }
  place origin_;
};

/// Any window of (B1 A1) o (B2 A2): rows of it, or (col_major) panels of a product. Owns the packed
/// factors.
template <class Acc, storage_order Order>
class hadamard_update {
  using update = rank_update<Acc, Order, columns::in_order, has_dots<Acc, bfloat16>>;

 public:
  hadamard_update(const char* operation, const low_rank_step& first, const low_rank_step& second)
      : first_(first_space_, operation, each_low_rank(std::span(&first, 1)),
               first.factors.out_features(), first.factors.in_features(), 1.0),
        second_(second_space_, operation, each_low_rank(std::span(&second, 1)),
                first.factors.out_features(), first.factors.in_features(), 1.0) {}
  hadamard_update(const hadamard_update&) = delete;
  hadamard_update& operator=(const hadamard_update&) = delete;

  /// The window to `to`, `stride` elements between its rows (those of the transpose if col_major).
  void write(const window& part, Acc* to, index_t stride) const {
    // In blocks that are still in the first-level cache when they are multiplied.
    constexpr index_t rows = is_panel ? 16 * tile_rows : tile_rows,
                      cols = (is_panel ? 1 : 16) * update::width;
    tally none;
    window some = part;
    for (; some.first_row < part.end_row; some.first_row = some.end_row) {
      some.end_row = std::min(part.end_row, (some.first_row / rows + 1) * rows);
      for (some.first_col = part.first_col; some.first_col < part.end_col;
           some.first_col = some.end_col) {
        some.end_col = std::min(part.end_col, (some.first_col / cols + 1) * cols);
        Acc* const block =
            to + (some.first_row - part.first_row) * stride + some.first_col - part.first_col;
        first_.run_here(hadamard_sink<update, Acc, false, is_panel>(block, stride), some, none);
        second_.run_here(hadamard_sink<update, Acc, true, is_panel>(block, stride), some, none);
      }
    }
  }

 private:
  static constexpr bool is_panel = Order == storage_order::col_major;
  workspace first_space_, second_space_;
  update first_, second_;
};

/// D of a loha_adapter, without s.
template <class Acc>
class loha_delta final : public delta_source<Acc> {
 public:
  loha_delta(const char* operation, any_factors first, any_factors second)
      : first_{std::move(first)}, second_{std::move(second)}, rows_(operation, first_, second_) {}

  void rows(index_t first, index_t count, Acc* to, index_t stride) const override {
    rows_.write({first, first + count, 0, first_.factors.in_features()}, to, stride);
  }

  void product(const Acc* x, index_t tokens, Acc* y) const override {
    const default_environment environment;
    const index_t out = first_.factors.out_features(), in = first_.factors.in_features();
    const hadamard_update<Acc, storage_order::col_major> panels("product", first_, second_);
    const auto pack = [&](index_t panel, index_t first, index_t depth, Acc* to) {
      constexpr index_t width = tile_cols<Acc>;
      const index_t begin = panel * width, end = std::min(begin + width, out);
      if (end - begin < width) std::fill_n(to, depth * width, Acc(0));
      panels.write({first, first + depth, begin, end}, to, width);
    };
    workspace space;
    multiply_columns(space, weight_source<Acc, Acc>{.pack = pack}, no_adapters, out, in, x, tokens,
                     y);
  }

  const any_factors* expanded() const override {
    const index_t rank = first_.factors.rank() * second_.factors.rank();
    const double out = static_cast<double>(first_.factors.out_features()),
                 in = static_cast<double>(first_.factors.in_features());
    if (static_cast<double>(rank) * (in + out) > in * out) return nullptr;
    return &khatri_rao_.get([&] { return expand(rank); });
  }

 private:
  struct widened {
    row_major_matrix<Acc> A, B;
  };
  static widened widen_factors(const any_factors& l) {
    return l.visit([](const auto& one) -> widened {
      return {converted_copy<Acc>(one.lora_A()), converted_copy<Acc>(one.lora_B())};
    });
  }
  any_factors expand(index_t rank) const {
    const default_environment environment;
    const widened l = widen_factors(first_.factors), m = widen_factors(second_.factors);
    const index_t own = m.A.rows();
    row_major_matrix<Acc> A(rank, l.A.cols()), B(l.B.rows(), rank);
    for (index_t k = 0; k < rank; ++k) A.row(k) = l.A.row(k / own).cwiseProduct(m.A.row(k % own));
    for (index_t o = 0; o < B.rows(); ++o)
      for (index_t k = 0; k < rank; ++k) B(o, k) = l.B(o, k / own) * m.B(o, k % own);
    return any_factors(std::make_shared<const adapter<Acc>>(
        std::move(A), std::move(B), scaling{.alpha = 1, .rule = scaling_rule::fixed}));
  }

  low_rank_step first_, second_;
  hadamard_update<Acc, storage_order::row_major> rows_;
  made_once<any_factors> khatri_rao_;
};

}  // namespace detail

/// The two matrices as they are stored, and s; see the top of this file. Immutable; copies share
/// the factors. Invariant: both have the same shape and neither is dense, and scaling() is finite.
/// Not low_rank: every verb takes it by its steps.
template <scalar T>
class [[nodiscard]] loha_adapter {
 public:
  using value_type = T;

  loha_adapter(factored_matrix<T> first, factored_matrix<T> second, const lora::scaling& scale)
      : first_(std::move(first)),
        second_(std::move(second)),
        scaling_(resolve(scale, first_.rank())) {
    if (first_.is_dense() || second_.is_dense())
      detail::raise_value("loha_adapter", "each of the two matrices must be given by its factors");
    if (first_.rows() != second_.rows() || first_.cols() != second_.cols())
      detail::raise_shape("loha_adapter", "B1 A1 is " +
                                              detail::shape_text(first_.rows(), first_.cols()) +
                                              " and B2 A2 is " +
                                              detail::shape_text(second_.rows(), second_.cols()));
    if (first_.rank() != second_.rank() && scale.rule != scaling_rule::fixed)
      detail::raise_value("loha_adapter", "the ranks are " + std::to_string(first_.rank()) +
                                              " and " + std::to_string(second_.rank()) +
                                              ": give the factor itself with scaling_rule::fixed");
  }

  index_t out_features() const { return first_.rows(); }
  index_t in_features() const { return first_.cols(); }
  index_t rank() const { return first_.rank(); }
  double scaling() const { return scaling_; }
  const factored_matrix<T>& first() const { return first_; }
  const factored_matrix<T>& second() const { return second_; }

  /// One delta step; none at strength 0.
  template <class Acc>
  std::vector<step<Acc>> steps(const step_request<Acc>& request) const {
    return detail::delta_steps(request, scaling_, [&] {
      return std::make_shared<const detail::loha_delta<Acc>>(
          request.operation, first_.template low_rank<Acc>(), second_.template low_rank<Acc>());
    });
  }

 private:
  factored_matrix<T> first_, second_;
  double scaling_;
};
static_assert(adapter_kind<loha_adapter<float>>);

}  // namespace lora::inline LORA_DETAIL_ABI
