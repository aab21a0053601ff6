// SPDX-License-Identifier: Apache-2.0
//
// A batch whose tokens have different adapters against the same layer without any:
//   mixed_batch/base:T/activations:X/layer:IxO/tokens:N/adapters:S/rank:R
//     base    lora::forward(space, W, X, Y)
//     mixed   lora::forward(space, W, X, Y, batch)      token t has one of S packed adapters of W's
//             format; none if S = 0
// The tokens of one adapter are scattered over the batch. Weights and adapters rotate on every
// call, over more than twice the last-level cache. Before a row is timed, the tokens of the batch
// must agree with one call for each adapter, bit for bit.
//
// A row is one Google Benchmark iteration: a series of rounds (see paired.hpp). Its time is the
// median mixed call (manual timing). Counters, as fractions where nothing else is said:
//   floor          max(FLOPs / FMA rate, bytes / read rate) with the adapters over the same
//                  without, minus 1: everything overlapped; each adapter's bytes once, its FLOPs
//                  for each of its tokens
//   floor_bytes    S rho: the adapters' bytes over the weight's, if nothing hides them
//   overhead       mixed / base - 1, the median of the rounds; overhead_lo, overhead_hi: its 95 %
//                  interval
//   points_above_floor  100 (overhead - floor)
//   inconclusive   1 when the interval is wider than +-0.5 point
//   share          of the machine's limit, base: max(FLOPs / FMA rate, bytes of W / read rate) /
//                  time
//   share_mixed    the same with the adapters' FLOPs and bytes, over the mixed time
//   base_us, rounds, limit_flops, limit_dot_flops, limit_read, limit_read_write
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <lora/lora.hpp>
#include <span>
#include <string>
#include <type_traits>
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
  index_t tokens, adapters, rank;
};

/// Layers, each with the adapters that its requests have.
template <class T>
struct served_layers {
  std::vector<lora::packed_weight<T>> weights;
  std::vector<lora::packed_adapters<T>> adapters;

  explicit served_layers(const row& r) {
    std::uint32_t seed = 1000;
    const std::size_t count = lora_bench::pool_size(r.layer.size() * sizeof(T));
    for (std::size_t k = 0; k < count; ++k) {
      const auto W = lora_bench::random_weight<T>(r.layer, static_cast<std::uint32_t>(k));
      weights.emplace_back(lora::row_major(W.data(), r.layer.out, r.layer.in));
      std::vector<decltype(lora_bench::random_adapter<T>(r.layer, r.rank, seed))> plain;
      for (index_t a = 0; a < r.adapters; ++a)
        plain.push_back(lora_bench::random_adapter<T>(r.layer, r.rank, seed += 2));
      adapters.emplace_back(plain);
    }
  }
};

/// Token t's adapter: neighbours differ, and every adapter has as many tokens.
index_t adapter_of(index_t token, index_t adapters) {
  return adapters == 0 ? -1 : token * 37 % adapters;
}

template <class T>
lora::batch<T> make_batch(const lora::packed_adapters<T>& adapters, index_t tokens) {
  lora::batch<T> who(adapters);
  for (index_t t = 0; t < tokens; ++t) {
    const index_t a = adapter_of(t, static_cast<index_t>(adapters.size()));
    who.add_each(std::span(&a, 1));
  }
  return who;
}

/// Whether token 0 .. 7 of y are what a call with their adapter alone gives.
template <class T, class X>
bool is_right(const lora::packed_weight<T>& W, const lora::packed_adapters<T>& adapters,
              const row& r, const lora_bench::buffer<X>& x, const std::vector<X>& y) {
  std::vector<X> alone(static_cast<std::size_t>(r.layer.out));
  for (index_t t = 0; t < std::min<index_t>(8, r.tokens); ++t) {
    const auto token = lora::col_major(x.data() + t * r.layer.in, r.layer.in, 1);
    if (const index_t a = adapter_of(t, r.adapters); a < 0)
      lora::forward(W, token, alone);
    else
      lora::forward(W, token, alone, adapters[static_cast<std::size_t>(a)]);
    const X* const mixed = y.data() + t * r.layer.out;
    if (std::memcmp(mixed, alone.data(), alone.size() * sizeof(X)) != 0) return false;
  }
  return true;
}

template <class T, class X>
void mixed_batch(benchmark::State& state, lora_bench::session& session, const row& r) {
  const served_layers<T> layers(r);
  std::vector<lora::batch<T>> batches;
  for (const auto& some : layers.adapters) batches.push_back(make_batch(some, r.tokens));
  const auto x = lora_bench::random_values<X>(r.layer.in * r.tokens, 1, 7);
  std::vector<X> y(static_cast<std::size_t>(r.layer.out * r.tokens));
  const auto in = lora::col_major(x.data(), r.layer.in, r.tokens);
  const auto out = lora::col_major(y, r.layer.out, r.tokens);
  lora::workspace space;

  lora::forward(space, layers.weights[0], in, out, batches[0]);
  if (!is_right(layers.weights[0], layers.adapters[0], r, x, y))
    return session.fail(state, "a token of the batch is not what its adapter alone gives");

  const auto run_base = [&, W = lora_bench::rotation(layers.weights)]() mutable {
    lora::forward(space, W.next(), in, out);
  };
  const auto run_mixed = [&, W = lora_bench::rotation(layers.weights),
                          who = lora_bench::rotation(batches)]() mutable {
    lora::forward(space, W.next(), in, out, who.next());
  };
  const auto m = session.measure(state, {run_base, run_mixed}, 1);

  const auto tokens = static_cast<double>(r.tokens),
             factors = r.layer.factors(static_cast<double>(r.rank));
  const double bytes = r.layer.size() * sizeof(T),
               more_bytes = static_cast<double>(r.adapters) * factors * sizeof(T);
  const double more_work = r.adapters == 0 ? 0 : 2 * factors * tokens;
  const auto base = lora_bench::flops_of<T, X>(2 * r.layer.size() * tokens);
  const auto base_limit = lora_bench::reading(base, bytes);
  const auto mixed_limit =
      lora_bench::reading(base + lora_bench::flops_of<T, X>(more_work), bytes + more_bytes);
  const lora::machine_rates limits = m.limits();
  lora_bench::count_overhead(state, m.series.ratio(1, 0),
                             mixed_limit(limits) / base_limit(limits) - 1);
  state.counters["floor_bytes"] = more_bytes / bytes;
  state.counters["share"] = m.share(0, base_limit);
  state.counters["share_mixed"] = m.share(1, mixed_limit);
  state.counters["base_us"] = m.series.time(0).median * 1e6;
}

template <class T, class X>
void add_rows(lora_bench::session& session) {
  const std::pair<index_t, index_t> counts[] = {{8, 0},  {8, 8},   {64, 0},
                                                {64, 8}, {64, 64}, {512, 64}};
  for (const shape& layer : {shape{1024, 1024}, {4096, 4096}, {4096, 11008}})
    for (const auto& [tokens, adapters] : counts)
      for (const index_t rank : {8, 16, 64}) {
        if (adapters == 0 && rank != 16) continue;
        const row r{layer, tokens, adapters, rank};
        const std::string name = std::string("mixed_batch/base:") + lora_bench::name_of<T>() +
                                 "/activations:" + lora_bench::name_of<X>() +
                                 "/layer:" + layer.text() + "/tokens:" + std::to_string(tokens) +
                                 "/adapters:" + std::to_string(adapters) +
                                 "/rank:" + std::to_string(rank);
        // Seconds a row at 512 tokens, where the activations' format makes no difference.
        const bool repeated = tokens == 512 && !std::is_same_v<T, X>;
        session.add(
            name, layer == shape{4096, 4096} && rank == 16 && !repeated,
            [=, &session](benchmark::State& state) { mixed_batch<T, X>(state, session, r); });
      }
}

}  // namespace

int main(int argc, char** argv) {
  return lora_bench::run_program(argc, argv, lora_bench::table_of_mixed_batch(),
                                 [](lora_bench::session& session) {
                                   add_rows<float, float>(session);
                                   add_rows<lora::bfloat16, lora::bfloat16>(session);
                                   add_rows<lora::bfloat16, float>(session);
                                 });
}
