// SPDX-License-Identifier: Apache-2.0
//
// OFT against the dense R of its definition, in long double; and PEFT's own weights and outputs.
#include "lora/kinds/oft.hpp"

#include <Eigen/LU>
#include <cstddef>

#include "kinds/by_hand.hpp"

static_assert(lora::adapter_kind<lora::oft_adapter<float>>);
static_assert(lora::adapter_kind<lora::oft_adapter<lora::bfloat16>>);
static_assert(!lora::low_rank<lora::oft_adapter<float>>);

namespace {

using by_hand::acc_of;
using by_hand::index_t;
using lora::oft_adapter;
using lora::oft_rotation;
using lora::oft_settings;
using test::exact_matrix;

/// R as a dense matrix, its inverse, and how far R in double may be from it.
struct dense {
  exact_matrix R, inverse, off;
};

/// Coefficients of the powers of Q, as PEFT's loop sums them.
std::vector<int> series(int terms) {
  switch (terms) {
    case 1: return {1};
    case 2: return {1, 2};
    case 3: return {1, 2, 2, 1};
    case 4: return {1, 2, 2, 1};
    case 5: return {1, 2, 2, 2, 1};
    case 6: return {1, 2, 2, 2, 2, 1};
    default: return {1, 2, 2, 2, 2, 2, 1};
  }
}

/// From the stored numbers alone.
dense dense_of(const exact_matrix& packed, index_t b, const oft_settings& settings) {
  const index_t in = settings.in_features;
  exact_matrix Q = exact_matrix::Zero(in, in);
  for (index_t block = 0; block < in / b; ++block) {
    const index_t row = packed.rows() == 1 ? 0 : block;
    index_t next = 0;
    long double squares = 0;
    exact_matrix q = exact_matrix::Zero(b, b);
    for (index_t i = 0; i < b; ++i)
      for (index_t j = i + 1; j < b; ++j) {
        q(i, j) = packed(row, next++);
        q(j, i) = -q(i, j);
        squares += 2 * q(i, j) * q(i, j);
      }
    if (settings.coft_eps) {
      const long double most =
          *settings.coft_eps / std::sqrt(static_cast<long double>(packed.rows()));
      if (std::sqrt(squares) > most) q *= most / std::sqrt(squares);
    }
    Q.block(block * b, block * b, b, b) = q;
  }
  const exact_matrix I = exact_matrix::Identity(in, in);
  dense result;
  const auto size = static_cast<long double>(b);
  if (settings.rotation == oft_rotation::cayley) {
    result.R = (I - Q) * exact_matrix((I + Q).fullPivLu().inverse());
    // |A^-1| <= 1 and |x| = 1 (2-norms), and gamma_3b |L||U| with |L| <= 1 and growth of at most 8.
    result.off = exact_matrix::Constant(
        in, in, 3 * size * 0x1p-53L * size * size * 8 * (1 + Q.cwiseAbs().maxCoeff()));
  } else {
    const auto coefficients = series(settings.neumann_terms);
    exact_matrix power = I, absolute = I, sum = exact_matrix::Zero(in, in), magnitude = sum;
    for (const int c : coefficients) {
      sum += c * power;
      magnitude += c * absolute;
      power = exact_matrix(power * Q);
      absolute = exact_matrix(absolute * Q.cwiseAbs());
    }
    result.R = sum;
    const auto terms = static_cast<index_t>(coefficients.size());
    result.off = by_hand::gamma<double>(terms * (b + 1)) * magnitude;
  }
  if (settings.coft_eps) result.off += 8 * 0x1p-53L * size * exact_matrix::Constant(in, in, 1);
  for (index_t i = 0; i < in; ++i)
    for (index_t j = 0; j < in; ++j)
      if (i / b != j / b) result.off(i, j) = 0;
  result.inverse = result.R.fullPivLu().inverse();
  return result;
}

struct sizes {
  index_t out, in, b, stored;
};
constexpr sizes all_sizes[] = {{5, 12, 4, 3},  {7, 9, 3, 1},   {3, 7, 7, 1},  {4, 6, 1, 6},
                               {1, 34, 17, 2}, {20, 10, 2, 5}, {33, 18, 6, 1}};

}  // namespace

TEMPLATE_TEST_CASE("W' = W R^T row by row, R^T x token by token, and back", "[oft]", float, double,
                   lora::float16, lora::bfloat16) {
  using T = TestType;
  using acc = acc_of<T>;
  test::random g(41);
  std::vector<oft_settings> ways{
      {.out_features = 0, .in_features = 0, .rotation = oft_rotation::cayley}};
  for (int terms = 1; terms <= 7; ++terms)
    ways.push_back({.out_features = 0, .in_features = 0, .neumann_terms = terms});
  ways.push_back({.out_features = 0, .in_features = 0, .coft_eps = 0.3});
  for (oft_settings settings : ways)
    for (const auto& [out, in, b, stored] : all_sizes) {
      settings.out_features = out;
      settings.in_features = in;
      CAPTURE(out, in, b, stored, settings.neumann_terms, settings.rotation, g.seed());
      const double spread = 0.7 / static_cast<double>(b);  // no eigenvalue near 1
      const test::matrix<T> packed = g.reals<T>(stored, b * (b - 1) / 2, spread);
      const oft_adapter<T> kind(packed, settings);
      CHECK(kind.block_size() == b);
      CHECK(kind.out_features() == out);
      CHECK(kind.in_features() == in);
      const dense exact = dense_of(test::exact(packed), b, settings);
      const auto map = by_hand::only<lora::input_step<acc>>(by_hand::of<acc>(kind)).map;
      const long double chain = by_hand::gamma<acc>(b + 1);

      const test::matrix<acc> W = g.reals<acc>(out, in, 1);
      const exact_matrix w = test::exact(W), size = w.cwiseAbs();
      const exact_matrix T_abs = exact.R.cwiseAbs().transpose(), off = exact.off.transpose();
      test::matrix<acc> rows = W;
      map->rows(rows.data(), out, in);
      const exact_matrix allowed = chain * size * T_abs + 2 * size * off;
      CHECK(by_hand::within(rows, w * exact.R.transpose(), allowed));

      // Row by row, and with room between them: the same bits.
      test::matrix<acc> apart = test::matrix<acc>::Constant(out, in + 3, 7);
      apart.leftCols(in) = W;
      for (index_t i = 0; i < out; ++i) map->rows(apart.row(i).data(), 1, in + 3);
      CHECK(test::same_bits(test::matrix<acc>(apart.leftCols(in)), rows));
      CHECK((apart.rightCols(3).array() == 7).all());

      const test::col_matrix<acc> x = g.reals<acc>(in, 19, 1);
      test::col_matrix<acc> turned = x;
      map->columns(turned.data(), 19, in);
      const exact_matrix x_exact = test::exact(x), x_size = x_exact.cwiseAbs();
      CHECK(by_hand::within(turned, exact_matrix(exact.R.transpose() * x_exact),
                            chain * T_abs * x_size + 2 * off * x_size));

      map->undo_rows("unmerge", nullptr, 0, in);
      map->undo_rows("unmerge", rows.data(), out, in);
      // Both maps round. The inverse in double has the error of R, times |R^-1| twice, and that of
      // its own solution.
      const exact_matrix back = exact.inverse.cwiseAbs().transpose();
      const exact_matrix inverse_off = back * off * back + 24.0L * 0x1p-53L *
                                                               static_cast<long double>(b * b * b) *
                                                               back * T_abs * back;
      CHECK(by_hand::within(rows, w,
                            exact_matrix(allowed * back + chain * size * T_abs * back +
                                         2 * size * T_abs * inverse_off)));
    }
}

TEMPLATE_TEST_CASE("the exact rotation is orthogonal", "[oft]", float, double, lora::bfloat16) {
  using acc = acc_of<TestType>;
  test::random g(42);
  const test::matrix<TestType> packed = g.reals<TestType>(3, 10, 2);
  const oft_adapter<TestType> kind(
      packed, {.out_features = 4, .in_features = 15, .rotation = oft_rotation::cayley});
  const auto map = by_hand::only<lora::input_step<acc>>(by_hand::of<acc>(kind)).map;
  test::matrix<acc> R = test::matrix<acc>::Identity(15, 15);
  map->rows(R.data(), 15, 15);
  const exact_matrix product = test::exact(R) * test::exact(R).transpose();
  const exact_matrix I = exact_matrix::Identity(15, 15);
  CHECK(by_hand::within(product, I, exact_matrix::Constant(15, 15, 64 * 5 * by_hand::u<acc>)));
}

// Q = [0 1; -1 0] has the eigenvalues i and -i, where 1 + 2q + 2q^2 + 2q^3 + q^4 is 0.
TEST_CASE("a series without an inverse is refused before anything is written", "[oft]") {
  const std::vector<float> numbers{0.25F, 1};
  const auto packed = lora::row_major(numbers, 2, 1);
  const oft_settings settings{.out_features = 3, .in_features = 4};
  const auto map = by_hand::only<lora::input_step<float>>(
                       by_hand::of<float>(oft_adapter<float>(packed, settings)))
                       .map;
  const auto text =
      test::refusal<lora::value_error>([&] { map->undo_rows("unmerge", nullptr, 0, 4); });
  CHECK(test::mentions(text, {"lora::unmerge", "block 1", "no inverse"}));
  // Merging and mixing need none.
  std::vector<float> row{1, 2, 3, 4};
  map->rows(row.data(), 1, 4);
  CHECK((row[2] == 0 && row[3] == 0));

  // A little off, and the rounding of R would decide.
  const std::vector<double> near{1 + 0x1p-50};
  const oft_adapter<double> almost(lora::row_major(near, 1, 1),
                                   {.out_features = 3, .in_features = 2});
  CHECK_THROWS_AS(by_hand::only<lora::input_step<double>>(by_hand::of<double>(almost))
                      .map->undo_rows("unmerge", nullptr, 0, 2),
                  lora::value_error);
  // The exact rotation has one for every Q.
  const oft_adapter<float> cayley(
      packed, {.out_features = 3, .in_features = 4, .rotation = oft_rotation::cayley});
  CHECK_NOTHROW(by_hand::only<lora::input_step<float>>(by_hand::of<float>(cayley))
                    .map->undo_rows("unmerge", nullptr, 0, 4));
  // A NaN has none.
  const std::vector<float> broken{std::numeric_limits<float>::quiet_NaN(), 0.5F};
  const oft_adapter<float> nan(lora::row_major(broken, 2, 1), settings);
  CHECK_THROWS_AS(by_hand::only<lora::input_step<float>>(by_hand::of<float>(nan))
                      .map->undo_rows("unmerge", nullptr, 0, 4),
                  lora::value_error);
}

TEST_CASE("an OFT adapter is there or not", "[oft]") {
  const std::vector<float> numbers{0.25F, 0.5F};
  const oft_adapter<float> kind(lora::row_major(numbers, 2, 1),
                                {.out_features = 3, .in_features = 4});
  CHECK(by_hand::of<float>(kind, 0).empty());
  CHECK(by_hand::of<float>(lora::scaled(2, lora::scaled(0.5, kind))).size() == 1);
  for (const double strength : {0.5, -1.0, 2.0}) {
    const auto text = test::refusal<lora::value_error>([&] { by_hand::of<float>(kind, strength); });
    CHECK(test::mentions(text, {"lora::merge", "strength", "PEFT"}));
  }
}

TEST_CASE("blocks that do not fit and settings without a meaning are refused", "[oft]") {
  const test::matrix<float> two = test::matrix<float>::Zero(2, 3),
                            five = test::matrix<float>::Zero(2, 5);
  const auto refused = [](const auto& blocks, const oft_settings& settings) {
    return test::refusal<lora::shape_error>([&] { (void)oft_adapter<float>(blocks, settings); });
  };
  CHECK(test::mentions(refused(five, {.out_features = 4, .in_features = 8}),
                       {"2x5", "b (b - 1) / 2"}));
  CHECK(test::mentions(refused(two, {.out_features = 4, .in_features = 9}),
                       {"2x3", "in_features is 9"}));
  CHECK(test::mentions(refused(two, {.out_features = 4, .in_features = 7}),
                       {"2x3", "in_features is 7"}));
  CHECK(test::mentions(refused(two, {.out_features = -4, .in_features = 6}), {"-4x6"}));
  const auto bad = [&](oft_settings settings) {
    settings.out_features = 4;
    settings.in_features = 6;
    return test::refusal<lora::value_error>([&] { (void)oft_adapter<float>(two, settings); });
  };
  oft_settings settings{.out_features = 4, .in_features = 6};
  CHECK_NOTHROW(oft_adapter<float>(two, settings));
  settings.neumann_terms = 0;
  CHECK(test::mentions(bad(settings), {"0 terms"}));
  settings.neumann_terms = 1001;
  CHECK(test::mentions(bad(settings), {"1001 terms"}));
  settings.neumann_terms = 5;
  settings.coft_eps = -1;
  CHECK(test::mentions(bad(settings), {"coft_eps"}));
  settings.coft_eps = std::numeric_limits<double>::infinity();
  CHECK(test::mentions(bad(settings), {"coft_eps"}));
}

// PEFT's forward turns by the first adapter first, its merge by the last: the cases know both.
TEST_CASE("PEFT's OFT, and two of them in the order of PEFT's merge", "[oft][golden]") {
  const auto make = [](oft_rotation rotation) {
    return [rotation](const auto& file, const std::string& module, index_t out, index_t in) {
      const auto name = module + ".oft_R.weight";
      const auto values = file.template copy<float>(name);
      const auto& shape = file.at(name).shape;
      return oft_adapter<float>(
          lora::row_major(values, static_cast<index_t>(shape[0]), static_cast<index_t>(shape[1])),
          {.out_features = out, .in_features = in, .rotation = rotation});
    };
  };
  by_hand::check_golden("other_oft", {"a"}, make(oft_rotation::neumann));
  by_hand::check_golden("other_oft_cayley", {"a"}, make(oft_rotation::cayley));
  by_hand::check_golden("other_oft_two", {"a", "b"}, make(oft_rotation::neumann));
  by_hand::check_golden("other_oft_two", {"b", "a"}, make(oft_rotation::neumann));
}
