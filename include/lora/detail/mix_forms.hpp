// SPDX-License-Identifier: Apache-2.0
//
// From mixed forms to the product. A form's low-rank parts and gains go into the product as they
// are. What the product cannot do is computed before it, for the tokens concerned: x changed by
// input maps, and columns that are added to the sums.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include "lora/detail/part_list.hpp"
#include "lora/mixed.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// The forms of a call, whose parts are numbered one after the other, and which of the parts each
/// token gets. A token gets a form with all its parts in order; a form with an input map is the
/// last of its token.
template <class Acc>
struct form_list {
  std::span<const form_state<Acc>* const> forms;
  token_parts who;
  index_t rank_of_token = 0;
};

/// Parts that are there already, as mix() takes them.
template <class Acc>
struct ready_parts {
  const part<Acc>* parts;
  bool pairs;

  bool all_pairs() const { return pairs; }
  void claim(layout&) const {}
  const part<Acc>* make(std::byte*) const { return parts; }
};

/// What a call computes before the product. Lives in scratch that the caller provides.
template <class Acc>
class form_scratch {
 public:
  form_scratch(const form_list<Acc>& list, index_t in_features, index_t tokens)
      : list_(list), in_(in_features), tokens_(tokens) {
    each_form([&](const form_state<Acc>& form, index_t first) {
      parts_ += static_cast<index_t>(form.parts().size());
      pairs_ = pairs_ && form.all_pairs();
      reads_x_ = reads_x_ || reads_x(form);
      if (!form.has_addends()) return;
      ++with_addends_;
      index_t users = 0;
      for (index_t t = 0; t < tokens_; ++t) users += uses(t, first) ? 1 : 0;
      for (const form_part<Acc>& p : form.parts())
        values_ += p.made.sort == part_sort::addend ? users * p.made.rows : 0;
    });
  }

  void claim(layout& l) {
    parts_place_ = l.take<part<Acc>>(parts_);
    if (!reads_x_) return;
    column_place_ = l.take<index_t>(tokens_);
    token_place_ = l.take<index_t>(tokens_);
    x_place_ = l.take<Acc>(tokens_ * in_);
    added_place_ = l.take<index_t>(with_addends_ * tokens_);
    values_place_ = l.take<Acc>(values_);
  }

  /// May throw what a kind throws. Uses the workspace's first block, whose content is lost.
  void make(std::byte* memory, workspace& space, const activation_source<Acc>& X) {
    made_ = parts_place_.in(memory);
    index_t n = 0;
    each_form([&](const form_state<Acc>& form, index_t) {
      for (const form_part<Acc>& p : form.parts()) made_[n++] = p.made;
    });
    if (!reads_x_) return;
    column_ = column_place_.in(memory);
    token_ = token_place_.in(memory);
    x_ = x_place_.in(memory);
    place_columns();
    parallel(threads_for(static_cast<double>(columns_ * in_)), [&](const team& team) {
      team.for_each(columns_, [&](index_t c) { X.widened({token_ + c, 1, 0, in_}, x_ + c * in_); });
    });
    place_addends(added_place_.in(memory), values_place_.in(memory));
    change_inputs(space);
    each_form([&](const form_state<Acc>& form, index_t first) {
      add_level(space, form, first, 0, 0, columns_);
    });
  }

  ready_parts<Acc> parts() const { return {made_, pairs_}; }
  /// Tokens that have an input map.
  index_t mapped() const { return mapped_; }
  bool is_mapped(index_t token) const {
    return mapped_ != 0 && column_[token] >= 0 && column_[token] < mapped_;
  }
  /// T x of a mapped token.
  const Acc* input(index_t token) const { return x_ + column_[token] * in_; }

 private:
  static bool reads_x(const form_state<Acc>& form) {
    return form.has_addends() || !form.maps().empty();
  }

  /// visit(form, number of its first part).
  template <class Visit>
  void each_form(const Visit& visit) const {
    index_t first = 0;
    for (const form_state<Acc>* const form : list_.forms) {
      visit(*form, first);
      first += static_cast<index_t>(form->parts().size());
    }
  }
  /// Whether a token has the form whose first part is this.
  bool uses(index_t token, index_t first_part) const {
    if (list_.who.same_for_all()) return true;
    for (index_t n = 0; n < list_.who.count(token); ++n)
      if (list_.who.part(token, n) == first_part) return true;
    return false;
  }

  /// Columns of x: first the tokens of each form with input maps, then the others that need one.
  void place_columns() {
    std::fill_n(column_, tokens_, index_t{-1});
    columns_ = 0;
    for (const bool maps : {true, false}) {
      each_form([&](const form_state<Acc>& form, index_t first) {
        if (!reads_x(form) || form.maps().empty() == maps) return;
        for (index_t t = 0; t < tokens_; ++t)
          if (column_[t] < 0 && uses(t, first)) {
            column_[t] = columns_;
            token_[columns_++] = t;
          }
      });
      if (maps) mapped_ = columns_;
    }
  }

  /// A form's addends have a column for each of its tokens, in the order of the columns of x.
  void place_addends(index_t* added, Acc* values) {
    each_form([&](const form_state<Acc>& form, index_t first) {
      if (!form.has_addends()) return;
      index_t users = 0;
      for (index_t c = 0; c < columns_; ++c)
        if (uses(token_[c], first)) added[token_[c]] = users++;
      for (std::size_t k = 0; k < form.parts().size(); ++k) {
        part<Acc>& made = made_[first + static_cast<index_t>(k)];
        if (made.sort != part_sort::addend) continue;
        made.values = values;
        made.columns = added;
        values += users * made.rows;
      }
      added += tokens_;
    });
  }

  /// The maps of each form, the last one first; between them the addends that see what the later
  /// ones made of x.
  void change_inputs(workspace& space) {
    index_t begin = 0;
    each_form([&](const form_state<Acc>& form, index_t first) {
      if (form.maps().empty()) return;
      index_t end = begin;
      while (end < mapped_ && uses(token_[end], first)) ++end;
      for (auto level = static_cast<index_t>(form.maps().size()); level > 0; --level) {
        add_level(space, form, first, level, begin, end);
        form.maps()[static_cast<std::size_t>(level - 1)]->columns(x_ + begin * in_, end - begin,
                                                                  in_);
      }
      begin = end;
    });
  }

  /// The addends of one level for the form's tokens among columns begin ... end - 1.
  void add_level(workspace& space, const form_state<Acc>& form, index_t first, index_t level,
                 index_t begin, index_t end) {
    for (std::size_t k = 0; k < form.parts().size(); ++k) {
      const form_part<Acc>& p = form.parts()[k];
      const part<Acc>& made = made_[first + static_cast<index_t>(k)];
      if (p.made.sort != part_sort::addend || p.level != level) continue;
      for (index_t c = begin; c < end;) {
        index_t next = c;
        while (next < end && uses(token_[next], first)) ++next;
        // Values are not const to who makes them.
        if (next != c)
          compute(space, p, x_ + c * in_, next - c,
                  const_cast<Acc*>(made.values) + made.columns[token_[c]] * made.rows);
        c = next + 1;
      }
    }
  }

  void compute(workspace& space, const form_part<Acc>& p, const Acc* x, index_t count,
               Acc* y) const {
    if (p.source != nullptr) return p.source->product(x, count, y);
    const auto read = [&](const activation_block& some, Acc* destination) {
      for (index_t i = 0; i < some.rows; ++i)
        for (index_t k = 0; k < some.depth; ++k)
          destination[k * some.rows + i] = x[some.tokens[i] * in_ + some.first + k];
    };
    const auto write = [&](index_t first, index_t outputs, index_t token, const Acc* sums) {
      std::copy_n(sums, outputs, y + token * p.later.rows + first);
    };
    const ready_parts<Acc> one{&p.later, false};
    mix<Acc>(space, p.later.rows, in_, count, weight_source<Acc, Acc>{}, one,
             token_parts{.parts = 1}, p.later.rank, activation_source<Acc>{.widened = read}, write);
  }

  const form_list<Acc>& list_;
  index_t in_, tokens_, parts_ = 0, with_addends_ = 0, values_ = 0, columns_ = 0, mapped_ = 0;
  bool pairs_ = true, reads_x_ = false;
  layout::place<part<Acc>> parts_place_;
  layout::place<index_t> column_place_, token_place_, added_place_;
  layout::place<Acc> x_place_, values_place_;
  part<Acc>* made_ = nullptr;
  index_t *column_ = nullptr, *token_ = nullptr;
  Acc* x_ = nullptr;
};

/// The whole product with forms. Everything was checked. May throw std::bad_alloc and what a kind
/// throws, with nothing written.
template <class Acc, class T>
void mix_forms(workspace& space, index_t out_features, index_t in_features, index_t tokens,
               const weight_source<Acc, T>& W, const form_list<Acc>& list,
               const activation_source<Acc>& X, const finish_function<Acc>& finish) {
  if (tokens == 0 || out_features == 0) return;
  form_scratch<Acc> scratch(list, in_features, tokens);
  layout places;
  scratch.claim(places);
  scratch.make(space.require_beside(places.size()), space, X);
  const ready_parts<Acc> parts = scratch.parts();
  const auto run = [&](const weight_source<Acc, T>& weight, const activation_source<Acc>& input,
                       const finish_function<Acc>& end) {
    mix<Acc>(space, out_features, in_features, tokens, weight, parts, list.who, list.rank_of_token,
             input, end);
  };
  if (scratch.mapped() == 0) return run(W, X, finish);
  const auto widened = [&](const activation_block& some, Acc* destination) {
    X.widened(some, destination);
    for (index_t i = 0; i < some.rows; ++i) {
      if (!scratch.is_mapped(some.tokens[i])) continue;
      const Acc* const from = scratch.input(some.tokens[i]) + some.first;
      for (index_t k = 0; k < some.depth; ++k) destination[k * some.rows + i] = from[k];
    }
  };
  const activation_source<Acc> changed{widened};
  weight_source<Acc, T> plain = W;
  plain.dots = false;  // T x is no bfloat16
  if (!W.dots || scratch.mapped() == tokens) return run(plain, changed, finish);
  // Tokens with and without an input map have their own products, or a token's bits would depend on
  // the others. Both compute all tokens: such calls are rare.
  run(plain, changed, [&](index_t first, index_t count, index_t token, const Acc* sums) {
    if (scratch.is_mapped(token)) finish(first, count, token, sums);
  });
  run(W, X, [&](index_t first, index_t count, index_t token, const Acc* sums) {
    if (!scratch.is_mapped(token)) finish(first, count, token, sums);
  });
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
