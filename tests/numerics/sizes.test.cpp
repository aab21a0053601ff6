// SPDX-License-Identifier: Apache-2.0
//
// Sizes larger than a memory, of views that hold no element or claim to hold many: a right result
// at once, or a refusal. Under UndefinedBehaviorSanitizer no product of extents overflows.
#include <vector>

#include "lora/dora.hpp"
#include "lora/embed.hpp"
#include "lora/residual.hpp"
#include "lora/rounding.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"

namespace {

using lora::index_t;
using rows_of = lora::matrix_view<const float, lora::storage_order::row_major>;
using columns_of = lora::matrix_view<const float, lora::storage_order::col_major>;
using output_rows = lora::matrix_view<float, lora::storage_order::row_major>;
using output_columns = lora::matrix_view<float, lora::storage_order::col_major>;

constexpr index_t large = index_t{1} << 47;  // as a number of rows of nothing
constexpr index_t too_large = index_t{1} << 61;
constexpr lora::scaling third{.alpha = 0.3, .rule = lora::scaling_rule::fixed};

/// An adapter of rank 0.
auto nothing(index_t out, index_t in) {
  return lora::basic_adapter(rows_of(nullptr, 0, in), rows_of(nullptr, out, 0), third);
}

}  // namespace

TEST_CASE("a view larger than a memory is refused", "[sizes]") {
  std::vector<float> v(8);
  CHECK_THROWS_AS(output_rows(v.data(), too_large, too_large), lora::shape_error);
  CHECK_THROWS_AS(output_rows(v.data(), index_t{1} << 31, index_t{1} << 31),
                  lora::shape_error);  // 2^64 bytes
  CHECK_THROWS_AS(output_rows(v.data(), 2, 3, too_large), lora::shape_error);
  CHECK_THROWS_AS(rows_of(nullptr, 0, too_large), lora::shape_error);
  CHECK_THROWS_AS(columns_of(nullptr, too_large, 0), lora::shape_error);
  CHECK_THROWS_AS(lora::row_major(v, 0, too_large), lora::shape_error);
  CHECK_THROWS_AS(rows_of(nullptr, 0, std::numeric_limits<index_t>::max()), lora::shape_error);
  CHECK_THROWS_AS(lora::packed_weight<float>(0, too_large), lora::shape_error);
  CHECK_THROWS_AS(lora::packed_weight<float>(too_large, 0), lora::shape_error);
  CHECK_THROWS_AS(lora::packed_weight<double>::unfilled(large, large), lora::shape_error);
  CHECK_THROWS_AS((void)lora::delta_weight(nothing(large, large)), lora::shape_error);
  CHECK(rows_of(nullptr, large, 0).size() == 0);
  CHECK(columns_of(nullptr, 0, large).size() == 0);
  CHECK(output_rows(v.data(), 1, 8, 8).size() == 8);
}

TEST_CASE("a weight without elements takes no time, however many rows or columns it has",
          "[sizes]") {
  for (const auto& [out, in] : std::vector<std::array<index_t, 2>>{{0, large}, {large, 0}}) {
    CAPTURE(out, in);
    const rows_of W(nullptr, out, in);
    const columns_of turned(nullptr, out, in);
    const lora::packed_weight<float> panels(W), other(turned);
    CHECK((panels.out_features() == out && panels.in_features() == in && other.bytes() == 0));
    CHECK(lora::packed_weight<lora::bfloat16>(out, in).bytes() == 0);
    const auto l = nothing(out, in);
    const lora::packed_adapter<float> packed(l);
    CHECK((packed.rank() == 0 && packed.out_features() == out));
    CHECK(lora::delta_weight(l).size() == 0);
    CHECK(lora::merge(output_rows(nullptr, out, in), l, lora::scaled(0.5, l)).became_nonfinite ==
          0);
    CHECK(lora::merge(lora::rounding::as_peft, output_rows(nullptr, out, in), l).became_nonfinite ==
          0);
    CHECK(lora::merged(turned, l).size() == 0);
    lora::merge_checked(output_columns(nullptr, out, in), l);
    lora::linear<float> layer{W};
    layer.attach("l", l);
    layer.merge("l");
    CHECK(layer.weight().size() == 0);
    CHECK((lora::leading_part(W, 0).B.size() == 0 && lora::leading_part(turned, 0).A.cols() == in));
  }
}

TEST_CASE("any number of tokens of no outputs takes no time", "[sizes]") {
  const auto l = nothing(0, 0);
  const rows_of W(nullptr, 0, 0);
  const columns_of x(nullptr, 0, large);
  const output_columns y(nullptr, 0, large);
  lora::forward(W, x, y, l);
  lora::apply(x, y, l);
  const auto layer = lora::mixed(W, lora::adapter<float>(l));
  lora::forward(W, x, y, layer);
  lora::apply(x, y, layer);
  lora::apply_through([](const auto&) { return test::col_matrix<float>(0, large); }, y, l);
  CHECK(y.size() == 0);
}

TEST_CASE("a rank that no adapter has is refused", "[sizes]") {
  // Factors without elements may claim any rank, which would be added up and looped over.
  using lora::basic_adapter;
  const basic_adapter<rows_of, rows_of> l(rows_of(nullptr, large, 0), rows_of(nullptr, 0, large),
                                          {.alpha = 1, .rule = lora::scaling_rule::fixed});
  const output_rows W(nullptr, 0, 0);
  CHECK_THROWS_AS(lora::packed_adapter<float>(l), lora::shape_error);
  CHECK_THROWS_AS(lora::merge(W, std::vector(70'000, l)), lora::shape_error);
  CHECK_THROWS_AS(lora::merge(lora::rounding::as_peft, W, l), lora::shape_error);
  CHECK_THROWS_AS(lora::apply(columns_of(nullptr, 0, 1), output_columns(nullptr, 0, 1), l),
                  lora::shape_error);
  CHECK_THROWS_AS(lora::apply_through([](const auto&) { return test::col_matrix<float>(0, 1); },
                                      output_columns(nullptr, 0, 1), l),
                  lora::shape_error);
  lora::linear<float> layer{W};
  CHECK_THROWS_AS(layer.attach("l", l), lora::shape_error);
}
