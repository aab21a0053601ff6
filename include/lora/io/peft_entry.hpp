// SPDX-License-Identifier: Apache-2.0
//
// One module's adapter out of a PEFT file, with what the file says of the base's storage, and the merges that honour it:
// merge, unmerge, merged and merge_checked take W as the base stores it.
//
// PEFT's fan_in_fan_out says that the base stores W as [in, out] (GPT-2's Conv1D). The factors do not tell: they are always
// A [rank, in] and B [out, rank], and a square W fits both ways. An entry is therefore not itself an adapter that a verb
// takes (a verb would ignore the word); it has one.
#pragma once

#include <string>
#include <type_traits>
#include <utility>

#include "lora/adapter.hpp"
#include "lora/merge.hpp"
#include "lora/scaled.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace peft {

/// A module's name (without base_model.model.), its factors with their resolved scaling, and the orientation of the base's
/// weight. Owns the factors; immutable.
template <scalar T>
class entry {
 public:
  entry(std::string name, lora::adapter<T> factors, bool fan_in_fan_out)
      : name_(std::move(name)), factors_(std::move(factors)), fan_in_fan_out_(fan_in_fan_out) {}

  const std::string& name() const { return name_; }
  index_t in_features() const { return factors_.in_features(); }
  index_t out_features() const { return factors_.out_features(); }
  /// The base stores W as [in, out].
  bool fan_in_fan_out() const { return fan_in_fan_out_; }

  /// The adapter, for a weight that the caller views as out x in whatever the orientation: W, or W.transpose().
  const lora::adapter<T>& factors() const { return factors_; }

  /// The adapter, for a caller who passes W as it is stored. Throws value_error when that would be the wrong way round.
  const lora::adapter<T>& plain() const {
    if (fan_in_fan_out_)
      lora::detail::raise_value("peft::entry::plain", "the base stores the weight of " + name_ +
                                                          " as in_features x out_features (fan_in_fan_out): pass "
                                                          "W.transpose() and factors(), or merge(W, entry)");
    return factors_;
  }

 private:
  std::string name_;
  lora::adapter<T> factors_;
  bool fan_in_fan_out_;
};

/// weight * (an entry). Looks at the entry, which must outlive it.
template <scalar T>
class scaled_entry {
 public:
  scaled_entry(double weight, const entry<T>& of) : factors_(weight, of.factors()), entry_(&of) {}
  const std::string& name() const { return entry_->name(); }
  index_t in_features() const { return entry_->in_features(); }
  index_t out_features() const { return entry_->out_features(); }
  bool fan_in_fan_out() const { return entry_->fan_in_fan_out(); }
  const scaled_adapter<lora::adapter<T>>& factors() const { return factors_; }
  double weight() const { return factors_.weight(); }
  const entry<T>& of() const { return *entry_; }

 private:
  scaled_adapter<lora::adapter<T>> factors_;
  const entry<T>* entry_;
};

namespace entry_detail {
template <class E>
inline constexpr bool is_entry = false;
template <class T>
inline constexpr bool is_entry<entry<T>> = true;
template <class T>
inline constexpr bool is_entry<scaled_entry<T>> = true;
}  // namespace entry_detail

template <class E>
concept adapter_entry = entry_detail::is_entry<std::remove_cvref_t<E>>;

static_assert(!low_rank<entry<float>> && !low_rank<scaled_entry<float>>,
              "an entry must not pass as an adapter: its orientation would be ignored");

namespace entry_detail {

/// Throws value_error when the entries disagree on how one weight is stored.
template <class First, class... Rest>
bool common_orientation(const char* operation, const First& first, const Rest&... rest) {
  [[maybe_unused]] const auto agree = [&](const auto& other) {
    if (other.fan_in_fan_out() != first.fan_in_fan_out())
      lora::detail::raise_value(
          operation, "the config of one adapter says fan_in_fan_out and the other's does not, for " + first.name() +
                         " and " + other.name() +
                         "; one weight is stored one way: read them with read_options::fan_in_fan_out");
  };
  (agree(rest), ...);
  return first.fan_in_fan_out();
}

/// Throws shape_error, with a way out when W only fits the other way round.
template <class View, class E>
void check_shape(const char* operation, const View& stored, const E& e) {
  const bool swapped = e.fan_in_fan_out();
  const index_t rows = swapped ? e.in_features() : e.out_features();
  const index_t cols = swapped ? e.out_features() : e.in_features();
  if (stored.rows() == rows && stored.cols() == cols) return;
  std::string what = "the weight of " + e.name() + " is " + lora::detail::shape_text<index_t>(stored.rows(), stored.cols()) +
                     " and the adapter is for " + lora::detail::shape_text(rows, cols);
  if (stored.rows() == cols && stored.cols() == rows)
    what += swapped ? "; it fits transposed: the config says fan_in_fan_out, but this base stores out x in: read with "
                      "{.fan_in_fan_out = false}"
                    : "; it fits transposed: this base stores in x out (fan_in_fan_out, as GPT-2 does) and the config does "
                      "not say so: read with {.fan_in_fan_out = true}";
  lora::detail::raise_shape(operation, what);
}

/// verb(out x in view of the stored weight, factors...)
template <class View, class Verb, class... E>
auto oriented(const char* operation, const View& stored, const Verb& verb, const E&... e) {
  const bool swapped = common_orientation(operation, e...);
  (check_shape(operation, stored, e), ...);
  return swapped ? verb(stored.transpose(), e.factors()...) : verb(stored, e.factors()...);
}

}  // namespace entry_detail
}  // namespace peft

/// The entry at weight times its own scaling, as a view. Throws value_error when the weight is not finite.
template <scalar T>
auto scaled(double weight, const peft::entry<T>& e) {
  return peft::scaled_entry<T>(weight, e);
}
template <scalar T>
void scaled(double weight, peft::entry<T>&& temporary) = delete;  // the view would outlive it
template <scalar T>
auto scaled(double weight, const peft::scaled_entry<T>& e) {
  return peft::scaled_entry<T>(weight * e.weight(), e.of());
}

/// merge(W, entries...): as lora::merge, with W as the base stores it. Throws also value_error when the entries disagree on
/// that.
template <class M, peft::adapter_entry... E>
  requires matrix_like<M> && (sizeof...(E) > 0)
merge_report merge(M&& W, const E&... e) {
  detail::refuse_temporary<M>();
  return peft::entry_detail::oriented(
      "merge", detail::output_view(W), [](const auto& view, const auto&... l) { return lora::merge(view, l...); }, e...);
}

/// unmerge(W, entries...): as lora::unmerge, with W as the base stores it.
template <class M, peft::adapter_entry... E>
  requires matrix_like<M> && (sizeof...(E) > 0)
merge_report unmerge(M&& W, const E&... e) {
  detail::refuse_temporary<M>();
  return peft::entry_detail::oriented(
      "unmerge", detail::output_view(W), [](const auto& view, const auto&... l) { return lora::unmerge(view, l...); }, e...);
}

/// merge_checked(W, entries...): as lora::merge_checked, with W as the base stores it.
template <class M, peft::adapter_entry... E>
  requires matrix_like<M> && (sizeof...(E) > 0)
void merge_checked(M&& W, const E&... e) {
  detail::refuse_temporary<M>();
  peft::entry_detail::oriented(
      "merge_checked", detail::output_view(W), [](const auto& view, const auto&... l) { lora::merge_checked(view, l...); },
      e...);
}

/// merged(W, entries...): as lora::merged; the result is stored as W is.
template <class M, peft::adapter_entry... E>
  requires matrix_like<M> && (sizeof...(E) > 0)
auto merged(const M& W, const E&... e) {
  const auto stored = as_matrix(W);
  auto result = lora::merged(stored);  // a copy; merging in place then needs no second one
  merge(result, e...);
  return result;
}

}  // namespace lora::inline LORA_DETAIL_ABI
