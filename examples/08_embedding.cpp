// SPDX-License-Identifier: Apache-2.0
// An embedding with an adapter, and one with trained rows: only the rows that are asked for are
// read.
#include <iostream>
#include <vector>

#include "lora/embed.hpp"
#include "lora/lora.hpp"

int main() {
  using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const matrix W{{1, 0}, {0, 1}, {1, 1}, {2, 0}};  // vocabulary x features
  const std::vector<int> ids{3, 1, 3};
  matrix y(2, 3);  // features x tokens

  // lora_embedding_A is rank x vocabulary, lora_embedding_B features x rank.
  const lora::adapter<float> style{matrix{{1, -1, 0, 2}}, matrix{{0.5F}, {1}}, {.alpha = 1}};
  lora::embed(W, ids, y, style);
  std::cout << "mixed\n" << y << "\n";

  matrix merged = W;
  lora::merge(merged.transpose(), style);
  lora::embed(merged, ids, y);
  std::cout << "merged\n" << y << "\n";

  // Trained tokens are values, not differences: the row of token 1 is another.
  const lora::replaced_rows<float> trained({1}, matrix{{7, 8}});
  lora::embed(W, ids, y);
  lora::overwrite_rows(ids, y, trained);
  std::cout << "trained row, base untouched\n" << y << "\n";
}
