// SPDX-License-Identifier: Apache-2.0
//
// What the programs of this folder share: their command line, the machine and the rivals in the
// JSON context, and a table of the counters (Google Benchmark would print a share of 0.78 as 780m).
//
//   --rows=bars              the rows that bench/results.md has a bar for (the default);
//                            --rows=all: every combination
//   --row_seconds=1          how long a row is measured (all its ways together), besides setting up
//                            and half as much for the probes between rounds; 6 rounds at least
//   --benchmark_filter=...   which rows; --benchmark_list_tests lists them
//   --benchmark_format=json, --benchmark_out=F.json    all figures, as fractions and seconds;
//                                                      bench/table.py reads them
//
// A row whose ways do not agree is an error, and the program's exit status is then 1.
#pragma once

#include <benchmark/benchmark.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <lora/lora.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "limits.hpp"
#include "paired.hpp"
#include "rivals/versions.hpp"
#include "tables.hpp"

namespace lora_bench {

/// A series, and the machine's limits when each of its rounds began.
struct measurement {
  lora_bench::series series;
  std::vector<lora::machine_rates> of_round;

  /// The medians of the rounds.
  lora::machine_rates limits() const {
    const auto median = [this](double lora::machine_rates::*rate) {
      std::vector<double> rates;
      for (const lora::machine_rates& l : of_round) rates.push_back(l.*rate);
      return estimate_median(std::move(rates)).median;
    };
    return {.flops = median(&lora::machine_rates::flops),
            .read = median(&lora::machine_rates::read),
            .read_write = median(&lora::machine_rates::read_write),
            .threads = of_round.front().threads,
            .dot_flops = median(&lora::machine_rates::dot_flops)};
  }
  /// The time that the limits allow, limit(lora::machine_rates), over the time that a way took: the
  /// median of the rounds.
  template <class Limit>
  double share(std::size_t which, const Limit& limit) const {
    std::vector<double> shares;
    for (std::size_t k = 0; k < of_round.size(); ++k)
      shares.push_back(limit(of_round[k]) / series.seconds(which)[k]);
    return estimate_median(std::move(shares)).median;
  }
};

/// The rows' view of the program.
class session {
 public:
  double row_seconds = 1;
  bool all_rows = false;
  bool failed = false;
  lora::detail::limits_probe probe = make_probe();

  /// Registers row(state) if it is asked for. A row is one iteration; it sets the time by
  /// state.SetIterationTime.
  template <class Row>
  void add(const std::string& name, bool has_bar, const Row& row) {
    if (!all_rows && !has_bar) return;
    benchmark::RegisterBenchmark(name.c_str(), row)
        ->Iterations(1)
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond);
  }

  /// The row's one iteration: `ways` in turns; its time is that of ways[subject].
  measurement measure(benchmark::State& state, const std::vector<way>& ways, std::size_t subject) {
    measurement m;
    for (auto _ : state) {
      // Between rounds, for a third of the time at most: where rounds are short, one probe serves
      // several.
      const double start = now();
      double probing = 0;
      m.series = time_in_turns(row_seconds, ways, [&] {
        if (m.of_round.empty() || 3 * probing <= now() - start) {
          probing += time_of([&] { m.of_round.push_back(probe.measure(0.001, 1)); });
        } else {
          m.of_round.push_back(m.of_round.back());
        }
      });
      state.SetIterationTime(m.series.time(subject).median);
    }
    const lora::machine_rates limits = m.limits();
    state.counters["rounds"] = static_cast<double>(m.series.rounds());
    state.counters["limit_flops"] = limits.flops;
    state.counters["limit_dot_flops"] = limits.dot_flops;
    state.counters["limit_read"] = limits.read;
    state.counters["limit_read_write"] = limits.read_write;
    return m;
  }

  void fail(benchmark::State& state, const char* text) {
    failed = true;
    state.SkipWithError(text);
  }
};

/// A counter with its 95 % interval: NAME, NAME_lo, NAME_hi.
inline void count(benchmark::State& state, const std::string& name, const estimate& e,
                  double shift = 0) {
  state.counters[name] = e.median + shift;
  state.counters[name + "_lo"] = e.low + shift;
  state.counters[name + "_hi"] = e.high + shift;
}

/// floor, overhead, points_above_floor, inconclusive of a ratio with_adapters / without.
inline void count_overhead(benchmark::State& state, const estimate& ratio, double floor) {
  count(state, "overhead", ratio, -1);
  state.counters["floor"] = floor;
  state.counters["points_above_floor"] = 100 * (ratio.median - 1 - floor);
  state.counters["inconclusive"] = ratio.high - ratio.low > 0.01 ? 1 : 0;
}

class table_reporter : public benchmark::BenchmarkReporter {
 public:
  table_reporter(std::string limits, table t) : limits_(std::move(limits)), table_(std::move(t)) {}

  bool ReportContext(const Context& context) override {
    PrintBasicContext(&GetErrorStream(), context);
    // Debian's library is a debug build and warns of it.
    GetErrorStream() << "Times are taken by this program: a DEBUG build of Google Benchmark does "
                        "not change them.\n";
    std::printf("%s\n%s%-*s%*s", limits_.c_str(), legend_of(table_).c_str(), name_width, "",
                cell_width, table_.time_heading);
    for (const column& c : table_.columns) std::printf("%*s", cell_width, c.heading);
    std::printf("\n");
    return true;
  }

  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& run : runs) {
      std::string name = run.benchmark_name();
      constexpr std::string_view once = "/iterations:1/manual_time";
      if (const auto at = name.find(once); at != std::string::npos) name.erase(at, once.size());
      std::printf("%-*s", name_width, name.c_str());
      const std::string failure = failure_of(run);
      if (!failure.empty()) {
        std::printf("  %s\n", failure.c_str());
        continue;
      }
      std::printf(
          "%*.1f", cell_width,
          run.GetAdjustedRealTime() * 1e6 / benchmark::GetTimeUnitMultiplier(run.time_unit));
      for (const column& c : table_.columns) {
        const auto found = run.counters.find(c.counter);
        if (found == run.counters.end())
          std::printf("%*s", cell_width, "");
        else
          std::printf("%*.*f", cell_width, c.decimals, found->second.value * c.scale);
      }
      std::printf("\n");
    }
    std::fflush(stdout);
  }

 private:
  static constexpr int name_width = 112;

  /// Google Benchmark 1.8 renamed the members that tell of an error.
  template <class R>
  static std::string failure_of(const R& run) {
    if constexpr (requires { run.error_message; })
      return run.error_occurred ? run.error_message : std::string();
    else
      return run.skip_message;
  }

  std::string limits_;
  table table_;
};

inline std::string build_text() {
  std::string text = "lora " + std::to_string(LORA_VERSION_MAJOR) + "." +
                     std::to_string(LORA_VERSION_MINOR) + "." + std::to_string(LORA_VERSION_PATCH) +
                     ", ";
#if defined(__clang__)
  text += "clang " __clang_version__;
#elif defined(__GNUC__)
  text += "gcc " __VERSION__;
#else
  text += "another compiler";
#endif
  text += " " LORA_BENCH_FLAGS ", vectors of " + std::to_string(lora::detail::simd<float>::width) +
          " floats, ";
#if defined(_OPENMP)
  text += "OpenMP";
#else
  text += "no OpenMP";
#endif
#if !defined(NDEBUG)
  text += ", NDEBUG NOT DEFINED";
#endif
#if !defined(__OPTIMIZE__)
  text += ", NOT OPTIMIZED";
#endif
  return text;
}

/// The processor's name, where the system tells it.
inline std::string cpu_text() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.starts_with("model name"))
      if (const auto at = line.find(": "); at != std::string::npos) return line.substr(at + 2);
  return "unknown";
}

inline void add_context(const session& s, const lora::machine_rates& limits) {
  benchmark::AddCustomContext("build", build_text());
  benchmark::AddCustomContext("cpu", cpu_text());
  benchmark::AddCustomContext("threads", std::to_string(s.probe.threads()));
  benchmark::AddCustomContext("limit_flops", std::to_string(limits.flops));
  benchmark::AddCustomContext("limit_dot_flops", std::to_string(limits.dot_flops));
  benchmark::AddCustomContext("limit_read", std::to_string(limits.read));
  benchmark::AddCustomContext("limit_read_write", std::to_string(limits.read_write));
  benchmark::AddCustomContext("last_level_cache_bytes", std::to_string(last_level_cache()));
  benchmark::AddCustomContext("row_seconds", std::to_string(s.row_seconds));
  benchmark::AddCustomContext("rival_eigen", eigen_version());
  benchmark::AddCustomContext("rival_openblas", openblas_version());
  benchmark::AddCustomContext("rival_onednn", onednn_version());
}

/// Takes this project's own arguments out; false when one of them is wrong.
inline bool read_arguments(int& argc, char** argv, session& s, bool& as_table) {
  int kept = 0;
  for (int k = 0; k < argc; ++k) {
    const std::string_view argument = argv[k];
    constexpr std::string_view seconds_flag = "--row_seconds=", rows_flag = "--rows=";
    if (argument.starts_with(seconds_flag)) {
      s.row_seconds = std::atof(argv[k] + seconds_flag.size());
    } else if (argument.starts_with(rows_flag)) {
      const std::string_view rows = argument.substr(rows_flag.size());
      if (rows != "all" && rows != "bars") {
        std::fprintf(stderr, "--rows is all or bars\n");
        return false;
      }
      s.all_rows = rows == "all";
    } else {
      if (argument.starts_with("--benchmark_format=")) as_table = false;
      argv[kept++] = argv[k];
    }
  }
  argc = kept;
  return true;
}

/// The main of a program: probes, registers, runs. register_rows(session&) registers the rows.
template <class Register>
int run_program(int argc, char** argv, const table& columns, const Register& register_rows) {
  session s;
  bool as_table = true;
  if (!read_arguments(argc, argv, s, as_table)) return 1;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;

  const lora::machine_rates limits = s.probe.measure();
  add_context(s, limits);
  char heading[256];
  std::snprintf(heading, sizeof heading,
                "limits of %d thread(s): %.0f GFLOP/s float multiply-add, %.0f by dot products of "
                "bfloat16, %.1f GB/s read, %.1f GB/s "
                "read and written in place",
                s.probe.threads(), limits.flops / 1e9, limits.dot_flops / 1e9, limits.read / 1e9,
                limits.read_write / 1e9);
  register_rows(s);
  if (as_table) {
    table_reporter reporter(heading, columns);
    benchmark::RunSpecifiedBenchmarks(&reporter);
  } else {
    benchmark::RunSpecifiedBenchmarks();
  }
  benchmark::Shutdown();
  return s.failed ? 1 : 0;
}

}  // namespace lora_bench
