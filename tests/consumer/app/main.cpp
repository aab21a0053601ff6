// SPDX-License-Identifier: Apache-2.0
//
// A program of somebody else: both ways on whole numbers, and the file readers where the build has
// them.
#include <cstdio>

#include "lora/lora.hpp"
#ifdef APP_READS_FILES
#include "lora/io/peft.hpp"
#endif

int main() {
  const Eigen::MatrixXf A{{1, 2, 0}}, B{{3}, {-1}};
  const lora::adapter<float> l{A, B, {.alpha = 2}};  // delta weight [6 12 0; -2 -4 0]
  Eigen::MatrixXf W{{1, 1, 1}, {2, 2, 2}};
  const Eigen::Vector3f x(1, 2, 3);
  Eigen::Vector2f mixed, merged;
  lora::forward(W, x, mixed, l);
  lora::merge(W, l);
  merged.noalias() = W * x;
  if (mixed != Eigen::Vector2f(36, 2) || mixed != merged) return 1;
#ifdef APP_READS_FILES
  try {
    lora::peft::read("no/such/directory");
    return 1;
  } catch (const lora::format_error&) {
  }
#endif
  std::printf("lora %d.%d.%d\n", LORA_VERSION_MAJOR, LORA_VERSION_MINOR, LORA_VERSION_PATCH);
}
