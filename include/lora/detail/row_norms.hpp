// SPDX-License-Identifier: Apache-2.0
//
// The norms of the rows of W + delta, in double, in one pass over W: what DoRA divides by.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "lora/detail/row_pass.hpp"
#include "lora/steps.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// A norm as value * 2^exponent: that of a row of doubles may lie outside of double's range.
struct scaled_norm {
  double value;
  int exponent;
};

/// Squares of numbers below 1e-145 lose digits, and those of numbers above 1e154 overflow.
inline bool is_accurate(double squares) {
  constexpr double smallest =
      0x1p-960;  // what each of the squares loses to underflow is 2^-114 of this
  return is_finite(squares) && squares >= smallest;
}

/// The norm of `count` numbers at(j). Where squares would not be accurate, the numbers are scaled
/// by a power of two first.
template <class At>
scaled_norm norm_of(index_t count, const At& at) {
  const auto squares_of = [count](const auto& value) {
    double all = 0;
    for (index_t j = 0; j < count; ++j) all += value(j) * value(j);
    return all;
  };
  const double plain = squares_of(at);
  if (is_accurate(plain)) return {std::sqrt(plain), 0};
  double largest = 0;
  for (index_t j = 0; j < count; ++j) {
    if (!is_finite(at(j))) return {std::abs(at(j)), 0};
    largest = std::max(largest, std::abs(at(j)));
  }
  if (is_zero(largest)) return {0, 0};
  const int exponent = std::ilogb(largest);
  return {std::sqrt(squares_of([&](index_t j) { return std::ldexp(at(j), -exponent); })), exponent};
}

/// Sink: squares of source + sums, added up in double for each output. Row-major: outputs are rows,
/// each with its own `lanes` sums; column-major: outputs are columns of the update, with a sum
/// each.
template <class Update, class Acc, class S, storage_order Order>
class square_sink {
  static constexpr bool outputs_are_rows = Order == storage_order::row_major;

 public:
  using T = storage_t<std::remove_const_t<S>>;
  using value_type = Acc;
  using counter = no_changes;
  static constexpr bool takes_tiles = rounds_in_registers<Acc, T>;
  static constexpr bool bands_down = false, writes = true;
  static constexpr index_t lanes = outputs_are_rows ? Update::width / 2 : 1;
  /// Where the squares of an output that is a column are: in the order of the tile's two vectors.
  static constexpr index_t slot(index_t column) {
    constexpr index_t width = Update::width;
    if constexpr (columns_of<Acc, T> == columns::in_order) return column;
    return column / width * width + column % 2 * (width / 2) + column % width / 2;
  }

  /// W begins at the window's first element, `squares` at its first output.
  square_sink(const matrix_view<const S, Order>& W, double* squares)
      : origin_{reinterpret_cast<const T*>(W.data()), W.outer_stride(), squares} {}

  struct place {
    const T* from;
    index_t stride;
    double* squares;

    void next() {
      from += Update::width;
      if constexpr (!outputs_are_rows) squares += Update::width;
    }
    void fetch() const {
      for (int i = 0; i < tile_rows; ++i)
        prefetch_at<Update::width* static_cast<int>(sizeof(T))>(
            from,
            (i * stride + tuned.tiles_ahead * Update::width) * static_cast<index_t>(sizeof(T)));
    }
    LORA_DETAIL_INLINE bool store_checked(const typename Update::tile& sum, no_changes&) const {
      typename simd<Acc>::squares all[2] = {};
      LORA_DETAIL_UNROLL
      for (int i = 0; i < tile_rows; ++i) {
        typename simd<Acc>::vector w[2];
        load_row<Acc>(from + i * stride, w);
        if constexpr (outputs_are_rows) {
          typename simd<Acc>::squares of_row;
          of_row.see(w[0], sum[i][0]);
          of_row.see(w[1], sum[i][1]);
          of_row.add_to(squares + i * lanes);
        } else {
          all[0].see(w[0], sum[i][0]);
          all[1].see(w[1], sum[i][1]);
        }
      }
      if constexpr (!outputs_are_rows) {
        all[0].add_to(squares);
        all[1].add_to(squares + simd<Acc>::width);
      }
      return true;
    }
  };
  place at(index_t row, index_t col) const {
    return {origin_.from + row * origin_.stride + col, origin_.stride,
            origin_.squares + (outputs_are_rows ? row * lanes : col)};
  }
  void store_sums(tally&, index_t row, index_t col, index_t count, const Acc* sums) const {
    const place there = at(row, col);
    for (index_t j = 0; j < count; ++j) {
      const double sum = widen<double>(there.from[j]) + static_cast<double>(sums[j]);
      double& to =
          outputs_are_rows ? there.squares[(col + j) % lanes] : origin_.squares[slot(col + j)];
      to += sum * sum;
    }
  }
  void finish() const {}

 private:
  place origin_;
};

/// Sums of squares that a weight computes itself, faster than by reading rows.
template <class Acc>
class square_source {
 public:
  virtual ~square_source() = default;
  /// The squares of each of these rows of W + delta, up to rounding: the bits are those of a weight
  /// of these rows alone. l is for the rows.
  virtual std::vector<double> squares(const char* operation, const low_rank_step& l,
                                      const row_range& rows) const = 0;
};

/// The squares of a weight in memory. The sums of an output are added in an order that depends on
/// the shape alone.
template <class Acc, class S, storage_order Order>
std::vector<double> squares_of_rows(const char* operation, const matrix_view<S, Order>& W,
                                    const low_rank_step& l) {
  workspace space;
  // Sums and W meet in one order of columns: that in which load_row reads W.
  using update = rank_update<Acc, Order, columns_of<Acc, storage_t<std::remove_const_t<S>>>,
                             has_dots<Acc, bfloat16>>;
  const update delta(space, operation, each_low_rank(std::span<const low_rank_step>(&l, 1)),
                     W.rows(), W.cols(), 1.0);
  using sink = square_sink<update, Acc, S, Order>;
  constexpr bool row_major = Order == storage_order::row_major;
  constexpr index_t together = row_major ? index_t{tile_rows} : 4 * update::width;
  std::vector<double> result(static_cast<std::size_t>(W.rows()));
  const double work = static_cast<double>(W.rows()) * static_cast<double>(W.cols()) *
                      static_cast<double>(delta.rank() + 4);
  parallel(threads_for(work), [&](const team& team) {
    team.for_each(pieces(W.rows(), together), [&](index_t b) {
      const index_t first = b * together, count = std::min(together, W.rows() - first);
      double sums[together * sink::lanes] = {};
      tally none;
      const matrix_view<const S, Order> part = W.middle_rows(first, count);
      delta.run_here(sink(part, sums),
                     row_major ? window{first, first + count, 0, W.cols()}
                               : window{0, W.cols(), first, first + count},
                     none);
      for (index_t i = 0; i < count; ++i)
        for (index_t n = 0; n < sink::lanes; ++n)
          result[static_cast<std::size_t>(first + i)] +=
              sums[row_major ? i * sink::lanes + n : sink::slot(i)];
    });
  });
  return result;
}

/// The same of any weight, by reading it.
template <class Acc>
std::vector<double> squares_of_rows(const char* operation, const weight_rows<Acc>& W,
                                    const low_rank_step& l) {
  const delta_rows<Acc> delta(operation, std::span<const low_rank_step>(&l, 1), W.out_features(),
                              W.in_features(), 1.0);
  std::vector<double> result(static_cast<std::size_t>(W.out_features()));
  each_block<Acc>(W.out_features(), W.in_features(), {W.granule(), false, true},
                  [&](const row_block<Acc>& b, tally&) {
                    W.read(b.first, b.count, b.first_col, b.cols, b.rows, b.stride);
                    delta.write(b.first, b.count, b.first_col, b.cols, b.scratch, b.stride,
                                W.memory(b.next_first, b.next_col));
                    for (index_t i = 0; i < b.count; ++i) {
                      const Acc *const w = b.rows + i * b.stride, *const d =
                                                                      b.scratch + i * b.stride;
                      double all = 0;
                      for (index_t k = 0; k < b.cols; ++k) {
                        const double sum = static_cast<double>(w[k]) + static_cast<double>(d[k]);
                        all += sum * sum;
                      }
                      result[static_cast<std::size_t>(b.first + i)] += all;
                    }
                  });
  return result;
}

/// The norm of each row of W + delta. Rows whose squares are not accurate are read once more.
template <class Acc>
std::vector<scaled_norm> norms_of_rows(const char* operation, const weight_rows<Acc>& W,
                                       const low_rank_step& l) {
  const square_source<Acc>* const own = W.squares();
  const std::vector<double> squares = own != nullptr
                                          ? own->squares(operation, l, {0, W.out_features()})
                                          : squares_of_rows(operation, W, l);
  std::vector<scaled_norm> norms;
  norms.reserve(squares.size());
  std::unique_ptr<delta_rows<Acc>> delta;
  std::vector<Acc> w(static_cast<std::size_t>(W.in_features())), d(w.size());
  for (std::size_t i = 0; i < squares.size(); ++i) {
    if (is_accurate(squares[i])) {
      norms.push_back({std::sqrt(squares[i]), 0});
      continue;
    }
    if (delta == nullptr)
      delta = std::make_unique<delta_rows<Acc>>(operation, std::span<const low_rank_step>(&l, 1),
                                                W.out_features(), W.in_features(), 1.0);
    const index_t in = W.in_features(), row = static_cast<index_t>(i);
    if (in != 0) W.read(row, 1, 0, in, w.data(), in);
    if (in != 0) delta->write(row, 1, d.data(), in);
    norms.push_back(norm_of(in, [&](index_t j) {
      return static_cast<double>(w[static_cast<std::size_t>(j)]) +
             static_cast<double>(d[static_cast<std::size_t>(j)]);
    }));
  }
  return norms;
}

/// A reader of a stored weight, for kinds that look at the base.
template <class Acc, class Rows>
class rows_reader : public weight_rows<Acc> {
 public:
  explicit rows_reader(const Rows& rows) : rows_(rows) {}
  index_t out_features() const override { return rows_.out_features(); }
  index_t in_features() const override { return rows_.in_features(); }
  index_t granule() const override { return rows_.granule(); }
  void read(index_t first, index_t count, index_t first_col, index_t cols, Acc* to,
            index_t stride) const override {
    rows_.load(row_block<Acc>{.first = first,
                              .count = count,
                              .first_col = first_col,
                              .cols = cols,
                              .rows = to,
                              .scratch = nullptr,
                              .stride = stride});
  }
  memory_of_rows memory(index_t row, index_t col) const override { return rows_.memory(row, col); }

 private:
  Rows rows_;
};

/// The same of a matrix, which computes its own squares.
template <class Acc, class S, storage_order Order>
class matrix_reader final : public rows_reader<Acc, matrix_rows<Acc, S, Order>>,
                            private square_source<Acc> {
 public:
  explicit matrix_reader(const matrix_view<S, Order>& W)
      : rows_reader<Acc, matrix_rows<Acc, S, Order>>(matrix_rows<Acc, S, Order>(W)), W_(W) {}
  const square_source<Acc>* squares() const override { return this; }

 private:
  std::vector<double> squares(const char* operation, const low_rank_step& l,
                              const row_range& rows) const override {
    return squares_of_rows<Acc>(operation, W_.middle_rows(rows.first, rows.count), l);
  }

  matrix_view<S, Order> W_;
};

/// A block of rows of a weight, as a weight. Looks at it.
template <class Acc>
class block_reader final : public weight_rows<Acc>, private square_source<Acc> {
 public:
  block_reader(const weight_rows<Acc>& of, const row_range& rows) : of_(of), rows_(rows) {}
  index_t out_features() const override { return rows_.count; }
  index_t in_features() const override { return of_.in_features(); }
  index_t granule() const override { return of_.granule(); }
  void read(index_t first, index_t count, index_t first_col, index_t cols, Acc* to,
            index_t stride) const override {
    of_.read(rows_.first + first, count, first_col, cols, to, stride);
  }
  memory_of_rows memory(index_t row, index_t col) const override {
    return row < 0 ? memory_of_rows{} : of_.memory(rows_.first + row, col);
  }
  const square_source<Acc>* squares() const override {
    return of_.squares() == nullptr ? nullptr : this;
  }

 private:
  std::vector<double> squares(const char* operation, const low_rank_step& l,
                              const row_range& rows) const override {
    return of_.squares()->squares(operation, l, {rows_.first + rows.first, rows.count});
  }

  const weight_rows<Acc>& of_;
  row_range rows_;
};

template <class Acc, class T, storage_order Order>
auto reader_of(const matrix_view<T, Order>& W) {
  return matrix_reader<Acc, T, Order>(W);
}
template <class Acc, class T>
auto reader_of(const packed_weight<T>& W) {
  return rows_reader<Acc, panel_rows<Acc, T>>(panel_rows<Acc, T>(W, nullptr));
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
