// SPDX-License-Identifier: Apache-2.0
//
// The bounds of embed, overwrite_rows and apply_through: they hold against long double, a
// mistake exceeds them, and a copy has none.
#include "lora/embed_bounds.hpp"

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/within_bound.hpp"

namespace {

using lora::bfloat16;
using lora::float16;
using lora::index_t;
using test::exact_matrix;
using test::within;

constexpr std::uint64_t seed = 20261203;

template <class F>
lora::adapter<F> adapter(test::random& g, index_t out, index_t in) {
  const index_t rank = g.integer(1, g.one_in(3) ? 2 * std::max(out, in) : 6);
  return {g.reals<F>(rank, in, 0.3),
          g.reals<F>(out, rank, 0.3),
          {.alpha = g.uniform(0.2, 3), .rule = lora::scaling_rule::fixed}};
}

}  // namespace

TEMPLATE_TEST_CASE("rows are within their bound, with a constant and without", "", float, double,
                   bfloat16, float16) {
  test::random g(seed);
  CAPTURE(g.seed());
  using F = std::conditional_t<std::is_same_v<TestType, double>, double, float>;
  for (int n = 0; n < 60; ++n) {
    const index_t vocabulary = g.integer(1, 30), features = g.integer(1, 20);
    const auto W = g.reals<TestType>(vocabulary, features, 1);
    const std::vector<index_t> ids{g.integer(0, vocabulary - 1), g.integer(0, vocabulary - 1)};
    const auto l = adapter<F>(g, features, vocabulary), other = adapter<F>(g, features, vocabulary);
    const double c = g.uniform(-9, 9);
    const exact_matrix merged =
        test::exact(W).transpose() + test::exact_delta(l) + test::exact_delta(other);
    exact_matrix want(features, 2);
    for (index_t t = 0; t < 2; ++t) want.col(t) = merged.col(ids[static_cast<std::size_t>(t)]);
    test::matrix<TestType> y(features, 2);
    lora::embed(W, ids, y, l, other);
    CHECK(within(y, want, lora::embed_bound(W, ids, y, l, other)));
    lora::embed(lora::scaled_embedding(W, c), ids, y, l, other);
    want *= static_cast<long double>(c);
    CHECK(within(y, want, lora::embed_bound(lora::scaled_embedding(W, c), ids, y, l, other)));
    CHECK_FALSE(
        within(y, want * 1.05L, lora::embed_bound(lora::scaled_embedding(W, c), ids, y, l, other)));
  }
}

TEST_CASE("a row that is copied has no error") {
  test::random g(seed);
  const auto W = g.reals<bfloat16>(7, 5, 1);
  const std::vector<int> ids{6, 0};
  const test::matrix<bfloat16> same(5, 2);
  const test::matrix<float> wider(5, 2);
  const test::matrix<float16> other(5, 2);
  CHECK(lora::embed_bound(W, ids, same).isZero(0));
  CHECK(lora::embed_bound(W, ids, wider).isZero(0));
  CHECK(lora::embed_bound(W, ids, other).maxCoeff() > 0);
  CHECK(lora::embed_bound(lora::scaled_embedding(W, 3), ids, same).maxCoeff() > 0);
}

TEST_CASE("replaced rows are within their bound, and other columns have none") {
  test::random g(seed);
  const lora::replaced_rows<float> replaced({2, 5}, g.reals<float>(2, 6, 1));
  const std::vector<int> ids{5, 1, 2};
  for (const double c : {1.0, 0.3}) {
    test::matrix<float16> y = g.reals<float16>(6, 3, 1);
    exact_matrix want = test::exact(y);
    want.col(0) = static_cast<long double>(c) * test::exact(replaced.values()).row(1).transpose();
    want.col(2) = static_cast<long double>(c) * test::exact(replaced.values()).row(0).transpose();
    const auto bound = lora::overwrite_rows_bound(ids, y, replaced, c);
    lora::overwrite_rows(ids, y, replaced, c);
    CHECK(within(y, want, bound));
    CHECK(bound.col(1).isZero(0));
    CHECK(bound.col(0).minCoeff() > 0);
    CHECK(bound.maxCoeff() < 1e-3);
  }
}

TEMPLATE_TEST_CASE("apply_through is within its bound", "", float, double, bfloat16) {
  test::random g(seed);
  CAPTURE(g.seed());
  using F = std::conditional_t<std::is_same_v<TestType, double>, double, float>;
  for (int n = 0; n < 40; ++n) {
    const index_t out = g.integer(1, 20), in = g.integer(1, 9), positions = g.integer(1, 7);
    const auto l = adapter<F>(g, out, in), other = adapter<F>(g, out, in);
    auto y = g.reals<TestType>(out, positions, 1);
    // What the caller makes of lora_A: whole numbers, without an error of their own.
    test::matrix<F> U;
    const auto down = [&](const auto& lora_A) {
      U.resize(lora_A.rows(), positions);
      for (index_t k = 0; k < U.size(); ++k) U.data()[k] = static_cast<F>(k % 7 - 3);
      return U;
    };
    exact_matrix want = test::exact(y);
    for (const auto* one : {&l, &other})
      want += static_cast<long double>(one->scaling()) *
              test::times(test::exact(one->lora_B()),
                          test::exact(down(lora::as_matrix(one->lora_A()))));
    const auto bound = lora::apply_through_bound(down, y, l, other);
    lora::apply_through(down, y, l, other);
    CHECK(within(y, want, bound));
    CHECK_FALSE(within(y, (want.array() + 0.1L).matrix(), bound));
  }
}
