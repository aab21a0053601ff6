// SPDX-License-Identifier: Apache-2.0
//
// From the steps of a call to the pass over the weight: low-rank steps alone go through the
// register tiles, all others through the row pass. And what the steps do to the bias of the layer.
#pragma once

#include <algorithm>
#include <memory>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "lora/detail/row_pass.hpp"
#include "lora/packed_weight.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// The low-rank steps of a list that change a weight. `fits_tiles` is true when at most one gain of
/// all rows follows them, and nothing else: then the register tiles can take them.
template <class Acc>
struct low_rank_list {
  std::vector<low_rank_step> steps = {};
  const gain_step<Acc>* gain = nullptr;
  bool fits_tiles = true;
  bool all_rows = true;  ///< no step is for a block of rows

  bool all_low_rank() const { return fits_tiles && gain == nullptr; }
};
template <class Acc>
low_rank_list<Acc> low_rank_steps(std::span<const step<Acc>> steps) {
  low_rank_list<Acc> result;
  for (const auto& one : steps) {
    if (!changes_weight(one)) continue;
    const auto* low = std::get_if<low_rank_step>(&one);
    if (low != nullptr) result.steps.push_back(*low);
    result.all_rows =
        result.all_rows && std::visit([](const auto& s) { return s.rows.all(); }, one);
    if (low == nullptr || result.gain != nullptr) {
      const auto* gain = std::get_if<gain_step<Acc>>(&one);
      result.fits_tiles = result.fits_tiles && result.gain == nullptr && gain != nullptr;
      result.gain = gain;
    }
  }
  return result;
}

/// Refuses a weight that shares memory with a factor.
template <class Acc, class V>
void refuse_step_overlap(const char* operation, const V& W, std::span<const step<Acc>> steps) {
  const auto list = low_rank_steps(steps);
  refuse_factor_overlap(operation, "W", W, each_low_rank(list.steps));
}

/// Low-rank adapters packed for a weight, or for some rows of one.
template <class Acc, class T, storage_order Order>
class update_of_rows {
  using update = rank_update<Acc, Order, columns_of<Acc, storage_t<T>>, has_dots<Acc, bfloat16>>;

 public:
  /// each visits the adapters. Everything that can throw happens here.
  template <class Each>
  update_of_rows(const char* operation, double sign, const matrix_view<T, Order>& W,
                 const Each& each)
      : W_(W), update_(space_, operation, each, W.rows(), W.cols(), sign) {}
  update_of_rows(const update_of_rows&) = delete;
  update_of_rows& operator=(const update_of_rows&) = delete;

  index_t rank() const { return update_.rank(); }

  /// W := round(change(W, sums)); see tile_change.hpp.
  template <writing Where, class Change>
  tally run(const Change& change) const {
    return update_.run(rounding_sink<update, Acc, T, Order, Where, Change>(W_, change));
  }
  /// W := round(W - sums), where there are any.
  template <writing Where>
  tally run() const {
    if (rank() == 0 && Where == writing::in_place) return {};
    return run<Where>(subtracted_sum<Acc>());
  }

 private:
  matrix_view<T, Order> W_;
  workspace space_;
  update update_;
};

/// W := round(what the steps make of it), or with `unmerging` the reverse; Where: in place, or
/// counted only.
template <writing Where, class Acc, class T, storage_order Order>
tally pass_over(const char* operation, double sign, const matrix_view<T, Order>& W,
                std::span<const step<Acc>> steps) {
  refuse_step_overlap(operation, W, steps);
  const auto list = low_rank_steps(steps);
  if (list.all_low_rank() && !list.all_rows) {
    for (const auto& one : steps) check_step(operation, one, W.rows(), W.cols());
    // All of them before the first is written.
    std::vector<std::unique_ptr<update_of_rows<Acc, T, Order>>> updates;
    for (const auto& [rows, some] : cut_at_rows(list.steps, W.rows()))
      if (!some.empty() || Where == writing::nowhere)
        updates.push_back(std::make_unique<update_of_rows<Acc, T, Order>>(
            operation, sign, W.middle_rows(rows.first, rows.count), each_low_rank(some)));
    tally seen;
    for (const auto& one : updates) seen += one->template run<Where>();
    return seen;
  }
  if (list.all_rows && (list.all_low_rank() || (list.fits_tiles && sign == merging))) {
    for (const auto& one : steps) check_step(operation, one, W.rows(), W.cols());
    const update_of_rows<Acc, T, Order> update(operation, sign, W, each_low_rank(list.steps));
    if (list.gain == nullptr) return update.template run<Where>();
    return update.template run<Where>(gained_sum<Acc, storage_t<T>, Order>{list.gain->gain.data()});
  }
  const row_change<Acc> change(operation, steps, W.rows(), W.cols(), sign);
  return row_pass<Acc>(matrix_rows<Acc, T, Order, Where == writing::in_place>(W), change);
}
/// destination := round(what the steps make of source), of one shape; possibly the same weight.
template <class Acc, class T>
tally pass_over(const char* operation, double sign, const packed_weight<T>& source,
                packed_weight<T>& destination, std::span<const step<Acc>> steps) {
  if (const auto list = low_rank_steps(steps); list.all_low_rank() && list.all_rows) {
    workspace space;
    const panel_update<Acc, has_dots<Acc, bfloat16>> update(
        space, operation, each_low_rank(list.steps), source.out_features(), source.in_features(),
        sign);
    return write_panels(update, source, destination);
  }
  const row_change<Acc> change(operation, steps, source.out_features(), source.in_features(), sign);
  return row_pass<Acc>(panel_rows<Acc, T>(source, &destination), change);
}

template <class Acc>
bool scales_bias(const step<Acc>& one) {
  const auto* gain = std::get_if<gain_step<Acc>>(&one);
  return gain != nullptr && gain->scales_bias;
}

/// What steps do to a bias b: b := gain b + shift. Empty where they leave it as it is.
struct bias_change {
  std::vector<double> gain, shift;

  bool empty() const { return gain.empty() && shift.empty(); }
};
/// Throws as row_change.
template <class Acc>
bias_change bias_change_of(const char* operation, std::span<const step<Acc>> steps,
                           index_t out_features, index_t in_features) {
  bias_change result;
  const auto outputs = static_cast<std::size_t>(out_features);
  for (const auto& one : steps) {
    check_step(operation, one, out_features, in_features);
    if (const auto* shift = std::get_if<shift_step>(&one)) {
      const auto first = static_cast<std::size_t>(shift->rows.first);
      result.shift.resize(outputs);
      for (std::size_t i = 0; i < shift->shift.size(); ++i)
        result.shift[first + i] += shift->shift[i];
    } else if (scales_bias(one)) {
      const auto* gain = std::get_if<gain_step<Acc>>(&one);
      const auto first = static_cast<std::size_t>(gain->rows.first);
      result.gain.resize(outputs, 1.0);
      for (std::size_t i = 0; i < gain->gain.size(); ++i) {
        result.gain[first + i] *= static_cast<double>(gain->gain[i]);
        if (!result.shift.empty()) result.shift[first + i] *= static_cast<double>(gain->gain[i]);
      }
    }
  }
  return result;
}

/// b := round(gain b + shift), or the reverse.
template <class View>
void change_bias(const View& bias, double sign, const bias_change& change) {
  using value = typename View::value_type;
  for (index_t k = 0; !change.empty() && k < bias.size(); ++k) {
    value& element = bias.cols() == 1 ? bias(k, 0) : bias(0, k);
    const auto i = static_cast<std::size_t>(k);
    const double gain = change.gain.empty() ? 1.0 : change.gain[i],
                 shift = change.shift.empty() ? 0.0 : change.shift[i];
    if (gain == 1.0 && shift == 0.0) continue;  // a zero keeps its sign
    const auto b = widen<double>(element);
    element = narrow<value>(sign == unmerging ? (b - shift) / gain : gain * b + shift);
  }
}

/// Throws unless b is a vector of out_features elements.
inline void check_bias_shape(const char* operation, index_t rows, index_t cols,
                             index_t out_features) {
  if ((rows != 1 && cols != 1) || rows * cols != out_features)
    raise_shape(operation, "the bias is " + shape_text(rows, cols) + " and W has " +
                               std::to_string(out_features) + " outputs");
}

/// Throws value_error when the steps have a bias to add and the call gives none to add it to.
template <class Acc>
void refuse_shifts(const char* operation, std::span<const step<Acc>> steps) {
  for (const auto& one : steps)
    if (const auto* shift = std::get_if<shift_step>(&one))
      raise_value(
          operation,
          (shift->of.empty() ? "an adapter" : shift->of) +
              " has a bias of its own (lora_bias): pass the base's bias, too, with merge or "
              "unmerge(W, bias, adapter); a base without one cannot take it");
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
