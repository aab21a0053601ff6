// SPDX-License-Identifier: Apache-2.0
//
// The steps of adapters as a change of the rows of a weight: row := step_n(... step_1(row)), in the
// accumulator, and the reverse. Factors are packed once; any thread may ask for any block of rows.
#pragma once

#include <algorithm>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "lora/detail/delta_rows.hpp"
#include "lora/detail/stored_rows.hpp"
#include "lora/steps.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

template <class Acc>
void check_low_rank(const char* operation, const low_rank_step& low, index_t out_features,
                    index_t in_features) {
  refuse_double_factors<Acc>(operation, low.factors);
  check_fit(operation, low.factors.out_features(), low.factors.in_features(),
            low.strength * low.factors.scaling(), out_features, in_features);
}
/// Throws unless a step is for a weight of this shape.
template <class Acc>
void check_step(const char* operation, const step<Acc>& one, index_t out_features,
                index_t in_features) {
  const auto check_length = [&](const char* what, std::size_t length) {
    if (static_cast<index_t>(length) != out_features)
      raise_shape(operation, "a " + std::string(what) + " has " + std::to_string(length) +
                                 " values for " + std::to_string(out_features) + " outputs");
  };
  out_features =
      std::visit([&](const auto& s) { return checked_rows(operation, s.rows, out_features); }, one)
          .count;
  if (const auto* low = std::get_if<low_rank_step>(&one)) {
    check_low_rank<Acc>(operation, *low, out_features, in_features);
  } else if (const auto* gain = std::get_if<gain_step<Acc>>(&one))
    check_length("gain", gain->gain.size());
  else if (const auto* shift = std::get_if<shift_step>(&one))
    check_length("bias", shift->shift.size());
}

/// Whether a step changes the weight; a shift changes the bias alone.
template <class Acc>
bool changes_weight(const step<Acc>& one) {
  return !std::holds_alternative<shift_step>(one);
}

/// What the steps do to rows of W, or with the sign `unmerging` the reverse. Refers to the steps'
/// gains, maps and sources, which must outlive it.
template <class Acc>
class row_change {
 public:
  /// Checks and packs everything. Throws shape_error, value_error (also where a step cannot be
  /// undone), std::bad_alloc.
  row_change(const char* operation, std::span<const step<Acc>> steps, index_t out_features,
             index_t in_features, double sign)
      : in_features_(in_features), undoes_(sign == unmerging) {
    for (const auto& one : steps) check_step(operation, one, out_features, in_features);
    std::vector<low_rank_step> chain;  // neighbours share one chain of multiply-adds
    const auto close = [&] {
      for (const auto& [rows, some] : cut_at_rows(chain, out_features)) {
        if (some.empty()) continue;
        auto delta = std::make_unique<delta_rows<Acc>>(
            operation, std::span<const low_rank_step>(some), rows.count, in_features, sign);
        if (delta->rank() != 0) parts_.push_back({rows, std::move(delta)});
      }
      chain.clear();
    };
    const auto count = steps.size();
    for (std::size_t n = 0; n < count; ++n) {
      const auto& one = steps[undoes_ ? count - 1 - n : n];
      if (!changes_weight(one)) continue;
      if (const auto* low = std::get_if<low_rank_step>(&one)) {
        // A chain that is undone keeps the order in which it was merged.
        chain.insert(undoes_ ? chain.begin() : chain.end(), *low);
        continue;
      }
      close();
      add(operation, one);
    }
    close();
  }

  bool empty() const { return parts_.empty(); }
  bool needs_scratch() const {
    return std::any_of(parts_.begin(), parts_.end(), [](const part& one) {
      return std::holds_alternative<const delta_step<Acc>*>(one.change);
    });
  }
  /// Whether a change needs whole rows, and not some of their columns.
  bool needs_rows() const {
    return needs_scratch() || std::any_of(parts_.begin(), parts_.end(), [](const part& one) {
             return std::holds_alternative<const input_step<Acc>*>(one.change);
           });
  }
  /// Whether any of these rows changes.
  bool touches(index_t first, index_t count) const {
    return std::any_of(parts_.begin(), parts_.end(), [&](const part& one) {
      return one.rows.all() || (one.rows.first < first + count && first < one.rows.end());
    });
  }

  /// Changes the rows in place. On the calling thread.
  void operator()(const row_block<Acc>& block) const {
    for (const part& one : parts_) {
      const row_block<Acc> some = within(block, one.rows);
      if (some.count > 0)
        std::visit([&](const auto& p) { run(p, some, one.rows.first); }, one.change);
    }
  }

 private:
  using chain_rows = std::unique_ptr<delta_rows<Acc>>;
  struct part {
    row_range rows;
    std::variant<chain_rows, const delta_step<Acc>*, const gain_step<Acc>*, const input_step<Acc>*>
        change;
  };

  void add(const char* operation, const step<Acc>& one) {
    if (const auto* delta = std::get_if<delta_step<Acc>>(&one)) {
      parts_.push_back({delta->rows, delta});
    } else if (const auto* gain = std::get_if<gain_step<Acc>>(&one)) {
      if (undoes_) refuse_lost_rows(operation, *gain);
      parts_.push_back({gain->rows, gain});
    } else if (const auto* input = std::get_if<input_step<Acc>>(&one)) {
      if (undoes_) input->map->undo_rows(operation, nullptr, 0, in_features_);
      parts_.push_back({input->rows, input});
    }
  }
  static void refuse_lost_rows(const char* operation, const gain_step<Acc>& one) {
    for (std::size_t i = 0; i < one.gain.size(); ++i)
      if (is_zero(one.gain[i]))
        raise_value(operation, "output " +
                                   std::to_string(one.rows.first + static_cast<index_t>(i)) +
                                   " has the magnitude 0, so its row of W is lost");
  }

  // Row `origin` of W is row 0 of what follows.
  void run(const chain_rows& rows, const row_block<Acc>& block, index_t origin) const {
    rows->subtract(block.first - origin, block.count, block.first_col, block.cols, block.rows,
                   block.stride, block.ahead);
  }
  /// Where the delta is 0 an element keeps its sign.
  void run(const delta_step<Acc>* delta, const row_block<Acc>& block, index_t origin) const {
    const Acc scale = static_cast<Acc>(undoes_ ? -delta->scale : delta->scale);
    delta->source->rows(block.first - origin, block.count, block.scratch, block.stride);
    for (index_t i = 0; i < block.count; ++i) {
      Acc* const row = block.rows + i * block.stride;
      const Acc* const D = block.scratch + i * block.stride;
      for (index_t k = 0; k < block.cols; ++k)
        row[k] = is_zero(D[k]) ? row[k] : row[k] + scale * D[k];
    }
  }
  void run(const gain_step<Acc>* gain, const row_block<Acc>& block, index_t origin) const {
    for (index_t i = 0; i < block.count; ++i) {
      Acc* const row = block.rows + i * block.stride;
      const Acc g = gain->gain[static_cast<std::size_t>(block.first - origin + i)];
      if (undoes_)
        for (index_t k = 0; k < block.cols; ++k) row[k] = row[k] / g;
      else
        for (index_t k = 0; k < block.cols; ++k) row[k] = row[k] * g;
    }
  }
  void run(const input_step<Acc>* input, const row_block<Acc>& block, index_t) const {
    if (undoes_)
      input->map->undo_rows("unmerge", block.rows, block.count, block.stride);
    else
      input->map->rows(block.rows, block.count, block.stride);
  }

  index_t in_features_;
  bool undoes_;
  std::vector<part> parts_;
};

}  // namespace lora::inline LORA_DETAIL_ABI::detail
