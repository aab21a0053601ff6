// SPDX-License-Identifier: Apache-2.0
//
// Each verb has an overload that takes everything, for its sentence (detail/refusals.hpp). Calls that other overloads take by
// a conversion, or that look alike, must not reach it; that they compile is the test.
#include <algorithm>
#include <utility>
#include <vector>

#include "lora/dora.hpp"
#include "lora/lora.hpp"
#include "lora/rounding.hpp"
#include "lora/rows.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"

namespace {

struct own_space : lora::workspace {};
using matrix = test::matrix<float>;

const lora::adapter<float> l{matrix::Ones(1, 3), matrix::Ones(2, 1), {.alpha = 1}};

}  // namespace

TEST_CASE("a workspace of one's own is one", "[overloads]") {
  own_space space;
  matrix W = matrix::Zero(2, 3);
  lora::merge(space, W, l);
  CHECK(W == matrix::Ones(2, 3));
  lora::unmerge(space, W, l);
  CHECK(W == matrix::Zero(2, 3));
  lora::merge_checked(space, W, l);
  Eigen::VectorXf y = Eigen::VectorXf::Zero(2);
  const Eigen::VectorXf x = Eigen::VectorXf::Ones(3);
  lora::apply(space, x, y, l);
  CHECK(y == Eigen::VectorXf::Constant(2, 3));
  lora::forward(space, W, x, y, l);
  CHECK(y == Eigen::VectorXf::Constant(2, 6));
  lora::linear<float>{W}.forward(space, x, y);
  CHECK(y == Eigen::VectorXf::Constant(2, 3));
}

TEST_CASE("const and temporary views, expressions of memory and plain vectors are arguments", "[overloads]") {
  matrix W = matrix::Zero(2, 6);
  const auto block = W.middleCols(1, 3);
  lora::merge(block, l);
  lora::merge(W.middleCols(1, 3), l);
  const auto view = lora::as_matrix(W).middle_cols(1, 3);
  lora::merge(view, l);
  CHECK(W.middleCols(1, 3) == matrix::Constant(2, 3, 3));
  CHECK(lora::merged(std::as_const(view), l)(0, 0) == 4);
  const std::vector<float> x(3, 1);
  std::vector<float> y(2, 0);
  lora::apply(x, y, l);
  lora::apply(x, std::span(y), l);
  CHECK(y == std::vector<float>{6, 6});
}

TEST_CASE("numbers are converted", "[overloads]") {
  const lora::replaced_rows<float> replaced({1}, matrix::Ones(1, 2));
  Eigen::MatrixXf y = Eigen::MatrixXf::Zero(2, 1);
  lora::apply(std::vector<int>{1}, y, replaced, 2);
  CHECK(y == Eigen::MatrixXf::Constant(2, 1, 2));
  CHECK(lora::scaled(2, l).weight() == 2);
  CHECK(lora::scaled(2, lora::packed_adapter<float>{l}.rank() == 1 ? l : l).weight() == 2);
  float values[6] = {};
  const float more[6] = {1, 2, 3, 4, 5, 6};
  CHECK(lora::row_major(values, 2, 3).rows() == 2);
  CHECK(lora::col_major(more, 2, 3)(1, 1) == 4);
}

TEST_CASE("more special verbs are taken first", "[overloads]") {
  matrix W = matrix::Zero(2, 3);
  lora::merge(lora::rounding::peft, W, l);
  const lora::rounding::peft_safe_policy policy;
  lora::merge(policy, W, l);
  CHECK(W == matrix::Constant(2, 3, 2));
  const auto layer = lora::attach(W, l);
  lora::merge(W, layer);
  CHECK(W == matrix::Constant(2, 3, 3));
  matrix embedding = matrix::Zero(2, 2);
  lora::merge(embedding, lora::replaced_rows<float>({1}, matrix::Ones(1, 2)));
  CHECK(embedding(1, 0) == 1);
}

TEST_CASE("unqualified names of the standard library stay theirs", "[overloads]") {
  using std::forward;
  using std::merge;
  const std::vector<lora::batch_entry> a{{0}, {2}}, b{{1}};
  std::vector<lora::batch_entry> all(3);
  merge(a.begin(), a.end(), b.begin(), b.end(), all.begin(),
        [](const auto& left, const auto& right) { return left.adapter < right.adapter; });
  CHECK(all[1].adapter == 1);
  const lora::bfloat16 one{1.0F};
  CHECK(forward<const lora::bfloat16&>(one) == one);
}
