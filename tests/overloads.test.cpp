// SPDX-License-Identifier: Apache-2.0
//
// Each verb has an overload that takes mistaken calls, for its sentence (detail/refusals.hpp).
// Calls that other overloads take by a conversion, calls of a user's own functions, and what looks
// alike must not reach it; that they compile is the test.
#include <algorithm>
#include <atomic>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/dora.hpp"
#include "lora/embed.hpp"
#include "lora/lora.hpp"
#include "lora/rounding.hpp"
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

TEST_CASE("const and temporary views, expressions of memory and plain vectors are arguments",
          "[overloads]") {
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
  lora::overwrite_rows(std::vector<int>{1}, y, replaced, 2);
  CHECK(y == Eigen::MatrixXf::Constant(2, 1, 2));
  CHECK(lora::scaled(2, l).strength() == 2);
  CHECK(lora::scaled(2, lora::packed_adapter<float>{l}.rank() == 1 ? l : l).strength() == 2);
  float values[6] = {};
  const float more[6] = {1, 2, 3, 4, 5, 6};
  CHECK(lora::row_major(values, 2, 3).rows() == 2);
  CHECK(lora::col_major(more, 2, 3)(1, 1) == 4);
}

TEST_CASE("more special verbs are taken first", "[overloads]") {
  matrix W = matrix::Zero(2, 3);
  lora::merge(lora::rounding::as_peft, W, l);
  const lora::rounding::peft_safe_policy policy;
  lora::merge(policy, W, l);
  CHECK(W == matrix::Constant(2, 3, 2));
  const auto layer = lora::mixed(W, l);
  lora::merge(W, layer);
  CHECK(W == matrix::Constant(2, 3, 3));
  matrix embedding = matrix::Zero(2, 2);
  lora::assign_rows(embedding, lora::replaced_rows<float>({1}, matrix::Ones(1, 2)));
  CHECK(embedding(1, 0) == 1);
}

TEST_CASE("unqualified names of the standard library stay theirs", "[overloads]") {
  using std::forward;
  using std::merge;
  const std::vector<lora::assignment> a{{0}, {2}}, b{{1}};
  std::vector<lora::assignment> all(3);
  merge(a.begin(), a.end(), b.begin(), b.end(), all.begin(),
        [](const auto& left, const auto& right) { return left.adapter < right.adapter; });
  CHECK(all[1].adapter == 1);
  const lora::bfloat16 one{1.0F};
  CHECK(forward<const lora::bfloat16&>(one) == one);
}

// A user's own functions, found beside those of lora by argument-dependent look-up: an argument is
// a matrix or vector of lora::bfloat16. Each call needs a conversion.
namespace mine {

using M = Eigen::Matrix<lora::bfloat16, Eigen::Dynamic, Eigen::Dynamic>;

struct forward_declared;
struct layer {
  int outputs = 2;
};
struct factors {  // looks like an adapter
  matrix A, B;
  const matrix& lora_A() const { return A; }
  const matrix& lora_B() const { return B; }
};
struct options {};

int merge(Eigen::Ref<M>, const Eigen::Ref<const M>&) { return 1; }
int merge(forward_declared&, const lora::bfloat16*) { return 2; }
int merge(Eigen::Ref<M>, const lora::packed_adapter<float>&, options) { return 3; }
int merge(Eigen::Ref<M>, const lora::packed_adapter<float>*) { return 4; }
int merge(Eigen::Ref<M>, const std::vector<int>&, double) { return 5; }
int apply(const layer&, std::span<const lora::bfloat16>, std::span<lora::bfloat16>) { return 1; }
int apply(const factors&, std::span<const lora::bfloat16>, std::span<lora::bfloat16>) { return 2; }
int forward(const layer&, std::span<const lora::bfloat16>, std::span<lora::bfloat16>) { return 1; }
int rows(const layer&, std::span<const int>, std::span<lora::bfloat16>) { return 1; }

int merge_forward_declared(forward_declared& layer, lora::bfloat16* data) {
  return merge(layer, data);
}
struct forward_declared {};

}  // namespace mine

namespace mine_by_template {
template <class F>
int apply(F f, std::span<const lora::bfloat16>, std::span<lora::bfloat16>) {
  return f();
}
}  // namespace mine_by_template

namespace mine_of_anything {
template <class... A>
int apply(const A&...) {
  return sizeof...(A);
}
}  // namespace mine_of_anything

TEST_CASE("a user's own functions stay theirs", "[overloads]") {
  mine::M W(2, 2), V(2, 2);
  const lora::packed_adapter<float> packed(l);
  lora::packed_adapter<float> changeable = packed;
  std::vector<lora::bfloat16> x(2), y(2);
  mine::forward_declared layer;
  CHECK(mine::merge_forward_declared(layer, x.data()) == 2);
  {
    using mine::apply;
    using mine::forward;
    using mine::merge;
    using mine::rows;
    CHECK(merge(W, V) == 1);
    CHECK(merge(W, packed, mine::options{}) == 3);
    CHECK(merge(W, &changeable) == 4);
    CHECK(merge(W, std::vector<int>{1}, 2) == 5);
    CHECK(apply(mine::layer{}, x, y) == 1);
    CHECK(apply(mine::factors{}, x, y) == 2);
    CHECK(forward(mine::layer{}, x, y) == 1);
    CHECK(rows(mine::layer{}, std::vector<int>{1}, y) == 1);
  }
  {
    using mine_by_template::apply;
    CHECK(apply([] { return 7; }, x, y) == 7);
  }
  {
    using mine_of_anything::apply;
    CHECK(apply(x, y, mine::layer{}) == 3);
    CHECK(apply(W, V, 0.5) == 3);
    CHECK(apply(W) == 1);
  }
}

namespace {

struct my_rows : lora::replaced_rows<float> {
  using replaced_rows::replaced_rows;
};
struct my_batch : lora::batch<float> {
  using batch::batch;
};
struct my_form : lora::mixed_form<float> {
  explicit my_form(const lora::mixed_form<float>& of) : mixed_form(of) {}
};
struct my_layer : lora::linear<float> {
  using linear::linear;
};
struct my_packed_weight : lora::packed_weight<float> {
  using packed_weight::packed_weight;
};
struct my_packed : lora::packed_adapter<float> {
  using packed_adapter::packed_adapter;
};
struct my_dora : lora::dora_adapter<float> {
  using dora_adapter::dora_adapter;
};

}  // namespace

TEST_CASE("what derives from a class of the library is one", "[overloads]") {
  matrix embedding = matrix::Zero(2, 2);
  const my_rows replaced({1}, matrix::Ones(1, 2));
  lora::assign_rows(embedding, replaced);
  CHECK(embedding(1, 0) == 1);
  Eigen::MatrixXf out = Eigen::MatrixXf::Zero(2, 1);
  lora::overwrite_rows(std::vector<int>{1}, out, replaced, std::atomic<double>(3));
  CHECK(out == Eigen::MatrixXf::Constant(2, 1, 3));

  matrix W = matrix::Zero(2, 3);
  const std::vector<lora::packed_adapter<float>> served{lora::packed_adapter<float>(l)};
  my_batch who(served);
  who.add({{0}});
  const Eigen::VectorXf x = Eigen::VectorXf::Ones(3);
  Eigen::VectorXf y = Eigen::VectorXf::Zero(2);
  lora::forward(W, x, y, who);
  CHECK(y == Eigen::VectorXf::Constant(2, 3));

  const my_form form(lora::mixed(W, l));
  lora::merge(W, form);
  CHECK(W == matrix::Ones(2, 3));

  const my_layer layer(W);
  CHECK(layer.clone().weight() == W);
  const my_packed_weight weight(W);
  CHECK(lora::packed_weight<float>(weight).matrix() == W);
  CHECK(lora::packed_weight(weight).matrix() == W);
  CHECK(lora::batch<float>(who).tokens() == 1);
  const my_packed packed(l);
  CHECK(lora::packed_adapter<float>(packed).rank() == 1);
  CHECK(lora::scaled(2, packed).strength() == 2);
  const my_dora style(lora::adapter<float>(l), {1, 1});
  CHECK(lora::scaled(2, style).strength() == 2);
}

namespace {

template <class W, class L>
concept merges = requires(W& weight, const L& adapter) { lora::merge(weight, adapter); };
template <class X, class Y, class L>
concept applies = requires(const X& x, Y& y, const L& adapter) { lora::apply(x, y, adapter); };

static_assert(merges<matrix, lora::adapter<float>>);
static_assert(!merges<matrix, matrix>);
static_assert(!merges<matrix, std::string>);
static_assert(!merges<matrix, double>);
static_assert(!merges<std::string, lora::adapter<float>>);
static_assert(!applies<matrix, matrix, matrix>);
static_assert(!applies<std::string, matrix, lora::adapter<float>>);

static_assert(std::is_constructible_v<lora::linear<float>, matrix>);
static_assert(!std::is_constructible_v<lora::linear<float>, std::string>);
static_assert(!std::is_constructible_v<lora::linear<float>, std::vector<float>>);
static_assert(std::is_constructible_v<lora::packed_weight<float>, matrix>);
static_assert(!std::is_constructible_v<lora::packed_weight<float>, std::string>);
static_assert(std::is_constructible_v<lora::packed_adapter<float>, lora::adapter<float>>);
static_assert(!std::is_constructible_v<lora::packed_adapter<float>, std::string>);
static_assert(!std::is_constructible_v<lora::packed_adapter<float>, matrix>);
static_assert(
    std::is_constructible_v<lora::batch<float>, std::vector<lora::packed_adapter<float>>&>);
static_assert(!std::is_constructible_v<lora::batch<float>, std::string>);
static_assert(!std::is_constructible_v<lora::batch<float>, std::vector<float>>);
static_assert(std::is_constructible_v<lora::adapter<float>, matrix, matrix, lora::scaling>);
static_assert(!std::is_constructible_v<lora::adapter<float>, matrix, matrix, int>);
static_assert(!std::is_constructible_v<lora::adapter<float>, matrix, matrix, double>);
static_assert(
    !std::is_constructible_v<lora::adapter<float>, std::string, std::string, lora::scaling>);

}  // namespace

TEST_CASE("an optional of packed adapters is made of one of adapters", "[overloads]") {
  const std::optional<lora::adapter<float>> adapter(l);
  const std::optional<lora::packed_adapter<float>> packed(adapter);
  CHECK(packed->rank() == 1);
}
