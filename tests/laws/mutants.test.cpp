// SPDX-License-Identifier: Apache-2.0
//
// Mistakes that engines really made, each of which must be told from rounding, in every format and
// also when the adapter is three hundredths of the weight: the bounds are tight enough to be worth
// having. The right computation passes beside them.
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/oracle.hpp"

namespace {

constexpr std::uint64_t seed = 771;

/// A layer in exact double operands; the mutants change a copy and leave the oracle's.
struct model {
  Eigen::MatrixXd W;
  Eigen::VectorXd bias;
  std::vector<agreement::part> parts;
  Eigen::MatrixXd other_A;  ///< a factor of the same adapter's next layer
  double alpha, rank;
};

template <class T>
Eigen::MatrixXd stored(const Eigen::MatrixXd& m) {
  return m.unaryExpr([](double v) { return static_cast<double>(static_cast<T>(v)); });
}

/// out 64, in 64 (a square layer hides transposition from shape checks), two adapters at `share` of
/// the weight.
template <class T>
model make(layers::generator& g, double share) {
  const Eigen::Index n = 64, rank = 9;
  model m;
  m.W = agreement::in_double(layers::normal<T>(g, n, n, 0.05));
  m.bias = agreement::in_double(layers::normal<float>(g, n, 1, 0.1)).col(0);
  m.alpha = 12;
  m.rank = static_cast<double>(rank);
  for (int k = 0; k < 2; ++k) {
    const double each = std::sqrt(share * 0.05 / (m.alpha / 3 * 3));
    m.parts.push_back({agreement::in_double(layers::normal<float>(g, rank, n, each)),
                       agreement::in_double(layers::normal<float>(g, n, rank, each)),
                       m.alpha / std::sqrt(m.rank)});
  }
  m.other_A =
      agreement::in_double(layers::normal<float>(g, rank, n, std::sqrt(share * 0.05 / m.alpha)));
  return m;
}

/// What the library computes for a (possibly wrong) model: the first adapter merged, the second
/// beside it.
template <class T, class Y>
Eigen::MatrixXd computed(const model& m, const Eigen::MatrixXd& x) {
  const layers::matrix<T> W = m.W.template cast<T>();
  const Eigen::VectorXf bias = m.bias.cast<float>();
  lora::linear<T> q{lora::with_bias(W, bias)};
  for (std::size_t k = 0; k < m.parts.size(); ++k)
    q.attach(std::string(1, static_cast<char>('a' + k)),
             lora::adapter<float>{m.parts[k].A.cast<float>(),
                                  m.parts[k].B.cast<float>(),
                                  {.alpha = m.parts[k].s, .rule = lora::scaling_rule::fixed}});
  if (!m.parts.empty()) q.merge("a");
  layers::matrix<Y> y(m.W.rows(), x.cols());
  const Eigen::MatrixXf xf = x.cast<float>();
  q.forward(xf, y);
  return agreement::in_double(y);
}

struct mutant {
  const char* name;
  std::function<void(model&)> spoil;
};
const std::vector<mutant> mutants{
    {"alpha / r for alpha / sqrt(r)", [](model& m) { m.parts[1].s = m.alpha / m.rank; }},
    {"the scale applied twice", [](model& m) { m.parts[0].s *= m.parts[0].s; }},
    {"the scale left out", [](model& m) { m.parts[1].s = 1; }},
    {"the mixed adapter dropped", [](model& m) { m.parts.pop_back(); }},
    {"the merged adapter dropped", [](model& m) { m.parts.erase(m.parts.begin()); }},
    {"B A transposed",
     [](model& m) {
       std::swap(m.parts[0].A, m.parts[0].B), m.parts[0].A.transposeInPlace(),
           m.parts[0].B.transposeInPlace();
     }},
    {"delta added twice", [](model& m) { m.parts[0].s *= 2; }},
    {"delta subtracted", [](model& m) { m.parts[0].s *= -1; }},
    {"the bias scaled", [](model& m) { m.bias *= m.parts[0].s; }},
    {"the bias left out", [](model& m) { m.bias.setZero(); }},
    {"another layer's lora_A", [](model& m) { m.parts[1].A = m.other_A; }},
    {"one rank of the adapter lost", [](model& m) { m.parts[1].B.col(3).setZero(); }},
    {"one output row of B shifted",
     [](model& m) { m.parts[0].B.row(5).swap(m.parts[0].B.row(6)); }},
};

template <class T, class Y>
void check(const char* format, double share) {
  layers::generator g(seed);
  const model right = make<T>(g, share);
  const Eigen::MatrixXd x = agreement::in_double(layers::normal<float>(g, right.W.cols(), 32, 1.0));
  const agreement::state where{{right.parts[0]}, {right.parts[1]}};
  const auto formats = agreement::formats_of<T, Y, float>();
  const layers::exact_matrix exact = layers::reference(right.W, right.bias, right.parts, x);
  const auto judge = [&](const model& m) {
    return oracle::compare(computed<T, Y>(m, x), exact, right.W, right.bias, where, x, formats);
  };
  const oracle::verdict rounding = judge(right);
  std::printf(
      "%-9s adapter %4.0f %% of the weight: right: hard %.3f, aggregate %.3f; mistakes from",
      format, 100 * share, rounding.hard, rounding.aggregate);
  CHECK(rounding.is_rounding());
  double least = 1e300;
  for (const mutant& one : mutants) {
    model wrong = right;
    one.spoil(wrong);
    const oracle::verdict v = judge(wrong);
    least = std::min(least, v.aggregate);
    INFO(format << ", " << share << ": " << one.name << ": hard " << v.hard << ", aggregate "
                << v.aggregate);
    CHECK_FALSE(v.is_rounding());
  }
  std::printf(" aggregate %.2f\n", least);
}

}  // namespace

TEST_CASE("every known mistake is told from rounding, in every format", "[law]") {
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  for (const double share : {0.3, 0.1, 0.03}) {
    check<float, float>("float", share);
    check<lora::float16, lora::float16>("float16", share);
    check<lora::bfloat16, lora::bfloat16>("bfloat16", share);
  }
}
