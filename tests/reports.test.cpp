// SPDX-License-Identifier: Apache-2.0
//
// A merge into 16 bits may round a small adapter away, and users found out only when the model
// answered as before. Every merge counts the elements that it changed, and those that are not
// finite.
#include <random>

#include "lora/dora.hpp"
#include "lora/embed.hpp"
#include "lora/kinds/ia3.hpp"
#include "lora/merge.hpp"
#include "lora/rounding.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/dense_delta.hpp"

namespace {

using lora::index_t;
template <class T, int Options>
using stored = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Options>;

template <class M>
std::size_t differing(const M& a, const M& b) {
  std::size_t count = 0;
  for (index_t i = 0; i < a.rows(); ++i)
    for (index_t j = 0; j < a.cols(); ++j) {
      const auto x = a(i, j), y = b(i, j);
      count += std::memcmp(&x, &y, sizeof x) != 0;
    }
  return count;
}

/// Weights of size 1, a delta of size `size`: some elements change and some do not.
template <class T, int Options>
void check(index_t out, index_t in, float size) {
  std::mt19937 bits(20261201);
  std::normal_distribution<float> value;
  stored<T, Options> W(out, in);
  for (index_t i = 0; i < out; ++i)
    for (index_t j = 0; j < in; ++j) W(i, j) = lora::detail::narrow<T>(value(bits));
  if (out > 2 && in > 2) W(1, 2) = lora::detail::narrow<T>(std::numeric_limits<float>::infinity());
  Eigen::MatrixXf A(3, in), B(out, 3);
  for (index_t k = 0; k < A.size(); ++k) A.data()[k] = value(bits);
  for (index_t k = 0; k < B.size(); ++k) B.data()[k] = size * value(bits);
  B.row(0).setZero();  // a row that stays
  const lora::adapter<float> l{A, B, {.alpha = 2}};
  const std::size_t before = out > 2 && in > 2 ? 1 : 0;
  CAPTURE(out, in, size);
  const auto look = [&](const char* what, auto merge) {
    auto V = W;
    const lora::merge_report report = merge(V);
    CAPTURE(what);
    CHECK(report.elements == static_cast<std::size_t>(out * in));
    CHECK(report.weights == 1);
    CHECK(report.changed == differing(W, V));
    CHECK(report.nonfinite_before == before);
    CHECK(report.nonfinite_after == before);
    CHECK(report.became_nonfinite == 0);
  };
  look("merge", [&](auto& V) { return lora::merge(V, l); });
  look("unmerge", [&](auto& V) { return lora::unmerge(V, l); });
  look("any kind", [&](auto& V) {
    return lora::merge(V, test::dense_delta(Eigen::MatrixXf(lora::delta_weight(l))));
  });
  look("as_peft", [&](auto& V) { return lora::merge(lora::rounding::as_peft, V, l); });
}

}  // namespace

TEMPLATE_TEST_CASE("a merge counts the elements whose bits it changed", "[reports]", float, double,
                   lora::float16, lora::bfloat16) {
  for (const auto& [out, in] :
       std::vector<std::pair<index_t, index_t>>{{1, 1}, {7, 13}, {33, 65}, {64, 256}, {70, 300}})
    for (const float size : {1e-9F, 1e-3F, 1.0F}) {
      check<TestType, Eigen::RowMajor>(out, in, size);
      check<TestType, Eigen::ColMajor>(out, in, size);
    }
}

TEST_CASE("an adapter that 16 bits round away changes nothing, and the report says so",
          "[reports]") {
  const auto W =
      stored<lora::bfloat16, Eigen::RowMajor>::Constant(40, 64, lora::bfloat16(1.0F)).eval();
  const lora::adapter<float> tiny{Eigen::MatrixXf::Constant(1, 64, 1e-3F),
                                  Eigen::MatrixXf::Constant(40, 1, 1.0F),
                                  {.alpha = 1}};
  auto V = W;
  CHECK(lora::merge(V, tiny).changed == 0);
  CHECK(test::same_bits(W, V));
  const lora::adapter<float> more{Eigen::MatrixXf::Constant(1, 64, 1e-2F),
                                  Eigen::MatrixXf::Constant(40, 1, 1.0F),
                                  {.alpha = 1}};
  CHECK(lora::merge(V, more).changed == 40 * 64);
}

TEST_CASE("merge_checked reports what it merged, and throws before it writes", "[reports]") {
  stored<lora::float16, Eigen::ColMajor> W =
      stored<lora::float16, Eigen::ColMajor>::Constant(9, 5, lora::float16(2.0F));
  const auto before = W;
  const lora::adapter<float> l{
      Eigen::MatrixXf::Ones(2, 5), Eigen::MatrixXf::Ones(9, 2), {.alpha = 1}};
  const lora::adapter<float> huge{
      Eigen::MatrixXf::Ones(2, 5), Eigen::MatrixXf::Ones(9, 2), {.alpha = 1e6}};
  const lora::dora_adapter<float> dora(huge, std::vector<float>(9, 1e6F));
  CHECK_THROWS_AS(lora::merge_checked(W, huge), lora::value_error);
  CHECK_THROWS_AS(lora::merge_checked(W, dora), lora::value_error);
  CHECK(test::same_bits(before, W));
  CHECK(lora::merge_checked(W, l).changed == 45);
  const lora::dora_adapter<float> mild(l, std::vector<float>(9, 1.0F));
  CHECK(lora::merge_checked(W, mild).changed == 45);
}

TEST_CASE("a report says when an adapter also scales a bias that the call did not give",
          "[reports]") {
  Eigen::MatrixXf W = Eigen::MatrixXf::Ones(2, 3);
  lora::packed_weight<float> packed(W);
  const auto l = lora::ia3_adapter<float>::of_outputs({2, 3}, 3);
  std::vector<float> bias{1, 1};
  CHECK(lora::merge(packed, l).biases_left == 1);
  CHECK(lora::merge(W, bias, l).biases_left == 0);
  CHECK(bias == std::vector<float>{2, 3});
  CHECK(lora::merge(W, l).biases_left == 1);
  CHECK(lora::merge(W, lora::ia3_adapter<float>::of_inputs({2, 3, 4}, 2)).biases_left == 0);
}

TEST_CASE("a merged copy has its report, and replaced rows count what they changed", "[reports]") {
  const Eigen::MatrixXf W = Eigen::MatrixXf::Ones(4, 3);
  const lora::adapter<float> l{
      Eigen::MatrixXf::Ones(1, 3), Eigen::MatrixXf{{0}, {1}, {0}, {2}}, {.alpha = 2}};
  CHECK(lora::merged(W, l).report.changed == 6);
  CHECK(lora::merged(lora::packed_weight<float>(W), l).report.changed == 6);
  Eigen::MatrixXf embedding = W;
  Eigen::MatrixXf values(2, 3);
  values << 1, 5, 1, 7, 1, std::numeric_limits<float>::infinity();
  const auto report = lora::assign_rows(embedding, lora::replaced_rows<float>({3, 0}, values));
  CHECK(report.elements == 12);
  CHECK(report.changed == 3);
  CHECK(report.became_nonfinite == 1);
  CHECK(report.nonfinite_after == 1);
  CHECK(report.weights == 1);
}
