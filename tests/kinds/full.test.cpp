// SPDX-License-Identifier: Apache-2.0
//
// A full difference: its rows are those stored, its product is a chain, and nobody copies it.
#include "lora/kinds/full.hpp"

#include <cstddef>
#include <optional>

#include "kinds/by_hand.hpp"

static_assert(lora::adapter_kind<lora::full_difference<float>>);
static_assert(lora::adapter_kind<lora::full_difference<lora::bfloat16>>);
static_assert(!lora::low_rank<lora::full_difference<float>>);

using by_hand::index_t;
using lora::full_difference;

TEMPLATE_TEST_CASE("rows are read exactly, and D x is within gamma_in", "[full]", float, double,
                   lora::float16, lora::bfloat16) {
  using T = TestType;
  using acc = by_hand::acc_of<T>;
  test::random g(61);
  for (const auto& [out, in] : {std::pair<index_t, index_t>{5, 9}, {17, 33}, {64, 3}, {1, 1}}) {
    CAPTURE(out, in, g.seed());
    const test::matrix<T> D = g.reals<T>(out, in, 1);
    const full_difference<T> kind(D);
    CHECK(kind.out_features() == out);
    CHECK(kind.in_features() == in);
    CHECK(test::same_bits(kind.difference(), D));
    const auto one = by_hand::only<lora::delta_step<acc>>(by_hand::of<acc>(kind, -0.35));
    CHECK(one.scale == -0.35);
    CHECK(one.source->expanded() == nullptr);

    test::matrix<acc> rows = test::matrix<acc>::Constant(out, in + 2, 7);
    for (index_t first = 0; first < out; first += 3)
      one.source->rows(first, std::min<index_t>(3, out - first), rows.row(first).data(), in + 2);
    CHECK(test::exact(rows.leftCols(in).eval()) == test::exact(D));
    CHECK((rows.rightCols(2).array() == 7).all());

    const test::col_matrix<acc> x = g.reals<acc>(in, 11, 1);
    test::col_matrix<acc> y(out, 11);
    one.source->product(x.data(), 11, y.data());
    const auto d = test::exact(D), t = test::exact(x);
    // forward rounds an accumulator to itself, but its bound counts that step.
    const long double chain = by_hand::gamma<acc>(in + 1);
    CHECK(by_hand::within(y, test::times(d, t), chain * test::times(d.cwiseAbs(), t.cwiseAbs())));
    for (index_t j = 0; j < 11; ++j) {
      by_hand::vector<acc> alone(out);
      one.source->product(x.col(j).data(), 1, alone.data());
      CHECK(test::same_bits(alone, by_hand::vector<acc>(y.col(j))));
    }
  }
}

TEST_CASE("W' = W + w D, merged and mixed", "[full]") {
  test::random g(62);
  const test::matrix<double> D = g.reals<double>(6, 4, 1);
  const full_difference<double> kind(D);
  const auto all = by_hand::of<double>(lora::scaled(0.7, kind));
  test::matrix<double> W = g.reals<double>(6, 4, 1);
  by_hand::vector<double> bias = g.reals<double>(6, 1, 1);
  const test::col_matrix<double> x = g.reals<double>(4, 5, 1);
  const test::col_matrix<double> mixed = by_hand::mix(all, W, bias, x);
  const auto w = test::exact(W), d = test::exact(D);
  by_hand::merge(all, W, bias);
  const test::exact_matrix size = w.cwiseAbs() + 0.7 * d.cwiseAbs();
  CHECK(by_hand::within(W, w + 0.7 * d, 2 * by_hand::u<double> * size));
  const test::exact_matrix y = (w + 0.7 * d) * test::exact(x);
  const test::exact_matrix b = test::exact(bias), all_sizes = size * test::exact(x).cwiseAbs();
  CHECK(by_hand::within(mixed, y.colwise() + b.col(0),
                        by_hand::gamma<double>(8) * (all_sizes.colwise() + b.col(0).cwiseAbs())));
  CHECK(by_hand::of<double>(kind, 0).empty());
}

TEST_CASE("copies and steps share D, and steps keep it", "[full]") {
  test::matrix<float> D = test::matrix<float>::Constant(3, 2, 0.5F);
  const float* const data = D.data();
  std::optional<full_difference<float>> first(std::in_place, std::move(D));
  CHECK(first->difference().data() == data);
  const full_difference<float> copy = *first;
  CHECK(copy.difference().data() == data);
  const auto one = by_hand::only<lora::delta_step<float>>(by_hand::of<float>(*first));
  first.reset();
  std::vector<float> row(2);
  one.source->rows(2, 1, row.data(), 2);
  CHECK(row == std::vector<float>{0.5F, 0.5F});
}

TEST_CASE("a view of either order, and a narrower scalar, make the same difference", "[full]") {
  const std::vector<lora::bfloat16> numbers{lora::bfloat16(1.5F),  lora::bfloat16(-2.0F),
                                            lora::bfloat16(0.25F), lora::bfloat16(3.0F),
                                            lora::bfloat16(4.0F),  lora::bfloat16(5.0F)};
  const full_difference<float> rows(lora::row_major(numbers, 2, 3)),
      cols(lora::col_major(numbers, 3, 2).transpose());
  CHECK(test::same_bits(rows.difference(), cols.difference()));
  CHECK(rows.difference()(1, 0) == 3);
}
