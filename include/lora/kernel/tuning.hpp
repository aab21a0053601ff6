// SPDX-License-Identifier: Apache-2.0
//
// Every size and distance of the kernels, with its reason. A port to another instruction set adds a
// column here and a file in isa/, and nothing else. Measured on Zen 5 (AVX-512; 48 KiB of
// first-level, 1 MiB of second-level, 32 MiB of last-level cache) and Zen 1 (AVX2);
// docs/experiments.md has the measurements.
#pragma once

#include <cstddef>

#include "lora/version.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// The constants that differ by instruction set.
struct tuning {
  /// Rows of a register tile. It has two columns of vectors.
  int tile_rows;
  /// Most rows of a tile that spans two panels (four columns of vectors).
  int paired_rows;
  /// Where W streams from memory through taller tiles, two panels alternate after this many bytes.
  /// 0: one panel at a time.
  int bytes_between_panels;
  /// Bytes of a widened chunk of W that only two or three tiles share.
  std::ptrdiff_t few_tiles_chunk;
  /// Bytes of activations that stay in the caches while all of W streams.
  std::ptrdiff_t block_bytes;
  /// Bytes of the factors' panels along a band of a merge. They stay in the second-level cache.
  std::ptrdiff_t strip_bytes;
  /// A merge prefetches the weight's rows this many tiles ahead.
  int tiles_ahead;
};

#if defined(LORA_DETAIL_AVX512)
/// 32 registers: 8 x 2 sums, 2 of the right operand, 1 broadcast; paired 4 x 4 sums, 4, 1.
inline constexpr tuning tuned = {.tile_rows = 8,
                                 .paired_rows = 4,
                                 .bytes_between_panels = 4096,
                                 .few_tiles_chunk = std::ptrdiff_t{64} << 10,
                                 .block_bytes = std::ptrdiff_t{8} << 20,
                                 .strip_bytes = std::ptrdiff_t{512} << 10,
                                 .tiles_ahead = 4};
#elif defined(LORA_DETAIL_AVX2)
/// 16 registers: 6 x 2 sums, 2 of the right operand, 1 broadcast.
inline constexpr tuning tuned = {.tile_rows = 6,
                                 .paired_rows = 2,
                                 .bytes_between_panels = 0,
                                 .few_tiles_chunk = std::ptrdiff_t{16} << 10,
                                 .block_bytes = std::ptrdiff_t{5} << 19,
                                 .strip_bytes = std::ptrdiff_t{256} << 10,
                                 .tiles_ahead = 16};
#else
/// 16 registers: 4 x 2 sums, and room for the product that a machine without FMA needs.
inline constexpr tuning tuned = {.tile_rows = 4,
                                 .paired_rows = 2,
                                 .bytes_between_panels = 0,
                                 .few_tiles_chunk = std::ptrdiff_t{16} << 10,
                                 .block_bytes = std::ptrdiff_t{5} << 19,
                                 .strip_bytes = std::ptrdiff_t{256} << 10,
                                 .tiles_ahead = 16};
#endif
inline constexpr int tile_rows = tuned.tile_rows, paired_rows = tuned.paired_rows;

/// A panel that one tile multiplies is prefetched this many bytes ahead of the multiply-adds.
inline constexpr std::ptrdiff_t fetch_ahead = 4096;
/// The same where two panels alternate: while one is read, the other's distance shrinks.
inline constexpr std::ptrdiff_t fetch_ahead_of_two = 6144;
static_assert(tuned.bytes_between_panels == 0 ||
              fetch_ahead_of_two == tuned.bytes_between_panels * 3 / 2);
/// A merge into panels prefetches this many bytes ahead.
inline constexpr std::ptrdiff_t panel_bytes_ahead = 8192;
/// Bytes of a chunk of accumulators that many tiles share: it stays in the first-level cache beside
/// a tile's activations and the lines that are prefetched of the next chunk.
inline constexpr std::ptrdiff_t many_tiles_chunk = std::ptrdiff_t{16} << 10;
/// Below this many tiles a panel of 16 bits is widened anew for each.
inline constexpr int few_tiles = 4;
/// Depths of a panel that a single tile multiplies between two prefetches of lora_B.
inline constexpr int depth_of_one_tile = 512;
/// Cache lines of lora_B that the first-level cache holds beside W and activations: 32 of 48 KiB.
inline constexpr int most_lines_at_once = 512;
/// Runs of rows that share one chunk of lora_A.
inline constexpr int most_runs_together = 16;
/// Single rows, each with its own panel, that are multiplied together: four chains keep the
/// multipliers busy, where one would wait for its own result.
inline constexpr int singles = 4;
/// Adapters of fewer ranks gain nothing by dot products of their own in a merge.
inline constexpr int least_rank_of_dots = 4;

}  // namespace lora::inline LORA_DETAIL_ABI::detail
