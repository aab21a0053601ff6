// SPDX-License-Identifier: Apache-2.0
//
// merge(stack, e...), unmerge(stack, e...)   a tensor_view<T, 3> [experts, ., .]: every expert with
//                                            its slice of each entry
// merged(stack, e...)                        the same as a new vector of the stack's elements
// merge_checked(stack, e...)                 merge if every element of every slice stays finite;
//                                            else the stack is untouched
//
// Each e is an entry of a PEFT file, scaled(w, entry), or a range of these; slices are as the base
// stores them. Arithmetic, rounding, bounds and aliasing are those of merge on a slice.
//   throws   shape_error for another number of experts or another shape; value_error for an entry
//            that a stack cannot take: with a bias, a magnitude, or a slice whose orientation the
//            file does not say. Nothing is written then.
#pragma once

#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/io/peft_entry.hpp"
#include "lora/merge.hpp"
#include "lora/tensor_view.hpp"
#include "lora/workspace.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace peft {

/// An entry, scaled or not, or a range of these.
template <class R>
concept entry_range = !adapter_entry<R> && requires(const R& r) {
  { *std::begin(r) } -> adapter_entry;
  { std::end(r) };
};
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
struct scalar_of<scaled_kind<entry<T>>> {
  using type = T;
};
template <entry_range R>
struct scalar_of<R>
    : scalar_of<std::remove_cvref_t<decltype(*std::begin(std::declval<const R&>()))>> {};

/// One entry of a call.
template <class T>
struct strong_entry {
  double strength;
  const entry<T>* of;
};
/// The entries of a call, in order.
template <class T>
using list = std::vector<strong_entry<T>>;

template <class T>
void append(list<T>& all, const entry<T>& e) {
  all.push_back({1, &e});
}
template <class T>
void append(list<T>& all, const scaled_kind<entry<T>>& e) {
  all.push_back({e.strength(), &e.of()});
}
template <class T, entry_range R>
void append(list<T>& all, const R& range) {
  using element = decltype(*std::begin(range));
  static_assert(std::is_lvalue_reference_v<element> ||
                    std::is_same_v<std::remove_cvref_t<element>, scaled_kind<entry<T>>>,
                "lora::peft: the range makes each entry as it is walked, so that it would be gone "
                "before it is used: keep the "
                "entries in a container, or let the range return references to them");
  for (const auto& e : range) append(all, e);
}
template <class First, class... Rest>
auto list_of(const First& first, const Rest&... rest) {
  using T = typename scalar_of<First>::type;
  static_assert((std::is_same_v<T, typename scalar_of<Rest>::type> && ...),
                "lora::peft: the entries of one call have one scalar: read both files with the "
                "same read<T>()");
  list<T> all;
  append(all, first);
  (append(all, rest), ...);
  return all;
}

/// Throws unless the entry is for such a stack.
template <class View, class T>
void check_stack(const char* operation, const View& stack, const entry<T>& e) {
  const auto refuse = [&](const std::string& why) {
    lora::detail::raise_value(operation, e.name() + why);
  };
  check_use(operation, step_use::merge, e);
  if (!e.lora_bias().empty())
    refuse(" has a bias of its own (lora_bias), which a stack has no place for");
  if (!e.magnitude().empty())
    refuse(
        " has a magnitude (DoRA): its norms are those of a matrix, not of a stack: use merge(W, "
        "entry)");
  if (e.experts() != stack.extent(0))
    lora::detail::raise_shape(operation, e.name() + " is for " + std::to_string(e.experts()) +
                                             " experts and the stack has " +
                                             std::to_string(stack.extent(0)));
  if (e.parts().orientation_unsaid)
    refuse(
        " does not say whether its square slice is B A or the transpose, as PEFT before 0.19.1 had "
        "it: read with "
        "read_options::parameters_in_out = true (transposed) or false, or merge it into a matrix");
  check_shape(operation, stack.extent(1), stack.extent(2), e, given::stack);
}

/// Whether the slices are stored in x out. Throws value_error when the entries disagree.
template <class T>
bool common_orientation(const char* operation, const list<T>& all) {
  const bool first = !all.empty() && stored_in_out(*all.front().of, given::stack);
  for (const auto& each : all)
    if (stored_in_out(*each.of, given::stack) != first)
      lora::detail::raise_value(
          operation,
          "the config of one adapter says fan_in_fan_out and the other's does not, for " +
              all.front().of->name() + " and " + each.of->name() +
              "; one weight is stored one way: read them with read_options::fan_in_fan_out");
  return first;
}

/// verb(slice out x in, its adapters) for every expert, after every check: experts have one shape
/// and one scaling, so what the first slice does not throw no later one throws.
template <class View, class T, class Verb>
void each_slice(const char* operation, const View& stack, const list<T>& all, const Verb& verb) {
  const bool swapped = common_orientation(operation, all);
  for (const auto& each : all) check_stack(operation, stack, *each.of);
  if (all.empty()) return;
  using l = scaled_adapter<lora::adapter<T>>;
  std::vector<std::vector<l>> of_experts(static_cast<std::size_t>(stack.extent(0)));
  for (index_t k = 0; k < stack.extent(0); ++k)
    for (const auto& e : all)
      of_experts[static_cast<std::size_t>(k)].push_back(l(e.strength, e.of->expert(k)));
  for (index_t k = 0; k < stack.extent(0); ++k) {
    const auto slice = stack.slice(k).matrix();
    const auto& list = of_experts[static_cast<std::size_t>(k)];
    swapped ? verb(slice.transpose(), list) : verb(slice, list);
  }
}

}  // namespace entry_detail
}  // namespace peft

/// See the top of this file.
template <class T, peft::entries... E>
  requires(!std::is_const_v<T>) && (sizeof...(E) > 0)
merge_report merge(const tensor_view<T, 3>& stack, const E&... e) {
  merge_report report;
  workspace space;
  peft::entry_detail::each_slice(
      "merge", stack, peft::entry_detail::list_of(e...),
      [&](const auto& slice, const auto& list) { report += merge(space, slice, list); });
  return report;
}
template <class T, peft::entries... E>
  requires(!std::is_const_v<T>) && (sizeof...(E) > 0)
merge_report unmerge(const tensor_view<T, 3>& stack, const E&... e) {
  merge_report report;
  workspace space;
  peft::entry_detail::each_slice(
      "unmerge", stack, peft::entry_detail::list_of(e...),
      [&](const auto& slice, const auto& list) { report += unmerge(space, slice, list); });
  return report;
}
template <class T, peft::entries... E>
  requires(sizeof...(E) > 0)
std::vector<std::remove_const_t<T>> merged(const tensor_view<T, 3>& stack, const E&... e) {
  using value = std::remove_const_t<T>;
  const auto size = static_cast<std::size_t>(stack.extent(0) * stack.extent(1) * stack.extent(2));
  std::vector<value> result(stack.data(), stack.data() + size);
  merge(tensor_view<value, 3>(std::span<value>(result),
                              {stack.extent(0), stack.extent(1), stack.extent(2)}),
        e...);
  return result;
}
template <class T, peft::entries... E>
  requires(!std::is_const_v<T>) && (sizeof...(E) > 0)
merge_report merge_checked(const tensor_view<T, 3>& stack, const E&... e) {
  const auto all = peft::entry_detail::list_of(e...);
  peft::entry_detail::each_slice(
      "merge_checked", stack, all,
      [](const auto& slice, const auto& list) { detail::check_merge(slice, list); });
  merge_report report;
  workspace space;
  peft::entry_detail::each_slice(
      "merge_checked", stack, all,
      [&](const auto& slice, const auto& list) { report += merge(space, slice, list); });
  return report;
}

}  // namespace lora::inline LORA_DETAIL_ABI
