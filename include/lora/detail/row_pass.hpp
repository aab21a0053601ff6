// SPDX-License-Identifier: Apache-2.0
//
// The row pass: W(i, :) := store(change(i, W(i, :))). Blocks of rows are widened into accumulators
// that stay in the second-level cache, changed, rounded once and counted. Threads share the blocks.
// W is read and written once; nothing of its size is allocated. A block gives the bits of the
// whole.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <numeric>

#include "lora/detail/row_change.hpp"
#include "lora/detail/stored_rows.hpp"
#include "lora/kernel/memory.hpp"
#include "lora/kernel/threads.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// Keeps the first exception of a parallel region, in which none may leave a thread.
class first_exception {
 public:
  template <class Body>
  void guard(const Body& body) {
#if defined(__cpp_exceptions)
    try {
      body();
    } catch (...) {
      if (!taken_.test_and_set()) held_ = std::current_exception();
    }
#else
    body();
#endif
  }
  void rethrow() const {
#if defined(__cpp_exceptions)
    if (held_) std::rethrow_exception(held_);
#endif
  }

 private:
  std::atomic_flag taken_;
  std::exception_ptr held_;
};

/// The blocks of a pass. Where columns may be handled apart, a block stays in the first-level
/// cache; else it has whole rows and stays in the second.
template <class Acc>
struct block_shape {
  index_t rows, cols, stride;

  block_shape(index_t out_features, index_t in_features, index_t granule, bool whole_rows) {
    constexpr index_t first_level = index_t{16} << 10, second_level = index_t{256} << 10,
                      page = 4096;
    constexpr index_t size = static_cast<index_t>(sizeof(Acc)), line = 64 / size;
    const index_t step = std::lcm(granule, index_t{tile_rows});
    cols = whole_rows
               ? in_features
               : std::min(in_features, std::max<index_t>(1, first_level / (step * 64 * size)) * 64);
    stride = pieces(cols, line) * line;
    // Rows a multiple of a page apart would meet in the same sets of the first-level cache.
    if (stride * size % page == 0) stride += line;
    const index_t wanted =
        (whole_rows ? second_level : first_level) / (std::max<index_t>(1, stride) * size);
    rows = std::min(std::clamp<index_t>(wanted / step, 1, 64) * step,
                    std::max<index_t>(1, out_features));
  }
  index_t size() const { return rows * stride; }
};

/// How each_block goes over a weight.
struct pass_options {
  index_t granule = 1;      ///< rows that are handled together
  bool whole_rows = false;  ///< a block has all columns
  bool scratch = false;     ///< memory of a block's size beside it
};

/// work(block, tally) for every block; the blocks of the same rows come from left to right on one
/// thread. Throws what work throws, when all threads are done.
template <class Acc, class Work>
tally each_block(index_t out_features, index_t in_features, const pass_options& options,
                 const Work& work) {
  if (out_features == 0 || in_features == 0) return {};
  constexpr double cost_of_one = 16;  // multiply-adds that take as long as one element
  const block_shape<Acc> shape(out_features, in_features, options.granule, options.whole_rows);
  const int threads = threads_for(cost_of_one * static_cast<double>(out_features) *
                                  static_cast<double>(in_features));
  const index_t per_thread = shape.size() * (options.scratch ? 2 : 1);
  array<Acc> memory(threads * per_thread);
  first_exception failure;
  std::atomic<std::size_t> became_nonfinite{0}, nonfinite{0}, changed{0};
  parallel(threads, [&](const team& team) {
    tally mine;
    Acc* const rows = memory.data() + team.thread() * per_thread;
    team.for_each(pieces(out_features, shape.rows), [&](index_t b) {
      const index_t first = b * shape.rows, count = std::min(shape.rows, out_features - first);
      failure.guard([&] {
        for (index_t col = 0; col < in_features; col += shape.cols) {
          const bool last =
              col + shape.cols >= in_features;  // then the rows below are probably next
          work(row_block<Acc>{.first = first,
                              .count = count,
                              .first_col = col,
                              .cols = std::min(shape.cols, in_features - col),
                              .rows = rows,
                              .scratch = options.scratch ? rows + shape.size() : nullptr,
                              .stride = shape.stride,
                              .next_first = last ? first + count : first,
                              .next_col = last ? 0 : col + shape.cols},
               mine);
        }
      });
    });
    became_nonfinite += mine.became_nonfinite;
    nonfinite += mine.nonfinite;
    changed += mine.changed;
  });
  failure.rethrow();
  return {became_nonfinite, nonfinite, changed};
}

/// W(i, :) := round(change(W(i, :))) for all rows; row i of `weight` is row offset + i of the
/// change.
template <class Acc, class Rows, class Change>
tally row_pass(const Rows& weight, const Change& change, index_t offset = 0) {
  const pass_options options{weight.granule(), change.needs_rows(), change.needs_scratch()};
  return each_block<Acc>(weight.out_features(), weight.in_features(), options,
                         [&](const row_block<Acc>& block, tally& seen) {
                           row_block<Acc> some = block;
                           some.first += offset;
                           if (weight.may_skip() && !change.touches(some.first, some.count)) return;
                           weight.load(block);
                           some.ahead = weight.memory(block.next_first, block.next_col);
                           change(some);
                           weight.store(block, seen);
                         });
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
