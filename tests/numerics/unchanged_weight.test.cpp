// SPDX-License-Identifier: Apache-2.0
//
// A merge whose products are all zero changes no bit of a weight: normal and subnormal numbers,
// zeros and infinities of either sign. Under -ffast-math, too, whose start-up code makes the
// program flush subnormal numbers; but for the sign of zero there.
#include <cstdint>
#include <vector>

#include "lora/linear.hpp"
#include "lora/lora.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

namespace {

using lora::index_t;

#if defined(__FAST_MATH__)
constexpr bool keeps_sign_of_zero = false;
#else
constexpr bool keeps_sign_of_zero = true;
#endif

template <class T>
using bits_of =
    std::conditional_t<sizeof(T) == 2, std::uint16_t,
                       std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>>;

/// Random bits, a third of them subnormal, and the ends of every range.
template <class T>
test::matrix<T> any_numbers(test::random& g, index_t rows, index_t cols) {
  using bits = bits_of<T>;
  constexpr int digits = std::numeric_limits<T>::digits - 1;
  constexpr bits sign = static_cast<bits>(bits(1) << (8 * sizeof(T) - 1)),
                 fraction = static_cast<bits>((bits(1) << digits) - 1);
  constexpr bits infinity =
      static_cast<bits>(static_cast<bits>(~sign) & static_cast<bits>(~fraction));
  const std::vector<bits> ends{
      0, 1, fraction, static_cast<bits>(fraction + 1), static_cast<bits>(infinity - 1), infinity};
  test::matrix<T> m(rows, cols);
  for (index_t k = 0; k < m.size(); ++k) {
    auto value = static_cast<bits>(g.bits());
    if (k % 3 == 0) value = static_cast<bits>(value & (sign | fraction));
    if (k % 5 == 0)
      value = static_cast<bits>((value & sign) | ends[static_cast<std::size_t>(g.integer(0, 5))]);
    if (static_cast<bits>(value & infinity) == infinity)
      value = static_cast<bits>(value & (sign | infinity));  // no NaN
    if (!keeps_sign_of_zero && static_cast<bits>(value << 1) == 0) value = 0;
    m.data()[k] = std::bit_cast<T>(value);
  }
  return m;
}

}  // namespace

TEMPLATE_TEST_CASE("a merge of nothing keeps the bits of a weight", "[merge][flags]", float, double,
                   lora::float16, lora::bfloat16) {
  using T = TestType;
  test::random g(20261206);
  for (const auto& [out, in] :
       std::vector<std::array<index_t, 2>>{{1, 1}, {33, 70}, {64, 64}, {130, 37}}) {
    CAPTURE(g.seed(), out, in);
    const auto W = any_numbers<T>(g, out, in);
    const lora::adapter<float> a{
        g.reals<float>(3, in, 1), test::matrix<float>::Zero(out, 3).eval(), {.alpha = 0.7}};
    const lora::adapter<T> b{
        test::matrix<T>::Constant(5, in, T(0.0F)).eval(), g.reals<T>(out, 5, 1), {.alpha = -2}};
    auto merged = W;
    test::col_matrix<T> turned = W;
    lora::merge(merged, a, b);
    lora::merge(turned, a, b);
    CHECK(test::same_bits(merged, W));
    CHECK(test::bytes(turned) == test::bytes(W));
    lora::unmerge(merged, b, lora::scaled(0.3, a));
    CHECK(test::same_bits(merged, W));
    CHECK(test::same_bits(lora::merged(W, a), W));
    lora::linear<T> layer{W};
    layer.attach("a", a);
    layer.merge();
    CHECK(test::same_bits(layer.weight(), W));
  }
}
