// SPDX-License-Identifier: Apache-2.0
//
// The algebra: what must hold for any adapter, whatever the implementation. Typed over the scalars,
// on non-square weights, s never 1, ranks from 1 to beyond the smaller side, B zero and B tiny
// among them. Where a law is exact it is checked bit for bit; elsewhere the tolerance is the bound
// of docs/numerics.md.
#include <Eigen/QR>
#include <cstring>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/layers.hpp"

namespace {

constexpr std::uint64_t seed = 4242;

/// What a factor of lora_B looks like: it starts at zero in training, and small steps follow.
enum class regime { zero, tiny, random };

template <class T>
struct sample {
  Eigen::Index out, in, rank;
  lora::adapter<T> l;
  layers::matrix<T> W;
};

template <class T>
sample<T> draw(layers::generator& g, regime kind) {
  const Eigen::Index out = layers::size(g, 45), in = layers::size(g, 70),
                     rank = layers::size(g, 2 * std::min(out, in));
  const double b = kind == regime::zero ? 0 : kind == regime::tiny ? 1e-4 : 0.5;
  return {out, in, rank,
          lora::adapter<T>{
              layers::normal<T>(g, rank, in, 0.3),
              layers::normal<T>(g, out, rank, b),
              {.alpha = layers::uniform(g, 2, 40), .rule = lora::scaling_rule::rank_stabilized}},
          layers::normal<T>(g, out, in, 0.7)};
}

template <class T, class Check>
void for_samples(const Check& check) {
  layers::generator g(seed);
  for (const regime kind : {regime::zero, regime::tiny, regime::random})
    for (int k = 0; k < 40 / std::min(4, layers::thinning); ++k) check(draw<T>(g, kind), g);
}

template <class M, class N>
bool same_bits(const M& a, const N& b) {
  if (a.rows() != b.rows() || a.cols() != b.cols()) return false;
  for (Eigen::Index i = 0; i < a.rows(); ++i)
    for (Eigen::Index j = 0; j < a.cols(); ++j) {
      const auto left = a(i, j);
      const auto right = b(i, j);
      static_assert(std::is_same_v<decltype(left), decltype(right)>);
      if (std::memcmp(&left, &right, sizeof left) != 0) return false;
    }
  return true;
}

/// gamma_{R+2} sum |s| |B| |A|: the bound of delta_weight.
Eigen::MatrixXd delta_bound(const std::vector<agreement::part>& parts, double u) {
  Eigen::MatrixXd d = Eigen::MatrixXd::Zero(parts[0].B.rows(), parts[0].A.cols());
  for (const auto& p : parts) d += std::abs(p.s) * p.B.cwiseAbs() * p.A.cwiseAbs();
  return (agreement::gamma(agreement::total_rank(parts) + 2, u) * d).array() + 1e-44;
}

template <class M, class N>
bool within(const M& a, const N& b, const Eigen::MatrixXd& bound) {
  return ((a - b).cwiseAbs().array() <= bound.array()).all();
}

}  // namespace

TEMPLATE_TEST_CASE("delta_weight is linear in the strength", "[law]", float, double, lora::float16,
                   lora::bfloat16) {
  CAPTURE(seed);
  using acc = lora::accumulator_t<TestType>;
  for_samples<TestType>([](const auto& t, auto& g) {
    // Powers of two scale exactly, and so must the delta (as values: a sum from zero never gives
    // -0).
    const auto delta = lora::delta_weight(t.l);
    CHECK(lora::delta_weight(lora::scaled(-0.25, t.l)) == delta * acc(-0.25));
    const double c = layers::uniform(g, -3, 3);
    const auto bound =
        delta_bound({agreement::part_of(lora::scaled(c, t.l))}, agreement::format_of<acc>().u);
    CHECK(within(agreement::in_double(lora::delta_weight(lora::scaled(c, t.l))),
                 c * agreement::in_double(delta), 2 * bound));
  });
}

TEMPLATE_TEST_CASE("the delta of several adapters is the sum of their deltas", "[law]", float,
                   double, lora::bfloat16) {
  using acc = lora::accumulator_t<TestType>;
  for_samples<TestType>([](const auto& t, auto& g) {
    const lora::adapter<TestType> other{layers::normal<TestType>(g, 3, t.in, 0.4),
                                        layers::normal<TestType>(g, t.out, 3, 0.4),
                                        {.alpha = 7}};
    const double u = agreement::format_of<acc>().u;
    const Eigen::MatrixXd sum = agreement::in_double(lora::delta_weight(t.l)) +
                                agreement::in_double(lora::delta_weight(other));
    const auto bound = delta_bound({agreement::part_of(t.l), agreement::part_of(other)}, u);
    CHECK(within(agreement::in_double(lora::delta_weight(t.l, other)), sum, 2 * bound));
    // A range is the list of its elements, and an adapter against its negative is exactly nothing.
    const std::vector<lora::scaled_adapter<lora::adapter<TestType>>> both{lora::scaled(1, t.l),
                                                                          lora::scaled(1, other)};
    CHECK(same_bits(lora::delta_weight(t.l, other), lora::delta_weight(both)));
  });
}

TEMPLATE_TEST_CASE("(B R^-1, R A) is the same adapter", "[law]", float, double) {
  for_samples<TestType>([](const auto& t, auto& g) {
    // R diagonal in powers of two changes no product; R orthogonal only rounds.
    layers::matrix<TestType> A = t.l.lora_A(), B = t.l.lora_B();
    for (Eigen::Index k = 0; k < t.rank; ++k) {
      const auto c = static_cast<TestType>(std::ldexp(1.0, static_cast<int>(g() % 9) - 4));
      A.row(k) *= c;
      B.col(k) /= c;
    }
    const lora::scaling s{.alpha = t.l.scaling(), .rule = lora::scaling_rule::fixed};
    CHECK(same_bits(lora::delta_weight(lora::adapter<TestType>{A, B, s}), lora::delta_weight(t.l)));

    const Eigen::MatrixXd square =
        agreement::in_double(layers::normal<double>(g, t.rank, t.rank, 1));
    const Eigen::MatrixXd R = Eigen::HouseholderQR<Eigen::MatrixXd>(square).householderQ();
    const Eigen::MatrixXd A0 = agreement::in_double(t.l.lora_A()),
                          B0 = agreement::in_double(t.l.lora_B());
    const lora::adapter<double> turned{R * A0, B0 * R.transpose(), s};
    const Eigen::MatrixXd exact = t.l.scaling() * B0 * A0;
    // Forming R A and B R' rounds each rank times, the delta 2 more; Householder's R is orthogonal
    // to 10 r^1.5 u.
    const double u = agreement::format_of<double>().u, r = static_cast<double>(t.rank);
    const Eigen::MatrixXd bound =
        std::abs(t.l.scaling()) *
        ((agreement::gamma(3 * t.rank + 8, u) *
          (B0.cwiseAbs() * R.transpose().cwiseAbs() * R.cwiseAbs() * A0.cwiseAbs()))
             .array() +
         10 * r * std::sqrt(r) * u * B0.norm() * A0.norm())
            .matrix();
    CHECK(within(lora::delta_weight(turned), exact, bound));
  });
}

TEMPLATE_TEST_CASE("merge is W + delta, rounded once", "[law]", float, double, lora::float16,
                   lora::bfloat16) {
  using acc = lora::accumulator_t<TestType>;
  for_samples<TestType>([](const auto& t, auto& g) {
    const auto second = draw<TestType>(g, regime::random);
    const auto delta = lora::delta_weight(t.l);
    layers::matrix<TestType> expected = t.W;
    for (Eigen::Index i = 0; i < t.out; ++i)
      for (Eigen::Index j = 0; j < t.in; ++j)
        if (delta(i, j) != 0)
          expected(i, j) = static_cast<TestType>(static_cast<acc>(t.W(i, j)) + delta(i, j));
    layers::matrix<TestType> W = t.W;
    CHECK(lora::merge(W, t.l).became_nonfinite == 0);
    CHECK(same_bits(W, expected));
    CHECK(same_bits(lora::merged(t.W, t.l), expected));
    const auto formats = agreement::formats_of<TestType, float, acc>();
    const agreement::part p = agreement::part_of(t.l);
    const Eigen::MatrixXd exact = agreement::in_double(t.W) + p.s * p.B * p.A;
    CHECK(within(agreement::in_double(W), exact,
                 (agreement::merge_bound(agreement::in_double(t.W), {p}, formats).array() + 1e-15)
                     .matrix()));
  });
}

TEMPLATE_TEST_CASE("storage order, blocks and transposes change no bit", "[law]", float, double,
                   lora::float16, lora::bfloat16) {
  using col_major = Eigen::Matrix<TestType, Eigen::Dynamic, Eigen::Dynamic, Eigen::ColMajor>;
  for_samples<TestType>([](const auto& t, auto& g) {
    const auto expected = lora::merged(t.W, t.l);
    col_major columns = t.W;
    lora::merge(columns, t.l);
    CHECK(same_bits(columns, expected));
    col_major stored_in_out = t.W.transpose();
    lora::merge(stored_in_out.transpose(), t.l);
    CHECK(same_bits(stored_in_out.transpose(), expected));
    // A block inside a larger matrix, whose rest must not change.
    layers::matrix<TestType> large = layers::normal<TestType>(g, t.out + 5, t.in + 7, 1), before;
    large.block(2, 3, t.out, t.in) = t.W;
    before = large;
    lora::merge(large.block(2, 3, t.out, t.in), t.l);
    CHECK(same_bits(large.block(2, 3, t.out, t.in), expected));
    large.block(2, 3, t.out, t.in) = t.W;
    CHECK(same_bits(large, before));

    const layers::matrix<TestType> x = layers::normal<TestType>(g, t.in, 5, 1);
    layers::matrix<float> y(t.out, 5), y_other(t.out, 5);
    lora::forward(t.W, x, y, t.l);
    const col_major x_columns = x, W_columns = t.W;
    Eigen::MatrixXf y_columns(t.out, 5);
    lora::forward(W_columns, x_columns, y_columns, t.l);
    CHECK(same_bits(y_columns, y));
    lora::forward(stored_in_out.transpose(), x, y_other);  // the merged weight, in its other order
    lora::forward(expected, x_columns, y_columns);
    CHECK(same_bits(y_columns, y_other));
  });
}

TEMPLATE_TEST_CASE("apply adds delta * x to y, rounded once", "[law]", float, double, lora::float16,
                   lora::bfloat16) {
  using acc = lora::accumulator_t<TestType>;
  for_samples<TestType>([](const auto& t, auto& g) {
    const layers::matrix<TestType> x = layers::normal<TestType>(g, t.in, 3, 1);
    const layers::matrix<TestType> before = layers::normal<TestType>(g, t.out, 3, 1);
    layers::matrix<TestType> y = before;
    lora::apply(x, y, t.l);
    // y + delta x is a layer whose bias is y: nothing merged, W zero.
    const agreement::part p = agreement::part_of(t.l);
    const auto formats = agreement::formats_of<TestType, TestType, acc>();
    const Eigen::MatrixXd zero = Eigen::MatrixXd::Zero(t.out, t.in);
    for (Eigen::Index token = 0; token < 3; ++token) {
      const Eigen::VectorXd bias = agreement::in_double(before).col(token);
      const Eigen::MatrixXd one = agreement::in_double(x).col(token);
      const auto bound = agreement::error_bound(zero, bias, {{}, {p}}, one, formats);
      const auto exact = layers::reference(zero, bias, {p}, one);
      const Eigen::MatrixXd got = agreement::in_double(y).col(token);
      CHECK(
          ((got.template cast<long double>() - exact).cwiseAbs().template cast<double>().array() <=
           bound.array())
              .all());
    }
  });
}

TEMPLATE_TEST_CASE("unmerge takes away what merge added, within two merges' bounds", "[law]", float,
                   double, lora::bfloat16) {
  using acc = lora::accumulator_t<TestType>;
  for_samples<TestType>([](const auto& t, auto&) {
    layers::matrix<TestType> W = t.W;
    lora::merge(W, t.l);
    const auto between = agreement::in_double(W);
    lora::unmerge(W, t.l);
    const auto formats = agreement::formats_of<TestType, float, acc>();
    const agreement::part p = agreement::part_of(t.l);
    const Eigen::MatrixXd bound = agreement::merge_bound(agreement::in_double(t.W), {p}, formats) +
                                  agreement::merge_bound(between, {p}, formats);
    CHECK(within(agreement::in_double(W), agreement::in_double(t.W), bound));
    // Subtracting is merging at strength -1, bit for bit.
    layers::matrix<TestType> subtracted = t.W, merged_negative = t.W;
    lora::unmerge(subtracted, t.l);
    lora::merge(merged_negative, lora::scaled(-1, t.l));
    CHECK(same_bits(subtracted, merged_negative));
  });
}

TEMPLATE_TEST_CASE("the state of linear, not the way to it, decides every bit", "[law]", float,
                   double, lora::float16, lora::bfloat16) {
  for_samples<TestType>([](const auto& t, auto& g) {
    const lora::adapter<float> other{layers::normal<float>(g, 4, t.in, 0.4),
                                     layers::normal<float>(g, t.out, 4, 0.4),
                                     {.alpha = 3}};
    lora::linear<TestType> straight{t.W}, winding{t.W};
    straight.attach("a", lora::scaled(0.7, t.l));
    straight.attach("b", lora::scaled(-0.4, other));
    straight.merge();
    winding.attach("b", other);
    winding.merge("b");
    winding.attach("a", lora::scaled(0.7, t.l));
    winding.merge("a");
    winding.unmerge("b");
    winding.set_strength("b", -0.4);
    winding.deactivate("a");
    winding.merge("b");
    winding.activate("a");
    CHECK(same_bits(straight.weight(), winding.weight()));
    // Both, rounded once, in the order of the names: the free merge in that order.
    CHECK(same_bits(straight.weight(),
                    lora::merged(t.W, lora::scaled(0.7, t.l), lora::scaled(-0.4, other))));
    winding.unmerge("a");
    CHECK(same_bits(winding.weight(), lora::merged(t.W, lora::scaled(-0.4, other))));
    winding.detach("b");
    CHECK(same_bits(winding.weight(), t.W));
  });
}
