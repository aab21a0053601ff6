// SPDX-License-Identifier: Apache-2.0
//
// Rows of an embedding, convolutions through the caller's, and the parts that initializations take
// out of a base: on whole numbers, where no step rounds, bit for bit against the definition.
#include "lora/embed.hpp"

#include "lora/merge.hpp"
#include "lora/residual.hpp"
#include "lora/through.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/refused.hpp"

namespace {

using lora::index_t;

template <class T>
test::matrix<T> drawn(index_t rows, index_t cols, unsigned seed) {
  test::matrix<T> m(rows, cols);
  unsigned state = seed * 2654435761u + 1;
  for (index_t k = 0; k < m.size(); ++k) {
    state = state * 1664525u + 1013904223u;
    m.data()[k] = test::stored<T>(static_cast<double>((state >> 20) % 9) - 4);
  }
  return m;
}

}  // namespace

TEMPLATE_TEST_CASE("rows of a mixed embedding are rows of the merged one", "[rows]", float, double,
                   lora::float16, lora::bfloat16) {
  using T = TestType;
  const index_t vocabulary = 11, features = 5;
  auto W = drawn<T>(vocabulary, features, 1);
  const lora::adapter<float> a(drawn<float>(3, vocabulary, 2), drawn<float>(features, 3, 3),
                               {.alpha = 3});
  const lora::adapter<T> b(drawn<T>(2, vocabulary, 4), drawn<T>(features, 2, 5), {.alpha = 4});
  std::vector<std::int64_t> ids{10, 0, 3, 3, 10};
  for (int k = 0; k < 600; ++k) ids.push_back(k % vocabulary);  // more than one block of tokens
  const auto tokens = static_cast<index_t>(ids.size());
  test::matrix<T> y(features, tokens), plain(features, tokens), merged_rows(features, tokens);
  lora::embed(W, ids, plain);
  for (index_t t = 0; t < tokens; ++t)
    for (index_t i = 0; i < features; ++i)
      REQUIRE(test::value(plain(i, t)) == test::value(W(ids[static_cast<std::size_t>(t)], i)));
  lora::embed(lora::scaled_embedding(W, 0.5), ids, y, a, lora::scaled(-0.5, b));
  lora::merge(W.transpose(), a, lora::scaled(-0.5, b));
  lora::embed(lora::scaled_embedding(W, 0.5), ids, merged_rows);
  // The numbers stay below 2^8 and are halves: exact in every format but bfloat16, whose steps are
  // then at most 1.
  if constexpr (std::is_same_v<T, lora::bfloat16>)
    for (index_t k = 0; k < y.size(); ++k)
      CHECK(std::abs(test::value(y.data()[k]) - test::value(merged_rows.data()[k])) <= 1);
  else
    CHECK(test::same_bits(y, merged_rows));
}

TEST_CASE("rows refuse what is not there, and write nothing", "[rows]") {
  const auto W = drawn<float>(4, 3, 1);
  const lora::adapter<float> l(drawn<float>(2, 4, 2), drawn<float>(3, 2, 3), {.alpha = 2});
  test::matrix<float> y = test::matrix<float>::Constant(3, 2, 7);
  const auto untouched = y;
  using test::mentions;
  using test::refusal;
  const auto value = [&](const auto& act) { return refusal<lora::value_error>(act); };
  const auto shape = [&](const auto& act) { return refusal<lora::shape_error>(act); };
  CHECK(mentions(value([&] {
                   lora::embed(W, std::vector<int>{0, 4}, y, l);
                 }),
                 {"token 1", "id 4", "4 of the embedding"}));
  CHECK(mentions(value([&] { lora::embed(W, std::vector<int>{-1, 0}, y); }), {"token 0", "-1"}));
  CHECK(mentions(value([&] {
                   lora::embed(W, std::vector<std::uint64_t>{~0ull, 0}, y);
                 }),
                 {"token 0"}));
  CHECK(mentions(shape([&] { lora::embed(W, std::vector<int>{0}, y, l); }), {"features x tokens"}));
  const lora::adapter<float> wrong(drawn<float>(2, 3, 2), drawn<float>(4, 2, 3), {.alpha = 2});
  CHECK(mentions(shape([&] {
                   lora::embed(W, std::vector<int>{0, 1}, y, wrong);
                 }),
                 {"delta weight"}));
  CHECK_THROWS_AS(lora::scaled_embedding(W, std::numeric_limits<double>::infinity()),
                  lora::value_error);
  CHECK(test::same_bits(y, untouched));
  CHECK_THROWS_AS(lora::replaced_rows<float>({1, 1}, drawn<float>(2, 3, 1)), lora::value_error);
  CHECK_THROWS_AS(lora::replaced_rows<float>({-1}, drawn<float>(1, 3, 1)), lora::value_error);
  CHECK_THROWS_AS(lora::replaced_rows<float>({1}, drawn<float>(2, 3, 1)), lora::shape_error);
  test::matrix<float> empty(3, 0);
  CHECK_NOTHROW(lora::embed(W, std::vector<int>{}, empty, l));
}

TEST_CASE("a scaling that float does not hold multiplies in double", "[rows][through]") {
  const test::matrix<float> W = test::matrix<float>::Ones(1, 1), A = W;
  const std::vector<int> ids{0};
  for (const double s : {1e39, 1e-39}) {
    CAPTURE(s);
    const test::matrix<float> B =
        test::matrix<float>::Constant(1, 1, static_cast<float>(0.125 / s));
    const lora::adapter<float> l{A, B, {.alpha = s, .rule = lora::scaling_rule::fixed}};
    test::matrix<float> merged = W, y(1, 1), through = W;
    lora::merge(merged, l);
    lora::embed(W, ids, y, l);
    lora::apply_through(
        [](const auto& a) { return test::matrix<float>::Constant(1, 1, a(0, 0)).eval(); }, through,
        l);
    CHECK(y(0, 0) == merged(0, 0));
    CHECK(through(0, 0) == merged(0, 0));
  }
}

TEST_CASE("an adapter through the caller's product is apply", "[through]") {
  const auto x = drawn<float>(6, 700, 1);
  const lora::adapter<float> a(drawn<float>(2, 6, 2), drawn<float>(5, 2, 3), {.alpha = 2});
  const lora::adapter<float> b(drawn<float>(3, 6, 4), drawn<float>(5, 3, 5), {.alpha = 6});
  test::matrix<float> y = drawn<float>(5, 700, 6), want = y;
  int calls = 0;
  const auto down = [&](const auto& lora_A) {
    ++calls;
    test::matrix<float> U(lora_A.rows(), 700);
    lora::forward(lora_A, x, U);
    return U;
  };
  lora::apply_through(down, y, a, lora::scaled(0.5, b), lora::scaled(0, b));
  lora::apply(x, want, a, lora::scaled(0.5, b));
  CHECK(test::same_bits(y, want));  // whole numbers and halves
  CHECK(calls == 2);                // an adapter at 0 is not read
  const auto untouched = y;
  CHECK_THROWS_AS(
      lora::apply_through([](const auto&) { return test::matrix<float>(1, 700); }, y, a),
      lora::shape_error);
  const lora::adapter<float> wrong(drawn<float>(2, 6, 2), drawn<float>(4, 2, 3), {.alpha = 2});
  CHECK_THROWS_AS(lora::apply_through(down, y, wrong), lora::shape_error);
  CHECK(test::same_bits(y, untouched));
}

TEST_CASE("parts of a base without elements are empty", "[residual]") {
  for (const auto& [out, in] :
       std::vector<std::array<index_t, 2>>{{0, 3}, {3, 0}, {0, 0}, {20, 0}}) {
    CAPTURE(out, in);
    const Eigen::MatrixXf W(out, in);
    for (const auto& part : {lora::principal_part(W, 0), lora::smallest_part(W, 0)}) {
      CHECK((part.B.rows() == out && part.B.cols() == 0));
      CHECK((part.A.rows() == 0 && part.A.cols() == in));
    }
  }
}

TEST_CASE("the parts of a base add up to it", "[residual]") {
  for (const auto& [rows, cols] :
       std::vector<std::pair<index_t, index_t>>{{6, 4}, {4, 6}, {5, 5}, {1, 3}}) {
    const auto W = drawn<float>(rows, cols, static_cast<unsigned>(rows * 7 + cols));
    const Eigen::MatrixXd exact = W.cast<double>();
    const index_t k = std::min(rows, cols);
    for (index_t r = 0; r <= k; ++r) {
      const auto top = lora::principal_part(W, r), rest = lora::smallest_part(W, k - r);
      CHECK((top.B * top.A + rest.B * rest.A - exact).norm() < 1e-13 * (exact.norm() + 1));
      CHECK((top.B * top.A).norm() >=
            0.999999 * std::sqrt(static_cast<double>(r) / static_cast<double>(k)) * exact.norm() -
                1e-12);
      const auto leading = lora::leading_part(W, r);
      // A projection: its first r columns are W's, and what is left is orthogonal to them.
      CHECK((leading.B * leading.A - exact).leftCols(r).norm() < 1e-13 * (exact.norm() + 1));
      CHECK((exact.leftCols(r).transpose() * (exact - leading.B * leading.A)).norm() <
            1e-12 * (exact.squaredNorm() + 1));
    }
    CHECK_THROWS_AS(lora::principal_part(W, k + 1), lora::value_error);
    CHECK_THROWS_AS(lora::smallest_part(W, -1), lora::value_error);
  }
  auto W = drawn<float>(3, 3, 1);
  W(1, 1) = std::numeric_limits<float>::quiet_NaN();
  CHECK_THROWS_AS(lora::leading_part(W, 1), lora::value_error);
}
