// SPDX-License-Identifier: Apache-2.0
//
// What the benchmarks print above their figures: every column is explained, fits its place, and
// uses the words of README.md.
#include "tables.hpp"

#include <cstdio>
#include <set>
#include <string>
#include <string_view>

namespace {

int faults = 0;
void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("%s\n", what.c_str());
  ++faults;
}

void check(const char* program, const lora_bench::table& t) {
  const std::string name = program;
  const std::string legend = lora_bench::legend_of(t);
  expect(legend.find("merged: ") == 0 && legend.find(" mixed: ") != std::string::npos,
         name + ": does not say what the two ways are");
  expect(std::string_view(t.time_heading).ends_with(" us") &&
             !std::string_view(t.time_heading).starts_with("time"),
         name + ": the heading of the time does not say of what it is");
  expect(legend.find(std::string("  ") + t.time_heading + " ") != std::string::npos &&
             legend.find("microseconds") != std::string::npos,
         name + ": the legend does not say what the time is");
  std::set<std::string> counters;
  for (const auto& c : t.columns) {
    const std::string heading = c.heading;
    expect(static_cast<int>(heading.size()) < lora_bench::cell_width,
           name + ": no space before the heading " + heading);
    expect(counters.insert(c.counter).second, name + ": two columns of " + c.counter);
    // An empty meaning continues: the other end of an interval, or a heading that was explained
    // before.
    expect(
        *c.meaning != '\0' || heading == "from" || heading == "to" || heading.starts_with("advise"),
        name + ": no meaning for " + heading);
    if (heading.starts_with("floor"))
      expect(std::string_view(c.meaning).find("at least") != std::string_view::npos,
             name + ": floor is not defined");
  }
  for (const char* word : {"unm. ", "points+", "(pred.)", "share"})
    expect(legend.find(word) == std::string::npos, name + ": says \"" + word + "\"");
}

}  // namespace

int main() {
  check("two_ways", lora_bench::table_of_two_ways());
  check("merge", lora_bench::table_of_merge());
  check("mixed_batch", lora_bench::table_of_mixed_batch());
  check("break_even", lora_bench::table_of_break_even());
  std::printf("%s", lora_bench::legend_of(lora_bench::table_of_two_ways()).c_str());
  return faults != 0;
}
