// SPDX-License-Identifier: Apache-2.0
//
// A caller that flushes subnormal numbers to zero, or rounds towards zero, gets the same bits as
// one that does not, for every number of threads, and has its mode back after the call. Half of the
// numbers here are subnormal.
#include "support/float_mode.hpp"

#include <random>

#include "lora/dora.hpp"
#include "lora/embed.hpp"
#include "lora/rounding.hpp"
#include "lora/through.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

using lora::index_t;
using bytes = std::vector<unsigned char>;

constexpr index_t out = 130, in = 517, tokens = 5;
constexpr unsigned seed = 20261201;

void set_threads(int threads) {
#if defined(_OPENMP)
  omp_set_num_threads(threads);
#else
  static_cast<void>(threads);
#endif
}

/// Normal and subnormal numbers of T in turn, of either sign.
template <class T>
test::matrix<T> drawn(index_t rows, index_t cols, unsigned of) {
  std::mt19937 g(seed + of);
  const double smallest = static_cast<double>(std::numeric_limits<T>::min());
  test::matrix<T> m(rows, cols);
  for (index_t k = 0; k < m.size(); ++k) {
    const double fraction = static_cast<double>(g() % 2000) / 1000 - 1;
    m.data()[k] = static_cast<T>(k % 2 == 0 ? fraction : fraction * smallest);
  }
  return m;
}

template <class M>
void keep(bytes& all, const M& m) {
  const auto more = test::bytes(m);
  all.insert(all.end(), more.begin(), more.end());
}

/// The operands of all verbs, made in the default mode.
template <class T, class F>
struct operands {
  test::matrix<T> W = drawn<T>(out, in, 1);
  test::matrix<F> A = drawn<F>(5, in, 2), B = drawn<F>(out, 5, 3), x = drawn<F>(in, tokens, 4),
                  y = drawn<F>(out, tokens, 5);
  std::vector<F> magnitude = std::vector<F>(static_cast<std::size_t>(out), F(0.75F));
  std::vector<F> bias =
      std::vector<F>(static_cast<std::size_t>(out), std::numeric_limits<F>::denorm_min());
  lora::adapter<F> l{A, B, {.alpha = 0.3}};
  lora::adapter<F> no_change{A, test::matrix<F>(test::matrix<F>::Zero(out, 5)), {.alpha = 0.3}};
};

template <class T, class F>
void merges(bytes& all, const operands<T, F>& o) {
  auto W = o.W, unchanged = o.W, safe = o.W;
  lora::merge(unchanged, o.no_change);
  CHECK(test::same_bits(unchanged, o.W));
  lora::merge(W, o.l, lora::scaled(-0.7, o.l));
  keep(all, W);
  lora::unmerge(W, o.l);
  keep(all, W);
  lora::merge_checked(W, lora::scaled(0.3, o.l));
  keep(all, lora::merged(W, o.l));
  keep(all, lora::delta_weight(o.l));
  lora::merge(lora::rounding::as_peft_safe, safe, o.l);
  keep(all, safe);
}

template <class T, class F>
void products(bytes& all, const operands<T, F>& o) {
  test::matrix<F> y(out, tokens);
  lora::forward(lora::with_bias(o.W, o.bias), o.x, y, o.l, lora::scaled(1e-3, o.l));
  keep(all, y);
  y = o.y;
  lora::apply(o.x, y, o.l);
  keep(all, y);
  const lora::packed_weight<T> panels(o.W);
  keep(all, panels.matrix());
  const std::vector<lora::packed_adapter<lora::accumulator_t<F>>> served{
      lora::packed_adapter<lora::accumulator_t<F>>(o.l)};
  lora::batch who{served};
  for (index_t t = 0; t < tokens; ++t) t % 2 == 0 ? who.add({{0, 0.5}}) : who.add();
  lora::forward(panels, o.x, y, who);
  keep(all, y);
  lora::linear<T> layer{lora::with_bias(o.W, o.bias)};
  layer.attach("a", lora::scaled(0.5, o.l));
  layer.attach("b", o.l);
  layer.merge("a");
  layer.forward(o.x, y);
  keep(all, y);
  keep(all, layer.weight());
}

template <class T, class F>
void others(bytes& all, const operands<T, F>& o) {
  const lora::dora_adapter<F> d(o.l, o.magnitude);
  const auto layer = lora::mixed(o.W, d, o.l);
  auto W = o.W;
  test::matrix<F> y(out, tokens);
  lora::merge(W, layer);
  keep(all, W);
  lora::unmerge(W, layer);
  keep(all, W);
  lora::forward(lora::with_bias(o.W, o.bias), o.x, y, layer);
  keep(all, y);
  const std::vector<int> ids{0, 3, in - 1, 3, 2};
  const test::matrix<T> embedding = o.W.transpose();
  lora::embed(lora::scaled_embedding(embedding, 0.7), ids, y, o.l);
  keep(all, y);
  lora::embed(embedding, ids, y, layer);
  keep(all, y);
  lora::replaced_rows<F> trained({1, 3}, test::matrix<F>(o.y.topRows(2)));
  test::matrix<F> few(tokens, tokens);
  few.setZero();
  lora::overwrite_rows(ids, few, trained, 0.3);
  keep(all, few);
  y = o.y;
  lora::apply_through([&](const auto&) { return test::matrix<F>(o.x.topRows(5)); }, y, o.l);
  keep(all, y);
  keep(all, lora::adapter<double>(o.A, o.B, {.alpha = 1}).lora_A());
}

template <class T, class F>
bytes everything(const operands<T, F>& o) {
  bytes all;
  merges(all, o);
  products(all, o);
  others(all, o);
  return all;
}

}  // namespace

TEMPLATE_TEST_CASE("the caller's floating-point mode changes no bit", "[environment]", float,
                   double, lora::bfloat16, lora::float16) {
  using T = TestType;
  using F = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const operands<T, F> o;
  set_threads(1);
  const bytes expected = everything(o);
  for (const auto mode : {test::flush, test::truncate, test::flush | test::truncate})
    for (const int threads : {1, 2, 4}) {
      CAPTURE(mode, threads);
      set_threads(threads);
      bytes got;
      {
        const test::in_float_mode changed(mode);
        got = everything(o);
        CHECK(test::float_mode() == mode);
      }
      const bool same = got == expected;  // not the bytes: a failure would print a million
      CHECK(same);
    }
  set_threads(1);
}

TEST_CASE("a call that throws gives the caller's mode back", "[environment]") {
  const test::matrix<float> W = test::matrix<float>::Ones(3, 4);
  test::matrix<float> wrong = test::matrix<float>::Ones(4, 3);
  const lora::adapter<float> l{
      test::matrix<float>::Ones(2, 4), test::matrix<float>::Ones(3, 2), {.alpha = 3}};
  const test::in_float_mode changed(test::flush);
  CHECK_THROWS_AS(lora::merge(wrong, l), lora::shape_error);
  CHECK(test::float_mode() == test::flush);
  CHECK_THROWS_AS(lora::forward(W, wrong, wrong, l), lora::shape_error);
  CHECK(test::float_mode() == test::flush);
}

TEST_CASE("what the caller computes for a verb is computed in its own mode", "[environment]") {
  const lora::adapter<float> l{
      test::matrix<float>::Ones(2, 4), test::matrix<float>::Ones(3, 2), {.alpha = 3}};
  test::matrix<float> y = test::matrix<float>::Ones(3, 2);
  const test::in_float_mode changed(test::flush);
  auto inside = test::float_mode();
  lora::apply_through(
      [&](const auto& lora_A) {
        inside = test::float_mode();
        return test::matrix<float>::Ones(lora_A.rows(), 2).eval();
      },
      y, l);
  CHECK(inside == test::flush);
}

TEST_CASE("which adapters apply_through reads does not depend on the caller's mode",
          "[float_mode]") {
  using mode = lora::detail::control_register;
  // Finite factors, and a scaling that a flushing caller would take for 0.
  const lora::adapter<double> l{Eigen::MatrixXd::Constant(1, 1, 0x1p1000),
                                Eigen::MatrixXd::Ones(1, 1),
                                {.alpha = 0x1p-1000, .rule = lora::scaling_rule::fixed}};
  const auto small = lora::scaled(0x1p-60, l);
  const auto before = mode::read();
  if (!mode::is_known) WARN("skipped: the floating-point mode of this processor is not known");
  for (const bool down_changes_it : {false, true}) {
    Eigen::MatrixXd y = Eigen::MatrixXd::Zero(1, 1);
    mode::write(before | mode::mode);
    lora::apply_through(
        [&](const auto& A) {
          if (down_changes_it) mode::write(before);
          return Eigen::MatrixXd(Eigen::MatrixXd::Constant(1, 1, A(0, 0)));
        },
        y, l, small);
    mode::write(before);
    CHECK(y(0, 0) == 1 + 0x1p-60 * 0x1p-1000 * 0x1p1000);
  }
}
