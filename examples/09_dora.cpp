// SPDX-License-Identifier: Apache-2.0
// DoRA both ways: W' = diag(m / |W + D|) (W + D), merged and mixed. It is not additive, so the
// base's own part is scaled too.
#include <iostream>

#include "lora/dora.hpp"
#include "lora/lora.hpp"

int main() {
  using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const matrix W{{2, 0, 1}, {0, 3, 4}};
  const lora::dora_adapter<float> style{
      matrix{{1, 0, 0}}, matrix{{1}, {0}}, {.alpha = 1}, {10, 10}};
  const lora::adapter<float> plain{matrix{{0, 1, 0}}, matrix{{1}, {1}}, {.alpha = 1}};
  const Eigen::Vector3f x(1, 2, 3);
  Eigen::Vector2f y;

  const auto layer =
      lora::mixed(W, style, plain);  // the norms, once: the order of adapters matters
  std::cout << "base rows times";
  for (const float gain : layer.gain()) std::cout << " " << gain;
  std::cout << "\n";

  lora::forward(W, x, y, layer);  // mixed, in one product
  std::cout << "mixed    " << y.transpose() << "\n";

  y.noalias() = W * x;  // or beside a product of your own
  lora::apply(x, y, layer);
  std::cout << "applied  " << y.transpose() << "\n";

  matrix merged = W;
  lora::merge(merged, layer);  // or in one weight
  y.noalias() = merged * x;
  std::cout << "merged   " << y.transpose() << "\n";

  lora::unmerge(merged, layer);
  std::cout << "unmerged "
            << ((merged - W).norm() < 1e-5F ? "the base, within rounding" : "something else")
            << "\n";
}
