// SPDX-License-Identifier: Apache-2.0
// Merge an adapter into a weight, or mix it into the output: the same function.
#include <iostream>

#include "lora/lora.hpp"

int main() {
  Eigen::MatrixXf W{{1, 0, 2}, {0, 3, 1}};               // out_features 2 x in_features 3
  const Eigen::MatrixXf A{{1, -1, 2}};                   // rank 1 x in_features
  const Eigen::MatrixXf B{{0.5}, {-2}};                  // out_features x rank 1
  const lora::adapter<float> style{A, B, {.alpha = 4}};  // s = alpha / rank = 4

  const Eigen::Vector3f x(1, 2, 3);
  Eigen::Vector2f y;

  lora::forward(W, x, y, style);  // mix: y = W x + s B (A x); W stays as it is
  std::cout << "mixed   " << y.transpose() << '\n';

  lora::forward(W, x, y, lora::scaled(0.5, style));  // at half strength, without touching anything
  std::cout << "at 0.5  " << y.transpose() << '\n';

  lora::merge(W, style);  // merge: W += s B A, rounded once
  y.noalias() = W * x;
  std::cout << "merged  " << y.transpose() << '\n';
}
