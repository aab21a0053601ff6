// SPDX-License-Identifier: Apache-2.0
//
// The row pass: W(i, :) := store(change(i, W(i, :))). Blocks of rows are widened into accumulators that
// stay in the second-level cache, changed, rounded once and counted. Threads share the blocks. W is read
// and written once; nothing of its size is allocated. A block gives the bits of the whole.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <numeric>

#include "lora/detail/memory.hpp"
#include "lora/detail/parallel.hpp"
#include "lora/detail/row_change.hpp"
#include "lora/detail/stored_rows.hpp"

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
  std::atomic_flag taken_ = ATOMIC_FLAG_INIT;
  std::exception_ptr held_;
};

/// How many rows are in a block, and how far apart they are.
template <class Acc>
struct block_shape {
  index_t rows, stride;

  block_shape(index_t out_features, index_t in_features, index_t granule) {
    constexpr index_t bytes = index_t{256} << 10, page = 4096;
    // Rows a multiple of a page apart would meet in the same sets of the first-level cache.
    stride = pieces(in_features, 16) * 16;
    if (stride * static_cast<index_t>(sizeof(Acc)) % page == 0) stride += 16;
    const index_t step = std::lcm(granule, index_t{tile_rows});
    const index_t wanted = bytes / (std::max<index_t>(1, stride) * static_cast<index_t>(sizeof(Acc)));
    rows = std::min(std::clamp<index_t>(wanted / step, 1, 64) * step, std::max<index_t>(1, out_features));
  }
  index_t size() const { return rows * stride; }
};

/// work(block, tally) for every block of rows, with memory for the block's rows and a scratch of the same
/// size where wanted. Throws what work throws, when all threads are done.
template <class Acc, class Work>
tally each_block(index_t out_features, index_t in_features, index_t granule, bool scratch, double cost, const Work& work) {
  if (out_features == 0 || in_features == 0) return {};
  const block_shape<Acc> shape(out_features, in_features, granule);
  const int threads = threads_for(cost * static_cast<double>(out_features) * static_cast<double>(in_features));
  array<Acc> memory(threads * shape.size() * (scratch ? 2 : 1));
  first_exception failure;
  std::atomic<std::size_t> became_nonfinite{0}, nonfinite{0}, changed{0};
  parallel(threads, [&](const team& team) {
    tally mine;
    Acc* const rows = memory.data() + team.thread() * shape.size() * (scratch ? 2 : 1);
    team.for_each(pieces(out_features, shape.rows), [&](index_t b) {
      const index_t first = b * shape.rows, count = std::min(shape.rows, out_features - first);
      failure.guard([&] {
        work(row_block<Acc>{first, count, rows, scratch ? rows + shape.size() : nullptr, shape.stride}, mine);
      });
    });
    became_nonfinite += mine.became_nonfinite;
    nonfinite += mine.nonfinite;
    changed += mine.changed;
  });
  failure.rethrow();
  return {became_nonfinite, nonfinite, changed};
}

/// W(i, :) := round(change(W(i, :))) for all rows; row i of `weight` is row offset + i of the change.
template <class Acc, class Rows, class Change>
tally row_pass(const Rows& weight, const Change& change, index_t offset = 0) {
  constexpr double cost_of_one = 16;
  return each_block<Acc>(weight.out_features(), weight.in_features(), weight.granule(), change.needs_scratch(), cost_of_one,
                         [&](const row_block<Acc>& block, tally& seen) {
                           weight.load(block.first, block.count, block.rows, block.stride);
                           row_block<Acc> some = block;
                           some.first += offset;
                           change(some);
                           weight.store(block.first, block.count, block.rows, block.stride, seen);
                         });
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
