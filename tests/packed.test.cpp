// SPDX-License-Identifier: Apache-2.0
//
// packed_weight and packed_adapter hold every bit, and what is computed from panels has the bits of
// what is computed from plain matrices: products, merges, and merges where infinities and NaN end
// the fast path.
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "lora/forward.hpp"
#include "lora/linear.hpp"
#include "lora/merge.hpp"
#include "support/agreement.hpp"
#include "support/allocations.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/openmp.hpp"
#include "support/random.hpp"
#include "support/refused.hpp"
#include "support/sanitized.hpp"

using lora::index_t;
using test::mentions;
using test::refusal;
using test::same_bits;

namespace {

/// Ranks below, at and above a panel's width and the sides.
template <class F>
lora::adapter<F> random_adapter(test::random& g, index_t out, index_t in) {
  const index_t rank = g.one_in(3) ? g.integer(1, 3 * std::min(out, in)) : g.integer(1, 40);
  return {g.reals<F>(rank, in, 0.4),
          g.reals<F>(out, rank, 0.4),
          {.alpha = g.uniform(0.2, 3) * static_cast<double>(rank)}};
}

template <class T, class F>
struct formats {
  using weight = T;
  using factor = F;
};

template <class T, class F, class X>
void check_products(std::uint64_t seed) {
  test::random g(seed);
  CAPTURE(g.seed());
  lora::workspace space;
  for (int trial = 0; trial < test::trials(25); ++trial) {
    const index_t out = g.integer(1, 90),
                  in = g.one_in(5) ? g.integer(250, 1100) : g.integer(1, 90);
    const index_t tokens = g.one_in(5) ? g.integer(100, 220) : g.integer(1, 19);
    CAPTURE(trial, out, in, tokens);
    const test::matrix<T> W = g.reals<T>(out, in, 1);
    const test::col_matrix<X> x = g.reals<X>(in, tokens, 1);
    const auto first = random_adapter<F>(g, out, in), second = random_adapter<F>(g, out, in);
    const lora::packed_weight<T> packed{W};
    const lora::packed_adapter<F> first_packed{first}, second_packed{second};
    test::col_matrix<X> plain(out, tokens), y(out, tokens);
    lora::forward(W, x, plain, first, lora::scaled(-0.3, second));
    lora::forward(packed, x, y, first, lora::scaled(-0.3, second));
    CHECK(same_bits(y, plain));
    lora::forward(space, packed, x, y, first_packed, lora::scaled(-0.3, second_packed));
    CHECK(same_bits(y, plain));
    lora::forward(space, W, x, y, first_packed, lora::scaled(-0.3, second));
    CHECK(same_bits(y, plain));
    // One token at a time, and in rows.
    test::matrix<X> rows(out, tokens);
    lora::forward(space, packed, x, rows, first_packed, lora::scaled(-0.3, second_packed));
    CHECK(same_bits(rows, plain));
    const index_t t = g.integer(0, tokens - 1);
    test::col_matrix<X> one(out, 1);
    lora::forward(space, packed, x.col(t), one, first_packed, lora::scaled(-0.3, second_packed));
    CHECK(same_bits(one, plain.col(t)));
    // With a bias, and the adapters' part alone.
    const std::vector<float> bias(static_cast<std::size_t>(out), 0.75F);
    lora::forward(lora::with_bias(W, bias), x, plain, first);
    lora::forward(space, lora::with_bias(packed, bias), x, y, first_packed);
    CHECK(same_bits(y, plain));
    plain = y;
    lora::apply(x, plain, first, second);
    lora::apply(space, x, y, std::vector{first_packed, second_packed});
    CHECK(same_bits(y, plain));
  }
}

}  // namespace

TEMPLATE_TEST_CASE("panels hold every bit", "[packed]", float, double, lora::float16,
                   lora::bfloat16) {
  test::random g(1001);
  CAPTURE(g.seed());
  for (int trial = 0; trial < test::trials(60); ++trial) {
    const index_t out = g.integer(0, 70), in = g.integer(0, 70);
    CAPTURE(trial, out, in);
    test::matrix<TestType> W = g.reals<TestType>(out, in, 2);
    if (W.size() > 2) {
      W.data()[0] = std::numeric_limits<TestType>::signaling_NaN();
      W.data()[W.size() - 1] = test::stored<TestType>(-0.0);
    }
    const test::col_matrix<TestType> W_cols = W;
    const auto check = [&](const lora::packed_weight<TestType>& packed) {
      CHECK((packed.out_features() == out && packed.in_features() == in));
      CHECK(same_bits(packed.matrix(), W));
      test::col_matrix<TestType> back(out, in);
      packed.copy_to(back);
      CHECK(same_bits(back, W_cols));
      CHECK(packed.bytes() >= static_cast<std::size_t>(W.size()) * sizeof(TestType));
    };
    lora::packed_weight<TestType> packed{W};
    check(packed);
    check(lora::packed_weight<TestType>{W_cols});
    test::matrix<TestType> large(out + 2, in + 3);
    large.setConstant(test::stored<TestType>(7));
    large.block(1, 2, out, in) = W;
    check(lora::packed_weight<TestType>{large.block(1, 2, out, in)});
    packed.assign(test::matrix<TestType>(
        test::matrix<TestType>::Constant(out, in, test::stored<TestType>(3))));
    CHECK((W.size() == 0 || test::value(packed(out - 1, in - 1)) == 3));
    packed.assign(W_cols);
    check(packed);
  }
}

TEST_CASE("products from panels have the bits of products from matrices", "[packed]") {
  SECTION("float") { check_products<float, float, float>(1002); }
  SECTION("double") { check_products<double, double, double>(1003); }
  SECTION("bfloat16, all of it") {
    check_products<lora::bfloat16, lora::bfloat16, lora::bfloat16>(1004);
  }
  SECTION("float16, float factors") { check_products<lora::float16, float, lora::float16>(1005); }
  SECTION("bfloat16, float factors and activations") {
    check_products<lora::bfloat16, float, float>(1006);
  }
  SECTION("float, float16 factors") { check_products<float, lora::float16, float>(1007); }
  SECTION("bfloat16 panels in a sum of doubles") {
    check_products<lora::bfloat16, lora::float16, double>(1008);
  }
}

TEMPLATE_TEST_CASE("chunks of W, widened or not, and turns of two panels change no bit", "[packed]",
                   (std::pair<float, float>), (std::pair<double, double>),
                   (std::pair<lora::bfloat16, float>), (std::pair<lora::float16, float>),
                   (std::pair<lora::bfloat16, lora::bfloat16>)) {
  using T = typename TestType::first_type;
  using X = typename TestType::second_type;
  test::random g(1021);
  CAPTURE(g.seed());
  lora::workspace space;
  // Around the depths of a chunk and of a turn, and around full and uneven tiles, few and many.
  for (const index_t in : {1, 63, 65, 127, 128, 129, 255, 257, 515, 901}) {
    const index_t out = 70, most = 140;
    const lora::packed_weight<T> W{g.reals<T>(out, in, 1)};
    const test::col_matrix<X> x = g.reals<X>(in, most, 1);
    test::col_matrix<X> alone(out, most);
    for (index_t t = 0; t < most; ++t) lora::forward(space, W, x.col(t), alone.col(t));
    for (const index_t tokens : {2, 3, 5, 8, 9, 16, 25, 31, 32, 60, 64, 140}) {
      CAPTURE(in, tokens);
      test::col_matrix<X> y(out, tokens);
      lora::forward(space, W, x.leftCols(tokens), y);
      CHECK(same_bits(y, test::col_matrix<X>(alone.leftCols(tokens))));
    }
  }
}

TEMPLATE_TEST_CASE("merging panels has the bits of merging the matrix, and of its definition",
                   "[packed]", (formats<float, float>), (formats<double, float>),
                   (formats<lora::float16, float>), (formats<lora::bfloat16, float>),
                   (formats<lora::bfloat16, lora::bfloat16>), (formats<float, lora::bfloat16>)) {
  test::random g(1010);
  CAPTURE(g.seed());
  using T = typename TestType::weight;
  using F = typename TestType::factor;
  using acc = lora::accumulator_t<T, F>;
  for (int trial = 0; trial < test::trials(80); ++trial) {
    const index_t out = g.integer(1, 70), in = g.integer(1, 70);
    CAPTURE(trial, out, in);
    test::matrix<T> W = g.reals<T>(out, in, 2);
    auto l = random_adapter<F>(g, out, in);
    // Numbers at the ends of the fast paths, at random places of a few trials.
    const double special[] = {0.0,
                              -0.0,
                              2.0,
                              -0x1p-63,
                              0x1p-64,
                              0x1p-120,
                              std::numeric_limits<double>::infinity(),
                              std::numeric_limits<double>::quiet_NaN(),
                              static_cast<double>(std::numeric_limits<T>::max()),
                              static_cast<double>(std::numeric_limits<T>::denorm_min())};
    if (trial % 2 == 1)
      for (int n = 0; n < 6; ++n)
        W(g.integer(0, out - 1), g.integer(0, in - 1)) = test::stored<T>(special[g.integer(0, 9)]);
    if (trial % 4 == 3) {  // rows of the delta that are zero
      auto B = test::matrix<F>(l.lora_B());
      B.row(g.integer(0, out - 1)).setConstant(F(0));
      l = lora::adapter<F>{
          l.lora_A(), B, {.alpha = l.scaling(), .rule = lora::scaling_rule::fixed}};
    }
    const auto delta = lora::delta_weight(l).template cast<acc>().eval();
    test::matrix<T> expected = W;
    std::size_t became_nonfinite = 0;
    for (index_t i = 0; i < out; ++i)
      for (index_t j = 0; j < in; ++j) {
        // delta_weight in float is the chain that a merge into float or 16 bits adds.
        if (delta(i, j) != acc(0))
          expected(i, j) = lora::detail::narrow<T>(lora::detail::widen<acc>(W(i, j)) + delta(i, j));
        became_nonfinite +=
            std::isfinite(test::value(W(i, j))) && !std::isfinite(test::value(expected(i, j)));
      }
    test::matrix<T> in_rows = W;
    test::col_matrix<T> in_cols = W;
    lora::packed_weight<T> in_panels{W};
    const auto report = lora::merge(in_rows, l);
    CHECK(lora::merge(in_panels, l).became_nonfinite == report.became_nonfinite);
    lora::merge(in_cols, l);
    if constexpr (!std::is_same_v<T, double>) {
      CHECK(same_bits(in_rows, expected));
      CHECK(report.became_nonfinite == became_nonfinite);
    }
    CHECK(same_bits(in_cols, test::col_matrix<T>(in_rows)));
    CHECK(same_bits(in_panels.matrix(), in_rows));
    CHECK(same_bits(lora::merged(lora::packed_weight<T>{W}, l).matrix(), in_rows));
    CHECK(same_bits(lora::merged(W, l), in_rows));
    lora::unmerge(in_panels, l);
    lora::unmerge(in_rows, l);
    CHECK(same_bits(in_panels.matrix(), in_rows));
  }
}

TEST_CASE(
    "adapters of several formats merge to the same bits in every layout, with any number of "
    "threads",
    "[packed]") {
  using lora::bfloat16;
  test::random g(1016);
  CAPTURE(g.seed());
  // Large enough that the factors are packed on several threads; ranks odd and even, one format
  // after the other, and a scaling and a rank beyond those that dot products take.
  const index_t out = 331, in = 517;
  const auto W = g.reals<bfloat16>(out, in, 1);
  const auto of_rank = [&]<class F>(F, index_t rank, double s) {
    return lora::adapter<F>{g.reals<F>(rank, in, 0.3),
                            g.reals<F>(out, rank, 0.3),
                            {.alpha = s, .rule = lora::scaling_rule::fixed}};
  };
  const auto a = of_rank(bfloat16(), 7, 0.3), b = of_rank(bfloat16(), 64, -1.7);
  const auto c = of_rank(0.0F, 33, 0.7), d = of_rank(0.0F, 1, 2.5);
  const auto tiny = of_rank(bfloat16(), 5, 0x1p-40), few = of_rank(bfloat16(), 3, 1.5);
  const auto parts = [](const auto&... l) { return std::vector{agreement::part_of(l)...}; };
  const auto check = [&](const auto&... l) {
    const auto all = parts(l...);
    Eigen::MatrixXd exact = agreement::in_double(W);
    for (const auto& p : all) exact += p.s * p.B * p.A;
    const int before = omp_get_max_threads();
    test::matrix<bfloat16> first;
    for (const int threads : {1, 2, 3, 8}) {
      omp_set_num_threads(threads);
      test::matrix<bfloat16> rows = W;
      test::col_matrix<bfloat16> cols = W;
      lora::packed_weight panels{W};
      lora::linear<bfloat16> layer(W);
      index_t n = 0;
      (layer.attach(std::string(1, static_cast<char>('a' + n++)), l), ...);
      lora::merge(rows, l...);
      lora::merge(cols, l...);
      lora::merge(panels, l...);
      layer.merge();
      omp_set_num_threads(before);
      if (threads == 1) first = rows;
      CHECK(same_bits(rows, first));
      CHECK(same_bits(test::matrix<bfloat16>(cols), first));
      CHECK(same_bits(panels.matrix(), first));
      CHECK(same_bits(layer.weight(), first));
    }
    const auto f = agreement::formats_of<bfloat16, float, float>();
    const Eigen::MatrixXd bound = agreement::merge_bound(agreement::in_double(W), all, f);
    CHECK(((agreement::in_double(first) - exact).array().abs() <= bound.array()).all());
  };
  check(a);
  check(a, b);
  check(a, c);
  check(c, a);
  check(c, d, b, a, d);
  check(b, tiny);
  check(tiny, a, b);
  check(few, a);
}

TEST_CASE("merge_checked leaves panels as they are when a result is not finite", "[packed]") {
  test::matrix<lora::float16> W =
      test::matrix<lora::float16>::Constant(19, 23, lora::float16(60000));
  lora::packed_weight packed{W};
  const lora::adapter<float> up{
      Eigen::MatrixXf::Constant(1, 23, 1), Eigen::MatrixXf::Constant(19, 1, 6000), {.alpha = 1}};
  CHECK(mentions(refusal<lora::value_error>([&] { lora::merge_checked(packed, up); }),
                 {"merge_checked", "437 of 437"}));
  CHECK(same_bits(packed.matrix(), W));
  lora::merge_checked(packed, lora::scaled(-1, up));
  CHECK(test::value(packed(18, 22)) == 54016);  // 54000, rounded to a multiple of 32
}

TEST_CASE("packing to 16 bits rounds each factor once", "[packed]") {
  test::random g(1011);
  CAPTURE(g.seed());
  const index_t out = 37, in = 300, rank = 19;
  const lora::adapter<float> l{
      g.reals<float>(rank, in, 0.4), g.reals<float>(out, rank, 0.4), {.alpha = 30}};
  const lora::adapter<lora::bfloat16> rounded{
      test::rounded<lora::bfloat16>(test::exact(l.lora_A())),
      test::rounded<lora::bfloat16>(test::exact(l.lora_B())),
      {.alpha = 30}};
  const test::matrix<float> W = g.reals<float>(out, in, 1);
  const test::col_matrix<float> x = g.reals<float>(in, 7, 1);
  test::col_matrix<float> y(out, 7), expected(out, 7);
  lora::forward(W, x, y, lora::packed_adapter<lora::bfloat16>{l});
  lora::forward(W, x, expected, rounded);
  CHECK(same_bits(y, expected));
  CHECK(lora::packed_adapter<lora::bfloat16>{l}.bytes() * 2 <=
        lora::packed_adapter<float>{l}.bytes() + 4096);
  // The stated bound of the delta.
  const double u = 0x1p-8;
  const test::exact_matrix limit =
      (2 * u + u * u) * std::abs(static_cast<long double>(l.scaling())) *
      test::times(test::exact(l.lora_B()).cwiseAbs(), test::exact(l.lora_A()).cwiseAbs());
  CHECK(((test::exact_delta(rounded) - test::exact_delta(l)).cwiseAbs().array() <= limit.array())
            .all());
}

TEST_CASE("U rounded to the format of the factors", "[packed]") {
  using lora::bfloat16;
  SECTION("to nearest, once, after the scaling") {
    // s A x = 3 (1 + 2^-9) lies between 3 and 3 + 2^-6, nearer to 3.
    const bfloat16 A(1), B(5);
    const float x = 1 + 0x1p-9F, W = 0;
    const lora::adapter<bfloat16> l{
        lora::row_major(&A, 1, 1), lora::row_major(&B, 1, 1), {.alpha = 3}};
    float kept = 0, rounded = 0, strong = 0;
    const auto forward = [&](float& y, const auto& one) {
      lora::forward(lora::row_major(&W, 1, 1), lora::col_major(&x, 1, 1), lora::col_major(&y, 1, 1),
                    one);
    };
    const lora::packed_adapter<bfloat16> exact{l}, coarse{l, lora::intermediate_format::factors};
    CHECK(exact.intermediate_format() == lora::intermediate_format::accumulator);
    CHECK(coarse.intermediate_format() == lora::intermediate_format::factors);
    forward(kept, exact);
    forward(rounded, coarse);
    forward(strong, lora::scaled(4.0 / 3, coarse));
    CHECK(kept == 15 * x);
    CHECK(rounded == 15);
    CHECK(strong == 20);
    auto moved = lora::packed_adapter<bfloat16>(coarse);
    const auto other = std::move(moved);
    forward(rounded, other);
    CHECK(rounded == 15);
  }
  SECTION("within its bound, and the same bits in any company") {
    const auto check = []<class T, class X>(std::uint64_t seed, T, X) {
      test::random g(seed);
      CAPTURE(g.seed());
      double worst = 0;
      for (const index_t rank : {1, 2, 5, 33, 70, 601})  // of the last, lora_B in chunks
        for (const index_t tokens : {1, 3, 9, 70}) {
          const index_t out = 37, in = 301;
          const auto W = g.reals<T>(out, in, 1);
          const lora::adapter<bfloat16> l{
              g.reals<bfloat16>(rank, in, 1), g.reals<bfloat16>(out, rank, 1), {.alpha = 0.7}};
          const lora::adapter<float> beside{
              g.reals<float>(3, in, 1), g.reals<float>(out, 3, 1), {.alpha = 5}};
          const test::col_matrix<X> x = g.reals<X>(in, tokens, 1);
          const lora::packed_weight packed{W};
          const lora::packed_adapter<bfloat16> coarse{l, lora::intermediate_format::factors};
          test::col_matrix<float> y(out, tokens), kept(out, tokens), one(out, 1);
          lora::forward(packed, x, y, coarse, beside);
          lora::forward(packed, x, kept, l, beside);
          CHECK(y != kept);
          lora::forward(packed, x.col(tokens - 1), one, coarse, beside);
          REQUIRE(same_bits(one, test::col_matrix<float>(y.col(tokens - 1))));
          auto part = agreement::part_of(l);
          part.U = agreement::format_of<bfloat16>();
          const auto exact = (test::times(
              test::exact(W) + test::exact_delta(l) + test::exact_delta(beside), test::exact(x)));
          const Eigen::MatrixXd bound = agreement::error_bound(
              agreement::in_double(W), {},
              {.merged = {}, .mixed = {part, agreement::part_of(beside)}}, agreement::in_double(x),
              agreement::formats_of<T, float, float, X>());
          worst = std::max(
              worst, ((agreement::in_double(y) - exact.template cast<double>()).cwiseAbs().array() /
                      bound.array())
                         .maxCoeff());
        }
      CHECK(worst <= 1);
      CHECK(worst > 0.01);
    };
    check(1301, float{}, float{});
    check(1302, bfloat16{}, bfloat16{});
    check(1303, bfloat16{}, float{});
  }
}

TEST_CASE("a factor that the panels' format does not hold is refused", "[packed]") {
  test::random g(1020);
  auto A = g.reals<float>(3, 7, 1);
  A(1, 2) = 1e5F;  // float16 ends at 65504
  const lora::adapter<float> l{A, g.reals<float>(5, 3, 1), {.alpha = 2}};
  CHECK(mentions(refusal<lora::value_error>([&] { lora::packed_adapter<lora::float16>{l}; }),
                 {"packed_adapter", "1, 2", "lora_A"}));
  CHECK(lora::packed_adapter<lora::bfloat16>{l}.rank() == 3);
  // What is not finite already stays that.
  A(1, 2) = std::numeric_limits<float>::infinity();
  CHECK(lora::packed_adapter<lora::float16>{
            lora::adapter<float>{A, g.reals<float>(5, 3, 1), {.alpha = 2}}}
            .rank() == 3);
}

TEMPLATE_TEST_CASE("a merged copy has the panels of the merged weight, padding too", "[packed]",
                   float, double, lora::float16, lora::bfloat16) {
  using T = TestType;
  test::random g(1022);
  for (const auto& [out, in] :
       std::vector<std::pair<index_t, index_t>>{{1, 1}, {33, 7}, {16, 5}, {47, 32}}) {
    CAPTURE(out, in);
    const test::matrix<T> W = g.reals<T>(out, in, 1);
    const auto l = random_adapter<float>(g, out, in);
    const lora::packed_weight<T> ours = lora::merged(lora::packed_weight<T>{W}, l),
                                 want{lora::merged(W, l)};
    REQUIRE(ours.bytes() == want.bytes());
    CHECK(std::memcmp(ours.panels(), want.panels(), want.bytes()) == 0);
  }
}

TEST_CASE("strengths of packed adapters multiply", "[packed]") {
  test::random g(1021);
  const lora::packed_adapter<float> l{random_adapter<float>(g, 9, 8)};
  const auto half = lora::scaled(0.5, l);
  CHECK(lora::scaled(-3, half).scaling() == -1.5 * l.scaling());
  CHECK_THROWS_AS((void)lora::scaled(1e308, lora::scaled(1e308, l)), lora::value_error);
}

TEST_CASE("a workspace makes steady calls allocate nothing", "[packed]") {
  test::random g(1012);
  const auto W = g.reals<float>(61, 130, 1);
  const lora::packed_weight packed{W};
  const lora::adapter<float> plain{
      g.reals<float>(9, 130, 0.4), g.reals<float>(61, 9, 0.4), {.alpha = 13}};
  const lora::packed_adapter<float> l{plain};
  // Small enough for one thread: what OpenMP's own runtime allocates is not ours.
  const test::col_matrix<float> x = g.reals<float>(130, 7, 1);
  test::col_matrix<float> y(61, 7);
  test::matrix<float> rows = W;
  lora::packed_weight merged{W};
  lora::workspace space;
  const auto calls = [&] {
    lora::forward(space, packed, x, y, l, lora::scaled(0.5, plain));
    lora::forward(space, W, x.leftCols(3), y.leftCols(3), l);
    lora::apply(space, x, y, l, plain);
    lora::merge(space, merged, plain);
    lora::merge(space, rows, plain);
    lora::unmerge(space, merged, plain, lora::scaled(0.5, plain));
    lora::merge_checked(space, rows, lora::scaled(-1, plain));
  };
  calls();
  CHECK(space.size() > 0);
  test::allocations::start(0);
  calls();
  test::allocations::stop();
  CHECK(test::allocations::now.count == 0);
  space.clear();
  CHECK(space.size() == 0);
  calls();
  CHECK(y.allFinite());
}

TEST_CASE("panels that do not fit are refused, and nothing is written", "[packed]") {
  test::random g(1013);
  const auto W = g.reals<float>(5, 7, 1);
  lora::packed_weight packed{W};
  const lora::adapter<float> other = random_adapter<float>(g, 7, 5);
  const lora::packed_adapter<float> other_packed{other};
  const test::col_matrix<float> x = g.reals<float>(7, 2, 1);
  test::col_matrix<float> y = g.reals<float>(5, 2, 1);
  const test::col_matrix<float> before = y;
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::forward(packed, x, y, other_packed); }),
                 {"forward", "7x5", "5x7"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::forward(packed, x.topRows(6), y); }),
                 {"forward", "5x7", "6x2"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::forward(packed, x, y.leftCols(1)); }),
                 {"forward", "7x2", "5x1"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::merge(packed, other); }),
                 {"merge", "7x5", "5x7"}));
  CHECK(
      mentions(refusal<lora::shape_error>([&] { packed.copy_to(y); }), {"copy_to", "5x2", "5x7"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { packed.assign(x); }), {"assign", "7x2", "5x7"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::packed_weight<float>(-1, 3); }),
                 {"packed_weight", "-1x3"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::apply(x, y, other_packed); }),
                 {"apply", "7x5"}));
  CHECK(mentions(refusal<lora::value_error>([&] { (void)lora::scaled(NAN, other_packed); }),
                 {"scaled", "not finite"}));
  CHECK(
      mentions(refusal<lora::shape_error>([&] { lora::with_bias(packed, std::vector<float>(4)); }),
               {"with_bias", "4x1"}));
  const lora::adapter<double> huge{
      Eigen::MatrixXd::Ones(1, 7), Eigen::MatrixXd::Ones(5, 1), {.alpha = 1e300}};
  const lora::packed_adapter<double> huge_packed{huge};
  CHECK(mentions(refusal<lora::value_error>(
                     [&] { lora::forward(packed, x, y, lora::scaled(1e300, huge_packed)); }),
                 {"forward", "not finite"}));
  CHECK(same_bits(y, before));
  CHECK(same_bits(packed.matrix(), W));
}
