// SPDX-License-Identifier: Apache-2.0
//
// lora::advise against measurement: how many tokens must a set of adapters stay for merging to pay?
//   break_even/base:T/layer:IxO/rank:R/tokens_per_call:N     calls of N tokens
//     merge    lora::merge(W', l), one adapter of W's format into a packed weight (the sign changes
//              from round to round)
//     merged   lora::forward(space, W', X, Y)
//     mixed    lora::forward(space, W, X, Y, l)
// Merged and mixed are timed in turns, merges in a series of their own: one leaves the cache full
// of lines that the next call has to write to memory. Weights and adapters rotate on every call,
// over more than twice the last-level cache for each way.
//
// A row is one Google Benchmark iteration: a series of rounds (see paired.hpp). Its time is the
// median call with the adapter merged (manual timing).
// Counters, in microseconds and tokens:
//   merge_us, merged_us, mixed_us    measured; predicted_..._us: advise() with the limits of this
//                                    row
//   tokens           measured break-even: merge / (mixed - merged) * N, each the median; infinity
//                    where mixed is not slower
//   tokens_lo, _hi   the same at the ends of the 95 % interval of mixed - merged
//   tokens_predicted advise().break_even_tokens
//   regret           the most that following the advice costs: over stays of 1 to 2^24 tokens, the
//                    measured time of the way advised over that of the better way, minus 1
//   regret_merge, regret_mix    the same of always merging, and of never
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <lora/lora.hpp>
#include <string>
#include <utility>
#include <vector>

#include "layers.hpp"
#include "limits.hpp"
#include "paired.hpp"
#include "program.hpp"
#include "tables.hpp"

namespace {

using lora_bench::index_t;
using lora_bench::shape;

struct row {
  shape layer;
  index_t rank, tokens;
};

/// Each layer untouched, with its adapter merged, and the adapter.
template <class T>
struct switched_layers {
  struct one {
    lora::packed_weight<T> base, merged;
    lora::adapter<T> adapter;
    lora::packed_adapter<T> packed;
    double sign = 1;  ///< of the next merge

    one(const shape& layer, const lora_bench::buffer<T>& W, lora::adapter<T> l)
        : base(lora::row_major(W.data(), layer.out, layer.in)),
          merged(base),
          adapter(std::move(l)),
          packed(adapter) {}

    void merge() {
      lora::merge(merged, lora::scaled(sign, adapter));
      sign = -sign;
    }
  };
  std::vector<one> layers;

  explicit switched_layers(const row& r) {
    const std::size_t count = lora_bench::pool_size(r.layer.size() * sizeof(T));
    for (std::size_t k = 0; k < count; ++k) {
      const auto seed = static_cast<std::uint32_t>(k);
      layers.emplace_back(r.layer, lora_bench::random_weight<T>(r.layer, seed),
                          lora_bench::random_adapter<T>(r.layer, r.rank, 1000 + 2 * seed));
    }
  }
};

/// Seconds of a merge, and of a token either way.
struct costs {
  double merge, merged_token, mixed_token;

  double when_merged(double stay) const { return merge + stay * merged_token; }
  double when_mixed(double stay) const { return stay * mixed_token; }
  double break_even() const {
    return mixed_token > merged_token ? merge / (mixed_token - merged_token)
                                      : std::numeric_limits<double>::infinity();
  }
  /// The most that a rule loses: merge for a stay of more tokens than this.
  double regret(double threshold) const {
    double most = 0;
    for (double stay = 1; stay <= 0x1p24; stay *= std::sqrt(2.0)) {
      const double taken = stay > threshold ? when_merged(stay) : when_mixed(stay);
      most = std::max(most, taken / std::min(when_merged(stay), when_mixed(stay)) - 1);
    }
    return most;
  }
};

template <class T>
void break_even(benchmark::State& state, lora_bench::session& session, const row& r) {
  switched_layers<T> pool(r);
  auto& layers = pool.layers;
  const auto x = lora_bench::random_values<T>(r.layer.in * r.tokens, 1, 7);
  std::vector<T> y(static_cast<std::size_t>(r.layer.out * r.tokens));
  const auto in = lora::col_major(x.data(), r.layer.in, r.tokens);
  const auto out = lora::col_major(y, r.layer.out, r.tokens);
  lora::workspace space;

  layers[0].merge();
  lora::forward(space, layers[0].merged, in, out);
  const std::vector<T> from_merged = y;
  lora::forward(space, layers[0].base, in, out, layers[0].packed);
  if (!lora_bench::agree<T>(from_merged, y))
    return session.fail(state, "merged and mixed results differ");

  const lora_bench::series merges = lora_bench::time_in_turns(
      session.row_seconds,
      {[turn = lora_bench::rotation(layers)]() mutable { turn.next().merge(); }}, [] {});
  const double merge = merges.time(0).median;
  const auto m = session.measure(state,
                                 {[&, turn = lora_bench::rotation(layers)]() mutable {
                                    lora::forward(space, turn.next().merged, in, out);
                                  },
                                  [&, turn = lora_bench::rotation(layers)]() mutable {
                                    auto& l = turn.next();
                                    lora::forward(space, l.base, in, out, l.packed);
                                  }},
                                 0);

  const auto tokens = static_cast<double>(r.tokens);
  const auto predicted =
      lora::advise<T>(m.limits(), {.out_features = r.layer.out, .in_features = r.layer.in},
                      {r.rank}, {.tokens_per_switch = 1, .tokens_per_call = tokens});
  const auto extra = m.series.difference(1, 0);
  const auto measured = [&](double difference) {
    const double merged = m.series.time(0).median / tokens;
    return costs{merge, merged, merged + difference / tokens};
  };
  const costs median = measured(extra.median);
  auto& counters = state.counters;
  counters["merge_us"] = merge * 1e6;
  counters["merged_us"] = m.series.time(0).median * 1e6;
  counters["mixed_us"] = m.series.time(1).median * 1e6;
  counters["predicted_merge_us"] = predicted.merge_once * 1e6;
  counters["predicted_merged_us"] = predicted.merged_call * 1e6;
  counters["predicted_mixed_us"] = predicted.mixed_call * 1e6;
  counters["tokens"] = median.break_even();
  counters["tokens_lo"] = measured(extra.high).break_even();
  counters["tokens_hi"] = measured(extra.low).break_even();
  counters["tokens_predicted"] = predicted.break_even_tokens;
  counters["regret"] = median.regret(predicted.break_even_tokens);
  counters["regret_merge"] = median.regret(0);
  counters["regret_mix"] = median.regret(std::numeric_limits<double>::infinity());
}

template <class T>
void add_rows(lora_bench::session& session) {
  for (const shape& layer : {shape{1024, 1024}, {4096, 4096}, {4096, 11008}})
    for (const index_t rank : {8, 16, 64, 256})
      for (const index_t tokens : {1, 8, 64, 512}) {
        const std::string name = std::string("break_even/base:") + lora_bench::name_of<T>() +
                                 "/layer:" + layer.text() + "/rank:" + std::to_string(rank) +
                                 "/tokens_per_call:" + std::to_string(tokens);
        const bool bar = layer == shape{4096, 4096} && (rank == 16 || rank == 64) &&
                         (tokens == 1 || tokens == 64);
        session.add(name, bar, [=, &session](benchmark::State& state) {
          break_even<T>(state, session, {layer, rank, tokens});
        });
      }
}

}  // namespace

int main(int argc, char** argv) {
  return lora_bench::run_program(argc, argv, lora_bench::table_of_break_even(),
                                 [](lora_bench::session& session) {
                                   add_rows<float>(session);
                                   add_rows<lora::bfloat16>(session);
                                   add_rows<lora::float16>(session);
                                 });
}
