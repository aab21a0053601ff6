// SPDX-License-Identifier: Apache-2.0
//
// LoKr: the Kronecker product of two small matrices.                        D = s kron(C1, C2)
//
//   const lora::lokr_adapter<float> style{w1, {w2_a, w2_b}, 8, {.alpha = 16}};
//   const lora::lokr_adapter<float> both{{w1_a, w1_b}, w2, 8, {.alpha = 16}};
//
//   shapes   C1 o1 x i1 and C2 o2 x i2, each dense or factored (factored_matrix.hpp). D is o1 o2 x
//            i1 i2, with D(a o2 + p, c i2 + b) = s C1(a, c) C2(p, b). For a convolution C2 is o2 x
//            (channels * kernel), which is how a dense w2 [o2, channels, kernel] lies in memory; D
//            is out x (in * kernel), and mixing needs x unfolded to that.
//   scaling  s = alpha / r, or by its rule, for the r of the configuration, also where both are
//            dense.
//   rows     Row a o2 + p is row p of C2 times each C1(a, c). Error of D / s: u kron(|C1|, |C2|)
//            for dense ones, else gamma_{q1+q2+4} kron(|C1|, |C2|) and what underflows, with u of
//            the accumulator and q the ranks, 0 for a dense one (a core of q columns adds q + 1).
//            1 FLOP per element, and 2 q2 / i1 more for a factored C2, whose rows are formed where
//            D is written. No scratch. C1 is formed when the steps are asked for, in o1 i1
//            accumulators.
//   product  Y = C2 X C1^T for each token, with x as X, i2 x i1, and y as Y, o2 x o1
//            (column-major). The order is the one that costs less: C2 first, i1 c2 + o1 i1 o2
//            multiply-adds per token, or C1 first, o1 i1 i2 + o1 c2; c2 is o2 i2, or q2 (o2 + i2)
//            where that is less. Tokens are taken in blocks whose intermediate has at most 2^17
//            elements, or one token's. The first call packs C1 and C2. Error: index i1 + i2 + q1 +
//            q2 + 10, also for dense ones.
//   bits     Those of a row do not depend on the block of rows or the thread; those of a token's
//            result not on the other tokens.
//   throws   value_error when r is not the rank of a factored C1 or C2 (unless the rule is fixed),
//            and as resolve. steps: value_error when s times the strength is not finite,
//            std::bad_alloc. rows does not throw; product std::bad_alloc.
//
// Not for a dense w2 of three dimensions (Conv1d) in PEFT 0.21: torch.kron pads w1 on the left
// there, so that D's rows are p o1 + a and its columns (b, c, k). With a kernel of 1 that is
// kron(C2, C1): exchange the two. With a longer kernel no lokr_adapter is that matrix.
// Yeh et al., "Navigating Text-To-Image Customization" (LyCORIS), arXiv 2309.14859; PEFT 0.21,
// tuners/lokr/layer.py.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "lora/detail/part_list.hpp"
#include "lora/kernel/product/mode_product.hpp"
#include "lora/kinds/factored_matrix.hpp"
#include "lora/packed_weight.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace detail {

/// D of a lokr_adapter, without s.
template <class Acc, scalar T>
class lokr_delta final : public delta_source<Acc> {
  using column_view = matrix_view<const Acc, storage_order::col_major>;

 public:
  lokr_delta(const char* operation, const factored_matrix<T>& C1, const factored_matrix<T>& C2)
      : C1_(C1.template formed<Acc>()), C2_(C2) {
    if (C2.is_dense()) return;
    factors_.emplace(low_rank_step{C2.template low_rank<Acc>()});
    C2_rows_.emplace(operation, std::span<const low_rank_step>(&*factors_, 1), C2.rows(), C2.cols(),
                     1.0);
  }

  void rows(index_t first, index_t count, Acc* to, index_t stride) const override {
    const index_t o2 = C2_.rows();
    for (index_t done = 0, n = 0; done < count; done += n) {
      const index_t a = (first + done) / o2, p = (first + done) % o2;
      n = std::min({count - done, o2 - p, tile_rows - p % tile_rows});
      Acc* const block = to + done * stride;
      read_C2(p, n, block, stride);
      for (index_t i = 0; i < n; ++i) times_C1(a, block + i * stride);
    }
  }

  void product(const Acc* x, index_t tokens, Acc* y) const override {
    const index_t o1 = C1_.rows(), i1 = C1_.cols(), o2 = C2_.rows(), i2 = C2_.cols();
    const packed& ready = packed_.get([&] { return pack(); });
    const double C2_first_cost = static_cast<double>(i1) * cost_of_C2() +
                                 static_cast<double>(o2) * static_cast<double>(i1 * o1);
    const double C1_first_cost = static_cast<double>(i1 * o1) * static_cast<double>(i2) +
                                 static_cast<double>(o1) * cost_of_C2();
    const bool C2_first = C2_first_cost <= C1_first_cost;
    const index_t between = std::max<index_t>(1, C2_first ? o2 * i1 : i2 * o1);
    const index_t block =
        std::clamp<index_t>((index_t{1} << 17) / between, 1, std::max<index_t>(1, tokens));
    workspace space;
    array<Acc> memory(block * between);
    Acc* const Z = memory.data();
    for (index_t t = 0; t < tokens; t += block) {
      const index_t n = std::min(block, tokens - t);
      const Acc* const from = x + t * i1 * i2;
      Acc* const to = y + t * o1 * o2;
      if (C2_first) {
        by_C2(space, ready, from, n * i1, Z);
        ready.C1.run(Z, o2, n, to);
      } else {
        ready.C1.run(from, i2, n, Z);
        by_C2(space, ready, Z, n * o1, to);
      }
    }
  }

 private:
  struct packed {
    mode_product<Acc> C1;
    packed_weight<Acc> C2;  // empty where the factors of C2 cost less
    packed_adapter<Acc> C2_factors;
  };
  bool by_factors() const {
    const auto rank = static_cast<double>(C2_.rank());
    return !C2_.is_dense() && rank * static_cast<double>(C2_.rows() + C2_.cols()) <
                                  static_cast<double>(C2_.rows()) * static_cast<double>(C2_.cols());
  }
  /// Multiply-adds of C2 times a column.
  double cost_of_C2() const {
    return by_factors()
               ? static_cast<double>(C2_.rank()) * static_cast<double>(C2_.rows() + C2_.cols())
               : static_cast<double>(C2_.rows()) * static_cast<double>(C2_.cols());
  }
  packed pack() const {
    const default_environment environment;
    if (!by_factors())
      return {
          mode_product<Acc>(as_matrix(C1_)), packed_weight<Acc>(C2_.template formed<Acc>()), {}};
    return {mode_product<Acc>(as_matrix(C1_)), {}, factors_->factors.visit([](const auto& l) {
              return packed_adapter<Acc>(l);
            })};
  }

  /// Rows of C2 to the first i2 columns of `to`.
  void read_C2(index_t first, index_t count, Acc* to, index_t stride) const {
    if (C2_rows_) return C2_rows_->write(first, count, to, stride);
    for (index_t i = 0; i < count; ++i)
      for (index_t b = 0; b < C2_.cols(); ++b)
        to[i * stride + b] = converted<Acc>(C2_.dense()(first + i, b));
  }
  /// row(c i2 + b) := C1(a, c) row(b), with c = 0 last, where row(b) lies.
  void times_C1(index_t a, Acc* row) const {
    const index_t i2 = C2_.cols();
    for (index_t c = C1_.cols(); c-- > 0;) {
      const Acc factor = C1_(a, c);
      Acc* const to = row + c * i2;
      for (index_t b = 0; b < i2; ++b) to[b] = factor * row[b];
    }
  }

  /// to := C2 from, of i2 x columns and o2 x columns.
  void by_C2(workspace& space, const packed& ready, const Acc* from, index_t columns,
             Acc* to) const {
    if (by_factors())
      multiply_columns(
          space, weight_source<Acc, Acc>{}, [&](const auto& visit) { visit(ready.C2_factors); },
          C2_.rows(), C2_.cols(), from, columns, to);
    else
      multiply_columns(space, weight_source<Acc, Acc>{.panels = ready.C2.panels()}, no_adapters,
                       C2_.rows(), C2_.cols(), from, columns, to);
  }

  row_major_matrix<Acc> C1_;
  factored_matrix<T> C2_;
  std::optional<low_rank_step> factors_;  // of a factored C2
  std::optional<delta_rows<Acc>> C2_rows_;
  made_once<packed> packed_;
};

}  // namespace detail

/// C1 and C2 as they are stored, and s; see the top of this file. Immutable; copies share the
/// elements. Invariant: a factored one has the rank of the adapter, unless the rule was fixed, and
/// scaling() is finite. Not low_rank: every verb takes it by its steps.
template <scalar T>
class [[nodiscard]] lokr_adapter {
 public:
  using value_type = T;

  /// rank: r of the configuration, which alpha is divided by.
  lokr_adapter(factored_matrix<T> C1, factored_matrix<T> C2, index_t rank,
               const lora::scaling& scale)
      : C1_(std::move(C1)), C2_(std::move(C2)), rank_(rank), scaling_(resolve(scale, rank)) {
    for (const auto* one : {&C1_, &C2_})
      if (!one->is_dense() && one->rank() != rank && scale.rule != scaling_rule::fixed)
        detail::raise_value("lokr_adapter",
                            std::string(one == &C1_ ? "C1" : "C2") + " has rank " +
                                std::to_string(one->rank()) + " but the adapter's rank is " +
                                std::to_string(rank) +
                                ": give the factor itself with scaling_rule::fixed");
    check_extent(C1_.rows(), C2_.rows());
    check_extent(C1_.cols(), C2_.cols());
  }

  index_t out_features() const { return C1_.rows() * C2_.rows(); }
  index_t in_features() const { return C1_.cols() * C2_.cols(); }
  index_t rank() const { return rank_; }
  double scaling() const { return scaling_; }
  const factored_matrix<T>& C1() const { return C1_; }
  const factored_matrix<T>& C2() const { return C2_; }

  /// One delta step; none at strength 0.
  template <class Acc>
  std::vector<step<Acc>> steps(const step_request<Acc>& request) const {
    return detail::delta_steps(request, scaling_, [&] {
      return std::make_shared<const detail::lokr_delta<Acc, T>>(request.operation, C1_, C2_);
    });
  }

 private:
  static void check_extent(index_t one, index_t other) {
    if (one != 0 && other > detail::most_extent / one)
      detail::raise_shape("lokr_adapter", "C1 and C2 make a matrix that is larger than a memory");
  }

  factored_matrix<T> C1_, C2_;
  index_t rank_;
  double scaling_;
};
static_assert(adapter_kind<lokr_adapter<float>>);

}  // namespace lora::inline LORA_DETAIL_ABI
