// SPDX-License-Identifier: Apache-2.0
//
// The bounds of rows, apply_through and PEFT's roundings, with what underflows: factors and weights
// down to the smallest subnormal numbers, scalings that bring products there and back, several
// adapters, every stored format.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "lora/embed.hpp"
#include "lora/rounding.hpp"
#include "lora/through.hpp"
#include "support/catch.hpp"
#include "support/dora_bound.hpp"
#include "support/random.hpp"

namespace {

using lora::index_t;
using test::exact_matrix;
using test::gamma;

constexpr std::uint64_t seed = 20261209;

/// Numbers of all sizes from 2^low to 2^high, of either sign.
template <class T>
test::matrix<T> spread(test::random& g, index_t rows, index_t cols, double low, double high) {
  test::matrix<T> m(rows, cols);
  for (index_t k = 0; k < m.size(); ++k)
    m.data()[k] = test::stored<T>(std::exp2(g.uniform(low, high)) * (g.one_in(2) ? 1 : -1));
  return m;
}

/// Adapters of float whose s B and s B A lie around the end of the normal range; exact deltas and
/// their sizes.
struct tiny {
  std::vector<lora::adapter<float>> all;
  index_t rank = 0;

  tiny(test::random& g, index_t out, index_t in) {
    for (const index_t r : {1, 3}) {
      all.push_back({spread<float>(g, r, in, -10, 60),
                     spread<float>(g, out, r, -149, -90),
                     {.alpha = std::exp2(g.uniform(-30, 20)), .rule = lora::scaling_rule::fixed}});
      rank += r;
    }
  }
  exact_matrix delta() const {
    exact_matrix sum = test::exact_delta(all[0]);
    return sum + test::exact_delta(all[1]);
  }
  /// gamma_k d + eta (R + sum |A|), of a chain with s folded into B.
  exact_matrix error(index_t k) const {
    exact_matrix e = exact_matrix::Zero(all[0].out_features(), all[0].in_features());
    for (const auto& l : all) {
      const test::dora_piece p(l, {});
      e += gamma(k, 0x1p-24L) * p.size;
      e.rowwise() += (static_cast<long double>(0x1p-149) * p.A.colwise().sum()).eval().row(0);
    }
    return e.array() + static_cast<long double>(rank + 1) * static_cast<long double>(0x1p-149);
  }
};

template <class T>
bool within(const test::matrix<T>& got, const exact_matrix& want, const exact_matrix& e) {
  return test::stored_within<T, float>(got, want, e);
}

}  // namespace

TEMPLATE_TEST_CASE("rows stay within their bound where products underflow", "[rows][bound]", float,
                   lora::bfloat16) {
  using T = TestType;
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  test::random g(seed);
  for (int k = 0; k < 100; ++k) {
    const index_t vocabulary = 7, features = g.integer(1, 9);
    CAPTURE(g.seed(), k, features);
    const tiny l(g, features, vocabulary);
    const auto W = spread<T>(g, vocabulary, features, -140, -60);
    const double c = std::exp2(g.uniform(-140, 40));
    std::vector<int> ids{6, 0, 1, 2, 3, 4, 5};
    test::matrix<T> y(features, vocabulary);
    lora::embed(lora::scaled_embedding(W, c), ids, y, l.all);
    exact_matrix want = test::exact(W).transpose();
    const exact_matrix e = (gamma(3, 0x1p-24L) * want.cwiseAbs() + l.error(l.rank + 5)) * c +
                           exact_matrix::Constant(features, 7, 0x1p-149L);
    want = (want + l.delta()) * static_cast<long double>(c);
    exact_matrix of_tokens(features, 7), bound(features, 7);
    for (index_t t = 0; t < 7; ++t) {
      of_tokens.col(t) = want.col(ids[static_cast<std::size_t>(t)]);
      bound.col(t) = e.col(ids[static_cast<std::size_t>(t)]);
    }
    REQUIRE(within(y, of_tokens, bound));
  }
}

TEMPLATE_TEST_CASE("apply_through stays within its bound where products underflow",
                   "[through][bound]", float, lora::bfloat16) {
  using T = TestType;
  test::random g(seed + 1);
  for (int k = 0; k < 100; ++k) {
    const index_t out = g.integer(1, 9), positions = 11;
    CAPTURE(g.seed(), k, out);
    const tiny l(g, out, positions);
    auto y = spread<T>(g, out, positions, -140, -60);
    // down(lora_A) is lora_A itself: U has no error.
    const exact_matrix want = test::exact(y) + l.delta();
    const exact_matrix e = 0x1p-24L * test::exact(y).cwiseAbs() + l.error(l.rank + 3);
    lora::apply_through([](const auto& lora_A) { return lora_A; }, y, l.all);
    REQUIRE(within(y, want, e));
  }
}

TEMPLATE_TEST_CASE("PEFT's roundings stay within their bound", "[rounding][bound]", float,
                   lora::bfloat16, lora::float16) {
  using T = TestType;
  test::random g(seed + 2);
  const long double u = 0x1p-24L, eta = 0x1p-149L;
  const bool wide = std::is_same_v<T, float>;
  const long double us =
      wide ? 0
           : static_cast<long double>(static_cast<double>(std::numeric_limits<T>::epsilon())) / 2;
  const long double eta_s =
      wide ? 0
           : static_cast<long double>(static_cast<double>(std::numeric_limits<T>::denorm_min()));
  for (int k = 0; k < 200; ++k) {
    const index_t out = g.integer(1, 9), in = g.integer(1, 9), r = g.integer(1, 5);
    const bool safe = g.one_in(2);
    CAPTURE(g.seed(), k, out, in, r, safe);
    const double low = g.one_in(2) ? -140 : -20;
    const auto W = spread<T>(g, out, in, wide ? low : -14, 3);
    const double s = std::exp2(g.uniform(-6, 6));
    const lora::adapter<T> l{spread<T>(g, r, in, low / 2, 2),
                             spread<T>(g, out, r, low / 2, 2),
                             {.alpha = s, .rule = lora::scaling_rule::fixed}};
    auto stored = W;
    if (safe)
      lora::merge(lora::rounding::as_peft_safe, stored, l);
    else
      lora::merge(lora::rounding::as_peft, stored, l);
    const test::dora_piece p(l, {});
    const exact_matrix absolute = p.delta.cwiseAbs();
    // The delta: chain, times s, stored in the factors' format (a build with dot products flushes:
    // its own term).
    const double flushed = lora::flush_threshold_of_delta<float, lora::adapter<T>>();
    exact_matrix e = gamma(r + 2, u) * p.size;
    e.array() += eta * (static_cast<long double>(s) * static_cast<long double>(r) + 1);
    const exact_matrix sums = p.A.colwise().sum(),
                       of_B = test::exact(l.lora_B()).cwiseAbs().rowwise().sum();
    e.array() += static_cast<long double>(flushed * s) * 2 * static_cast<long double>(r);
    e.rowwise() += (static_cast<long double>(flushed * s) * sums).eval().row(0);
    e.colwise() += (static_cast<long double>(flushed * s) * of_B).eval().col(0);
    e = e + us * (absolute + e);  // the factors are T, too
    e.array() += eta_s / 2;
    if (safe) {
      e = (e + us * (absolute + e)).eval();
      e.array() += eta_s / 2;
    }
    // The sum, in float, and W's format.
    const exact_matrix base = test::exact(W).cwiseAbs();
    e = (e + u * (base + absolute + e)).eval();
    REQUIRE(within(stored, test::exact(W) + p.delta, e));
  }
}
