// SPDX-License-Identifier: Apache-2.0
//
// Nothing to do is done: every verb takes no adapters, as an empty range or as no argument, and
// leaves every bit as it was. The numbers have bits that an addition of zero would change: -0, and
// NaN with a payload.
#include <bit>
#include <limits>
#include <string>
#include <vector>

#include "lora/dora.hpp"
#include "lora/embed.hpp"
#include "lora/lora.hpp"
#include "lora/rounding.hpp"
#include "lora/through.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"

namespace {

template <class T>
using matrix = test::matrix<T>;
using columns = Eigen::MatrixXf;

const std::vector<lora::adapter<float>> none;
const std::vector<lora::packed_adapter<float>> none_packed;
const std::vector<lora::dora_adapter<float>> none_dora;

/// rows x cols with -0 and, unless finite, a NaN whose payload is not the usual one.
template <class M>
M delicate(lora::index_t rows, lora::index_t cols, bool finite = false) {
  M m(rows, cols);
  for (lora::index_t i = 0; i < rows; ++i)
    for (lora::index_t j = 0; j < cols; ++j)
      m(i, j) = (i + j) % 2 == 0 ? -0.0F : static_cast<float>(i - 2 * j);
  if (!finite) m(0, 1) = std::bit_cast<float>(0x7fc0'1234u);
  return m;
}

/// What an adapter at strength 0 is: it is not read, so NaN in its factors does no harm.
lora::adapter<float> broken(lora::index_t out, lora::index_t in) {
  const auto nan = std::numeric_limits<float>::quiet_NaN();
  return {matrix<float>::Constant(2, in, nan), matrix<float>::Constant(out, 2, nan), {.alpha = 1}};
}

}  // namespace

TEST_CASE("a merge of nothing changes no bit", "[nothing]") {
  const auto base = delicate<matrix<float>>(3, 4);
  auto W = base;
  const auto l = broken(3, 4);
  const std::vector<lora::scaled_adapter<lora::adapter<float>>> unread{lora::scaled(0, l)};
  lora::workspace space;
  const auto unchanged = [&](const lora::merge_report& report) {
    CHECK(report.became_nonfinite == 0);
    CHECK(test::same_bits(W, base));
  };
  unchanged(lora::merge(W));
  unchanged(lora::merge(W, none));
  unchanged(lora::merge(W, none, none));
  unchanged(lora::merge(space, W, none));
  unchanged(lora::merge(W.transpose(), none));
  unchanged(lora::merge(W, unread));
  unchanged(lora::unmerge(W));
  unchanged(lora::unmerge(W, none));
  unchanged(lora::unmerge(space, W, none));
  unchanged(lora::merge(lora::rounding::as_peft, W));
  unchanged(lora::merge(lora::rounding::as_peft, W, none));
  unchanged(lora::merge(lora::rounding::as_peft_safe, W, none));
  unchanged(lora::unmerge(lora::rounding::as_peft, W, none));
  unchanged(lora::merge(lora::rounding::as_peft, W, unread));
  CHECK(test::same_bits(lora::merged(W), base));
  CHECK(test::same_bits(lora::merged(W, none), base));

  lora::packed_weight packed{base};
  CHECK(lora::merge(packed, none).became_nonfinite == 0);
  CHECK(lora::unmerge(packed, none).became_nonfinite == 0);
  CHECK(test::same_bits(packed.matrix(), base));
  CHECK(test::same_bits(lora::merged(packed, none).matrix(), base));

  matrix<float> empty(0, 0);
  CHECK(lora::merge(empty, none).became_nonfinite == 0);
}

TEST_CASE("a checked merge of nothing changes no bit, and still says what is not finite",
          "[nothing]") {
  const auto base = delicate<matrix<float>>(3, 4, true);
  auto W = base;
  lora::merge_checked(W);
  lora::merge_checked(W, none);
  lora::workspace space;
  lora::merge_checked(space, W, none);
  CHECK(test::same_bits(W, base));
  lora::packed_weight packed{base};
  lora::merge_checked(packed, none);
  CHECK(test::same_bits(packed.matrix(), base));
  W = delicate<matrix<float>>(3, 4);
  CHECK_THROWS_AS(lora::merge_checked(W, none), lora::value_error);
}

TEST_CASE("mixing nothing changes no bit of y, and forward is the base's product", "[nothing]") {
  const auto old = delicate<columns>(3, 5);
  auto y = old;
  const columns x = columns::Ones(4, 5);
  const auto l = broken(3, 4);
  lora::workspace space;
  lora::apply(x, y);
  lora::apply(x, y, none);
  lora::apply(space, x, y, none);
  lora::apply(x, y, none_packed, none);
  lora::apply(x, y, lora::scaled(0, l));
  CHECK(test::same_bits(y, old));
  lora::apply_through([](const auto&) -> columns { throw 1; }, y, none);
  lora::apply_through([](const auto&) -> columns { throw 1; }, y, lora::scaled(0, l));
  CHECK(test::same_bits(y, old));

  const auto W = delicate<matrix<float>>(3, 4, true);
  columns product(3, 5), nothing(3, 5);
  lora::forward(W, x, product);
  lora::forward(W, x, nothing, none);
  CHECK(test::same_bits(nothing, product));
  lora::forward(space, lora::packed_weight{W}, x, nothing, none_packed);
  CHECK(test::same_bits(nothing, product));
  const std::vector<float> bias{1, 2, 3};
  lora::forward(lora::with_bias(W, bias), x, product);
  lora::forward(lora::with_bias(W, bias), x, nothing, none);
  CHECK(test::same_bits(nothing, product));
}

TEST_CASE("rows of an embedding without adapters are those of W, bit for bit", "[nothing]") {
  const auto W = delicate<matrix<float>>(4, 3);
  const std::vector<int> ids{0, 3, 1};
  columns y(3, 3), expected(3, 3);
  for (lora::index_t t = 0; t < 3; ++t)
    expected.col(t) = W.row(ids[static_cast<std::size_t>(t)]).transpose();
  lora::embed(W, ids, y);
  CHECK(test::same_bits(y, expected));
  lora::embed(W, ids, y, none);
  CHECK(test::same_bits(y, expected));
  lora::embed(W, ids, y, lora::mixed(W.transpose(), none));
  CHECK(test::same_bits(y, expected));
  columns no_tokens(3, 0);
  lora::embed(W, std::vector<int>(), no_tokens, none);
}

TEST_CASE("what nothing was attached to stays", "[nothing]") {
  const auto base = delicate<matrix<float>>(3, 4);
  auto W = base;
  for (const auto& layer : {lora::mixed(W), lora::mixed(W, none), lora::mixed(W, none_dora)}) {
    CHECK(layer.changes_nothing());
    CHECK(lora::merge(W, layer).became_nonfinite == 0);
    CHECK(test::same_bits(W, base));
    CHECK(lora::unmerge(W, layer).became_nonfinite == 0);
    CHECK(test::same_bits(W, base));
    const columns x = columns::Ones(4, 5);
    const auto old = delicate<columns>(3, 5);
    auto y = old;
    lora::apply(x, y, layer);
    lora::apply_through([](const auto&) -> columns { throw 1; }, y, layer);
    CHECK(test::same_bits(y, old));
  }
  CHECK(lora::merge(W, none_dora).became_nonfinite == 0);
  CHECK(test::same_bits(W, base));
  const auto finite = delicate<matrix<float>>(3, 4, true);
  const columns x = columns::Ones(4, 5);
  columns product(3, 5), nothing(3, 5);
  lora::forward(finite, x, product);
  lora::forward(finite, x, nothing, lora::mixed(finite, none_dora));
  CHECK(nothing == product);
}

TEST_CASE("a range of DoRA adapters merges as its elements do, in order", "[nothing][dora]") {
  matrix<float> A(1, 2), B(2, 1), base(2, 2);
  A << 1, 2;
  B << 1, -1;
  base << 3, 4, -1, 2;
  const lora::dora_adapter<float> first{A, B, {.alpha = 1}, {2, 3}},
      second{A, B, {.alpha = 2}, {1, 5}};
  auto one_by_one = base, as_a_range = base, scaled = base;
  lora::merge(one_by_one, first, second);
  lora::merge(as_a_range, std::vector{first, second});
  CHECK(test::same_bits(as_a_range, one_by_one));
  lora::merge(scaled, std::vector{lora::scaled(1, first), lora::scaled(1, second)});
  CHECK(test::same_bits(scaled, one_by_one));
}

TEST_CASE("a layer and a batch without adapters are the base", "[nothing]") {
  const auto W = delicate<matrix<float>>(3, 4, true);
  lora::linear q{W};
  CHECK(q.merge().became_nonfinite == 0);
  CHECK(q.unmerge().became_nonfinite == 0);
  CHECK(test::same_bits(q.weight(), W));
  const columns x = columns::Ones(4, 2);
  columns product(3, 2), y(3, 2);
  lora::forward(W, x, product);
  q.forward(x, y);
  CHECK(test::same_bits(y, product));

  lora::batch who{none_packed};
  lora::workspace space;
  columns no_tokens(3, 0);
  lora::forward(space, W, columns(4, 0), no_tokens, who);
  who.add();
  who.add({});
  lora::forward(space, W, x, y, who);
  CHECK(test::same_bits(y, product));
  who.clear();
  who.add_each({});
  CHECK(who.tokens() == 0);
}

TEST_CASE("the delta of nothing has no shape", "[nothing]") {
  CHECK_THROWS_AS((void)lora::delta_weight(none), lora::value_error);
  CHECK(lora::delta_weight(none, broken(3, 4)).rows() == 3);
}
