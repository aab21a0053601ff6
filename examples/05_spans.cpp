// SPDX-License-Identifier: Apache-2.0
//
// An engine that knows nothing of Eigen: weights, factors and activations are spans, or an mdspan
// of its own. Views cost nothing and copy nothing.
#include <array>
#include <cstdio>
#include <numeric>
#include <span>
#include <vector>

#include "lora/lora.hpp"

namespace engine {

/// What std::mdspan (C++23) or Kokkos' is for two dimensions, as far as the library asks: anything
/// with these members is taken.
template <class T>
struct mdspan {
  struct extents_type {};
  struct layout_type {};
  struct mapping_type {};
  static constexpr std::size_t rank() { return 2; }
  T* data_handle() const { return data; }
  std::size_t extent(std::size_t i) const { return extents[i]; }
  std::size_t stride(std::size_t i) const { return strides[i]; }

  T* data;
  std::array<std::size_t, 2> extents, strides;
};

}  // namespace engine

int main() {
  constexpr int out = 3, in = 4, rank = 2, tokens = 2;
  std::vector<float> weight(out * in), a(rank * in), b(out * rank), x(tokens * in), y(tokens * out);
  std::iota(weight.begin(), weight.end(), 1.0F);
  std::iota(a.begin(), a.end(), -3.0F);
  std::iota(b.begin(), b.end(), -2.0F);
  std::iota(x.begin(), x.end(), 0.0F);

  // Row-major [out, in], [rank, in], [out, rank], as PyTorch keeps them. The adapter looks; it
  // copies nothing.
  const std::span<float> w(weight);
  const lora::adapter_view<float> l{
      lora::row_major(a, rank, in), lora::row_major(b, out, rank), {.alpha = 1}};

  // Activations [tokens, in] are in x tokens, column by column: a token is a column.
  lora::forward(lora::row_major(w, out, in), lora::col_major(x, in, tokens),
                lora::col_major(y, out, tokens), l);
  std::printf("mixed  ");
  for (const float value : y) std::printf(" %g", static_cast<double>(value));

  // The same weight as an mdspan, merged where it lies.
  const engine::mdspan<float> view{weight.data(), {out, in}, {in, 1}};
  lora::merge(lora::row_major(view), l);
  lora::forward(lora::row_major(view), lora::col_major(x, in, tokens),
                lora::col_major(y, out, tokens));
  std::printf("\nmerged ");
  for (const float value : y) std::printf(" %g", static_cast<double>(value));

  // One token is a span by itself, and 16-bit weights are read where they lie.
  std::vector<lora::bfloat16> narrow(weight.begin(), weight.end());
  std::array<float, out> one{};
  lora::forward(lora::row_major(narrow, out, in), std::span(x).first(in), one);
  std::printf("\none    ");
  for (const float value : one) std::printf(" %g", static_cast<double>(value));
  std::printf("\n");
}
