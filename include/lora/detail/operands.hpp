// SPDX-License-Identifier: Apache-2.0
//
// From what a caller passes to what the kernels take: views of the matrices, a walk over the
// adapters, and the checks that every verb shares.
#pragma once

#include <iterator>
#include <ranges>
#include <string>
#include <string_view>
#include <type_traits>

#include "lora/concepts.hpp"
#include "lora/detail/convert.hpp"
#include "lora/detail/overlap.hpp"
#include "lora/error.hpp"
#include "lora/matrix_view.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// An argument list of adapters and ranges of adapters.
template <class L>
concept adapters = low_rank<L> || low_rank_range<L>;

/// visit(l) for one adapter (packed or not), or for each of a range.
template <class Visit, class L>
void visit_adapters(const Visit& visit, const L& l) {
  if constexpr (!low_rank<L> && requires { std::begin(l); }) {
    for (const auto& each : l) visit(each);
  } else {
    visit(l);
  }
}

/// A callable that visits every adapter of an argument list, in order. It refers to the arguments.
template <class... L>
auto each_of(const L&... l) {
  return [&l...](const auto& visit) { (visit_adapters(visit, l), ...); };
}

/// The view of a matrix that is written. Refusals are sentences at compile time: a failed concept
/// would hide them.
template <class M>
auto output_view(M& m) {
  if constexpr (eigen_matrix<M>) {
    static_assert(eigen_direct<M>,
                  "lora: the matrix to write is an arithmetic expression, which has no memory: "
                  "name a matrix");
    static_assert(eigen_writable<M>,
                  "lora: the matrix to write is read-only (const, or a view of const data)");
    static_assert(eigen_strided<M>,
                  "lora: the matrix to write has an inner stride other than 1: its elements along "
                  "a row (row-major) or "
                  "column (column-major) must be adjacent");
    return eigen_view(m);
  } else if constexpr (scalar_range<M>) {
    using value = std::remove_pointer_t<decltype(std::data(m))>;
    static_assert(!std::is_const_v<value>,
                  "lora: the vector to write is read-only (const, or a view of const data)");
    return col_major(m, static_cast<index_t>(std::size(m)), 1);
  } else {
    const auto view = as_matrix(m);
    static_assert(!std::is_const_v<std::remove_pointer_t<decltype(view.data())>>,
                  "lora: the matrix to write is read-only (const, or a view of const data)");
    return view;
  }
}

/// A container of scalars, not a span.
template <class V>
concept owning_range = scalar_range<V> && !std::ranges::borrowed_range<bare<V>>;

/// Refuses an output whose result would vanish with the full expression.
template <class M>
constexpr void refuse_temporary() {
  static_assert(std::is_lvalue_reference_v<M> || !(eigen_owner<M> || owning_range<M>),
                "lora: the matrix to write is a temporary that owns its elements, so the result "
                "would be lost: give it a "
                "name first");
}

/// What to read activations from: the argument itself, or for an Eigen expression without adjacent
/// elements in memory (an arithmetic expression, an inner stride) its value, the size of the
/// activations.
template <activations X>
decltype(auto) in_memory(const X& x) {
  if constexpr (eigen_matrix<X>) {
    if constexpr (eigen_strided<X>)
      return (x);
    else
      return x.eval();
  } else {
    return (x);
  }
}

/// in_features x tokens; a range of scalars is one token.
template <activations X>
auto input_view(const X& x) {
  if constexpr (scalar_range<X>)
    return col_major(std::data(x), static_cast<index_t>(std::size(x)), index_t{1});
  else
    return as_matrix(x);
}

/// Throws unless a delta weight of adapter_out x adapter_in with this scaling fits the weight (or,
/// where there is none, y and x).
inline void check_fit(const char* operation, index_t adapter_out, index_t adapter_in,
                      double scaling, index_t out_features, index_t in_features) {
  const bool has_weight = std::string_view(operation) != "apply";
  if (adapter_out != out_features || adapter_in != in_features)
    raise_shape(operation,
                "the adapter's delta weight is " + shape_text(adapter_out, adapter_in) +
                    (has_weight ? " but the weight is " : " but y and x are for one of ") +
                    shape_text(out_features, in_features) + " (out_features x in_features)" +
                    (adapter_out == in_features && adapter_in == out_features
                         ? "; a weight stored in_features x out_features (Conv1D, fan_in_fan_out) "
                           "is passed as its transpose"
                         : ""));
  if (!is_finite(scaling)) raise_value(operation, "the adapter's scaling is not finite");
}

/// Throws for a rank that no adapter has: factors without elements may claim any, and ranks are
/// added up and looped over.
inline void check_rank(const char* operation, index_t rank) {
  constexpr index_t most = 0x7fffffff;
  if (rank > most)
    raise_shape(operation, "the adapter's rank is " + std::to_string(rank) + "; at most " +
                               std::to_string(most) + " is taken");
}

template <low_rank L>
void check_factors(const char* operation, const L& l, index_t out_features, index_t in_features) {
  const auto& lora_A = l.lora_A();
  const auto& lora_B = l.lora_B();
  const auto a = as_matrix(lora_A);
  const auto b = as_matrix(lora_B);
  if (a.rows() != b.cols() || a.rows() != static_cast<index_t>(l.rank()))
    raise_shape(operation, "the adapter says rank " + std::to_string(l.rank()) + " but lora_A is " +
                               shape_text(a.rows(), a.cols()) + " and lora_B is " +
                               shape_text(b.rows(), b.cols()));
  check_rank(operation, a.rows());
  check_fit(operation, b.rows(), a.cols(), static_cast<double>(l.scaling()), out_features,
            in_features);
}

/// Throws unless the adapter, packed or not, changes an out_features x in_features weight by a
/// finite multiple.
template <class L>
void check_adapter(const char* operation, const L& l, index_t out_features, index_t in_features) {
  if constexpr (!low_rank<L>)
    check_fit(operation, l.out_features(), l.in_features(), l.scaling(), out_features, in_features);
  else
    check_factors(operation, l, out_features, in_features);
}

/// Whether the adapter takes part: at scaling 0 its factors are not read. By the bits, in every
/// floating-point mode.
template <class L>
bool is_read(const L& l) {
  return !is_zero(static_cast<double>(l.scaling()));
}

/// Checks every adapter and adds up the ranks of those that take part.
template <class Each>
index_t checked_total_rank(const char* operation, const Each& each, index_t out_features,
                           index_t in_features) {
  index_t total = 0;
  each([&](const auto& l) {
    check_adapter(operation, l, out_features, in_features);
    if (is_read(l)) total += static_cast<index_t>(l.rank());
  });
  return total;
}

/// Refuses an output that shares memory with a factor.
template <class Each, class V>
void refuse_factor_overlap(const char* operation, const char* written, const V& output,
                           const Each& each) {
  each([&]<class L>(const L& l) {
    if constexpr (low_rank<L>) {
      const auto& lora_A = l.lora_A();
      const auto& lora_B = l.lora_B();
      refuse_overlap(operation, written, output, "lora_A", as_matrix(lora_A));
      refuse_overlap(operation, written, output, "lora_B", as_matrix(lora_B));
    }
  });
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
