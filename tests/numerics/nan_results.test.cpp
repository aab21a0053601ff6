// SPDX-License-Identifier: Apache-2.0
//
// Results that are NaN: the same of them are NaN whatever stands beside a token, and all other
// results have the same bits. The sign and the payload of a NaN are not promised.
#include <cstdint>
#include <vector>

#include "lora/lora.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

namespace {

using lora::index_t;

template <class T>
bool is_nan(const T& v) {
  return test::value(v) != test::value(v);
}

/// Numbers, and a NaN of some sign and payload in every fifth row.
template <class T>
test::matrix<T> with_nan(test::random& g, index_t rows, index_t cols) {
  auto m = g.reals<T>(rows, cols, 2);
  for (index_t i = 0; i < rows; i += 5) {
    const auto payload = static_cast<std::uint16_t>(g.integer(1, 63) | (g.one_in(2) ? 0x8000 : 0));
    if constexpr (sizeof(T) == 2)
      m(i, g.integer(0, cols - 1)) = std::bit_cast<T>(static_cast<std::uint16_t>(
          payload | (std::is_same_v<T, lora::bfloat16> ? 0x7fc0 : 0x7e00)));
    else
      m(i, g.integer(0, cols - 1)) =
          static_cast<T>(lora::bfloat16::from_bits(static_cast<std::uint16_t>(payload | 0x7fc0)));
  }
  return m;
}

template <class T>
bool same_but_nan(const test::matrix<T>& a, const test::matrix<T>& b) {
  for (index_t k = 0; k < a.size(); ++k) {
    if (is_nan(a.data()[k]) != is_nan(b.data()[k])) return false;
    if (!is_nan(a.data()[k]) && std::memcmp(a.data() + k, b.data() + k, sizeof(T)) != 0)
      return false;
  }
  return true;
}

}  // namespace

TEMPLATE_TEST_CASE(
    "a token's results do not depend on the tokens beside it, but for the bits of a NaN",
    "[forward][nan]", float, double, lora::bfloat16) {
  using T = TestType;
  test::random g(20261207);
  const index_t out = 37, in = 19, tokens = 23;
  const auto W = with_nan<T>(g, out, in);
  const test::matrix<T> x = with_nan<T>(g, tokens, in).transpose();
  const lora::adapter<T> l{g.reals<T>(3, in, 1), with_nan<T>(g, out, 3), {.alpha = 1.2}};
  CAPTURE(g.seed());
  test::matrix<T> all(out, tokens), panels(out, tokens);
  lora::forward(W, x, all, l);
  lora::forward(lora::packed_weight<T>{W}, x, panels, l);
  CHECK(same_but_nan(all, panels));
  bool some = false, others = false;
  for (index_t k = 0; k < all.size(); ++k) (is_nan(all.data()[k]) ? some : others) = true;
  CHECK((some && others));
  for (index_t count = 1; count < tokens; count += 3)
    for (index_t first = 0; first + count <= tokens; first += count) {
      const test::matrix<T> few = x.middleCols(first, count), want = all.middleCols(first, count);
      test::matrix<T> y(out, count);
      lora::forward(W, few, y, l);
      CHECK(same_but_nan(y, want));
    }
}
