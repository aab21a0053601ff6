// SPDX-License-Identifier: Apache-2.0
//
// Objects that a program can put together wrongly refuse it: no verb reads past the end of one of
// their parts.
#include <vector>

#include "lora/dora.hpp"
#include "lora/lora.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/refused.hpp"

namespace {

lora::adapter<float> adapter(lora::index_t out, lora::index_t in) {
  return {test::matrix<float>::Constant(2, in, 0.5F),
          test::matrix<float>::Constant(out, 2, 0.25F),
          {.alpha = 3}};
}

}  // namespace

TEST_CASE("a form refuses steps that do not fit", "[mixed][invariant]") {
  const auto form = [](lora::index_t out, const std::vector<lora::adapter<float>>& adapters,
                       lora::index_t in) {
    std::vector<lora::step<float>> steps{lora::gain_step<float>{std::vector<float>(3, 1.0F)}};
    for (const auto& l : adapters)
      steps.push_back(lora::low_rank_step{lora::any_factors::copy_of(l)});
    return lora::mixed_form<float>("mixed", out, in, steps);
  };
  CHECK_NOTHROW((void)form(3, {adapter(3, 4), adapter(3, 4)}, 4));
  CHECK_THROWS_AS((void)form(3, {adapter(3, 4), adapter(2, 4)}, 4), lora::shape_error);
  CHECK_THROWS_AS((void)form(3, {adapter(3, 5)}, 4), lora::shape_error);
  CHECK_THROWS_AS((void)form(2, {adapter(2, 4)}, 4), lora::shape_error);
  CHECK_THROWS_AS((void)form(3, {}, -1), lora::shape_error);
}

TEST_CASE("a form takes its adapters at their scaling", "[mixed][invariant]") {
  const auto form = lora::mixed(3, 4, adapter(3, 4));
  test::matrix<float> W = test::matrix<float>::Constant(3, 4, 2), want = W;
  lora::merge(W, form);
  lora::merge(want, adapter(3, 4));
  CHECK(W == want);  // numbers that no step rounds
}

TEST_CASE("verbs of a form without adapters check their operands", "[mixed][invariant]") {
  const auto form = lora::mixed(3, 4);
  test::matrix<float> y = test::matrix<float>::Ones(3, 2), tall = test::matrix<float>::Ones(5, 2);
  const test::matrix<float> W = test::matrix<float>::Ones(3, 4),
                            x = test::matrix<float>::Ones(4, 2);
  CHECK_THROWS_AS(lora::apply(x, tall, form), lora::shape_error);
  CHECK_THROWS_AS(lora::apply(tall, y, form), lora::shape_error);
  CHECK_THROWS_AS(lora::forward(W, tall, y, form), lora::shape_error);
  CHECK_THROWS_AS(lora::forward(W, x, tall, form), lora::shape_error);
  CHECK(y == test::matrix<float>::Ones(3, 2));
}

TEST_CASE("a bias that was put beside a weight by hand is checked", "[forward][invariant]") {
  const test::matrix<float> W = test::matrix<float>::Ones(3, 4),
                            x = test::matrix<float>::Ones(4, 2);
  const std::vector<float> b(2);
  auto good = lora::with_bias(W, std::vector<float>(3));
  good.bias = lora::col_major(b, 2, 1);
  test::matrix<float> y = test::matrix<float>::Ones(3, 2);
  CHECK_THROWS_AS(lora::forward(good, x, y), lora::shape_error);
  CHECK_THROWS_AS(lora::linear<float>(good), lora::shape_error);
  CHECK_THROWS_AS(lora::forward(good, x, y, lora::mixed(W, adapter(3, 4))), lora::shape_error);
  CHECK(y == test::matrix<float>::Ones(3, 2));
}

TEST_CASE("a packed weight that changed after its bias was checked is refused",
          "[forward][invariant]") {
  const test::matrix<float> W = test::matrix<float>::Ones(3, 4),
                            x = test::matrix<float>::Ones(4, 2);
  lora::packed_weight<float> packed{W};
  const std::vector<float> b(3);
  const auto layer = lora::with_bias(packed, b);
  packed = lora::packed_weight<float>(5, 4);
  test::matrix<float> y = test::matrix<float>::Ones(5, 2);
  CHECK_THROWS_AS(lora::forward(layer, x, y), lora::shape_error);
}

TEST_CASE("a strength on a packed adapter is a finite number", "[packed][invariant]") {
  const lora::packed_adapter<float> packed{adapter(3, 4)};
  CHECK_THROWS_AS(
      lora::scaled_packed_adapter<float>(std::numeric_limits<double>::infinity(), packed),
      lora::value_error);
  CHECK_THROWS_AS((void)lora::scaled(std::numeric_limits<double>::max(), lora::scaled(2, packed)),
                  lora::value_error);
  CHECK(lora::scaled(0.5, lora::scaled(0.5, packed)).scaling() == 0.375);
}
