// SPDX-License-Identifier: Apache-2.0
//
// Owners, views and scaled views of adapters, and a user's own type among them: what each holds,
// and that copies are exact.
#include <array>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/lora.hpp"
#include "support/catch.hpp"
#include "support/mdspan.hpp"
#include "support/random.hpp"
#include "support/refused.hpp"

using Eigen::MatrixXf;
using lora::index_t;
using lora::scaling_rule;
using test::mentions;
using test::refusal;
using test::same_bits;

namespace {

/// A user's own adapter: A stored transposed, in doubles, with its own idea of scaling. It
/// satisfies low_rank and no more.
class homemade {
 public:
  homemade(Eigen::MatrixXd down, Eigen::MatrixXd up, float strength)
      : down_(std::move(down)), up_(std::move(up)), strength_(strength) {}
  auto lora_A() const { return down_.transpose(); }  // by value: a view of the stored matrix
  const Eigen::MatrixXd& lora_B() const { return up_; }
  float scaling() const { return strength_; }
  int rank() const { return static_cast<int>(down_.cols()); }

 private:
  Eigen::MatrixXd down_, up_;
  float strength_;
};
static_assert(lora::low_rank<homemade> && lora::low_rank<const homemade&>);
static_assert(!lora::low_rank<int> && !lora::low_rank<Eigen::MatrixXf> &&
              !lora::low_rank<std::vector<homemade>>);
static_assert(lora::low_rank_range<std::vector<homemade>> &&
              lora::low_rank_range<std::array<lora::adapter<float>, 2>>);
static_assert(!lora::low_rank_range<homemade> && !lora::low_rank_range<std::vector<float>>);

template <class To, class From>
bool equal_values(const To& a, const From& b) {
  return test::exact(a) == test::exact(b);
}

}  // namespace

TEST_CASE("an adapter holds its factors row-major and its scaling", "[adapter]") {
  test::random g(501);
  const Eigen::MatrixXf A = g.reals<float>(3, 7, 1), B = g.reals<float>(5, 3, 1);
  const lora::adapter<float> l{A, B, {.alpha = 12}};
  CHECK(l.rank() == 3);
  CHECK(l.in_features() == 7);
  CHECK(l.out_features() == 5);
  CHECK(l.scaling() == 4.0);
  CHECK(same_bits(l.lora_A(), A));
  CHECK(same_bits(l.lora_B(), B));
  static_assert(std::remove_cvref_t<decltype(l.lora_A())>::IsRowMajor);
  CHECK(l.lora_A().data() != A.data());

  const lora::adapter deduced{A, B, {.alpha = 12, .rule = scaling_rule::rank_stabilized}};
  static_assert(std::is_same_v<decltype(deduced), const lora::adapter<float>>);
  CHECK(deduced.scaling() == 12 / std::sqrt(3.0));
  const lora::adapter copy = deduced;
  static_assert(std::is_same_v<decltype(copy), const lora::adapter<float>>);
  CHECK(copy.scaling() == deduced.scaling());
}

TEMPLATE_TEST_CASE("copies widen exactly, from every scalar and layout", "[adapter]", float, double,
                   lora::float16, lora::bfloat16, Eigen::half, Eigen::bfloat16) {
  test::random g(502);
  CAPTURE(g.seed());
  const auto check = [&](const auto& A, const auto& B) {
    const lora::scaling s{.alpha = 3};
    const lora::adapter<double> wide{A, B, s};
    CHECK(equal_values(wide.lora_A(), A));
    CHECK(equal_values(wide.lora_B(), B));
    const lora::adapter<TestType> same{A, B, s};
    CHECK(same_bits(same.lora_A(), A));
    CHECK(same_bits(same.lora_B(), B));
    if constexpr (!std::is_same_v<TestType, double>) {
      const lora::adapter<float> floats{A, B, s};
      CHECK(equal_values(floats.lora_A(), A));
      // An adapter from an adapter, through views and strengths: the scaling as it stands.
      const lora::adapter<double> other(lora::scaled(-0.3, lora::scaled(0.7, floats)));
      CHECK(other.scaling() == -0.3 * (0.7 * floats.scaling()));
      CHECK(equal_values(other.lora_B(), B));
    }
  };
  const test::matrix<TestType> A = g.reals<TestType>(4, 9, 2), B = g.reals<TestType>(6, 4, 2);
  const test::col_matrix<TestType> by_cols_A = A, by_cols_B = B;
  const test::col_matrix<TestType> turned_A = A.transpose();
  check(A, B);
  check(by_cols_A, by_cols_B);
  check(turned_A.transpose(), B.topRows(3));
  check(A.middleRows(1, 2), by_cols_B.middleCols(1, 2));
  check(lora::as_matrix(A).middle_cols(2, 5), lora::as_matrix(by_cols_B));
  using extents = test::md::dextents<>;
  check(test::md::mdspan<const TestType, extents>(A.data(), extents(4, 9)),
        test::md::mdspan<const TestType, extents, test::md::layout_left>(by_cols_B.data(),
                                                                         extents(6, 4)));
  // Subnormals, -0 and infinities are values like others.
  test::matrix<TestType> edge(1, 4);
  edge << test::stored<TestType>(-0.0), test::stored<TestType>(0x1p-24),
      test::stored<TestType>(65504),
      test::stored<TestType>(-std::numeric_limits<double>::infinity());
  check(edge, edge.leftCols(1));
  CHECK(std::signbit(lora::adapter<double>(edge, edge.leftCols(1), {.alpha = 2}).lora_A()(0, 0)));
}

TEST_CASE("an expression of the adapter's own scalar is evaluated into it", "[adapter]") {
  test::random g(503);
  const Eigen::MatrixXf A = g.integers<float>(2, 5, 3), B = g.integers<float>(4, 2, 3);
  const lora::adapter<float> l{2 * A, B + B, {.alpha = 3}};
  CHECK(l.lora_A() == 2 * A);
  CHECK(l.lora_B() == 2 * B);
}

TEST_CASE("ranks beyond the dimensions, 1 x 1, and no features at all", "[adapter]") {
  const Eigen::MatrixXf A = Eigen::MatrixXf::Ones(9, 2), B = Eigen::MatrixXf::Ones(3, 9);
  CHECK(lora::adapter<float>{A, B, {.alpha = 18}}.scaling() == 2.0);
  const Eigen::MatrixXf one = Eigen::MatrixXf::Constant(1, 1, 3);
  CHECK(lora::adapter<float>{one, one, {.alpha = 5}}.rank() == 1);
  const Eigen::MatrixXf none_A(2, 0), none_B(0, 2);
  CHECK(lora::adapter<float>{none_A, none_B, {.alpha = 5}}.in_features() == 0);
  const Eigen::MatrixXf empty_A(0, 4), empty_B(3, 0);
  CHECK(lora::adapter<float>{empty_A, empty_B, {.alpha = 5, .rule = scaling_rule::fixed}}.rank() ==
        0);
}

TEST_CASE("an adapter that makes no sense is refused", "[adapter]") {
  const Eigen::MatrixXf A = Eigen::MatrixXf::Ones(3, 7), B = Eigen::MatrixXf::Ones(5, 3),
                        empty_A(0, 7), empty_B(5, 0);
  using a = lora::adapter<float>;
  CHECK(mentions(refusal<lora::shape_error>([&] {
                   a{B, A, {.alpha = 2}};
                 }),
                 {"lora::adapter", "5x3", "3x7", "swapped"}));
  CHECK(mentions(refusal<lora::shape_error>([&] {
                   a{A, B.leftCols(2), {.alpha = 2}};
                 }),
                 {"3x7", "5x2"}));
  CHECK(mentions(
      refusal<lora::shape_error>([&] { lora::basic_adapter(A, A, lora::scaling{.alpha = 2}); }),
      {"3x7"}));
  CHECK(mentions(refusal<lora::value_error>([&] {
                   a{empty_A, empty_B, {.alpha = 2}};
                 }),
                 {"rank 0"}));
  CHECK(mentions(refusal<lora::value_error>([&] {
                   a{A, B, {.alpha = NAN}};
                 }),
                 {"alpha is not finite"}));
  CHECK(mentions(refusal<lora::value_error>([&] {
                   lora::adapter_view<float>{lora::as_matrix(a(A, B, {.alpha = 2}).lora_A()),
                                             lora::as_matrix(a(A, B, {.alpha = 2}).lora_B()),
                                             {.alpha = INFINITY}};
                 }),
                 {"not finite"}));
  const std::vector<float> six(6), none;
  using view = lora::adapter_view<float>;
  CHECK(mentions(refusal<lora::shape_error>([&] {
                   view{lora::row_major(six, 2, 3), lora::row_major(six, 2, 3), {.alpha = 2}};
                 }),
                 {"lora::adapter", "lora_A is 2x3", "lora_B is 2x3", "rank x in_features"}));
  CHECK(mentions(refusal<lora::value_error>([&] {
                   view{lora::row_major(none, 0, 3), lora::row_major(none, 2, 0), {.alpha = 2}};
                 }),
                 {"lora::scaling", "rank 0", "fixed"}));
  CHECK(mentions(refusal<lora::value_error>(
                     [&] { lora::basic_adapter(A, B, lora::scaling{.alpha = -INFINITY}); }),
                 {"lora::scaling", "alpha is not finite"}));
  // A copy of an adapter whose scaling overflowed on the way.
  const a big{A, B, {.alpha = 200}};
  CHECK(mentions(refusal<lora::value_error>([&] { a(lora::scaled(1e307, big)); }), {"not finite"}));
}

TEST_CASE("adapter_view looks, and follows what it looks at", "[adapter]") {
  test::random g(504);
  std::vector<float> A(12), B(8);
  for (auto& v : A) v = static_cast<float>(g.uniform(-1, 1));
  const lora::adapter_view<float> l{
      lora::row_major(A, 2, 6), lora::row_major(B, 4, 2), {.alpha = 3}};
  CHECK(l.lora_A().data() == A.data());
  CHECK((l.rank() == 2 && l.in_features() == 6 && l.out_features() == 4 && l.scaling() == 1.5));
  B[7] = 5;
  CHECK(l.lora_B()(3, 1) == 5);

  const lora::adapter<float> owner{l.lora_A(), l.lora_B(), {.alpha = 3}};
  const lora::adapter_view<float> of_owner = owner;
  CHECK(of_owner.lora_A().data() == owner.lora_A().data());
  CHECK(of_owner.scaling() == owner.scaling());
  static_assert(!std::is_constructible_v<lora::adapter_view<float>, lora::adapter<float>>,
                "it would dangle");
  static_assert(!std::is_constructible_v<lora::adapter_view<float>, const lora::adapter<float>>,
                "it would dangle");
  static_assert(lora::enable_adapter_view<lora::adapter_view<float>>);
  static_assert(!lora::enable_adapter_view<lora::adapter<float>> &&
                !lora::enable_adapter_view<homemade>);
  static_assert(std::is_trivially_copyable_v<lora::adapter_view<lora::bfloat16>>);
}

TEST_CASE("basic_adapter over any matrix types", "[adapter]") {
  test::random g(505);
  const Eigen::MatrixXf A = g.integers<float>(2, 5, 3);
  Eigen::Matrix<double, 3, 2> B;
  B << 1, 2, 3, 4, 5, 6;
  const lora::basic_adapter mixed(lora::as_matrix(A), B, lora::scaling{.alpha = 5});
  static_assert(
      std::is_same_v<std::remove_cvref_t<decltype(mixed.lora_B())>, Eigen::Matrix<double, 3, 2>>);
  CHECK(mixed.lora_A().data() == A.data());
  CHECK(mixed.lora_B().data() != B.data());
  CHECK(mixed.scaling() == 2.5);
  static_assert(!lora::enable_adapter_view<std::remove_const_t<decltype(mixed)>>, "B is owned");
  const lora::basic_adapter view(lora::as_matrix(A), lora::as_matrix(B), lora::scaling{.alpha = 5});
  static_assert(lora::enable_adapter_view<std::remove_const_t<decltype(view)>>);
  static_assert(std::is_same_v<decltype(lora::delta_weight(mixed)), Eigen::MatrixXd>);
  CHECK(test::exact(lora::delta_weight(mixed)) == test::exact_delta(mixed));
  CHECK(test::exact(lora::delta_weight(view)) == test::exact_delta(mixed));
}

TEST_CASE("scaled multiplies and keeps owners by pointer, views by value", "[scaled]") {
  const Eigen::MatrixXf A = Eigen::MatrixXf::Ones(2, 3), B = Eigen::MatrixXf::Ones(4, 2);
  const lora::adapter<float> l{A, B, {.alpha = 3}};
  const auto half = lora::scaled(0.5, l);
  CHECK(half.scaling() == 0.75);
  CHECK(half.strength() == 0.5);
  CHECK(&half.adapter() == &l);
  CHECK(&half.lora_A() == &l.lora_A());
  CHECK(half.rank() == 2);
  static_assert(!decltype(half)::holds_view);

  // Nested, also from temporaries of views: weights multiply, and nothing dangles.
  const auto nested =
      lora::scaled(-4, lora::scaled(0.25, lora::scaled(0.5, lora::adapter_view<float>(l))));
  CHECK(nested.scaling() == -0.75);
  CHECK(nested.lora_B().data() == l.lora_B().data());
  static_assert(decltype(nested)::holds_view);
  static_assert(lora::low_rank<decltype(nested)> &&
                lora::enable_adapter_view<std::remove_const_t<decltype(nested)>>);
  CHECK(lora::scaled(1, l).scaling() == l.scaling());
  CHECK(lora::scaled(0.0, l).scaling() == 0.0);
  // Copies and assignment, as of any view.
  auto other = lora::scaled(2, l);
  other = half;
  CHECK(other.scaling() == 0.75);
}

TEST_CASE("a weight that is not finite is refused, also a product that overflows when it is used",
          "[scaled]") {
  const Eigen::MatrixXf A = Eigen::MatrixXf::Ones(2, 3), B = Eigen::MatrixXf::Ones(4, 2);
  const lora::adapter<float> l{A, B, {.alpha = 200}};
  for (const double weight :
       {std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity(),
        std::numeric_limits<double>::quiet_NaN()})
    CHECK(mentions(refusal<lora::value_error>([&] { (void)lora::scaled(weight, l); }),
                   {"lora::scaled", "not finite"}));
  const auto overflowing = lora::scaled(1e307, l);
  CHECK(mentions(refusal<lora::value_error>([&] { (void)lora::delta_weight(overflowing); }),
                 {"lora::delta_weight", "scaling is not finite"}));
}

TEST_CASE("a user's own type is an adapter everywhere", "[adapter]") {
  test::random g(506);
  const homemade mine(g.integers<double>(7, 3, 3), g.integers<double>(5, 3, 3), -0.5F);
  const test::exact_matrix delta = test::exact_delta(mine);
  CHECK(delta.rows() == 5);
  CHECK(delta.cols() == 7);
  CHECK(test::exact(lora::delta_weight(mine)) == delta);
  CHECK(test::exact(lora::delta_weight(lora::scaled(2, mine))) == 2 * delta);
  CHECK(test::exact(lora::delta_weight(std::vector<homemade>{mine, mine})) == 2 * delta);

  const Eigen::MatrixXf W = g.integers<float>(5, 7, 9);
  Eigen::MatrixXf merged = W;
  lora::merge(merged, mine);
  CHECK(test::exact(merged) == test::exact(W) + delta);
  const Eigen::VectorXf x = g.integers<float>(7, 1, 3);
  Eigen::VectorXf y = Eigen::VectorXf::Zero(5), z(5);
  lora::apply(x, y, mine);
  CHECK(test::exact(y) == test::times(delta, test::exact(x)));
  lora::forward(W, x, z, mine);
  CHECK(test::exact(z) == test::times(test::exact(W) + delta, test::exact(x)));

  lora::linear<float> layer(W);
  layer.attach("mine", lora::scaled(3, mine));
  CHECK(layer.at("mine").strength == 3);
  CHECK(layer.at("mine").scaling == -0.5);
  CHECK(layer.at("mine").rank == 3);
  layer.merge();
  CHECK(test::exact(layer.weight()) == test::exact(W) + 3 * delta);
  CHECK(lora::adapter<double>(mine).scaling() == -0.5);
}

namespace {

/// An adapter that says of itself what it likes.
struct claims {
  MatrixXf A, B;
  double s;
  index_t r;
  const MatrixXf& lora_A() const { return A; }
  const MatrixXf& lora_B() const { return B; }
  double scaling() const { return s; }
  index_t rank() const { return r; }
};

/// Every verb and attach, on a 3 x 4 layer, must refuse the adapter with these words and its own
/// name, and write nothing.
template <class Error>
void refused_by_every_verb(const claims& l, std::initializer_list<const char*> words) {
  const MatrixXf W = MatrixXf::Constant(3, 4, 2), x = MatrixXf::Ones(4, 2),
                 y = MatrixXf::Constant(3, 2, 7);
  MatrixXf weight = W, out = y;
  lora::linear<float> layer(W);
  const auto refuses = [&](const char* operation, const auto& call) {
    const std::string text = refusal<Error>(call);
    CAPTURE(text);
    CHECK(mentions(text, {operation}));
    CHECK(mentions(text, words));
    CHECK((same_bits(weight, W) && same_bits(out, y) && layer.names().empty()));
  };
  refuses("lora::merge:", [&] { lora::merge(weight, l); });
  refuses("lora::unmerge:", [&] { lora::unmerge(weight, l); });
  refuses("lora::merge_checked:", [&] { lora::merge_checked(weight, l); });
  refuses("lora::merged:", [&] { (void)lora::merged(weight, l); });
  refuses("lora::delta_weight:", [&] { (void)lora::delta_weight(l); });
  refuses("lora::apply:", [&] { lora::apply(x, out, l); });
  refuses("lora::forward:", [&] { lora::forward(W, x, out, l); });
  refuses("lora::linear::attach:", [&] { layer.attach("l", l); });
}

}  // namespace

TEST_CASE("an adapter that contradicts itself is refused by every verb", "[adapter]") {
  const MatrixXf A = MatrixXf::Ones(2, 4), B = MatrixXf::Ones(3, 2);
  refused_by_every_verb<lora::shape_error>({A, B, 0.5, 3},
                                           {"rank 3", "lora_A is 2x4", "lora_B is 3x2"});
  refused_by_every_verb<lora::shape_error>({A, B, 0.5, -1}, {"rank -1"});
  refused_by_every_verb<lora::shape_error>({A, MatrixXf::Ones(3, 5), 0.5, 2},
                                           {"rank 2", "2x4", "3x5"});
  refused_by_every_verb<lora::shape_error>({A, MatrixXf::Ones(3, 5), 0.0, 2},
                                           {"rank 2", "2x4", "3x5"});  // also at strength 0
  for (const double s : {double{INFINITY}, -double{INFINITY}, double{NAN}})
    refused_by_every_verb<lora::value_error>({A, B, s, 2}, {"scaling is not finite"});
}
