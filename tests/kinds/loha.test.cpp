// SPDX-License-Identifier: Apache-2.0
//
// LoHa against its definition in long double; its expanded factors; what it refuses; PEFT's cases.
#include "lora/kinds/loha.hpp"

#include "kinds/delta.hpp"
#include "support/catch.hpp"
#include "support/refused.hpp"

namespace {

using delta::known;
using lora::factored_matrix;
using lora::index_t;
using lora::scaling_rule;

constexpr lora::scaling fixed{.alpha = 1.25, .rule = scaling_rule::fixed};

struct shape {
  index_t out, in, first, second;  ///< ranks
};

template <class T>
factored_matrix<T> drawn(test::random& g, index_t rows, index_t cols, index_t rank) {
  return {g.reals<T>(rows, rank, 1.5), g.reals<T>(rank, cols, 1.5)};
}
template <class T>
known definition(const lora::loha_adapter<T>& l) {
  const known first = delta::known_of(l.first()), second = delta::known_of(l.second());
  return {delta::hadamard(first.value, second.value), delta::hadamard(first.size, second.size),
          first.roundings + second.roundings + 3};
}

/// lora_B lora_A within the roundings of the Khatri-Rao products, one an element and side, and of
/// cores.
template <class Acc, class T>
void check_expanded(const lora::loha_adapter<T>& l, const known& D) {
  const auto step = delta::step_of<Acc>(l);
  const lora::any_factors* const all = step.source->expanded();
  const index_t rank = l.first().rank() * l.second().rank();
  if (rank * (l.out_features() + l.in_features()) > l.out_features() * l.in_features()) {
    CHECK(all == nullptr);
    return;
  }
  REQUIRE(all != nullptr);
  CHECK(all == step.source->expanded());
  CHECK(all->rank() == rank);
  CHECK(all->scaling() == 1);
  index_t roundings = 2;
  for (const auto* one : {&l.first(), &l.second()})
    if (one->has_core()) roundings += one->right().rows() + 1;
  if (sizeof(T) == 2 && roundings == 2) roundings = 0;  // products of 16-bit numbers are exact
  all->visit([&](const auto& factors) {
    CHECK(std::is_same_v<std::remove_cvref_t<decltype(factors.lora_A()(0, 0))>, Acc>);
    CHECK(delta::within(test::exact_delta(factors), D.value,
                        (delta::gamma<Acc>(roundings) + 0x1p-55L) * D.size));
  });
}

template <class T, class Acc>
void check_all(std::uint64_t seed) {
  test::random g(seed);
  CAPTURE(seed);
  for (const shape& s :
       {shape{1, 1, 1, 1}, shape{3, 5, 2, 2}, shape{17, 33, 3, 1}, shape{40, 7, 9, 8},
        shape{8, 64, 1, 2}, shape{65, 131, 4, 5}, shape{96, 64, 4, 4}}) {
    CAPTURE(s.out, s.in, s.first, s.second);
    const lora::loha_adapter<T> l(drawn<T>(g, s.out, s.in, s.first),
                                  drawn<T>(g, s.out, s.in, s.second), fixed);
    const known D = definition(l);
    delta::check<Acc>(l, D, s.in, g);
    check_expanded<Acc>(l, D);
  }
  for (const index_t kernel : {index_t{1}, index_t{3}, index_t{9}}) {
    const index_t out = 19, channels = 7, r = 3;
    const auto through_core = [&]() -> factored_matrix<T> {
      return {g.reals<T>(r, r * kernel, 1.0), g.reals<T>(r, out, 1.0),
              g.reals<T>(r, channels, 1.0)};
    };
    const lora::loha_adapter<T> l(through_core(), through_core(), {.alpha = 5});
    CHECK(l.in_features() == channels * kernel);
    CHECK(l.scaling() == 5.0 / 3);
    const known D = definition(l);
    delta::check<Acc>(l, D, l.in_features(), g);
    check_expanded<Acc>(l, D);
  }
}

}  // namespace

TEST_CASE("LoHa is the elementwise product of two low-rank matrices") {
  check_all<float, float>(1);
  check_all<float, double>(2);
  check_all<double, double>(3);
  check_all<lora::bfloat16, float>(4);
  check_all<lora::float16, float>(5);
  check_all<lora::bfloat16, double>(6);
}

TEST_CASE("LoHa's expanded factors are offered where they cost less than the layer") {
  test::random g(7);
  for (const index_t rank : {index_t{2}, index_t{4}, index_t{5}}) {
    const lora::loha_adapter<float> l(drawn<float>(g, 40, 40, rank), drawn<float>(g, 40, 40, rank),
                                      {.alpha = 2});
    CHECK((delta::step_of<float>(l).source->expanded() != nullptr) == (rank < 5));
    check_expanded<float>(l, definition(l));
  }
}

TEST_CASE("LoHa's step has s times the strength, and strength 0 none") {
  test::random g(8);
  const lora::loha_adapter<float> l{{g.reals<float>(4, 2, 1), g.reals<float>(2, 3, 1)},
                                    {g.reals<float>(4, 2, 1), g.reals<float>(2, 3, 1)},
                                    {.alpha = 8, .rule = scaling_rule::rank_stabilized}};
  CHECK(l.rank() == 2);
  CHECK(l.scaling() == 8 / std::sqrt(2.0));
  CHECK(delta::step_of<float>(l, -0.5).scale == -0.5 * l.scaling());
  CHECK(l.steps<float>({.operation = "merge", .strength = 0}).empty());
  const auto scaled = lora::scaled(3.0, l);
  CHECK(delta::step_of<float>(scaled).scale == 3 * l.scaling());
  CHECK(test::mentions(test::refusal<lora::value_error>([&] {
                         (void)l.steps<float>({.operation = "merge", .strength = 1e308});
                       }),
                       {"lora::merge", "not finite"}));
}

TEST_CASE("LoHa's step outlives the adapter") {
  test::random g(9);
  std::vector<lora::step<float>> all;
  test::matrix<float> want;
  {
    const lora::loha_adapter<float> l(drawn<float>(g, 5, 6, 2), drawn<float>(g, 5, 6, 2),
                                      {.alpha = 2});
    want = delta::rows_of(*delta::step_of<float>(l).source, 5, 6);
    all = l.steps<float>({.operation = "merge"});
  }
  CHECK(test::same_bits(delta::rows_of(*std::get<lora::delta_step<float>>(all[0]).source, 5, 6),
                        want));
}

TEST_CASE("LoHa refuses what makes none") {
  test::random g(10);
  const auto two = drawn<float>(g, 4, 6, 2), three = drawn<float>(g, 4, 6, 3),
             other = drawn<float>(g, 6, 4, 2);
  const factored_matrix<float> dense(g.reals<float>(4, 6, 1));
  const auto says = [](const auto& first, const auto& second, const lora::scaling& s) {
    return test::refusal<lora::value_error>([&] {
      (void)lora::loha_adapter<float>{first, second, s};
    });
  };
  CHECK(test::mentions(says(two, three, {.alpha = 1}), {"2 and 3", "scaling_rule::fixed"}));
  CHECK(test::mentions(says(two, dense, {.alpha = 1}), {"factors"}));
  CHECK(test::mentions(says(two, two, {.alpha = std::numeric_limits<double>::infinity()}),
                       {"alpha is not finite"}));
  CHECK(test::mentions(test::refusal<lora::shape_error>([&] {
                         (void)lora::loha_adapter<float>{two, other, {.alpha = 1}};
                       }),
                       {"4x6", "6x4"}));
  const auto shapes = [&](index_t left_rows, index_t left_cols, index_t right_rows) {
    return test::refusal<lora::shape_error>([&] {
      factored_matrix<float>(g.reals<float>(left_rows, left_cols, 1),
                             g.reals<float>(right_rows, 5, 1));
    });
  };
  CHECK(test::mentions(shapes(4, 2, 3), {"left is 4x2", "right is 3x5"}));
  CHECK(test::mentions(shapes(4, 0, 0), {"rank of at least 1"}));
  const auto through = [&](index_t rows, index_t cols) {
    return test::refusal<lora::shape_error>([&] {
      factored_matrix<float>(g.reals<float>(rows, cols, 1), g.reals<float>(2, 5, 1),
                             g.reals<float>(3, 5, 1));
    });
  };
  CHECK(test::mentions(through(2, 7), {"the core is 2x7"}));
  CHECK(test::mentions(through(3, 6), {"the core is 3x6"}));
  CHECK(test::mentions(through(2, 6), {"(no exception)"}));
}

TEST_CASE("LoHa of PEFT") {
  if (!test::have_outside()) return;
  const auto make = [](const lora::safetensors::file& file, const std::string& at, index_t r,
                       double alpha) {
    const auto one = [&](const std::string& n) -> factored_matrix<double> {
      const auto a = golden::kernel<double>(file, at + "hada_w" + n + "_a"),
                 b = golden::kernel<double>(file, at + "hada_w" + n + "_b");
      if (file.contains(at + "hada_t" + n))
        return {golden::kernel<double>(file, at + "hada_t" + n), a, b};
      return {a, b};
    };
    lora::loha_adapter<double> l(one("1"), one("2"), {.alpha = alpha});
    CHECK(l.rank() == r);
    return l;
  };
  for (const char* folder : {"other_loha", "other_loha_conv2d", "other_loha_conv2d_effective"})
    delta::check_case(folder, "a", make);
  delta::check_case("mixed_kinds_loha_lokr", "adloha", make);
  delta::check_case("mixed_kinds_lora_loha", "adloha", make);
}
