// SPDX-License-Identifier: Apache-2.0
//
// any_kind outlives what it was made from: scaled(w, l) looks at an adapter, and an any_kind made
// of it kept the look, so that a function that returned one gave a dangling adapter.
#include "lora/any_kind.hpp"

#include "lora/dora.hpp"
#include "lora/kinds/oft.hpp"
#include "lora/lora.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refused.hpp"

namespace {

using lora::index_t;

template <class T>
lora::adapter<T> low_rank(test::random& g, index_t out, index_t in) {
  return {g.reals<T>(3, in, 1), g.reals<T>(out, 3, 1), {.alpha = 5}};
}
lora::any_kind made_and_gone(test::random& g) {
  const lora::dora_adapter<float> gone(low_rank<float>(g, 7, 5), std::vector<float>(7, 1.5F));
  return lora::scaled(0.5, gone);
}

}  // namespace

TEST_CASE("an any_kind of a scaled adapter owns the adapter", "[any_kind]") {
  test::random g(31), again(31);
  const lora::any_kind kept = made_and_gone(g);
  const lora::dora_adapter<float> same(low_rank<float>(again, 7, 5), std::vector<float>(7, 1.5F));
  const test::matrix<float> W = g.reals<float>(7, 5, 1);
  CHECK(test::same_bits(test::matrix<float>(lora::merged(W, kept)),
                        test::matrix<float>(lora::merged(W, lora::scaled(0.5, same)))));
  CHECK(test::same_bits(test::matrix<float>(lora::merged(W, lora::scaled(-2, kept))),
                        test::matrix<float>(lora::merged(W, lora::scaled(-1, same)))));
}

TEST_CASE("an any_kind merges and mixes as what is in it", "[any_kind]") {
  test::random g(32);
  const auto l = low_rank<lora::bfloat16>(g, 6, 9);
  const lora::any_kind any = l;
  const test::matrix<lora::bfloat16> W = g.reals<lora::bfloat16>(6, 9, 1);
  CHECK(test::same_bits(test::matrix<lora::bfloat16>(lora::merged(W, any, lora::scaled(0.25, any))),
                        test::matrix<lora::bfloat16>(lora::merged(W, l, lora::scaled(0.25, l)))));
  const test::matrix<float> x = g.reals<float>(9, 4, 1);
  test::matrix<float> y(6, 4), want(6, 4);
  lora::forward(W, x, y, any);
  lora::forward(W, x, want, l);
  CHECK(test::same_bits(y, want));
  CHECK(any.get_if<lora::dora_adapter<float>>() == nullptr);
  CHECK_THROWS_AS(lora::merge(y, any), lora::shape_error);
}

TEST_CASE("double that only the run time knows is accumulated in double, or refused",
          "[any_kind]") {
  test::random g(33);
  const auto l = low_rank<double>(g, 6, 9);
  const lora::any_kind any = l;
  CHECK(any.holds_double());
  test::matrix<float> W = g.reals<float>(6, 9, 1), want = W;
  lora::merge(W, any);
  lora::merge(want, l);
  CHECK(test::same_bits(W, want));
  const test::matrix<float> x = g.reals<float>(9, 4, 1);
  test::matrix<float> y = test::matrix<float>::Constant(6, 4, 7);
  CHECK(test::mentions(test::refusal<lora::value_error>([&] { lora::forward(W, x, y, any); }),
                       {"forward", "mixed<double>"}));
  CHECK(y == test::matrix<float>::Constant(6, 4, 7));
  lora::forward(W, x, y, lora::mixed<double>(W, any));
  CHECK(y.allFinite());
}
