// SPDX-License-Identifier: Apache-2.0
//
// Merging one adapter into a weight in place, lora::merge(space, W, l), against other libraries:
//   rows, panels   a weight that the caller keeps row-major, and a lora::packed_weight
//   eigen          float: W.noalias() += s * B * A. 16 bits: the same on a float temporary, as one
//                  would write it: T = W.cast<float>(); T.noalias() += s * B * A; W = T.cast<...>()
//   openblas       float: cblas_sgemm(alpha = s, beta = 1); no 16-bit products in Debian's build
// over ranks, formats and layer sizes (4096x11008: 4096 in_features, 11008 out_features). Factors
// are float, or, without rivals, bfloat16, which dot products multiply where the build has them.
// Weights rotate over more than twice the last-level cache and every round over them changes the
// adapter's sign, so that they stay of one size. Before a row is timed, all
// results are compared with dot products in double.
//
// A row is one Google Benchmark iteration: a series of rounds (see paired.hpp). Its time is the
// median lora::merge of rows (manual timing). Counters:
//   share, share_panels      of the machine's limit: max(FLOPs / their rate, 2 bytes of W /
//                            read-and-write rate) / time
//   speedup_vs_R             R / lora (rows), the median of the rounds; _lo, _hi: its 95 %
//                            interval; R_us
//   panels_us, rounds, limit_flops, limit_dot_flops, limit_read, limit_read_write
//
// A quick look: --row_seconds=0.3 --benchmark_filter='layer:4096x4096/rank:(8|64)/'
#include <benchmark/benchmark.h>

#include <Eigen/Core>
#include <cmath>
#include <cstddef>
#include <lora/lora.hpp>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "layers.hpp"
#include "limits.hpp"
#include "paired.hpp"
#include "program.hpp"
#include "rivals/merge.hpp"
#include "tables.hpp"

namespace {

using lora_bench::index_t;
using lora_bench::shape;

/// The weights that all ways but `panels` work on, each from a rotation of its own.
template <class T>
struct pool {
  std::vector<lora_bench::weight_rows<T>> rows;
  std::vector<lora_bench::weight_panels<T>> panels;

  explicit pool(const shape& layer) {
    const std::size_t count = lora_bench::pool_size(layer.size() * sizeof(T));
    for (std::size_t k = 0; k < count; ++k) {
      rows.emplace_back(lora_bench::random_weight<T>(layer, static_cast<std::uint32_t>(k)), layer);
      panels.emplace_back(rows.back().values, layer);
    }
  }

  /// Kept from row to row, because filling it takes longer than measuring.
  static pool& get(const shape& layer) {
    static std::optional<pool> held;
    static shape held_layer{0, 0};
    if (held_layer != layer) {
      held.reset();
      held.emplace(layer);
      held_layer = layer;
    }
    return *held;
  }
};

/// Whether sampled elements of `after` are before + s B A, to the format's rounding.
template <class T, class Adapter, class After>
bool is_merged(const lora_bench::weight_rows<T>& before, const Adapter& l, const After& after) {
  const auto W = before.view();
  const auto A = lora_bench::widened(l.lora_A()), B = lora_bench::widened(l.lora_B());
  const double unit = std::is_same_v<T, float> ? 1e-5 : 1.0 / 256;
  for (index_t k = 0; k < 1000; ++k) {
    const index_t i = k * 7919 % W.rows(), j = k * 104729 % W.cols();
    const double old = static_cast<double>(static_cast<float>(W(i, j)));
    const double delta = l.scaling() * B.row(i).dot(A.col(j));
    if (!(std::abs(static_cast<double>(static_cast<float>(after(i, j))) - old - delta) <=
          unit * (std::abs(old) + std::abs(delta)) + 1e-6))
      return false;
  }
  return true;
}

/// W += sign s B A on the next weight; the sign changes with every round over the pool.
template <class Pool, class Merge>
lora_bench::way in_turn(Pool& weights, const Merge& merge) {
  return [turn = lora_bench::rotation(weights), &weights, merge]() mutable {
    const double sign = turn.turn() / weights.size() % 2 == 0 ? 1.0 : -1.0;
    merge(turn.next(), sign);
  };
}

template <class T, class F>
void merge(benchmark::State& state, lora_bench::session& session, const shape& layer,
           index_t rank) {
  auto& [rows, panels] = pool<T>::get(layer);
  const auto l = lora_bench::random_adapter<F>(layer, rank, 1000);
  lora::workspace space;
  const auto merge_ours = [&](auto& W, double sign) {
    lora::merge(space, W.view(), lora::scaled(sign, l));
  };
  std::vector<lora_bench::merge_rival<T>> rivals;
  if constexpr (std::is_same_v<F, float>) rivals = lora_bench::merge_rivals<T>(layer, l);

  {
    const lora_bench::weight_rows<T> before(rows[0].values, layer);
    auto after = before;
    auto packed_after = lora_bench::weight_panels<T>(before.values, layer);
    merge_ours(after, 1.0);
    merge_ours(packed_after, 1.0);
    if (!is_merged(before, l, std::as_const(after).view()) ||
        !is_merged(before, l, packed_after.panels))
      return session.fail(state, "the merged weight is wrong");
    for (const auto& rival : rivals) {
      after = before;
      rival.merge(after, 1.0);
      if (!is_merged(before, l, std::as_const(after).view()))
        return session.fail(state, (rival.name + "'s result is wrong").c_str());
    }
  }

  std::vector<lora_bench::way> ways{in_turn(rows, merge_ours), in_turn(panels, merge_ours)};
  for (const auto& rival : rivals) ways.push_back(in_turn(rows, rival.merge));
  const auto m = session.measure(state, ways, 0);

  const double flops = 2 * static_cast<double>(rank) * layer.size();
  const auto limit =
      lora_bench::updating(lora_bench::flops_of_delta<F>(flops), 2 * layer.size() * sizeof(T));
  state.counters["share"] = m.share(0, limit);
  state.counters["share_panels"] = m.share(1, limit);
  state.counters["panels_us"] = m.series.time(1).median * 1e6;
  for (std::size_t k = 0; k < rivals.size(); ++k) {
    lora_bench::count(state, "speedup_vs_" + rivals[k].name, m.series.ratio(k + 2, 0));
    state.counters[rivals[k].name + "_us"] = m.series.time(k + 2).median * 1e6;
  }
}

template <class T, class F>
void add_rows(lora_bench::session& session) {
  for (const shape& layer :
       {shape{768, 768}, {1024, 1024}, {4096, 4096}, {4096, 11008}, {11008, 4096}, {8192, 28672}})
    for (const index_t rank : {8, 16, 64, 256}) {
      const std::string name = std::string("merge/base:") + lora_bench::name_of<T>() +
                               "/factors:" + lora_bench::name_of<F>() + "/layer:" + layer.text() +
                               "/rank:" + std::to_string(rank);
      const bool small = layer == shape{768, 768} || layer == shape{4096, 4096};
      const bool large = layer == shape{4096, 11008} && rank <= 16;
      const bool largest = layer.in == 8192 && rank == 16 &&
                           !std::is_same_v<T, lora::float16>;  // half a minute to set up
      session.add(name, small || large || largest, [=, &session](benchmark::State& state) {
        merge<T, F>(state, session, layer, rank);
      });
    }
}

}  // namespace

int main(int argc, char** argv) {
  return lora_bench::run_program(argc, argv, lora_bench::table_of_merge(),
                                 [](lora_bench::session& session) {
                                   add_rows<float, float>(session);
                                   add_rows<lora::bfloat16, float>(session);
                                   add_rows<lora::bfloat16, lora::bfloat16>(session);
                                   add_rows<lora::float16, float>(session);
                                 });
}
