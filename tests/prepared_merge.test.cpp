// SPDX-License-Identifier: Apache-2.0
//
// A checkpoint is merged in blocks of rows that fit a memory budget. The law that streaming stands
// on: blocks of any size give the bits of the whole.
#include "lora/prepared_merge.hpp"

#include <random>

#include "lora/any_kind.hpp"
#include "lora/dora.hpp"
#include "lora/io/peft_entry.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"

namespace {

constexpr unsigned seed = 20261201;

template <class T, int Options>
using stored = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Options>;

template <class M>
M random(std::mt19937& bits, lora::index_t rows, lora::index_t cols, double size) {
  std::normal_distribution<double> value(0, size);
  M m(rows, cols);
  for (lora::index_t i = 0; i < rows; ++i)
    for (lora::index_t j = 0; j < cols; ++j)
      m(i, j) = lora::detail::narrow<typename M::Scalar>(value(bits));
  return m;
}

/// merge.rows over blocks of `height` rows from the last one to the first.
template <class Merge, class M>
lora::merge_report by_blocks(const Merge& merge, M& W, lora::index_t height) {
  lora::merge_report all;
  lora::index_t first = (W.rows() - 1) / height * height;
  for (; first >= 0; first -= height)
    all += merge.rows(first,
                      lora::as_matrix(W).middle_rows(first, std::min(height, W.rows() - first)));
  return all;
}

template <class T, int Options>
void check(lora::index_t out, lora::index_t in) {
  std::mt19937 bits(seed);
  constexpr auto order =
      Options == Eigen::RowMajor ? lora::storage_order::row_major : lora::storage_order::col_major;
  const auto W = random<stored<T, Options>>(bits, out, in, 1);
  const lora::adapter<float> one{random<Eigen::MatrixXf>(bits, 7, in, 1),
                                 random<Eigen::MatrixXf>(bits, out, 7, 1),
                                 {.alpha = 3}};
  const lora::adapter<lora::bfloat16> other{random<stored<lora::bfloat16, 0>>(bits, 6, in, 1),
                                            random<stored<lora::bfloat16, 0>>(bits, out, 6, 1),
                                            {.alpha = 5}};
  std::vector<float> magnitude(static_cast<std::size_t>(out), 1.25F);
  const lora::dora_adapter<float> dora(one, magnitude);
  for (const lora::index_t height : {1, 3, 8, 13, 64, 200}) {
    CAPTURE(seed, out, in, height);
    auto whole = W, parts = W;
    const auto report = lora::merge(whole, one, lora::scaled(0.7, other));
    const lora::prepared_merge<T, order> merge(out, in, one, lora::scaled(0.7, other));
    const auto sum = by_blocks(merge, parts, height);
    CHECK(test::same_bits(whole, parts));
    CHECK(sum.changed == report.changed);
    CHECK(sum.elements == static_cast<std::size_t>(out * in));

    auto whole_dora = W, parts_dora = W;
    lora::merge(whole_dora, other, dora);
    using acc = lora::accumulator_t<T>;
    const auto reader = lora::detail::reader_of<acc>(lora::as_matrix(W));
    const lora::prepared_merge<T, order> merge_dora(reader, other, dora);
    by_blocks(merge_dora, parts_dora, height);
    CHECK(test::same_bits(whole_dora, parts_dora));
  }
}

}  // namespace

TEMPLATE_TEST_CASE("blocks of rows have the bits of the whole weight", "[prepared_merge]", float,
                   double, lora::float16, lora::bfloat16) {
  for (const auto& [out, in] :
       std::vector<std::pair<lora::index_t, lora::index_t>>{{37, 53}, {64, 96}, {131, 260}}) {
    check<TestType, Eigen::RowMajor>(out, in);
    check<TestType, Eigen::ColMajor>(out, in);
  }
}

TEST_CASE("rows outside the weight are refused before anything is written", "[prepared_merge]") {
  const Eigen::MatrixXf A = Eigen::MatrixXf::Ones(2, 5), B = Eigen::MatrixXf::Ones(7, 2);
  const lora::prepared_merge<float> merge(7, 5, lora::adapter<float>{A, B, {.alpha = 2}});
  stored<float, Eigen::RowMajor> block = stored<float, Eigen::RowMajor>::Zero(3, 5);
  CHECK_THROWS_AS(merge.rows(5, block), lora::shape_error);
  CHECK_THROWS_AS(merge.rows(-1, block), lora::shape_error);
  stored<float, Eigen::RowMajor> narrow = stored<float, Eigen::RowMajor>::Zero(3, 4);
  CHECK_THROWS_AS(merge.rows(0, narrow), lora::shape_error);
  CHECK(block.isZero(0));
  CHECK(merge.rows(4, block).changed == 15);
}

TEST_CASE("a kind that looks at the weight needs its rows", "[prepared_merge]") {
  const Eigen::MatrixXf A = Eigen::MatrixXf::Ones(2, 5), B = Eigen::MatrixXf::Ones(7, 2);
  const lora::dora_adapter<float> dora{A, B, {.alpha = 2}, std::vector<float>(7, 1.0F)};
  CHECK_THROWS_AS((lora::prepared_merge<float>(7, 5, dora)), lora::value_error);
}

TEST_CASE("double factors known at run time, and a base stored in x out, are refused",
          "[prepared_merge]") {
  std::mt19937 bits(seed);
  const auto A = random<Eigen::MatrixXd>(bits, 2, 7, 1), B = random<Eigen::MatrixXd>(bits, 7, 2, 1);
  const lora::any_kind any = lora::adapter<double>{A, B, {.alpha = 3}};
  CHECK_THROWS_WITH((lora::prepared_merge<float>(7, 7, any)), Catch::Contains("holds double"));
  const lora::prepared_merge<float, lora::storage_order::row_major, double> in_double(7, 7, any);
  auto W = random<stored<float, Eigen::RowMajor>>(bits, 7, 7, 1), want = W;
  lora::merge(want, any);
  in_double.rows(0, W);
  CHECK(test::same_bits(W, want));
  // Square, so that no shape tells: blocks of rows of such a weight would be blocks of inputs.
  const lora::peft::entry<float> conv1d(
      "c_attn", lora::adapter<float>{A.cast<float>().eval(), B.cast<float>().eval(), {.alpha = 3}},
      true);
  CHECK_THROWS_WITH((lora::prepared_merge<float>(7, 7, conv1d)),
                    Catch::Contains("stores the weight of this adapter in x out"));
}
