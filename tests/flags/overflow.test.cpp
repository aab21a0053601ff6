// SPDX-License-Identifier: Apache-2.0
//
// An element that overflows is seen under -ffast-math, too, where a compiler may sum terms in
// another order: here the largest number plus itself, beside a delta that takes as much away; and a
// factor that is infinite or NaN.
#include <limits>

#include "lora/lora.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

namespace {

/// W is the largest number at (at, at), where as much is added; the neighbour in `down` (the next
/// output) or in the same row (the next input) loses as much.
template <class T>
void overflows_beside_its_opposite(lora::index_t at, bool down) {
  constexpr T largest = std::numeric_limits<T>::max();
  test::matrix<T> W = test::matrix<T>::Zero(32, 64), A = test::matrix<T>::Zero(1, 64),
                  B = test::matrix<T>::Zero(32, 1);
  W(at, at) = largest;
  A(0, at) = 1;
  B(at, 0) = largest / 4;
  if (down)
    B(at + 1, 0) = -largest / 4;
  else
    A(0, at + 1) = -1;
  const lora::adapter<T> l{A, B, {.alpha = 4}};  // s = 4, exactly
  const test::matrix<T> before = W;
  lora::packed_weight<T> panels{W};
  CHECK_THROWS_AS(lora::merge_checked(W, l), lora::value_error);
  CHECK_THROWS_AS(lora::merge_checked(panels, l), lora::value_error);
  CHECK(W == before);
  CHECK(lora::merge(W, l).became_nonfinite == 1);
  CHECK(lora::merge(panels, l).became_nonfinite == 1);
}

}  // namespace

TEMPLATE_TEST_CASE("an overflow is seen whatever lies beside it", "[merge][flags]", float, double) {
  for (const lora::index_t at : {0, 28})  // the first and the second vector of a tile
    for (const bool down : {true, false}) overflows_beside_its_opposite<TestType>(at, down);
}

TEMPLATE_TEST_CASE("a factor that is not finite is seen", "[merge][flags]", float, lora::float16,
                   lora::bfloat16) {
  const auto check = [](auto factor, float value) {
    using F = decltype(factor);
    test::matrix<TestType> W =
        test::matrix<TestType>::Constant(32, 64, test::stored<TestType>(0.5));
    test::matrix<F> A = test::matrix<F>::Constant(4, 64, F(0.5F));
    A(1, 9) = F(value);
    const lora::adapter<F> l{A, test::matrix<F>::Constant(32, 4, F(0.25F)), {.alpha = 2}};
    lora::packed_weight<TestType> panels{W};
    CHECK_THROWS_AS(lora::merge_checked(W, l), lora::value_error);
    CHECK_THROWS_AS(lora::merge_checked(panels, l), lora::value_error);
    CHECK(lora::merge(W, l).became_nonfinite == 32);
    CHECK(lora::merge(panels, l).became_nonfinite == 32);
  };
  for (const float value :
       {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    check(0.0F, value);
    check(lora::bfloat16(), value);
  }
}
