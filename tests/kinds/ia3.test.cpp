// SPDX-License-Identifier: Apache-2.0
//
// (IA)^3: gains and diagonal maps, their strength, and PEFT's own weights and outputs.
#include "lora/kinds/ia3.hpp"

#include <cstddef>

#include "kinds/by_hand.hpp"

static_assert(lora::adapter_kind<lora::ia3_adapter<float>>);
static_assert(lora::adapter_kind<lora::ia3_adapter<lora::bfloat16>>);
static_assert(!lora::low_rank<lora::ia3_adapter<float>>);

namespace {

using by_hand::acc_of;
using by_hand::index_t;
using lora::ia3_adapter;
using lora::ia3_side;

/// Factors about 1, one of them tiny.
template <class T>
std::vector<T> factors(test::random& g, index_t count) {
  std::vector<T> l;
  for (index_t k = 0; k < count; ++k) l.push_back(static_cast<T>(g.uniform(-2, 3)));
  l.back() = static_cast<T>(0x1p-12);
  return l;
}
template <class T>
ia3_adapter<T> adapter_of(ia3_side side, std::vector<T> l, index_t others) {
  return side == ia3_side::outputs ? ia3_adapter<T>::of_outputs(std::move(l), others)
                                   : ia3_adapter<T>::of_inputs(std::move(l), others);
}

}  // namespace

TEMPLATE_TEST_CASE("W' = W + w (W l - W), on outputs with the bias and on inputs without", "[ia3]",
                   float, double, lora::float16, lora::bfloat16) {
  using T = TestType;
  using acc = acc_of<T>;
  test::random g(31);
  for (const auto side : {ia3_side::outputs, ia3_side::inputs})
    for (const auto& [out, in] : {std::pair<index_t, index_t>{5, 9}, {17, 3}, {8, 8}, {1, 1}})
      for (const double strength : {1.0, 0.35, 2.0, -1.5}) {
        CAPTURE(out, in, strength, g.seed());
        const bool outputs = side == ia3_side::outputs;
        const auto l = factors<T>(g, outputs ? out : in);
        const auto kind = adapter_of(side, l, outputs ? in : out);
        CHECK(kind.out_features() == out);
        CHECK(kind.in_features() == in);
        CHECK(kind.side() == side);

        test::exact_matrix scale(static_cast<index_t>(l.size()), 1), off = scale;
        for (index_t k = 0; k < scale.rows(); ++k) {
          const long double apart = strength * (test::value(l[static_cast<std::size_t>(k)]) - 1.0L);
          scale(k) = 1 + apart;
          off(k) = 0x1p-53L * (2 * std::abs(apart) + std::abs(scale(k)));  // of l' in double
        }
        const test::matrix<acc> W = g.reals<acc>(out, in, 1);
        const test::matrix<acc> b = g.reals<acc>(out, 1, 1);
        const auto exact = test::exact(W);
        const auto times = [&](const test::exact_matrix& by) -> test::exact_matrix {
          if (outputs) return by.col(0).asDiagonal() * exact;
          return exact * by.col(0).asDiagonal();
        };
        const test::exact_matrix want = times(scale);
        const long double u = by_hand::u<acc>;
        const test::exact_matrix allowed =
            (2 * u + u * u) * want.cwiseAbs() + 2 * times(off).cwiseAbs();

        const auto all = by_hand::of<acc>(kind, strength);
        test::matrix<acc> merged = W;
        by_hand::vector<acc> bias = b;
        by_hand::merge(all, merged, bias);
        CHECK(by_hand::within(merged, want, allowed));
        if (outputs) {
          const test::exact_matrix wanted = scale.cwiseProduct(test::exact(b));
          CHECK(by_hand::within(bias, wanted,
                                (2 * u + u * u) * wanted.cwiseAbs() +
                                    2 * off.cwiseProduct(test::exact(b)).cwiseAbs()));
        } else {
          CHECK(bias == b);
        }

        // The map of tokens is that of rows, and is undone.
        if (outputs) continue;
        const auto map = by_hand::only<lora::input_step<acc>>(all).map;
        test::matrix<acc> again = W;
        map->columns(again.data(), out, in);
        CHECK(test::same_bits(again, merged));
        map->undo_rows("unmerge", nullptr, 0, in);
        map->undo_rows("unmerge", again.data(), out, in);
        CHECK(by_hand::within(again, exact, 2.1L * u * exact.cwiseAbs()));
      }
}

TEST_CASE("rows and tokens may lie apart", "[ia3]") {
  const auto kind = ia3_adapter<float>::of_inputs({2, 3}, 4);
  const auto map = by_hand::only<lora::input_step<float>>(by_hand::of<float>(kind)).map;
  std::vector<float> rows{1, 1, 7, 1, 1, 7};
  map->rows(rows.data(), 2, 3);
  CHECK(rows == std::vector<float>{2, 3, 7, 2, 3, 7});
  map->undo_rows("unmerge", rows.data(), 2, 3);
  CHECK(rows == std::vector<float>{1, 1, 7, 1, 1, 7});
}

TEMPLATE_TEST_CASE("at strength 1 the factors are the stored ones, at 0 nothing is done", "[ia3]",
                   float, double, lora::float16, lora::bfloat16) {
  using acc = acc_of<TestType>;
  test::random g(32);
  const auto l = factors<TestType>(g, 6);
  const auto kind = ia3_adapter<TestType>::of_outputs(l, 3);
  const auto gain = by_hand::only<lora::gain_step<acc>>(by_hand::of<acc>(kind));
  CHECK(gain.scales_bias);
  for (std::size_t k = 0; k < l.size(); ++k)
    CHECK(static_cast<double>(gain.gain[k]) == test::value(l[k]));
  CHECK(by_hand::of<acc>(kind, 0).empty());
  CHECK(by_hand::of<acc>(lora::scaled(0.0, kind)).empty());
  const auto half = by_hand::only<lora::gain_step<acc>>(by_hand::of<acc>(lora::scaled(0.5, kind)));
  CHECK(half.gain == by_hand::only<lora::gain_step<acc>>(by_hand::of<acc>(kind, 0.5)).gain);
}

TEST_CASE("a factor of 0 is taken, and is not undone", "[ia3]") {
  const auto kind = ia3_adapter<float>::of_inputs({2, 0, 3}, 4);
  const auto map = by_hand::only<lora::input_step<float>>(by_hand::of<float>(kind)).map;
  const auto text =
      test::refusal<lora::value_error>([&] { map->undo_rows("unmerge", nullptr, 0, 3); });
  CHECK(test::mentions(text, {"lora::unmerge", "input 1", "column"}));
}

TEST_CASE("a negative number of features is refused", "[ia3]") {
  const auto text = test::refusal<lora::shape_error>([] {
    (void)ia3_adapter<float>::of_outputs({1, 2}, -1);
  });
  CHECK(test::mentions(text, {"ia3_adapter", "in_features is -1"}));
  const auto other = test::refusal<lora::shape_error>([] {
    (void)ia3_adapter<float>::of_inputs({1, 2}, -3);
  });
  CHECK(test::mentions(other, {"out_features is -3"}));
}

TEST_CASE("PEFT's (IA)^3: l0 scales its outputs, l1 its inputs", "[ia3][golden]") {
  const auto make = [](const auto& file, const std::string& module, index_t out, index_t in) {
    auto l = file.template copy<float>(module + ".ia3_l");
    return module.ends_with("l1") ? ia3_adapter<float>::of_inputs(std::move(l), out)
                                  : ia3_adapter<float>::of_outputs(std::move(l), in);
  };
  by_hand::check_golden("other_ia3", {"a"}, make);
  by_hand::check_golden("other_ia3_fan_in_fan_out", {"a"}, make, true);
}
