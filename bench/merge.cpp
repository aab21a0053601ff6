// SPDX-License-Identifier: Apache-2.0
//
// Merging one adapter into a weight in place, lora::merge(W, l), against Eigen:
//   float     W.noalias() += s * B * A
//   16 bits   the same on a float temporary, as one would write it: T = W.cast<float>(); T.noalias() += s * B * A; W = T.cast<...>()
// over ranks, formats and layer sizes (4096x11008: 4096 in_features, 11008 out_features). Weights are row-major, factors
// float. Weights rotate over more than twice the last-level cache and every round changes the adapter's sign, so that
// they stay of one size. Before a row is timed, both results are compared with dot products in double.
//
// A row is one Google Benchmark iteration: a series of pairs (see paired.hpp). Its time is the median lora::merge (manual
// timing). Counters:
//   share             of the machine's limit: max(FLOPs / FMA rate, 2 bytes of W / read-and-write rate) / time
//   eigen_share       the same of Eigen
//   speedup_vs_eigen  Eigen / lora, the median of the pairs; speedup_lo, speedup_hi: its 95 % interval
//   eigen_us, pairs
//
// All rows take about a minute on two cores. A quick look: --row_seconds=0.3 --benchmark_filter='layer:4096x4096/rank:(8|64)$'
#include <benchmark/benchmark.h>

#include <Eigen/Core>
#include <cmath>
#include <cstddef>
#include <limits>
#include <lora/lora.hpp>
#include <string>
#include <type_traits>
#include <vector>

#include "layers.hpp"
#include "limits.hpp"
#include "paired.hpp"
#include "program.hpp"

namespace {

using lora_bench::index_t;
using lora_bench::shape;

// Eigen's 16-bit types: the library takes them as storage, and its rival needs them.
template <class T>
using matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

template <class T>
constexpr const char* name_of() {
  if constexpr (std::is_same_v<T, float>)
    return "float";
  else
    return std::is_same_v<T, Eigen::half> ? "float16" : "bfloat16";
}

template <class T>
matrix<T> random_matrix(const shape& layer, std::uint32_t seed) {
  const auto values = lora_bench::random_weight<float>(layer, seed);
  return Eigen::Map<const matrix<float>>(values.data(), layer.out, layer.in).template cast<T>();
}

template <class T>
std::vector<matrix<T>>& weights_of(const shape& layer) {
  static std::vector<matrix<T>> weights;
  if (weights.empty() || weights[0].rows() != layer.out || weights[0].cols() != layer.in) {
    weights.clear();
    const std::size_t count = lora_bench::pool_size(layer.size() * sizeof(T));
    for (std::size_t k = 0; k < count; ++k) weights.push_back(random_matrix<T>(layer, static_cast<std::uint32_t>(k)));
  }
  return weights;
}

template <class T>
void merge_with_eigen(matrix<T>& W, float s, const matrix<float>& B, const matrix<float>& A) {
  if constexpr (std::is_same_v<T, float>) {
    W.noalias() += s * B * A;
  } else {
    matrix<float> widened = W.template cast<float>();
    widened.noalias() += s * B * A;
    W = widened.template cast<T>();
  }
}

/// Whether sampled elements of `after` are before + s B A, to the format's rounding.
template <class T>
bool is_merged(const matrix<T>& before, const matrix<T>& after, double s, const matrix<float>& B, const matrix<float>& A) {
  const double unit = std::is_same_v<T, float> ? 1e-5 : 1.0 / 256;
  for (index_t k = 0; k < 1000; ++k) {
    const index_t i = k * 7919 % before.rows(), j = k * 104729 % before.cols();
    const double delta = s * B.row(i).template cast<double>().dot(A.col(j).template cast<double>());
    const double expected = static_cast<double>(static_cast<float>(before(i, j))) + delta;
    const double size = std::abs(static_cast<double>(static_cast<float>(before(i, j)))) + std::abs(delta);
    if (!(std::abs(static_cast<double>(static_cast<float>(after(i, j))) - expected) <= unit * size + 1e-6)) return false;
  }
  return true;
}

template <class T>
void merge(benchmark::State& state, lora_bench::session& session, const shape& layer, index_t rank) {
  auto& weights = weights_of<T>(layer);
  const auto adapter = lora_bench::random_adapter<float>(layer, rank, 1000);
  const matrix<float>&A = adapter.lora_A(), &B = adapter.lora_B();
  const double s = adapter.scaling();

  {
    const matrix<T> before = weights[0];
    matrix<T> after = before;
    lora::merge(after, adapter);
    const bool ours = is_merged(before, after, s, B, A);
    after = before;
    merge_with_eigen(after, static_cast<float>(s), B, A);
    if (!ours || !is_merged(before, after, s, B, A)) {
      state.SkipWithError(ours ? "Eigen's result is wrong" : "the merged weight is wrong");
      return;
    }
  }

  // Every call takes another weight, and every round over them the other sign.
  std::size_t next = 0;
  const auto in_turn = [&](const auto& call) {
    const std::size_t turn = next++;
    call(weights[turn % weights.size()], turn / weights.size() % 2 == 0 ? 1.0 : -1.0);
  };
  const auto run_lora = [&] { in_turn([&](matrix<T>& W, double sign) { lora::merge(W, lora::scaled(sign, adapter)); }); };
  const auto run_eigen = [&] {
    in_turn([&](matrix<T>& W, double sign) { merge_with_eigen(W, static_cast<float>(sign * s), B, A); });
  };

  lora_bench::machine_limits limits;
  lora_bench::series series;
  for (auto _ : state) {
    series =
        session.between_probes(limits, [&] { return lora_bench::time_pairs(session.row_seconds, run_lora, run_eigen); });
    state.SetIterationTime(series.first_time().median);
  }

  const double limit = limits.updating(2 * static_cast<double>(rank) * layer.size(), 2 * layer.size() * sizeof(T));
  const auto speedup = series.ratio();
  auto& counters = state.counters;
  counters["share"] = limit / series.first_time().median;
  counters["eigen_share"] = limit / series.second_time().median;
  counters["speedup_vs_eigen"] = speedup.median;
  counters["speedup_lo"] = speedup.low;
  counters["speedup_hi"] = speedup.high;
  counters["eigen_us"] = series.second_time().median * 1e6;
  counters["pairs"] = static_cast<double>(series.pairs());
}

template <class T>
void add_rows(lora_bench::session& session) {
  for (const shape& layer : lora_bench::shapes)
    for (const index_t rank : lora_bench::ranks) {
      const std::string name =
          std::string("merge/base:") + name_of<T>() + "/layer:" + layer.text() + "/rank:" + std::to_string(rank);
      benchmark::RegisterBenchmark(name.c_str(),
                                   [=, &session](benchmark::State& state) { merge<T>(state, session, layer, rank); })
          ->Iterations(1)
          ->UseManualTime()
          ->Unit(benchmark::kMicrosecond);
    }
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<lora_bench::column> columns = {{"eigen_us", "eigen us", 1, 1}, {"speedup_vs_eigen", "speedup", 1, 2},
                                                   {"speedup_lo", "from", 1, 2},   {"speedup_hi", "to", 1, 2},
                                                   {"share", "share %", 100, 1},   {"eigen_share", "eigen %", 100, 1},
                                                   {"pairs", "pairs", 1, 0}};
  return lora_bench::run_program(argc, argv, columns, [](lora_bench::session& session) {
    add_rows<float>(session);
    add_rows<Eigen::bfloat16>(session);
    add_rows<Eigen::half>(session);
  });
}
