// SPDX-License-Identifier: Apache-2.0
//
// AdaLoRA: lora_E inside lora_A, PEFT's scaling, and PEFT's own weights and outputs.
#include "lora/kinds/adalora.hpp"

#include <cstddef>

#include "kinds/by_hand.hpp"

static_assert(lora::adapter_kind<lora::adalora_adapter<float>>);
static_assert(lora::adapter_kind<lora::adalora_adapter<lora::bfloat16>>);

namespace {

using by_hand::acc_of;
using by_hand::index_t;
using lora::adalora_adapter;

template <class T>
std::vector<T> values(const test::matrix<T>& m) {
  return std::vector<T>(m.data(), m.data() + m.size());
}

}  // namespace

TEMPLATE_TEST_CASE("the step is w alpha / (initial_rank + 1e-5) B diag(E) A", "[adalora]", float,
                   double, lora::float16, lora::bfloat16) {
  using T = TestType;
  using acc = acc_of<T>;
  test::random g(51);
  for (const auto& [out, in, rank] :
       {std::array<index_t, 3>{5, 9, 3}, {17, 3, 4}, {1, 6, 1}, {8, 8, 12}})
    for (const double strength : {1.0, -0.35, 2.5})
      for (const double alpha : {9.0, 0.0, -2.0}) {
        CAPTURE(out, in, rank, strength, alpha, g.seed());
        const test::matrix<T> A = g.reals<T>(rank, in, 1), B = g.reals<T>(out, rank, 1);
        const test::matrix<T> E = g.reals<T>(rank, 1, 1);
        const index_t initial = rank + 2;
        const adalora_adapter<T> kind(A, B, values(E), {.alpha = alpha, .initial_rank = initial});
        CHECK(kind.out_features() == out);
        CHECK(kind.in_features() == in);
        CHECK(kind.rank() == rank);
        const long double scale =
            strength * static_cast<long double>(alpha > 0 ? alpha : static_cast<double>(rank)) /
            (static_cast<long double>(initial) + 1e-5L);
        const test::exact_matrix EA = test::exact(E).col(0).asDiagonal() * test::exact(A);
        const test::exact_matrix want = scale * test::times(test::exact(B), EA);
        const test::exact_matrix size =
            std::abs(scale) * test::times(test::exact(B).cwiseAbs(), EA.cwiseAbs());

        const auto one = by_hand::only<lora::low_rank_step>(by_hand::of<acc>(kind, strength));
        CHECK(one.strength == strength);
        CHECK(one.factors.rank() == rank);
        one.factors.visit([&]<class L>(const L& l) {
          CHECK(std::is_same_v<L, lora::adapter_view<acc>>);
          const test::exact_matrix delta = one.strength * test::exact_delta(l);
          const bool exact = sizeof(T) == 2;  // their products are floats
          const long double off = (exact ? 0 : by_hand::u<acc>)+4 * by_hand::u<double>;
          CHECK(by_hand::within(delta, want, off * size));
          if (exact) CHECK(test::exact(l.lora_A()) == EA);
        });

        // As a verb has it: merged by it, within the bound of an adapter of one rank more.
        test::matrix<acc> W = g.reals<acc>(out, in, 1);
        const test::exact_matrix before = test::exact(W);
        one.factors.visit([&](const auto& l) { lora::merge(W, lora::scaled(one.strength, l)); });
        const long double u = by_hand::u<acc>, chain = by_hand::gamma<acc>(rank + 3);
        const test::exact_matrix allowed =
            u * (before + want).cwiseAbs() + (1 + u) * (u * before.cwiseAbs() + chain * size);
        CHECK(by_hand::within(W, before + want, allowed));
      }
}

TEST_CASE("nothing is done at strength 0 and at rank 0", "[adalora]") {
  const test::matrix<float> A = test::matrix<float>::Ones(2, 3),
                            B = test::matrix<float>::Ones(4, 2);
  const adalora_adapter<float> kind(A, B, {1, 2}, {.alpha = 8, .initial_rank = 4});
  CHECK(by_hand::of<float>(kind, 0).empty());
  CHECK(by_hand::of<float>(lora::scaled(0.5, kind)).size() == 1);
  const test::matrix<float> no_A(0, 3), no_B(4, 0);
  const adalora_adapter<float> pruned(no_A, no_B, {}, {.alpha = 8, .initial_rank = 4});
  CHECK(pruned.out_features() == 4);
  CHECK(pruned.in_features() == 3);
  CHECK(by_hand::of<float>(pruned).empty());
}

TEST_CASE("factors that do not fit are refused", "[adalora]") {
  const test::matrix<float> A = test::matrix<float>::Ones(2, 3),
                            B = test::matrix<float>::Ones(4, 2);
  const auto refused = [](const auto& a, const auto& b, std::vector<float> e, index_t initial) {
    return test::refusal<lora::shape_error>(
        [&] { (void)adalora_adapter<float>(a, b, e, {.alpha = 8, .initial_rank = initial}); });
  };
  CHECK(test::mentions(refused(A, B, {1, 2, 3}, 3), {"lora_E has 3", "rank is 2"}));
  CHECK(test::mentions(refused(A, A, {1, 2}, 2), {"2x3", "lora_B"}));
  CHECK(test::mentions(refused(A, B, {1, 2}, 1), {"rank is 2", "init_r", "1"}));
  CHECK_THROWS_AS(
      adalora_adapter<float>(
          A, B, {1, 2}, {.alpha = std::numeric_limits<double>::quiet_NaN(), .initial_rank = 2}),
      lora::value_error);
}

TEST_CASE("PEFT's AdaLoRA", "[adalora][golden]") {
  const auto make = [](const auto& file, const std::string& module, index_t out, index_t in) {
    const auto A = file.template copy<float>(module + ".lora_A");
    const auto B = file.template copy<float>(module + ".lora_B");
    auto E = file.template copy<float>(module + ".lora_E");
    const auto rank = static_cast<index_t>(E.size());
    return adalora_adapter<float>(lora::row_major(A, rank, in), lora::row_major(B, out, rank),
                                  std::move(E), {.alpha = 9, .initial_rank = 4});
  };
  by_hand::check_golden("other_adalora", {"a"}, make);
}
