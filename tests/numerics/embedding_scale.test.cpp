// SPDX-License-Identifier: Apache-2.0
//
// An embedding's constant c multiplies as the number it is, also where float does not hold it or
// the product would underflow on the way; an ordinary c multiplies in the accumulator. Trained rows
// that W cannot hold are reported.
#include <cmath>
#include <vector>

#include "lora/dora.hpp"
#include "lora/embed.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

namespace {

const std::vector<int> ids{0};

template <class T>
test::matrix<T> one(double value) {
  return test::matrix<T>::Constant(1, 1, test::stored<T>(value));
}
/// c * w, by rows, by rows of a DoRA, and by a replaced row.
template <class T, class Y>
void check(double c, double w, double want) {
  CAPTURE(c, w);
  const auto W = one<T>(w);
  test::matrix<Y> y(1, 1);
  lora::embed(lora::scaled_embedding(W, c), ids, y);
  CHECK(test::value(y(0, 0)) == want);
  const test::matrix<T> turned = W.transpose();
  lora::embed(lora::scaled_embedding(W, c), ids, y, lora::mixed(turned));
  CHECK(test::value(y(0, 0)) == want);
  lora::overwrite_rows(ids, y, lora::replaced_rows<T>({0}, W), c);
  CHECK(test::value(y(0, 0)) == want);
}

}  // namespace

TEST_CASE("a constant that float does not hold multiplies in double", "[rows][scale]") {
  check<float, float>(0x1p-160, 0x1p100, 0x1p-60);
  check<float, float>(0x1p130, 0x1p-100, 0x1p30);
  check<float, float>(-0x1.8p-130, 0x1p100, -0x1.8p-30);
  check<float, lora::bfloat16>(0x1p-160, 0x1p100, 0x1p-60);
  check<lora::bfloat16, float>(0x1p140, -0x1p-120, -0x1p20);
  check<lora::float16, float>(0x1p-140, 0x1p10, 0x1p-130);
  check<double, double>(0x1p-1050, 0x1p1000, 0x1p-50);
  check<float, float>(0, 3, 0);
}

TEST_CASE("a result below the normal range is off by half a step", "[rows][scale]") {
  check<float, float>(1.5, 0x1p-140, 0x1.8p-140);
  check<float, float>(0x1p-100, 0x1p-48, 0x1p-148);
  check<float, float>(0x1p-100, 0x1p-51, 0);
}

TEST_CASE("an ordinary constant keeps the bits of a product in float", "[rows][scale]") {
  test::random g(20261204);
  for (int k = 0; k < 500; ++k) {
    CAPTURE(g.seed(), k);
    const double c = std::exp2(g.uniform(-120, 120));
    const auto W = g.reals<float>(1, 1, 4);
    test::matrix<float> y(1, 1);
    lora::embed(lora::scaled_embedding(W, c), ids, y);
    CHECK(y(0, 0) == W(0, 0) * static_cast<float>(c));
  }
}

TEST_CASE("a constant that is no number is refused", "[rows][scale]") {
  test::matrix<float> y = one<float>(7);
  const lora::replaced_rows<float> trained({0}, one<float>(2));
  CHECK_THROWS_AS(lora::overwrite_rows(ids, y, trained, std::numeric_limits<double>::infinity()),
                  lora::value_error);
  CHECK(y(0, 0) == 7);
}

TEST_CASE("a trained row that the weight cannot hold is reported", "[rows][report]") {
  test::matrix<float> values(2, 3);
  values << 1, 70000, -3, 65519, 65520, std::numeric_limits<float>::infinity();
  const lora::replaced_rows<float> trained({3, 1}, values);
  test::matrix<lora::float16> W = test::matrix<float>::Constant(4, 3, 2).cast<lora::float16>();
  CHECK(lora::assign_rows(W, trained).became_nonfinite == 3);
  CHECK(static_cast<float>(W(1, 0)) == 65504);
  CHECK(lora::assign_rows(W, trained).became_nonfinite == 0);  // they were infinite before
  test::matrix<float> wide = test::matrix<float>::Ones(4, 3);
  CHECK(lora::assign_rows(wide, trained).became_nonfinite == 1);
}
