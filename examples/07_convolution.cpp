// SPDX-License-Identifier: Apache-2.0
// An adapter of a convolution: merged into the kernel, and mixed in through the caller's own
// convolution.
#include <iostream>
#include <vector>

#include "lora/lora.hpp"
#include "lora/through.hpp"

namespace {

using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
constexpr int channels = 2, width = 6, taps = 3, stride = 2;
constexpr int positions = (width - taps) / stride + 1;

/// The engine's convolution: kernel rows x (channels * taps), image channels x width.
template <class Kernel>
matrix convolve(const Kernel& kernel, const matrix& image) {
  matrix out = matrix::Zero(kernel.rows(), positions);
  for (int o = 0; o < kernel.rows(); ++o)
    for (int p = 0; p < positions; ++p)
      for (int c = 0; c < channels; ++c)
        for (int k = 0; k < taps; ++k)
          out(o, p) += kernel(o, c * taps + k) * image(c, p * stride + k);
  return out;
}

}  // namespace

int main() {
  // A Conv1d weight [out, channels, taps] is out x (channels * taps); lora_A has the same kernel,
  // lora_B is 1 x 1.
  const matrix W{{1, 0, -1, 2, 0, 1}, {0, 1, 0, 1, -1, 0}, {2, 2, 0, 0, 1, 1}};
  const lora::adapter<float> style{
      matrix{{1, 2, 0, 0, -1, 1}}, matrix{{0.5F}, {-1}, {0.25F}}, {.alpha = 2}};
  const matrix image{{1, 2, 3, 4, 5, 6}, {0, 1, 0, 2, 0, 3}};

  matrix y = convolve(W, image);  // the base's, however the engine does it
  lora::apply_through([&](const auto& lora_A) { return convolve(lora_A, image); }, y, style);
  std::cout << "mixed\n" << y << "\n";

  matrix kernel = W;
  lora::merge(kernel, style);  // the same, as one kernel
  std::cout << "merged\n" << convolve(kernel, image) << "\n";
}
