// SPDX-License-Identifier: Apache-2.0
//
// The columns that each program of this folder prints, and what they mean: printed above the table
// as its legend. The words are those of README.md: a merged adapter is inside the weight, a mixed
// one is computed beside it in the same call.
#pragma once

#include <cstdio>
#include <string>
#include <vector>

namespace lora_bench {

/// One counter in the printed table: value * scale with so many decimals.
struct column {
  const char* counter;
  const char* heading;
  double scale;
  int decimals;
  const char* meaning;  ///< empty: belongs to the column before
};

/// What a program prints: the heading and the meaning of a row's time, then its counters.
struct table {
  const char* time_heading;
  const char* time_meaning;
  std::vector<column> columns;
};

inline constexpr int cell_width = 11;

inline constexpr const char* meaning_of_floor =
    "what the adapters' FLOPs or bytes, whichever take longer, cost at least over the call without "
    "them";
inline constexpr const char* meaning_of_points =
    "overhead minus floor, in percentage points: what the library adds";
inline constexpr const char* meaning_of_unsure =
    "1 where the interval is wider than one point in all (+-0.5)";
inline constexpr const char* meaning_of_rounds =
    "how often the ways of the row were timed, in turns";
inline constexpr const char* meaning_of_interval =
    "and to: the ends of the 95 % interval of the figure before";

inline table table_of_two_ways() {
  return {
      "call us",
      "time of a mixed call (rows two_ways, rounded_U), or of the base alone (rows base), in "
      "microseconds",
      {{"merged_us", "merged us", 1, 1, "time of the same call with the adapters merged"},
       {"floor", "floor %", 100, 2, meaning_of_floor},
       {"overhead", "overhead %", 100, 2, "mixed over merged, minus 1, the median of the rounds"},
       {"overhead_lo", "from", 100, 2, meaning_of_interval},
       {"overhead_hi", "to", 100, 2, ""},
       {"points_above_floor", "points", 1, 2, meaning_of_points},
       {"inconclusive", "unsure", 1, 0, meaning_of_unsure},
       {"over_stacked", "stacked %", 100, 2,
        "several adapters over one of all their ranks, minus 1"},
       {"share", "% of limit", 100, 1,
        "the time that the machine's limits allow over the time taken: merged call, or base alone"},
       {"share_mixed", "mixed %", 100, 1, "the same of the mixed call"},
       {"speedup_vs_onednn", "x oneDNN", 1, 2, "oneDNN's time over ours, its weight packed"},
       {"speedup_vs_onednn_plain", "x plain", 1, 2, "the same against oneDNN with a plain weight"},
       {"speedup_vs_openblas", "x OpenBLAS", 1, 2, "the same against OpenBLAS"},
       {"speedup_vs_eigen", "x Eigen", 1, 2, "the same against Eigen"},
       {"rounds", "rounds", 1, 0, meaning_of_rounds}}};
}

inline table table_of_merge() {
  return {"merge us",
          "time of lora::merge into a row-major weight, in microseconds",
          {{"panels_us", "panels us", 1, 1, "the same into a packed_weight"},
           {"share", "% of limit", 100, 1,
            "the time that the machine's limits allow over the time taken"},
           {"share_panels", "panels %", 100, 1, "the same of the packed_weight"},
           {"speedup_vs_eigen", "x Eigen", 1, 2, "Eigen's time over ours (row-major)"},
           {"speedup_vs_eigen_lo", "from", 1, 2, meaning_of_interval},
           {"speedup_vs_eigen_hi", "to", 1, 2, ""},
           {"speedup_vs_openblas", "x OpenBLAS", 1, 2, "OpenBLAS's time over ours (row-major)"},
           {"speedup_vs_openblas_lo", "from", 1, 2, ""},
           {"speedup_vs_openblas_hi", "to", 1, 2, ""},
           {"rounds", "rounds", 1, 0, meaning_of_rounds}}};
}

inline table table_of_mixed_batch() {
  return {"mixed us",
          "time of the call whose tokens have adapters of their own, in microseconds",
          {{"base_us", "base us", 1, 1, "time of the same call without adapters"},
           {"floor", "floor %", 100, 2, meaning_of_floor},
           {"floor_bytes", "bytes %", 100, 2,
            "bytes of the adapters over those of the weight: a floor if nothing hides them"},
           {"overhead", "overhead %", 100, 2, "mixed over base, minus 1, the median of the rounds"},
           {"overhead_lo", "from", 100, 2, meaning_of_interval},
           {"overhead_hi", "to", 100, 2, ""},
           {"points_above_floor", "points", 1, 2, meaning_of_points},
           {"inconclusive", "unsure", 1, 0, meaning_of_unsure},
           {"share", "% of limit", 100, 1,
            "the time that the machine's limits allow over the time taken: base"},
           {"share_mixed", "mixed %", 100, 1, "the same of the mixed call"},
           {"rounds", "rounds", 1, 0, meaning_of_rounds}}};
}

inline table table_of_break_even() {
  return {"merged us",
          "time of a call with the adapter merged, in microseconds",
          {{"predicted_merged_us", "advise us", 1, 1,
            "after each figure: what lora::advise says for it"},
           {"mixed_us", "mixed us", 1, 1, "time of a call with the adapter mixed"},
           {"predicted_mixed_us", "advise us", 1, 1, ""},
           {"merge_us", "merge us", 1, 1, "time of merging the adapter"},
           {"predicted_merge_us", "advise us", 1, 1, ""},
           {"tokens", "tokens", 1, 0,
            "break-even: how many tokens the adapter must stay for merging to pay"},
           {"tokens_lo", "from", 1, 0, meaning_of_interval},
           {"tokens_hi", "to", 1, 0, ""},
           {"tokens_predicted", "advise", 1, 0, ""},
           {"regret", "regret %", 100, 1,
            "the most that following lora::advise costs over the better way"},
           {"rounds", "rounds", 1, 0, meaning_of_rounds}}};
}

/// One line for each column that has a meaning of its own.
inline std::string legend_of(const table& t) {
  const auto line = [](const char* heading, const char* meaning) {
    char text[160];
    std::snprintf(text, sizeof text, "  %-11s %s\n", heading, meaning);
    return std::string(text);
  };
  std::string text =
      "merged: the adapters are inside the weight. mixed: they are computed beside it in the same "
      "call (PEFT: unmerged).\n";
  text += line(t.time_heading, t.time_meaning);
  for (const column& c : t.columns)
    if (*c.meaning != '\0') text += line(c.heading, c.meaning);
  return text;
}

}  // namespace lora_bench
