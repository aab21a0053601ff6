// SPDX-License-Identifier: Apache-2.0
//
// Built with -fno-exceptions: right calls work, a wrong one reaches the hook with its message
// before the program ends.
#include <cstdio>
#include <cstdlib>

[[noreturn]] inline void report(const char* message) {
  std::printf("hook: %s\n", message);
  std::exit(0);
}
#define LORA_ON_ERROR(message) report(message)
#include "lora/lora.hpp"

int main() {
  const Eigen::MatrixXf A{{1, 2, 0}}, B{{3}, {-1}};
  const lora::adapter<float> l{A, B, {.alpha = 2}};
  Eigen::MatrixXf W{{1, 1, 1}, {2, 2, 2}};
  lora::merge(W, l);
  const Eigen::MatrixXf expected{{7, 13, 1}, {0, -2, 2}};
  std::printf("%s\n", W == expected ? "merged" : "wrong");
  lora::linear<float> layer{W};
  layer.merge("nobody");
  std::printf("went on after an error\n");
  return 1;
}
