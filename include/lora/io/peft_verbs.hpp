// SPDX-License-Identifier: Apache-2.0
//
// The verbs for entries of a PEFT file, with everything that an entry holds: how W is stored, lora_bias, DoRA, kernels, experts.
//
//   merge(W, e...), unmerge(W, e...), merged(W, e...), merge_checked(W, e...)    W as the base stores it
//   merge(W, b, e...), unmerge(W, b, e...)    and the base's bias b, for adapters with a bias of their own:  b += sum of s * bias
//   merge(stack, e...)                        a tensor_view<T, 3> [experts, ., .]: every expert with its slice
//   apply(x, y, e...)                         y := round(y + sum of (s * B * (A * x) + s * bias))
//   rows(W, ids, y, e...)                     an embedding's rows with its adapters
//   apply_through(down, y, e...)              a convolution's, through the caller's convolution (through.hpp)
//   mixed(W, e...)                            their mixed form (mixed.hpp): norms computed once; every verb takes the result
//
// A square W does not betray a wrong fan_in_fan_out (only a rectangular one "fits transposed"): before merging a file, compare
// the shapes of all its entries with the base.
// Each e is an entry, scaled(w, entry), or a range of these (a run-time number of adapters; with none, the verb does what it does for the base alone), all of
// one scalar. A range may make scaled ones as it is walked, but not entries: they must live somewhere.
// Arithmetic, rounding, bounds, cost and aliasing are those of the core's verbs on the entries' factors. Entries are taken in
// the order given; with a magnitude among them that order matters (dora.hpp).
//   throws   as those, and value_error for an entry that the verb cannot honour wholly: a bias without b, a magnitude in
//            apply or for a stack, a grouped convolution in merge (its delta has no kernel of the base's shape), a change of
//            the base (see converted() in peft_convert.hpp), a weight that replicated layers share. Nothing is written then.
#pragma once

#include <algorithm>
#include <iterator>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/detail/environment.hpp"
#include "lora/dora.hpp"
#include "lora/io/detail/module_path.hpp"
#include "lora/io/peft_entry.hpp"
#include "lora/merge.hpp"
#include "lora/rows.hpp"
#include "lora/tensor_view.hpp"
#include "lora/through.hpp"
#include "lora/workspace.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace peft {

/// A range of entries, or of scaled ones.
template <class R>
concept entry_range = !adapter_entry<R> && requires(const R& r) {
  { *std::begin(r) } -> adapter_entry;
  { std::end(r) };
};
/// What the verbs for entries take.
template <class E>
concept entries = adapter_entry<E> || entry_range<E>;

namespace entry_detail {

template <class E>
struct scalar_of;
template <class T>
struct scalar_of<entry<T>> {
  using type = T;
};
template <class T>
struct scalar_of<scaled_entry<T>> {
  using type = T;
};
template <entry_range R>
struct scalar_of<R> : scalar_of<std::remove_cvref_t<decltype(*std::begin(std::declval<const R&>()))>> {};

/// The arguments of one call, in order. Everything below is written over it, so that a verb is compiled once for each scalar.
template <class T>
using list = std::vector<scaled_entry<T>>;

template <class T>
void append(list<T>& all, const entry<T>& e) {
  all.push_back(scaled_entry<T>(1, e));
}
template <class T>
void append(list<T>& all, const scaled_entry<T>& e) {
  all.push_back(e);
}
template <class T, entry_range R>
void append(list<T>& all, const R& range) {
  using element = decltype(*std::begin(range));
  static_assert(
      std::is_lvalue_reference_v<element> || std::is_same_v<std::remove_cvref_t<element>, scaled_entry<T>>,
      "lora::peft: the range makes each entry as it is walked, so that it would be gone before it is used: keep the "
      "entries in a container, or let the range return references to them");
  for (const auto& e : range) append(all, e);
}

template <class First, class... Rest>
auto list_of(const First& first, const Rest&... rest) {
  using T = typename scalar_of<First>::type;
  static_assert((std::is_same_v<T, typename scalar_of<Rest>::type> && ...),
                "lora::peft: the entries of one call have one scalar: read both files with the same read<T>()");
  list<T> all;
  append(all, first);
  (append(all, rest), ...);
  return all;
}

[[noreturn]] inline void refuse(const char* operation, const std::string& why) { lora::detail::raise_value(operation, why); }

/// What no verb on one weight can honour.
template <class T>
void check_usable(const char* operation, const list<T>& all) {
  for (const auto& each : all)
    if (const auto& e = each.of(); e.change() != base_change::none)
      refuse(operation,
             e.name() + " was trained beside a base that its initialization had changed (" + e.change_name(e.change()) +
                 "): make it an adapter of the published base with converted(W, entry) of lora/io/peft_convert.hpp");
}

template <class T>
void check_one_weight(const char* operation, const list<T>& all) {
  check_usable(operation, all);
  for (const auto& each : all) {
    const auto& e = each.of();
    if (e.groups() > 1)
      refuse(operation,
             e.name() + " is a convolution with " + std::to_string(e.groups()) +
                 " groups whose lora_A sees all channels, so that its delta has no kernel of the base's shape (PEFT "
                 "refuses to merge it too): mix it in with apply_through");
    if (!e.shared_with().empty())
      refuse(operation, "the weight of " + e.shared_with() + " is shared by several layers of layer_replication, and " +
                            e.name() +
                            " is one of them: copy the weight for each layer and merge the factors() of its entry there, or "
                            "mix with apply");
  }
}

template <class T>
void check_no_bias(const char* operation, const list<T>& all,
                   const char* instead =
                       "pass the base's bias, too, with merge or unmerge(W, bias, entry); a base without "
                       "one cannot take it") {
  for (const auto& each : all)
    if (!each.of().lora_bias().empty()) refuse(operation, each.name() + " has a bias of its own (lora_bias): " + instead);
}

template <class T>
void check_no_magnitude(const char* operation, const list<T>& all, const char* instead) {
  for (const auto& each : all)
    if (!each.of().magnitude().empty()) refuse(operation, each.name() + " has a magnitude (DoRA): " + instead);
}

template <class T>
bool any_bias(const list<T>& all) {
  return std::any_of(all.begin(), all.end(), [](const auto& e) { return !e.of().lora_bias().empty(); });
}
template <class T>
bool any_magnitude(const list<T>& all) {
  return std::any_of(all.begin(), all.end(), [](const auto& e) { return !e.of().magnitude().empty(); });
}

/// What of the base a verb is given.
enum class given { matrix, stack };

/// PEFT looks at a module's is_transposed for stacks only: a parameter of two dimensions is out x in always.
template <class T>
bool stored_in_out(const entry<T>& e, given base) {
  if (e.kind() == entry_kind::parameter && base == given::matrix) return false;
  return e.fan_in_fan_out() || e.kind() == entry_kind::embedding;
}

/// Throws value_error when the entries disagree on how one weight is stored. Without an entry: as out x in.
template <class T>
bool common_orientation(const char* operation, const list<T>& all, given base) {
  if (all.empty()) return false;
  const auto& first = all.front().of();
  for (const auto& each : all)
    if (stored_in_out(each.of(), base) != stored_in_out(first, base))
      refuse(operation, "the config of one adapter says fan_in_fan_out and the other's does not, for " + first.name() +
                            " and " + each.name() +
                            "; one weight is stored one way: read them with read_options::fan_in_fan_out");
  return stored_in_out(first, base);
}

/// A hint where only the number of tokens differs.
template <class T>
std::string resized_vocabulary(index_t stored_rows, index_t stored_cols, index_t rows, index_t cols, const entry<T>& e) {
  const bool embeds = e.kind() == entry_kind::embedding || io_detail::is_embedding_name(e.name());
  if (!embeds || stored_cols != cols || stored_rows == rows) return {};
  const std::string tokens = "; the columns fit and the rows are tokens: ";
  if (stored_rows > rows)
    return tokens + "this base has a larger vocabulary, or a padded one, than the adapter was trained with";
  return tokens + "the vocabulary was resized, probably, before the adapter was trained: resize the base to " +
         std::to_string(rows) + " rows first (its new rows may be in a file beside the adapter)";
}

/// Throws shape_error, with a way out when W only fits the other way round.
template <class T>
void check_shape(const char* operation, index_t stored_rows, index_t stored_cols, const entry<T>& e,
                 given base = given::matrix) {
  const bool swapped = stored_in_out(e, base);
  const index_t rows = swapped ? e.in_features() : e.out_features();
  const index_t cols = swapped ? e.out_features() : e.in_features();
  if (stored_rows == rows && stored_cols == cols) return;
  std::string what = "the weight of " + e.name() + " is " + lora::detail::shape_text(stored_rows, stored_cols) +
                     " and the adapter is for " + lora::detail::shape_text(rows, cols);
  if (stored_rows == cols && stored_cols == rows && e.kind() == entry_kind::linear)
    what += swapped ? "; it fits transposed: the config says fan_in_fan_out, but this base stores out x in: read with "
                      "{.fan_in_fan_out = false}"
                    : "; it fits transposed: this base stores in x out (fan_in_fan_out, as GPT-2 does) and the config does "
                      "not say so: read with {.fan_in_fan_out = true}";
  if (stored_rows == cols && stored_cols == rows && e.kind() == entry_kind::parameter)
    what += base == given::stack
                ? "; it fits transposed: a base may store [expert, in, out] (is_transposed), and PEFT before "
                  "0.19.1 saved stacks transposed: read with read_options::parameters_in_out the other way"
                : "; it fits transposed: if this is a slice of a stack of experts, pass the stack";
  lora::detail::raise_shape(operation, what + resized_vocabulary(stored_rows, stored_cols, rows, cols, e));
}

template <class T>
using core_adapter = scaled_adapter<lora::adapter<T>>;

/// The factors at their weights, for the verbs of the core.
template <class T>
std::vector<core_adapter<T>> core(const list<T>& all) {
  std::vector<core_adapter<T>> result;
  for (const auto& e : all) result.push_back(e.factors());
  return result;
}
template <class T>
std::vector<dora_view<T>> core_with_magnitude(const list<T>& all) {
  std::vector<dora_view<T>> result;
  for (const auto& e : all) result.push_back({e.factors(), e.of().magnitude()});
  return result;
}

/// verb(out x in view of the stored weight), after every check.
template <class View, class T, class Verb>
auto oriented(const char* operation, const View& stored, const list<T>& all, const Verb& verb) {
  const bool swapped = common_orientation(operation, all, given::matrix);
  check_one_weight(operation, all);
  for (const auto& e : all) check_shape(operation, stored.rows(), stored.cols(), e.of());
  return swapped ? verb(stored.transpose()) : verb(stored);
}

/// s * bias of the entries, added up in double.
template <class T>
std::vector<double> bias_sum(index_t out_features, const list<T>& all) {
  const lora::detail::default_environment environment;
  std::vector<double> sum(static_cast<std::size_t>(out_features), 0.0);
  for (const auto& each : all) {
    const auto& values = each.of().lora_bias();
    const double s = each.weight() * each.of().scaling();
    for (std::size_t i = 0; s != 0 && i < values.size(); ++i) sum[i] += s * lora::detail::widen<double>(values[i]);
  }
  return sum;
}

/// y := round(y + (deltas + sum of s * bias)), with run(sums) adding the deltas to zero.
template <class Acc, class View, class T, class Run>
void add_with_bias(const View& y, const list<T>& all, const Run& run) {
  using value = typename View::value_type;
  Eigen::Matrix<Acc, Eigen::Dynamic, Eigen::Dynamic> sums;
  sums.setZero(y.rows(), y.cols());
  run(sums);
  const auto bias = bias_sum(y.rows(), all);
  const lora::detail::default_environment environment;
  for (index_t j = 0; j < y.cols(); ++j)
    for (index_t i = 0; i < y.rows(); ++i)
      y(i, j) = lora::detail::narrow<value>(lora::detail::widen<Acc>(y(i, j)) +
                                            (sums(i, j) + static_cast<Acc>(bias[static_cast<std::size_t>(i)])));
}

/// b := round(b + sign * sum), for a bias that check_bias has seen.
template <class View>
void add_bias(const View& bias, double sign, const std::vector<double>& sum) {
  const lora::detail::default_environment environment;
  using value = typename View::value_type;
  for (index_t k = 0; k < bias.size(); ++k) {
    value& element = bias.cols() == 1 ? bias(k, 0) : bias(0, k);
    element = lora::detail::narrow<value>(lora::detail::widen<double>(element) + sign * sum[static_cast<std::size_t>(k)]);
  }
}

template <class T>
void check_bias(const char* operation, index_t rows, index_t cols, const list<T>& all) {
  for (const auto& e : all)
    if ((rows != 1 && cols != 1) || rows * cols != e.out_features())
      lora::detail::raise_shape(operation, "the bias is " + lora::detail::shape_text(rows, cols) + " and " + e.name() +
                                               " has " + std::to_string(e.out_features()) + " outputs");
}

template <class View, class T>
merge_report merge_into(const char* operation, double sign, const View& stored, const list<T>& all) {
  return oriented(operation, stored, all, [&](const auto& view) {
    if (!any_magnitude(all)) return sign > 0 ? lora::merge(view, core(all)) : lora::unmerge(view, core(all));
    if (sign < 0)
      check_no_magnitude(
          operation, all,
          "its norms belong to the base before the merge: keep what mixed(W, entries...) returns and unmerge "
          "that");
    return lora::merge(view, core_with_magnitude(all));
  });
}

template <class View, class T>
void check_stack(const View& stack, const list<T>& all) {
  check_one_weight("merge", all);
  check_no_bias("merge", all);
  check_no_magnitude("merge", all, "its norms are those of a matrix, not of a stack: use merge(W, entry)");
  for (const auto& each : all) {
    const auto& e = each.of();
    if (e.experts() != stack.extent(0))
      lora::detail::raise_shape("merge", e.name() + " is for " + std::to_string(e.experts()) +
                                             " experts and the stack has " + std::to_string(stack.extent(0)));
    if (e.parts().orientation_unsaid)
      refuse("merge", e.name() +
                          " does not say whether its square slice is B A or the transpose, as PEFT before 0.19.1 had "
                          "it: read with read_options::parameters_in_out = true (transposed) or false, or merge it "
                          "into a matrix");
    check_shape("merge", stack.extent(1), stack.extent(2), e, given::stack);
  }
}

/// Every check and every list comes first. Experts have one shape and one scaling, so what the first slice does not throw (a
/// scaling that is not finite, no memory for the workspace) no later one throws.
template <class View, class T>
merge_report merge_stack(const View& stack, const list<T>& all) {
  const bool swapped = common_orientation("merge", all, given::stack);
  check_stack(stack, all);
  if (all.empty()) return {};
  std::vector<std::vector<core_adapter<T>>> of_experts(static_cast<std::size_t>(stack.extent(0)));
  for (index_t k = 0; k < stack.extent(0); ++k)
    for (const auto& e : all) {
      auto& list = of_experts[static_cast<std::size_t>(k)];
      list.push_back({e.weight(), e.of().expert(k)});
    }
  merge_report report;
  workspace space;
  for (index_t k = 0; k < stack.extent(0); ++k) {
    const auto slice = stack.slice(k).matrix();
    const auto& list = of_experts[static_cast<std::size_t>(k)];
    report += swapped ? lora::merge(space, slice.transpose(), list) : lora::merge(space, slice, list);
  }
  return report;
}

template <class T>
void check_mixable(const char* operation, const list<T>& all) {
  check_usable(operation, all);
  check_no_magnitude(operation, all, "it also scales the base's part: mixed(W, entries...) once, and pass what it returns");
}

}  // namespace entry_detail
}  // namespace peft

/// merge(W, entries...): see the top of this file.
template <class M, peft::entries... E>
  requires matrix_like<M> && (sizeof...(E) > 0)
merge_report merge(M&& W, const E&... e) {
  detail::refuse_temporary<M>();
  const auto all = peft::entry_detail::list_of(e...);
  peft::entry_detail::check_no_bias("merge", all);
  return peft::entry_detail::merge_into("merge", 1.0, detail::output_view(W), all);
}

/// unmerge(W, entries...): W with its deltas subtracted, as lora::unmerge. Entries with a magnitude are refused: their norms
/// belong to the base before the merge; keep what mixed returned and unmerge that.
template <class M, peft::entries... E>
  requires matrix_like<M> && (sizeof...(E) > 0)
merge_report unmerge(M&& W, const E&... e) {
  detail::refuse_temporary<M>();
  const auto all = peft::entry_detail::list_of(e...);
  peft::entry_detail::check_no_bias("unmerge", all);
  return peft::entry_detail::merge_into("unmerge", -1.0, detail::output_view(W), all);
}

/// merge(W, b, entries...): also b := round(b + sum of s * bias), added up in double.
template <class M, class V, peft::entries... E>
  requires matrix_like<M> && activations<V> && (sizeof...(E) > 0)
merge_report merge(M&& W, V&& bias, const E&... e) {
  detail::refuse_temporary<M>();
  detail::refuse_temporary<V>();
  const auto all = peft::entry_detail::list_of(e...);
  const auto b = detail::output_view(bias);
  if (all.empty()) return {};  // nothing says which shape b must have
  peft::entry_detail::check_bias("merge", b.rows(), b.cols(), all);
  const auto sum = peft::entry_detail::bias_sum(b.size(), all);  // before anything is written
  const auto report = peft::entry_detail::merge_into("merge", 1.0, detail::output_view(W), all);
  peft::entry_detail::add_bias(b, 1.0, sum);
  return report;
}

/// unmerge(W, b, entries...): also b := round(b - sum of s * bias).
template <class M, class V, peft::entries... E>
  requires matrix_like<M> && activations<V> && (sizeof...(E) > 0)
merge_report unmerge(M&& W, V&& bias, const E&... e) {
  detail::refuse_temporary<M>();
  detail::refuse_temporary<V>();
  const auto all = peft::entry_detail::list_of(e...);
  const auto b = detail::output_view(bias);
  if (all.empty()) return {};  // nothing says which shape b must have
  peft::entry_detail::check_bias("unmerge", b.rows(), b.cols(), all);
  const auto sum = peft::entry_detail::bias_sum(b.size(), all);  // before anything is written
  const auto report = peft::entry_detail::merge_into("unmerge", -1.0, detail::output_view(W), all);
  peft::entry_detail::add_bias(b, -1.0, sum);
  return report;
}

/// merge_checked(W, entries...): as lora::merge_checked. Entries with a magnitude are refused: merge checks their norms.
template <class M, peft::entries... E>
  requires matrix_like<M> && (sizeof...(E) > 0)
void merge_checked(M&& W, const E&... e) {
  detail::refuse_temporary<M>();
  const auto all = peft::entry_detail::list_of(e...);
  peft::entry_detail::check_no_bias("merge_checked", all);
  peft::entry_detail::check_no_magnitude("merge_checked", all, "use merge, which counts what became non-finite");
  peft::entry_detail::oriented("merge_checked", detail::output_view(W), all,
                               [&](const auto& view) { lora::merge_checked(view, peft::entry_detail::core(all)); });
}

/// merged(W, entries...): the merged weight as a new matrix, stored as W is.
template <class M, peft::entries... E>
  requires matrix_like<M> && (sizeof...(E) > 0)
auto merged(const M& W, const E&... e) {
  const auto stored = as_matrix(W);
  auto result = lora::merged(stored);  // a copy; merging in place then needs no second one
  merge(result, e...);
  return result;
}

/// merge(stack, entries...): a stack of experts [experts, ., .], each slice as the base stores it. Throws before anything is
/// written when an entry has another number of experts.
template <class T, peft::entries... E>
  requires(!std::is_const_v<T>) && (sizeof...(E) > 0)
merge_report merge(const tensor_view<T, 3>& stack, const E&... e) {
  return peft::entry_detail::merge_stack(stack, peft::entry_detail::list_of(e...));
}

/// apply(x, y, entries...): y := round(y + sum of (s B A x + s bias)), tokens are columns whatever the weight's storage.
template <class X, class Y, peft::entries... E>
  requires activations<X> && activations<Y> && (sizeof...(E) > 0)
void apply(const X& x, Y&& y, const E&... e) {
  detail::refuse_temporary<Y>();
  const auto all = peft::entry_detail::list_of(e...);
  peft::entry_detail::check_mixable("apply", all);
  for (const auto& each : all) {
    const auto& kernel = each.of().kernel();
    if (each.of().kind() == peft::entry_kind::embedding)
      peft::entry_detail::refuse("apply", each.name() + " is an embedding: use rows(W, ids, y, entry)");
    if (std::any_of(kernel.begin(), kernel.end(), [](auto extent) { return extent != 1; }))
      peft::entry_detail::refuse("apply",
                                 each.name() + " is a convolution with a kernel: use apply_through(down, y, entry)");
  }
  const auto run = [&](auto& to) { lora::apply(x, to, peft::entry_detail::core(all)); };
  if (!peft::entry_detail::any_bias(all)) return run(y);
  const auto to = detail::output_view(y);
  using value = typename std::remove_const_t<decltype(to)>::value_type;
  using acc = accumulator_t<X, value, typename decltype(peft::entry_detail::core(all))::value_type>;
  peft::entry_detail::add_with_bias<acc>(to, all, run);
}

/// rows(W, ids, y, entries...): an embedding's rows, as lora::rows.
template <class M, class R, class Y, peft::entries... E>
  requires(matrix_like<M> || rows_detail::is_scaled_embedding<M>) && token_range<R> && activations<Y> && (sizeof...(E) > 0)
void rows(const M& W, const R& ids, Y&& y, const E&... e) {
  detail::refuse_temporary<Y>();
  const auto all = peft::entry_detail::list_of(e...);
  peft::entry_detail::check_mixable("rows", all);
  peft::entry_detail::check_no_bias("rows", all, "rows of an embedding take none, and PEFT has no such embedding");
  for (const auto& each : all)
    if (each.of().kind() != peft::entry_kind::embedding)
      peft::entry_detail::refuse("rows", each.name() + " is not an embedding but a " + peft::name_of(each.of().kind()));
  lora::rows(W, ids, y, peft::entry_detail::core(all));
}

/// apply_through(down, y, entries...): convolutions, as lora::apply_through, and s * bias added. down(lora_A) gets the kernel
/// rank x (in_channels * kernel) and must convolve with the base's stride, padding and dilation, and always with groups = 1:
/// lora_A sees all channels.
template <class Down, class Y, peft::entries... E>
  requires activations<Y> && (sizeof...(E) > 0)
void apply_through(const Down& down, Y&& y, const E&... e) {
  detail::refuse_temporary<Y>();
  const auto all = peft::entry_detail::list_of(e...);
  peft::entry_detail::check_mixable("apply_through", all);
  const auto run = [&](auto& to) { lora::apply_through(down, to, peft::entry_detail::core(all)); };
  if (!peft::entry_detail::any_bias(all)) return run(y);
  const auto to = detail::output_view(y);
  using value = typename std::remove_const_t<decltype(to)>::value_type;
  using acc = accumulator_t<value, typename decltype(peft::entry_detail::core(all))::value_type>;
  peft::entry_detail::add_with_bias<acc>(to, all, run);
}

/// mixed(W, entries...): W as the base stores it; see mixed.hpp. What is returned knows how that is: merge, unmerge and forward
/// take the same W, rows an embedding's. A bias of an entry (lora_bias) is a shift of the form.
template <class M, peft::entries... E>
  requires matrix_like<M> && (sizeof...(E) > 0)
[[nodiscard]] auto mixed(const M& W, const E&... e) {
  const detail::default_environment environment;
  const auto stored = as_matrix(W);
  const auto all = peft::entry_detail::list_of(e...);
  auto form = peft::entry_detail::oriented("mixed", stored, all, [&](const auto& view) {
    const auto core = peft::entry_detail::core_with_magnitude(all);
    using acc = accumulator_t<detail::bare<decltype(view)>, decltype(core)>;
    const auto rows = detail::base_rows<acc>(view);
    const detail::rows_reader<acc, detail::bare<decltype(rows)>> reader(rows);
    auto steps = detail::steps_of<acc>(step_request<acc>{"mixed", 1.0, &reader}, view.rows(), view.cols(), core);
    if (peft::entry_detail::any_bias(all))
      steps.emplace_back(shift_step{.shift = peft::entry_detail::bias_sum(view.rows(), all)});
    return mixed_form<acc>("mixed", view.rows(), view.cols(), std::move(steps));
  });
  using peft::entry_detail::given;
  return peft::entry_detail::common_orientation("mixed", all, given::matrix) ? form.for_in_out() : form;
}

}  // namespace lora::inline LORA_DETAIL_ABI
