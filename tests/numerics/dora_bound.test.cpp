// SPDX-License-Identifier: Apache-2.0
//
// Forms with gains (DoRA, IA3, entries) within their bounds, also where W + D cancels, so that the
// norm has few digits left: with one gain and several, merged, unmerged, mixed and looked up; the
// bounds of lora/mixed_bounds.hpp against those that support/dora_bound.hpp finds step by step in
// long double; and rows whose norm lies near the ends of double's range.
#include "support/dora_bound.hpp"

#include <cstdio>

#include "lora/io/peft_entry.hpp"
#include "lora/mixed_bounds.hpp"
#include "support/catch.hpp"
#include "support/dense_delta.hpp"
#include "support/random.hpp"
#include "support/within_bound.hpp"

namespace {

using lora::index_t;
using test::elements;
using test::exact_column;
using test::exact_matrix;
using test::within;

constexpr std::uint64_t seed = 20261202;

/// A base that the first adapter cancels: all but 2^-lost of -D in most columns, and numbers of
/// that size in the others.
template <class T, class L>
test::matrix<T> cancelled(test::random& g, const L& l, double lost) {
  const exact_matrix D = test::exact_delta(l);
  const double rest = std::exp2(-lost);
  test::matrix<T> W(D.rows(), D.cols());
  for (index_t i = 0; i < W.rows(); ++i)
    for (index_t j = 0; j < W.cols(); ++j)
      W(i, j) = test::stored<T>((j % 4 == 3 ? 0.0 : -static_cast<double>(D(i, j))) +
                                rest * g.uniform(0.5, 1.5));
  return W;
}

template <class F>
std::vector<F> magnitudes(test::random& g, index_t out) {
  std::vector<F> m;
  for (index_t i = 0; i < out; ++i)
    m.push_back(static_cast<F>(g.uniform(0.2, 3) * (i % 3 == 0 ? -1 : 1)));
  return m;
}
template <class F>
std::vector<double> in_double(const std::vector<F>& m) {
  return {m.begin(), m.end()};
}

/// The library's bound is not below what the oracle finds step by step, and at most `most` times
/// it: a rounding that is not counted, or one too many, would show.
template <class B>
bool agrees(const B& bound, const exact_matrix& e, long double most) {
  const exact_matrix got = elements(bound);
  return (got.array() >= (1 - 1e-9L) * e.array()).all() && (got.array() <= most * e.array()).all();
}

/// A bias of its own, and nothing else.
class shift_kind {
 public:
  using value_type = float;
  shift_kind(std::vector<double> shift, index_t in) : shift_(std::move(shift)), in_(in) {}
  index_t out_features() const { return static_cast<index_t>(shift_.size()); }
  index_t in_features() const { return in_; }
  template <class Acc>
  std::vector<lora::step<Acc>> steps(const lora::step_request<Acc>&) const {
    return {lora::shift_step{shift_}};
  }

 private:
  std::vector<double> shift_;
  index_t in_;
};

/// What the verbs are given, and what the oracle is.
template <class F>
struct drawn {
  test::random& g;
  index_t out, in;
  lora::adapter<F> first, second, plain;
  std::vector<F> m, n, l;
  std::vector<double> c;
  lora::dora_adapter<F> one, two;
  lora::ia3_adapter<F> factors;
  double strength = g.one_in(2) ? 1 : g.uniform(-2, 2);
  shift_kind shift;

  drawn(test::random& random, index_t outputs, index_t inputs, index_t r)
      : g(random),
        out(outputs),
        in(inputs),
        first(g.reals<F>(r, in, 3), g.reals<F>(out, r, 3), {.alpha = 0.7}),
        second(g.reals<F>(2, in, 0.1), g.reals<F>(out, 2, 0.1), {.alpha = -1.3}),
        plain(g.reals<F>(1, in, 0.1), g.reals<F>(out, 1, 0.1), {.alpha = 0.3}),
        m(magnitudes<F>(g, out)),
        n(magnitudes<F>(g, out)),
        l(magnitudes<F>(g, out)),
        c(static_cast<std::size_t>(out), g.uniform(-1, 1)),
        one(first, m),
        two(second, n),
        factors(lora::ia3_adapter<F>::of_outputs(l, in)),
        shift(c, in) {}

  test::dora_piece of_ia3() const {
    test::dora_piece p(out, in);
    for (const F& stored : l) {
      const double v = static_cast<double>(stored);
      const long double more =
          static_cast<long double>(strength) * (static_cast<long double>(v) - 1);
      p.given.push_back(strength == 1 ? v : 1 + more);
      p.off.push_back(strength == 1 ? 0
                                    : 0x1p-53L * (2 * std::abs(more) + std::abs(p.given.back())));
    }
    p.scales_bias = true;
    return p;
  }
  test::dora_piece of_shift() const {
    test::dora_piece p(out, in);
    p.shift.resize(out);
    for (index_t i = 0; i < out; ++i) p.shift(i) = c[static_cast<std::size_t>(i)];
    return p;
  }

  /// call(pieces, adapters...) for one of several lists.
  template <class Call>
  void each_list(const Call& call) const {
    const test::dora_piece p_one(first, in_double(m)), p_two(second, in_double(n)),
        p_plain(plain, {});
    const auto scaled_factors = lora::scaled(strength, factors);
    call(true, std::vector{p_one}, one);
    call(false, std::vector{p_one, p_plain, p_two}, one, plain, two);
    call(false, std::vector{p_plain, of_ia3(), p_one, p_plain}, plain, scaled_factors, one, plain);
    call(false, std::vector{of_ia3(), p_one}, scaled_factors, one);
    if constexpr (std::is_same_v<F, float>) {
      call(false, std::vector{p_one, of_shift(), of_ia3(), p_plain, of_shift()}, one, shift,
           scaled_factors, plain, shift);
      call(false, std::vector{of_shift(), p_plain}, shift, plain);
    }
  }
};

/// The verbs and the bounds of one list. alone: one adapter, for which the counts of a product are
/// those of the oracle; of several the library counts all ranks for each.
template <class T, class F, class Acc>
void check_list(test::random& g, const test::matrix<T>& W, bool alone,
                const std::vector<test::dora_piece>& pieces, const lora::mixed_form<Acc>& form,
                const lora::mixed_form_bound<Acc>& sure) {
  using acc = Acc;
  const index_t out = W.rows(), in = W.cols(), tokens = 3;
  const auto oracle = test::dora_bound::of<acc>(test::exact(W), pieces);
  const long double close = 1.001L, of_products = alone ? close : 4;

  const bool shifts = oracle.has_shift();
  auto stored = W;
  if (!shifts) {
    lora::merge(stored, form);
    REQUIRE(within(stored, oracle.merged, lora::merge_bound(W, sure)));
  } else {
    stored = test::rounded<T>(oracle.merged);
  }
  REQUIRE(agrees(lora::merge_bound(W, sure), oracle.weight().template stored<T, acc>(), close));
  exact_matrix q;
  const exact_matrix of_q = oracle.unmerged(test::exact(stored), q).template stored<T, acc>();
  auto back = stored;
  if (!shifts) {
    lora::unmerge(back, form);
    REQUIRE(within(back, q, lora::unmerge_bound(stored, sure)));
  }
  REQUIRE(agrees(lora::unmerge_bound(stored, sure), of_q, close));

  const test::matrix<F> x = g.reals<F>(in, tokens, 1);
  const std::vector<F> bias(static_cast<std::size_t>(out), F(0.3F));
  exact_column b = exact_column::Constant(out,
                                          static_cast<long double>(static_cast<double>(bias[0]))),
               b_scaled = b;
  for (std::size_t k = 0; k < pieces.size(); ++k)
    if (pieces[k].scales_bias) b_scaled = b_scaled.cwiseProduct(oracle.f[k]).eval();
  test::matrix<F> y(out, tokens);
  const auto layer = lora::with_bias(W, bias);
  lora::forward(layer, x, y, form);
  exact_matrix want = test::times(oracle.merged, test::exact(x));
  want.colwise() += b_scaled + oracle.shift;
  REQUIRE(within(y, want, lora::forward_bound(layer, x, y, sure)));
  REQUIRE(agrees(lora::forward_bound(layer, x, y, sure),
                 oracle.mixed(test::exact(x), b).template stored<F, acc>(), of_products));

  const test::matrix<F> base_y = g.reals<F>(out, tokens, 1);
  const exact_matrix deltas = oracle.merged - exact_matrix(oracle.g0.asDiagonal() * oracle.W);
  y = base_y;
  lora::apply(x, y, form);
  want = exact_matrix(oracle.g0.asDiagonal() * test::exact(base_y)) +
         test::times(deltas, test::exact(x));
  want.colwise() += oracle.shift;
  const auto apply_bound = lora::apply_bound(x, base_y, sure);
  REQUIRE(within(y, want, apply_bound));
  REQUIRE(agrees(apply_bound,
                 oracle.applied(test::exact(x), test::exact(base_y)).template stored<F, acc>(),
                 of_products));

  // Folded products are rounded to the accumulator: not counted apart where there is one, and none
  // of the library's roundings in double is.
  const long double of_folds = std::is_same_v<acc, double> || alone ? 4 : 1.5L;
  if (!shifts) {
    const test::matrix<T> embedding = W.transpose();
    const std::vector<index_t> ids{in - 1, 0, in - 1};
    const double c = g.uniform(0.1, 9);
    test::matrix<F> found(out, 3);
    lora::embed(lora::scaled_embedding(embedding, c), ids, found, form);
    exact_matrix want_rows(out, 3), base(out, 3);
    for (index_t t = 0; t < 3; ++t) {
      want_rows.col(t) =
          oracle.merged.col(ids[static_cast<std::size_t>(t)]) * static_cast<long double>(c);
      base.col(t) = oracle.W.col(ids[static_cast<std::size_t>(t)]).cwiseAbs();
    }
    const auto U = [&](const test::dora_piece& p) {
      exact_matrix columns(p.rank(), 3);
      for (index_t t = 0; t < 3; ++t) columns.col(t) = p.A.col(ids[static_cast<std::size_t>(t)]);
      return columns;
    };
    auto e = oracle.folded(base, U, 3);
    e.size *= static_cast<long double>(c);
    e.e *= static_cast<long double>(c);
    const auto bound = lora::embed_bound(lora::scaled_embedding(embedding, c), ids, found, sure);
    REQUIRE(within(found, want_rows, bound));
    REQUIRE(agrees(bound, e.template stored<F, acc>(), of_folds));
  }
  // What the caller makes of lora_A: whole numbers, without an error of their own.
  const auto down = [&](const auto& lora_A) {
    test::matrix<F> U(lora_A.rows(), tokens);
    for (index_t k = 0; k < U.size(); ++k)
      U.data()[k] = static_cast<F>(static_cast<float>(k % 7 - 3));
    return U;
  };
  const auto U = [&](const test::dora_piece& p) { return test::exact(down(p.A)); };
  want = oracle.g0.asDiagonal() * test::exact(base_y);
  want.colwise() += oracle.shift;
  exact_column after = exact_column::Ones(out);
  for (std::size_t k = pieces.size(); k-- > 0;) {
    if (oracle.f[k].size() != 0) after = after.cwiseProduct(oracle.f[k]).eval();
    if (pieces[k].rank() != 0) want += after.asDiagonal() * test::times(pieces[k].sB, U(pieces[k]));
  }
  y = base_y;
  lora::apply_through(down, y, form);
  const auto through_bound = lora::apply_through_bound(down, base_y, sure);
  REQUIRE(within(y, want, through_bound));
  if (!shifts) {
    const auto absolute = [&](const test::dora_piece& p) { return exact_matrix(U(p).cwiseAbs()); };
    const auto e = oracle.folded(test::exact(base_y).cwiseAbs(), absolute, 1);
    REQUIRE(agrees(through_bound, e.template stored<F, acc>(), of_folds));
  }
}

template <class T, class F>
void check(test::random& g) {
  const index_t out = g.integer(1, 9), in = g.integer(2, 30), r = g.integer(1, 5);
  const double lost = g.uniform(0, std::is_same_v<F, float> ? 14 : 40);
  const drawn<F> d(g, out, in, r);
  const test::matrix<T> W = cancelled<T>(g, d.first, lost);
  CAPTURE(g.seed(), out, in, r, lost, d.strength);
  d.each_list([&](bool alone, const auto& pieces, const auto&... l) {
    check_list<T, F>(g, W, alone, pieces, lora::mixed(W, l...), lora::mixed_bound(W, l...));
  });
}

}  // namespace

TEMPLATE_TEST_CASE("forms with gains stay within their bounds where the norm cancels",
                   "[dora][bound]", float, double, lora::bfloat16) {
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  test::random g(seed);
  // Each round has every list, and a rounding that is not counted shows in each.
  for (int k = 0; k < 50; ++k)
    check<TestType, std::conditional_t<std::is_same_v<TestType, double>, double, float>>(g);
}

TEST_CASE("a form of plain adapters has their bounds", "[bound]") {
  test::random g(seed);
  const auto W = g.reals<float>(7, 9, 1);
  const lora::adapter<float> a(g.reals<float>(3, 9, 1), g.reals<float>(7, 3, 1), {.alpha = 1.7});
  const lora::adapter<float> b(g.reals<float>(2, 9, 1), g.reals<float>(7, 2, 1), {.alpha = -0.6});
  const auto half = lora::scaled(0.5, a);
  const auto sure = lora::mixed_bound(W, half, b);
  const auto close = [](const auto& left, const auto& right) {
    return (elements(left).array() / elements(right).array() - 1).abs().maxCoeff() < 1e-6L;
  };
  CHECK(close(lora::merge_bound(W, sure), lora::merge_bound(W, half, b)));
  CHECK(close(lora::unmerge_bound(W, sure), lora::unmerge_bound(W, half, b)));
  const auto x = g.reals<float>(9, 4, 1);
  const auto y = g.reals<lora::float16>(7, 4, 1);
  CHECK(close(lora::forward_bound(W, x, y, sure), lora::forward_bound(W, x, y, half, b)));
  CHECK(close(lora::apply_bound(x, y, sure), lora::apply_bound(x, y, half, b)));
  const test::matrix<float> embedding = W.transpose();
  const std::vector<int> ids{8, 0, 8, 1};
  CHECK(close(lora::embed_bound(embedding, ids, y, sure),
              lora::embed_bound(embedding, ids, y, half, b)));
  const auto down = [](const auto& lora_A) -> test::matrix<float> {
    return test::matrix<float>::Constant(lora_A.rows(), 4, 1.5F);
  };
  CHECK(
      close(lora::apply_through_bound(down, y, sure), lora::apply_through_bound(down, y, half, b)));
}

TEST_CASE("a form that changes nothing has no error", "[bound]") {
  const test::matrix<float> W = test::matrix<float>::Constant(2, 3, 1.5F),
                            x = test::matrix<float>::Ones(3, 1);
  const test::matrix<float> y = test::matrix<float>::Ones(2, 1), embedding = W.transpose();
  const lora::adapter<float> l(test::matrix<float>::Ones(1, 3).eval(),
                               test::matrix<float>::Ones(2, 1).eval(), {.alpha = 2});
  const auto none = lora::scaled(0, l);
  for (const auto& sure : {lora::mixed_bound(W), lora::mixed_bound(W, none)}) {
    CHECK(lora::merge_bound(W, sure).largest() == 0);
    CHECK(lora::unmerge_bound(W, sure)(1, 2) == 0);
    CHECK(lora::apply_bound(x, y, sure).isZero(0));
    CHECK(lora::embed_bound(embedding, std::vector<int>{1}, y, sure).isZero(0));
    CHECK(lora::apply_through_bound([](const auto&) { return test::matrix<float>(); }, y, sure)
              .isZero(0));
  }
}

TEST_CASE("bounds of entries are those of what they hold, with W as the base stores it",
          "[bound]") {
  test::random g(seed);
  const index_t out = 5, in = 8;
  const lora::adapter<float> l(g.reals<float>(3, in, 1), g.reals<float>(out, 3, 1), {.alpha = 1.7});
  const auto m = magnitudes<float>(g, out);
  const test::matrix<float> W = g.reals<float>(out, in, 1), stored = W.transpose();
  lora::peft::entry_parts<float> parts;
  parts.name = "h.0.attn";
  parts.experts.push_back(l);
  parts.magnitude = m;
  parts.bias.assign(static_cast<std::size_t>(out), 0.4F);
  parts.fan_in_fan_out = true;
  const lora::peft::entry<float> entry(parts);
  const lora::dora_adapter<float> dora(l, m);
  const auto of_entry = lora::mixed_bound(stored, entry);
  const auto of_dora = lora::mixed_bound(W, dora);
  CHECK(elements(lora::merge_bound(stored, of_entry)) == elements(lora::merge_bound(W, of_dora)));
  const auto half = lora::scaled(0.5, entry);
  const auto of_half = lora::mixed_bound(stored, std::vector{entry}, half);
  CHECK(of_half.gains().size() == 2);
  CHECK(of_half.shifts().size() == 2);

  const auto form = lora::mixed(stored, entry);
  const auto x = g.reals<float>(in, 2, 1);
  test::matrix<float> y(out, 2);
  const std::vector<double> b(static_cast<std::size_t>(out), 0.2);
  const auto layer = lora::with_bias(stored, b, form);
  lora::forward(layer, x, y, form);
  exact_matrix want = test::times(
      test::dora_bound::of<float>(test::exact(W), {{l, in_double(m)}}).merged, test::exact(x));
  want.array() += static_cast<long double>(0.2) +
                  static_cast<long double>(l.scaling()) * static_cast<long double>(0.4F);
  const auto bound = lora::forward_bound(layer, x, y, of_entry);
  CHECK(within(y, want, bound));
  CHECK(bound.maxCoeff() < 1e-4);
  CHECK_FALSE(within(y, (want.array() + 1e-3L).matrix(), bound));
}

TEST_CASE("bounds of a packed weight and of no weight", "[bound]") {
  test::random g(seed);
  const auto W = g.reals<lora::bfloat16>(6, 7, 1);
  const lora::packed_weight<lora::bfloat16> packed(W);
  const auto m = magnitudes<float>(g, 6);
  const lora::dora_adapter<float> dora(
      lora::adapter<float>(g.reals<float>(2, 7, 1), g.reals<float>(6, 2, 1), {.alpha = 1.7}), m);
  CHECK(elements(lora::merge_bound(packed, lora::mixed_bound(packed, dora))) ==
        elements(lora::merge_bound(W, lora::mixed_bound(W, dora))));
  const auto l = lora::ia3_adapter<float>::of_outputs(m, 7);
  CHECK(elements(lora::merge_bound(W, lora::mixed_bound(6, 7, l))) ==
        elements(lora::merge_bound(W, lora::mixed_bound(W, l))));
  CHECK_THROWS_AS(lora::mixed_bound(6, 7, dora), lora::value_error);
  CHECK_THROWS_AS(lora::merge_bound(g.reals<float>(7, 6, 1), lora::mixed_bound(W, l)),
                  lora::shape_error);
}

TEST_CASE("dot products of bfloat16 under a gain stay within the bounds", "[bound]") {
  using F = lora::bfloat16;
  test::random g(seed);
  for (int k = 0; k < 100; ++k) {
    const index_t out = g.integer(1, 9), in = g.integer(2, 40), r = g.integer(1, 9);
    const double size = std::exp2(g.uniform(-60, 0));  // products down to subnormal ones
    CAPTURE(g.seed(), out, in, r, size);
    const auto reals = [&](index_t rows, index_t cols, double factor) {
      test::matrix<F> result(rows, cols);
      for (index_t i = 0; i < result.size(); ++i)
        result.data()[i] = test::stored<F>(factor * g.uniform(-1, 1));
      return result;
    };
    const lora::adapter<F> l(reals(r, in, size), reals(out, r, size), {.alpha = 0.7});
    const auto m = magnitudes<F>(g, out);
    const test::matrix<F> W = reals(out, in, size * size), x = reals(in, 3, size);
    std::vector<double> wide;
    for (const F& v : m) wide.push_back(static_cast<double>(v));
    const lora::dora_adapter<F> dora(l, m);
    const auto exact = test::dora_bound::of<float>(test::exact(W), {{l, wide}}).merged;
    const auto sure = lora::mixed_bound(W, dora);
    auto stored = W;
    lora::merge(stored, dora);
    CHECK(within(stored, exact, lora::merge_bound(W, sure)));
    test::matrix<float> y(out, 3);
    lora::forward(W, x, y, lora::mixed(W, dora));
    CHECK(within(y, test::times(exact, test::exact(x)), lora::forward_bound(W, x, y, sure)));
  }
}

TEMPLATE_TEST_CASE("the gain of a magnitude is within its bound in every format and order",
                   "[dora][bound]", float, double, lora::bfloat16, lora::float16) {
  test::random g(seed);
  const auto check_order = [&g](const auto& W) {
    using F = std::conditional_t<std::is_same_v<TestType, double>, double, float>;
    const index_t out = W.rows(), in = W.cols();
    const lora::adapter<F> l(g.reals<F>(5, in, 1), g.reals<F>(out, 5, 1), {.alpha = 0.7});
    const auto m = magnitudes<F>(g, out);
    const lora::dora_adapter<F> dora(l, m);
    const auto form = lora::mixed(W, dora);
    const auto oracle =
        test::dora_bound::of<lora::accumulator_t<TestType, F>>(test::exact(W), {{l, in_double(m)}});
    for (index_t i = 0; i < out; ++i) {
      CAPTURE(g.seed(), out, in, i);
      const long double p = test::growth{oracle.off[0](i)}.rounds(1, oracle.u).v;
      CHECK(std::abs(form.gain()[static_cast<std::size_t>(i)] - oracle.g0(i)) <=
            p * std::abs(oracle.g0(i)));
    }
  };
  // Whole tiles of every build, and what is left of them.
  for (const auto& [out, in] : {std::pair<index_t, index_t>{19, 77}, {77, 19}, {64, 64}}) {
    const test::matrix<TestType> W = g.reals<TestType>(out, in, 1);
    check_order(W);
    check_order(test::col_matrix<TestType>(W));
  }
}

TEST_CASE("a form with an input map or a delta has no bound yet", "[bound]") {
  const test::matrix<float> W = test::matrix<float>::Ones(2, 3);
  CHECK_THROWS_WITH(lora::mixed_bound(W, lora::ia3_adapter<float>::of_inputs({1, 2, 3}, 2)),
                    Catch::Contains("there is no bound for that yet"));
  CHECK_THROWS_WITH(lora::mixed_bound(W, test::dense_delta(W)),
                    Catch::Contains("there is no bound for that yet"));
}

TEST_CASE("the error of DoRA is that of the norm where it cancels", "[dora][bound]") {
  // One column holds nearly all of the delta, and the base takes it away; the other column has no
  // delta at all.
  const float a = 1000 * 1.0001F, b = 1000 * 0.9999F;
  test::matrix<float> W(1, 2), A(1, 2), B(1, 1);
  A << a, 0;
  B << b;
  W << 1 - a * b, 1;
  const lora::dora_adapter<float> l{A, B, {.alpha = 1}, {1}};
  const auto bound =
      test::dora_bound::of<float>(test::exact(W), {test::dora_piece(l.factors(), {1})});
  const long double without_norm =
      test::gamma(4, 0x1p-24L) * std::abs(bound.g0(0));  // element (0, 1)
  lora::merge(W, l);
  const long double error = std::abs(bound.merged(0, 1) - static_cast<long double>(W(0, 1)));
  CHECK(error > 100 * without_norm);
  CHECK(error <= bound.weight().e(0, 1));
}

TEST_CASE("DoRA takes the norm of rows of any size", "[dora]") {
  for (const double w : {1e-320, 1e-300, 1e-200, 1e-162, 1e-154, 1e-145, 1e-100, 1e100, 1e154,
                         1e160, 1e300, 1.7e308}) {
    CAPTURE(w);
    test::matrix<double> W(2, 3);
    W << w, -w, w, 2, 1, 2;
    const lora::dora_adapter<double> l{test::matrix<double>::Zero(1, 3).eval(),
                                       test::matrix<double>::Zero(2, 1).eval(),
                                       {.alpha = 3},
                                       {w, 6}};
    // |row| = sqrt(3) w, with the magnitude w
    const exact_matrix before = test::exact(W);
    lora::merge(W, l);
    const long double want = before(0, 0) / std::sqrt(3.0L);
    const long double u = 0x1p-53L, bound = test::gamma(3 + 5 + 4, u) * want +
                                            static_cast<long double>(0x1p-1074);
    for (index_t j = 0; j < 3; ++j)
      CHECK(std::abs(std::abs(static_cast<long double>(W(0, j))) - want) <= bound);
    CHECK(W(1, 0) == 4);  // an ordinary row, with exact numbers
  }
}

TEST_CASE("DoRA refuses a factor that no number holds", "[dora]") {
  const test::matrix<double> tiny = test::matrix<double>::Constant(1, 2, 1e-320);
  const test::matrix<double> none = test::matrix<double>::Zero(1, 2),
                             B = test::matrix<double>::Zero(1, 1);
  const lora::dora_adapter<double> l{none, B, {.alpha = 2}, {1.5}};
  CHECK_THROWS_WITH((void)lora::mixed(tiny, l), Catch::Contains("output 0"));
  const test::matrix<float> small = test::matrix<float>::Constant(1, 2, 1e-40F);
  const lora::dora_adapter<float> f{test::matrix<float>::Zero(1, 2).eval(),
                                    test::matrix<float>::Zero(1, 1).eval(),
                                    {.alpha = 2},
                                    {1.5F}};
  CHECK_THROWS_WITH((void)lora::mixed(small, f), Catch::Contains("accumulator"));
}
