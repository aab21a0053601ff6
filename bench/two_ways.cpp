// SPDX-License-Identifier: Apache-2.0
//
// A layer with its adapters merged into the weight against the same layer with the adapters mixed
// in, in the steady state of a program that serves (packed weights and adapters, scratch that is
// kept), and the merged way against other libraries.
//
//   two_ways/stored:S/base:T/activations:X/factors:F/layer:IxO/tokens:N/rank:R/adapters:K
//     merged    lora::forward(space, W', X, Y)                W' = W + sum of s B A, merged before
//     mixed     lora::forward(space, W, X, Y, adapters)       W untouched, K packed adapters of
//               rank R on every token
//     stacked   the same with one adapter of rank K R (K > 1)
//   rounded_U/...   the same with U = s A x rounded to the factors' format before B multiplies it
//                   (lora::intermediate_format)
//   base/stored:S/base:T/activations:X/layer:IxO/tokens:N
//     lora::forward(space, W, X, Y) against each rival of rivals/product.hpp
//
// A layer of 4096x11008 has 4096 in_features and 11008 out_features. S is `panels`
// (lora::packed_weight) or `rows` (a weight that the caller keeps row-major). Weights and adapters
// rotate on every call, over more than twice the last-level cache for each way; the activations
// stay where the cache has them. Before a row is timed, all ways must agree.
//
// A row is one Google Benchmark iteration: a series of rounds (see paired.hpp). Its time is the
// median mixed call, or our base product (manual timing). Counters, as fractions where nothing else
// is said:
//   floor           what the adapters' bytes and FLOPs must cost: max(FLOPs / FMA rate, bytes /
//                   read rate) with adapters over the same without, minus 1. For factors of the
//                   base's format that is rho = R K (in + out) / (in out); for wider ones more
//                   where the base is bound by memory: their bytes over the base's
//   overhead        mixed / merged - 1, the median of the rounds; overhead_lo, overhead_hi: its 95
//                   % interval
//   points_above_floor  100 (overhead - floor)
//   inconclusive    1 when the interval is wider than +-0.5 point
//   over_stacked    mixed with K adapters over one of rank K R, minus 1
//   share           of the machine's limit, merged way: max(FLOPs / FMA rate, bytes of W / read
//                   rate) / time; where W and x are bfloat16 and the build has dot products of it,
//                   their rate
//   share_mixed     the same with the factors' FLOPs and bytes, over the mixed time
//   speedup_vs_R    R / ours, with R_us
//   merged_us, rounds, limit_flops, limit_dot_flops, limit_read, limit_read_write
// An interval tells the noise of this series; repeat rows that matter (--benchmark_repetitions=5).
// A quick look:
//   --row_seconds=0.3
//   --benchmark_filter='two_ways/.*layer:4096x4096/tokens:(1|64)/rank:16/adapters:1'
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <lora/lora.hpp>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "layers.hpp"
#include "limits.hpp"
#include "paired.hpp"
#include "program.hpp"
#include "rivals/product.hpp"
#include "tables.hpp"

namespace {

using lora_bench::index_t;
using lora_bench::shape;

template <template <class> class Weight, class T>
std::vector<Weight<T>> make_weights(const shape& layer) {
  std::vector<Weight<T>> weights;
  const std::size_t count = lora_bench::pool_size(layer.size() * sizeof(T));
  for (std::size_t k = 0; k < count; ++k)
    weights.emplace_back(lora_bench::random_weight<T>(layer, static_cast<std::uint32_t>(k)), layer);
  return weights;
}

/// The untouched weights of one layer size; kept from row to row, because filling them takes longer
/// than measuring.
template <template <class> class Weight, class T>
std::vector<Weight<T>>& base_weights(const shape& layer) {
  static shape held{0, 0};
  static std::vector<Weight<T>> weights;
  if (held != layer) {
    weights.clear();
    weights = make_weights<Weight, T>(layer);
    held = layer;
  }
  return weights;
}

/// The weights of a layer size with some adapters merged, and the adapters.
template <template <class> class Weight, class T, class F>
struct adapted_layers {
  using adapters = std::vector<lora::packed_adapter<F>>;

  std::vector<Weight<T>> merged;
  std::vector<adapters> apart;    ///< for each layer: its adapters
  std::vector<adapters> stacked;  ///< for each layer: one of their ranks together

  adapted_layers(const shape& layer, index_t rank, int count, bool rounded)
      : merged(make_weights<Weight, T>(layer)) {
    std::uint32_t seed = 1000;
    for (auto& W : merged) {
      std::vector<lora::adapter<F>> some;
      for (int k = 0; k < count; ++k)
        some.push_back(lora_bench::random_adapter<F>(layer, rank, seed += 2));
      lora::merge(W.view(), some);
      apart.emplace_back();
      for (const auto& l : some) apart.back().push_back(pack(l, rounded));
      stacked.emplace_back();
      if (count > 1)
        stacked.back().push_back(
            pack(lora_bench::random_adapter<F>(layer, rank * count, seed += 2), rounded));
    }
  }
  static lora::packed_adapter<F> pack(const lora::adapter<F>& l, bool rounded) {
    if constexpr (std::is_same_v<F, lora::bfloat16>)
      if (rounded) return lora::packed_adapter<F>(l, lora::intermediate_format::factors);
    return lora::packed_adapter<F>(l);
  }

  /// The last one made: rows that differ in tokens only share it.
  static adapted_layers& get(const shape& layer, index_t rank, int count, bool rounded) {
    static std::unique_ptr<adapted_layers> held;
    static std::string held_name;
    const std::string name = layer.text() + "/" + std::to_string(rank) + "/" +
                             std::to_string(count) + (rounded ? "/rounded" : "");
    if (held_name != name) {
      held.reset();
      held = std::make_unique<adapted_layers>(layer, rank, count, rounded);
      held_name = name;
    }
    return *held;
  }
};

template <class X>
std::vector<X> random_activations(index_t count) {
  const auto values = lora_bench::random_values<X>(count, 1, 7);
  return {values.data(), values.data() + count};
}

struct row {
  shape layer;
  index_t tokens, rank;
  int adapters;
  bool rounded = false;  ///< U in the factors' format
};

template <template <class> class Weight, class T, class X, class F>
void two_ways(benchmark::State& state, lora_bench::session& session, const row& r) {
  auto& base = base_weights<Weight, T>(r.layer);
  auto& layers = adapted_layers<Weight, T, F>::get(r.layer, r.rank, r.adapters, r.rounded);
  const auto x = random_activations<X>(r.layer.in * r.tokens);
  std::vector<X> y(static_cast<std::size_t>(r.layer.out * r.tokens));
  const auto in = lora::col_major(x, r.layer.in, r.tokens);
  const auto out = lora::col_major(y, r.layer.out, r.tokens);
  lora::workspace space;

  const auto run_merged = [&, turn = lora_bench::rotation(layers.merged)]() mutable {
    lora::forward(space, std::as_const(turn.next()).view(), in, out);
  };
  const auto mixed_with = [&](auto& adapters) {
    return [&, W = lora_bench::rotation(base), l = lora_bench::rotation(adapters)]() mutable {
      lora::forward(space, std::as_const(W.next()).view(), in, out, l.next());
    };
  };
  std::vector<lora_bench::way> ways{run_merged, mixed_with(layers.apart)};
  if (r.adapters > 1) ways.emplace_back(mixed_with(layers.stacked));

  ways[0]();
  const std::vector<X> from_merged = y;
  ways[1]();
  if (!lora_bench::agree<T>(from_merged, y))
    return session.fail(state, "merged and mixed results differ");
  ways = {run_merged, mixed_with(layers.apart)};  // the rotations in step again
  if (r.adapters > 1) ways.emplace_back(mixed_with(layers.stacked));

  const auto m = session.measure(state, ways, 1);
  const auto tokens = static_cast<double>(r.tokens),
             factors = r.layer.factors(static_cast<double>(r.rank)) * r.adapters;
  const auto work = lora_bench::flops_of<T, X>(2 * r.layer.size() * tokens);
  const auto more = std::is_same_v<F, T> ? lora_bench::flops_of<T, X>(2 * factors * tokens)
                                         : lora_bench::flops{.multiply_adds = 2 * factors * tokens};
  const auto merged_limit = lora_bench::reading(work, r.layer.size() * sizeof(T));
  const auto mixed_limit =
      lora_bench::reading(work + more, r.layer.size() * sizeof(T) + factors * sizeof(F));
  const lora::machine_rates limits = m.limits();
  lora_bench::count_overhead(state, m.series.ratio(1, 0),
                             mixed_limit(limits) / merged_limit(limits) - 1);
  if (r.adapters > 1) lora_bench::count(state, "over_stacked", m.series.ratio(1, 2), -1);
  state.counters["share"] = m.share(0, merged_limit);
  state.counters["share_mixed"] = m.share(1, mixed_limit);
  state.counters["merged_us"] = m.series.time(0).median * 1e6;
}

/// The base product alone, against the other libraries on the same values.
template <template <class> class Weight, class T, class X>
void base_product(benchmark::State& state, lora_bench::session& session, const shape& layer,
                  index_t tokens) {
  auto& base = base_weights<Weight, T>(layer);
  auto& rows = base_weights<lora_bench::weight_rows, T>(layer);
  const auto x = random_activations<X>(layer.in * tokens);
  std::vector<X> y(static_cast<std::size_t>(layer.out * tokens));
  lora::workspace space;
  std::vector<lora_bench::way> ways{[&, turn = lora_bench::rotation(base)]() mutable {
    lora::forward(space, std::as_const(turn.next()).view(), lora::col_major(x, layer.in, tokens),
                  lora::col_major(y, layer.out, tokens));
  }};
  constexpr bool packed = std::is_same_v<Weight<T>, lora_bench::weight_panels<T>>;
  const auto rivals = lora_bench::product_rivals<T, X>({rows, x, y, tokens}, packed);
  for (const auto& rival : rivals) ways.push_back(rival.run);

  // One call each, so that the rotations stay in step.
  std::vector<X> ours;
  for (std::size_t k = 0; k < ways.size(); ++k) {
    std::fill(y.begin(), y.end(), X(0));
    ways[k]();
    if (k == 0)
      ours = y;
    else if (!lora_bench::agree<T>(ours, y))
      return session.fail(state, ("another result than " + rivals[k - 1].name).c_str());
  }

  const auto m = session.measure(state, ways, 0);
  state.counters["share"] =
      m.share(0, lora_bench::reading(
                     lora_bench::flops_of<T, X>(2 * layer.size() * static_cast<double>(tokens)),
                     layer.size() * sizeof(T)));
  for (std::size_t k = 0; k < rivals.size(); ++k) {
    lora_bench::count(state, "speedup_vs_" + rivals[k].name, m.series.ratio(k + 1, 0));
    state.counters[rivals[k].name + "_us"] = m.series.time(k + 1).median * 1e6;
  }
}

bool one_of(index_t value, std::initializer_list<index_t> values) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

/// A row's place among those that bench/results.md has a bar for: few at 512 tokens, which take
/// seconds each.
bool has_bar(const row& r) {
  const bool usual = one_of(r.rank, {16, 64});
  if (r.adapters > 1)
    return r.layer == shape{4096, 4096} && one_of(r.tokens, {1, 64}) && r.rank == 16;
  if (r.layer == shape{4096, 4096})
    return one_of(r.tokens, {1, 8, 64}) || (r.tokens == 512 ? usual : r.rank == 16);
  if (r.layer.size() > 4096 * 4096) return one_of(r.tokens, {1, 64}) && one_of(r.rank, {16, 256});
  return one_of(r.tokens, {1, 64}) && usual;
}

/// T, X, F: the base, the activations, the factors. `all_bars`: has_bar decides, or only 4096x4096
/// at rank 16. `rounded`: rows named rounded_U, whose adapters keep U in the factors' format.
template <template <class> class Weight, class T, class X, class F>
void add_two_ways(lora_bench::session& session, bool all_bars, bool rounded = false) {
  const auto add = [&](const row& r) {
    const std::string name =
        std::string(rounded ? "rounded_U" : "two_ways") + "/stored:" + Weight<T>::name +
        "/base:" + lora_bench::name_of<T>() + "/activations:" + lora_bench::name_of<X>() +
        "/factors:" + lora_bench::name_of<F>() + "/layer:" + r.layer.text() +
        "/tokens:" + std::to_string(r.tokens) + "/rank:" + std::to_string(r.rank) +
        "/adapters:" + std::to_string(r.adapters);
    const bool bar =
        all_bars ? has_bar(r)
                 : r.layer == shape{4096, 4096} && one_of(r.tokens, {1, 64}) && r.rank == 16;
    session.add(
        name, bar && (r.adapters == 1 || (all_bars && !rounded)),
        [=, &session](benchmark::State& state) { two_ways<Weight, T, X, F>(state, session, r); });
  };
  // Sorted so that neighbours share their weights.
  for (const shape& layer :
       {shape{768, 768}, {1024, 1024}, {4096, 4096}, {4096, 11008}, {11008, 4096}})
    for (const int adapters : {1, 2, 4})
      for (const index_t rank : {8, 16, 64, 256})
        for (const index_t tokens : {1, 2, 8, 16, 64, 512})
          if (layer == shape{4096, 4096} || !one_of(tokens, {2, 16}))
            add({layer, tokens, rank, adapters, rounded});
}

/// `wide`: the layer of most in_features has a bar, too.
template <template <class> class Weight, class T, class X>
void add_base_products(lora_bench::session& session, bool wide) {
  constexpr bool packed = std::is_same_v<Weight<T>, lora_bench::weight_panels<T>>;
  for (const shape& layer :
       {shape{768, 768}, {1024, 1024}, {4096, 4096}, {4096, 11008}, {11008, 4096}, {14336, 4096}})
    for (const index_t tokens : {1, 2, 4, 8, 16, 64, 512}) {
      const std::string name = std::string("base/stored:") + Weight<T>::name +
                               "/base:" + lora_bench::name_of<T>() +
                               "/activations:" + lora_bench::name_of<X>() +
                               "/layer:" + layer.text() + "/tokens:" + std::to_string(tokens);
      const bool bar = layer == shape{4096, 4096}
                           ? one_of(tokens, {1, 8, 64}) || (packed && one_of(tokens, {4, 512}))
                           : wide && layer.in == 14336 && one_of(tokens, {1, 64, 512});
      session.add(name, bar, [=, &session](benchmark::State& state) {
        base_product<Weight, T, X>(state, session, layer, tokens);
      });
    }
}

}  // namespace

int main(int argc, char** argv) {
  return lora_bench::run_program(
      argc, argv, lora_bench::table_of_two_ways(), [](lora_bench::session& session) {
        using lora::bfloat16, lora::float16, lora_bench::weight_panels, lora_bench::weight_rows;
        add_base_products<weight_panels, float, float>(session, true);
        add_base_products<weight_panels, bfloat16, bfloat16>(session, true);
        add_base_products<weight_panels, bfloat16, float>(session, false);
        add_base_products<weight_panels, float16, float>(session, false);
        add_base_products<weight_rows, float, float>(session, false);
        add_base_products<weight_rows, bfloat16, bfloat16>(session, false);

        add_two_ways<weight_panels, float, float, float>(session, true);
        add_two_ways<weight_panels, bfloat16, bfloat16, bfloat16>(session, true);
        add_two_ways<weight_panels, bfloat16, bfloat16, bfloat16>(session, true, true);
        add_two_ways<weight_panels, bfloat16, bfloat16, float>(session, false);
        add_two_ways<weight_panels, bfloat16, float, bfloat16>(session, false);
        add_two_ways<weight_panels, bfloat16, float, float>(session, false);
        add_two_ways<weight_panels, float16, float, float16>(session, false);
        add_two_ways<weight_panels, float16, float, float>(session, false);
        add_two_ways<weight_rows, float, float, float>(session, false);
        add_two_ways<weight_rows, bfloat16, bfloat16, bfloat16>(session, false);
      });
}
