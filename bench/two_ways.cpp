// SPDX-License-Identifier: Apache-2.0
//
// A layer with its adapters merged into the weight against the same layer with the adapters mixed in:
//   merged    lora::forward(W', X, Y)                W' = W + sum of s B A, merged before
//   unmerged  lora::forward(W, X, Y, adapters...)    W untouched
// over tokens, ranks, formats, layer sizes and one or two adapters. A layer of 4096x11008 has 4096 in_features and 11008
// out_features. Weights are row-major, activations have the weights' format, factors are float unless the row says
// otherwise. Both ways of a pair run on weights that 2 caches of other weights have passed since their last use; the
// activations stay where the cache has them. Before a row is timed, both ways must agree.
//
// A row is one Google Benchmark iteration: a series of pairs (see paired.hpp). Its time is the median unmerged call (manual
// timing). Counters, as fractions:
//   floor           what the adapters' bytes and FLOPs must cost: rho' = rho * max(b_a / b_w, F / F_a) for each adapter,
//                   with rho = rank (in + out) / (in out), b_a / b_w the bytes of a factor's and of a weight's element, and
//                   F / F_a the rates at which base and factors run: 1 here, everything is multiplied in float
//   overhead        unmerged / merged - 1, the median of the pairs; overhead_lo, overhead_hi: its 95 % interval
//   above_floor     overhead - floor
//   inconclusive    1 when the interval is wider than +-0.5 point
//   share           of the machine's limit, merged: max(FLOPs / FMA rate, bytes of W / read rate) / time
//   share_unmerged  the same with the factors' FLOPs and bytes, over the unmerged time
//   merged_us, pairs
// An interval tells the noise of this series; repeat rows that matter (--benchmark_repetitions=5).
//
// All rows take about six minutes on two cores. A quick look:
//   --row_seconds=0.3 --benchmark_filter='base:.*factors:float/layer:4096x4096/tokens:(1|64)/rank:16/adapters:1'
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <lora/lora.hpp>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "layers.hpp"
#include "limits.hpp"
#include "paired.hpp"
#include "program.hpp"

namespace {

using lora_bench::index_t;
using lora_bench::shape;

template <class T>
constexpr const char* name_of() {
  return std::is_same_v<T, float> ? "float" : "bfloat16";
}

/// The untouched weights of one layer size; kept from row to row, because filling them takes longer than measuring.
template <class T>
const std::vector<std::vector<T>>& base_weights(const shape& layer) {
  static shape held{0, 0};
  static std::vector<std::vector<T>> weights;
  if (held.in != layer.in || held.out != layer.out) {
    weights.clear();
    // Each layer comes twice: as it is and merged.
    const std::size_t count = lora_bench::pool_size(2 * layer.size() * sizeof(T));
    for (std::size_t k = 0; k < count; ++k)
      weights.push_back(lora_bench::random_weight<T>(layer, static_cast<std::uint32_t>(k)));
    held = layer;
  }
  return weights;
}

/// The weights of one layer size with some adapters, and the adapters.
template <class T, class F>
struct adapted_layers {
  std::vector<std::vector<lora::adapter<F>>> adapters;
  std::vector<std::vector<T>> merged;

  adapted_layers(const shape& layer, index_t rank, int count) {
    std::uint32_t seed = 1000;
    for (const auto& base : base_weights<T>(layer)) {
      adapters.emplace_back();
      for (int k = 0; k < count; ++k) adapters.back().push_back(lora_bench::random_adapter<F>(layer, rank, seed += 2));
      merged.push_back(base);
      lora::merge(lora::row_major(merged.back(), layer.out, layer.in), adapters.back());
    }
  }

  /// The last one made: rows that differ in tokens only share it.
  static const adapted_layers& get(const shape& layer, index_t rank, int count) {
    static std::unique_ptr<adapted_layers> held;
    static std::string held_name;
    const std::string name = layer.text() + "/" + std::to_string(rank) + "/" + std::to_string(count);
    if (held_name != name) {
      held.reset();
      held = std::make_unique<adapted_layers>(layer, rank, count);
      held_name = name;
    }
    return *held;
  }
};

/// ||a - b|| / ||b||.
template <class T>
double distance(const std::vector<T>& a, const std::vector<T>& b) {
  double difference = 0, size = 0;
  for (std::size_t k = 0; k < a.size(); ++k) {
    const auto [x, y] = std::pair(static_cast<double>(a[k]), static_cast<double>(b[k]));
    difference += (x - y) * (x - y);
    size += y * y;
  }
  return std::sqrt(difference / size);
}

template <class T, class F>
void two_ways(benchmark::State& state, lora_bench::session& session, const shape& layer, index_t tokens, index_t rank,
              int count) {
  const auto& base = base_weights<T>(layer);
  const auto& [adapters, merged] = adapted_layers<T, F>::get(layer, rank, count);
  const auto x = lora_bench::random_values<T>(layer.in * tokens, 1, 7);
  std::vector<T> y(static_cast<std::size_t>(layer.out * tokens));
  const auto X = lora::col_major(x, layer.in, tokens);
  const auto Y = lora::col_major(y, layer.out, tokens);

  std::size_t next = 0;  // every call, of either way, takes another layer
  const auto run_merged = [&] {
    const std::size_t k = next++ % base.size();
    lora::forward(lora::row_major(merged[k], layer.out, layer.in), X, Y);
  };
  const auto run_unmerged = [&] {
    const std::size_t k = next++ % base.size();
    const auto W = lora::row_major(base[k], layer.out, layer.in);
    if (count == 1)
      lora::forward(W, X, Y, adapters[k][0]);
    else
      lora::forward(W, X, Y, adapters[k][0], adapters[k][1]);
  };

  run_merged();
  const std::vector<T> from_merged = y;
  next = 0;
  run_unmerged();
  if (!(distance(from_merged, y) < (sizeof(T) == 2 ? 2e-2 : 1e-4))) {
    state.SkipWithError("merged and unmerged results differ");
    return;
  }

  lora_bench::machine_limits limits;
  lora_bench::series series;
  for (auto _ : state) {
    series = session.between_probes(limits,
                                    [&] { return lora_bench::time_pairs(session.row_seconds, run_merged, run_unmerged); });
    state.SetIterationTime(series.second_time().median);
  }

  const double factor_elements = static_cast<double>(rank) * static_cast<double>(layer.in + layer.out) * count;
  const double work = 2 * layer.size() * static_cast<double>(tokens);
  const double more_work = 2 * factor_elements * static_cast<double>(tokens);
  const double bytes = layer.size() * sizeof(T), more_bytes = factor_elements * sizeof(F);
  const double floor = layer.rho(static_cast<double>(rank)) * count *
                       std::max(static_cast<double>(sizeof(F)) / static_cast<double>(sizeof(T)), 1.0);
  const auto ratio = series.ratio();
  const double merged_time = series.first_time().median, unmerged_time = series.second_time().median;
  auto& counters = state.counters;
  counters["floor"] = floor;
  counters["overhead"] = ratio.median - 1;
  counters["overhead_lo"] = ratio.low - 1;
  counters["overhead_hi"] = ratio.high - 1;
  counters["above_floor"] = ratio.median - 1 - floor;
  counters["inconclusive"] = ratio.high - ratio.low > 0.01 ? 1 : 0;
  counters["share"] = limits.reading(work, bytes) / merged_time;
  counters["share_unmerged"] = limits.reading(work + more_work, bytes + more_bytes) / unmerged_time;
  counters["merged_us"] = merged_time * 1e6;
  counters["pairs"] = static_cast<double>(series.pairs());
}

template <class T, class F>
void add_row(lora_bench::session& session, const shape& layer, index_t tokens, index_t rank, int adapters) {
  const std::string name = std::string("two_ways/base:") + name_of<T>() + "/factors:" + name_of<F>() +
                           "/layer:" + layer.text() + "/tokens:" + std::to_string(tokens) + "/rank:" + std::to_string(rank) +
                           "/adapters:" + std::to_string(adapters);
  benchmark::RegisterBenchmark(
      name.c_str(),
      [=, &session](benchmark::State& state) { two_ways<T, F>(state, session, layer, tokens, rank, adapters); })
      ->Iterations(1)
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond);
}

/// Sorted so that neighbours share their weights.
template <class T>
void add_rows(lora_bench::session& session) {
  for (const shape& layer : lora_bench::shapes)
    for (const int adapters : {1, 2})
      for (const index_t rank : lora_bench::ranks)
        for (const index_t tokens : {1, 8, 64, 512}) add_row<T, float>(session, layer, tokens, rank, adapters);
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<lora_bench::column> columns = {{"merged_us", "merged us", 1, 1},     {"floor", "floor %", 100, 2},
                                                   {"overhead", "over %", 100, 2},       {"overhead_lo", "from", 100, 2},
                                                   {"overhead_hi", "to", 100, 2},        {"above_floor", "points+", 100, 2},
                                                   {"inconclusive", "unsure", 1, 0},     {"share", "share %", 100, 1},
                                                   {"share_unmerged", "unm. %", 100, 1}, {"pairs", "pairs", 1, 0}};
  return lora_bench::run_program(argc, argv, columns, [](lora_bench::session& session) {
    add_rows<float>(session);
    add_rows<lora::bfloat16>(session);
    // Factors stored as the base is: their bytes halve, the products stay float.
    for (const index_t rank : {16, 256})
      for (const index_t tokens : {1, 8, 64, 512})
        add_row<lora::bfloat16, lora::bfloat16>(session, {4096, 4096}, tokens, rank, 1);
  });
}
