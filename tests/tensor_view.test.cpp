// SPDX-License-Identifier: Apache-2.0
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

#include "lora/tensor_view.hpp"
#include "support/catch.hpp"
#include "support/refused.hpp"

using lora::index_t;
using test::mentions;
using test::refusal;

namespace {

std::vector<float> counting(std::size_t n) {
  std::vector<float> v(n);
  for (std::size_t k = 0; k < n; ++k) v[k] = static_cast<float>(k);
  return v;
}

}  // namespace

TEST_CASE("slices of a tensor down to a matrix name the row-major elements", "[tensor_view]") {
  auto v = counting(2 * 3 * 4 * 5);
  const lora::tensor_view<float, 4> t(v, {2, 3, 4, 5});
  static_assert(t.rank() == 4);
  CHECK((t.extent(0) == 2 && t.extent(3) == 5 && t.size() == 120));
  bool same = true;
  for (index_t a = 0; a < 2; ++a)
    for (index_t b = 0; b < 3; ++b) {
      const auto m = t.slice(a).slice(b).matrix();
      static_assert(std::is_same_v<decltype(m),
                                   const lora::matrix_view<float, lora::storage_order::row_major>>);
      same = same && m.rows() == 4 && m.cols() == 5;
      for (index_t i = 0; i < 4; ++i)
        for (index_t j = 0; j < 5; ++j)
          same = same && &m(i, j) == &v[static_cast<std::size_t>(((a * 3 + b) * 4 + i) * 5 + j)];
    }
  CHECK(same);
  CHECK(t.slice(1).shape() == std::array<index_t, 3>{3, 4, 5});
  const auto row = t.slice(1).slice(2).slice(3);
  static_assert(row.rank() == 1);
  CHECK((row.size() == 5 && row.data() == v.data() + 115));
}

TEST_CASE("a tensor as the matrix first dimension x the others", "[tensor_view]") {
  auto v = counting(24);
  const auto flat = lora::tensor_view<float, 3>(v, {2, 3, 4}).matrix();
  CHECK((flat.rows() == 2 && flat.cols() == 12 && flat(1, 5) == 17));
  const auto column = lora::tensor_view<const float, 1>(std::span<const float>(v), {24}).matrix();
  CHECK((column.rows() == 24 && column.cols() == 1 && column(7, 0) == 7));
  lora::tensor_view<float, 2>(v, {4, 6}).matrix()(3, 5) = -1;
  CHECK(v[23] == -1);
  // A span that holds more than the tensor is fine.
  CHECK(lora::tensor_view<float, 2>(v, {2, 2}).size() == 4);
}

TEST_CASE("tensors without elements", "[tensor_view]") {
  std::vector<lora::bfloat16> none;
  const lora::tensor_view<lora::bfloat16, 3> t(none, {3, 0, 2});
  CHECK(t.size() == 0);
  CHECK(t.slice(2).shape() == std::array<index_t, 2>{0, 2});
  CHECK(t.slice(2).matrix().cols() == 2);
  CHECK(t.matrix().rows() == 3);
  constexpr index_t huge = lora::detail::most_extent / 2;
  const lora::tensor_view<lora::bfloat16, 3> wide(none, {0, 2, huge});
  CHECK((wide.size() == 0 && wide.matrix().cols() == 2 * huge));
  CHECK_THROWS_AS(wide.slice(0), lora::shape_error);
  // No element either, but as a matrix it would have too many columns to count.
  CHECK(mentions(refusal<lora::shape_error>([&] {
                   lora::tensor_view<lora::bfloat16, 3>(none, {0, huge, huge});
                 }),
                 {"too many elements"}));
}

TEST_CASE("tensors that do not fit are refused", "[tensor_view]") {
  auto v = counting(24);
  CHECK(mentions(refusal<lora::shape_error>([&] {
                   lora::tensor_view<float, 2>(v, {5, 5});
                 }),
                 {"tensor_view", "[5, 5]", "24"}));
  CHECK(mentions(refusal<lora::shape_error>([&] {
                   lora::tensor_view<float, 2>(v, {-2, 3});
                 }),
                 {"[-2, 3]", "negative"}));
  CHECK(mentions(refusal<lora::shape_error>([&] {
                   lora::tensor_view<float, 3>(v, {0, -1, 2});
                 }),
                 {"negative"}));
  constexpr index_t big = index_t{1} << 32;
  CHECK(mentions(refusal<lora::shape_error>([&] {
                   lora::tensor_view<float, 2>(v, {big, big});
                 }),
                 {"too many elements"}));
  const lora::tensor_view<float, 2> t(v, {4, 6});
  CHECK(mentions(refusal<lora::shape_error>([&] { t.slice(4); }),
                 {"tensor_view::slice", "4", "[4, 6]"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { t.slice(-1); }), {"-1", "[4, 6]"}));
  const std::span<float> nothing;
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::tensor_view<float, 1>(nothing, {1}); }),
                 {"tensor_view", "[1]", "0"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::tensor_view<float, 1>(v, {-3}); }),
                 {"[-3]", "negative"}));
  CHECK(mentions(refusal<lora::shape_error>([&] {
                   lora::tensor_view<float, 2>(v, {0, 6}).slice(0);
                 }),
                 {"tensor_view::slice", "0 is not", "[0, 6]"}));
}
