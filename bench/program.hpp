// SPDX-License-Identifier: Apache-2.0
//
// What the programs of this folder share: their command line, the limits in the heading and in the JSON context, and a
// table of the counters (Google Benchmark would print a share of 0.78 as 780m).
//
//   --row_seconds=1          how long a row is measured (its pairs together), besides setting up
//   --benchmark_filter=...   which rows; --benchmark_list_tests lists them
//   --benchmark_out=F.json   all figures and the limits, as fractions and seconds; bench/table turns them into Markdown
#pragma once

#include <benchmark/benchmark.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "limits.hpp"
#include "paired.hpp"

namespace lora_bench {

/// One counter in the printed table: value * scale with so many decimals.
struct column {
  const char* counter;
  const char* heading;
  double scale;
  int decimals;
};

/// The rows' view of the program.
struct session {
  double row_seconds = 1;
  limits_probe probe;

  /// measure() between two probes; `limits` becomes the better of them.
  template <class Measure>
  auto between_probes(machine_limits& limits, const Measure& measure) {
    const machine_limits before = probe.measure();
    auto result = measure();
    limits = better(before, probe.measure());
    return result;
  }
};

class table_reporter : public benchmark::BenchmarkReporter {
 public:
  table_reporter(std::string heading, std::vector<column> columns)
      : heading_(std::move(heading)), columns_(std::move(columns)) {}

  bool ReportContext(const Context& context) override {
    PrintBasicContext(&GetErrorStream(), context);
    std::printf("%s\n%-*s%12s", heading_.c_str(), name_width, "", "time us");
    for (const column& c : columns_) std::printf("%*s", cell_width, c.heading);
    std::printf("\n");
    return true;
  }

  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& run : runs) {
      std::printf("%-*s", name_width, run.benchmark_name().c_str());
      const std::string failure = failure_of(run);
      if (!failure.empty()) {
        std::printf("  %s\n", failure.c_str());
        continue;
      }
      std::printf("%12.1f", run.GetAdjustedRealTime() * 1e6 / benchmark::GetTimeUnitMultiplier(run.time_unit));
      for (const column& c : columns_) {
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
  static constexpr int name_width = 88, cell_width = 9;

  /// Google Benchmark 1.8 renamed the members that tell of an error.
  template <class R>
  static std::string failure_of(const R& run) {
    if constexpr (requires { run.error_message; })
      return run.error_occurred ? run.error_message : std::string();
    else
      return run.skip_message;
  }

  std::string heading_;
  std::vector<column> columns_;
};

inline std::string build_text() {
  std::string text = "lora " + std::to_string(LORA_VERSION_MAJOR) + "." + std::to_string(LORA_VERSION_MINOR) + "." +
                     std::to_string(LORA_VERSION_PATCH) + ", ";
#if defined(__clang__)
  text += "clang " __clang_version__;
#elif defined(__GNUC__)
  text += "gcc " __VERSION__;
#else
  text += "another compiler";
#endif
  text += ", Eigen " + std::to_string(EIGEN_WORLD_VERSION) + "." + std::to_string(EIGEN_MAJOR_VERSION) + "." +
          std::to_string(EIGEN_MINOR_VERSION) + ", vectors of " + std::to_string(lora::detail::simd<float>::width) +
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

/// The main of a program: probes, registers, runs. register_rows(session&) registers the rows.
template <class Register>
int run_program(int argc, char** argv, const std::vector<column>& columns, const Register& register_rows) {
  session s;
  bool table = true;
  int kept = 0;
  for (int k = 0; k < argc; ++k) {
    const std::string_view argument = argv[k];
    constexpr std::string_view seconds_flag = "--row_seconds=";
    if (argument.starts_with(seconds_flag)) {
      s.row_seconds = std::atof(argv[k] + seconds_flag.size());
      continue;
    }
    if (argument.starts_with("--benchmark_format=")) table = false;
    argv[kept++] = argv[k];
  }
  argc = kept;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;

  const machine_limits limits = s.probe.measure();
  char heading[256];
  std::snprintf(heading, sizeof heading,
                "limits of %d thread(s): %.0f GFLOP/s float multiply-add, %.1f GB/s read, %.1f GB/s read + write in place",
                s.probe.threads(), limits.flops / 1e9, limits.read / 1e9, limits.read_write / 1e9);
  benchmark::AddCustomContext("build", build_text());
  benchmark::AddCustomContext("threads", std::to_string(s.probe.threads()));
  benchmark::AddCustomContext("limit_flops", std::to_string(limits.flops));
  benchmark::AddCustomContext("limit_read", std::to_string(limits.read));
  benchmark::AddCustomContext("limit_read_write", std::to_string(limits.read_write));
  benchmark::AddCustomContext("last_level_cache", std::to_string(last_level_cache()));
  benchmark::AddCustomContext("row_seconds", std::to_string(s.row_seconds));

  register_rows(s);
  if (table) {
    table_reporter reporter(heading, columns);
    benchmark::RunSpecifiedBenchmarks(&reporter);
  } else {
    benchmark::RunSpecifiedBenchmarks();
  }
  benchmark::Shutdown();
  return 0;
}

}  // namespace lora_bench
