// SPDX-License-Identifier: Apache-2.0
//
// LoKr against its definition in long double, with either product first; what it refuses; PEFT's
// cases.
#include "lora/kinds/lokr.hpp"

#include "kinds/delta.hpp"
#include "support/catch.hpp"
#include "support/refused.hpp"

namespace {

using delta::known;
using lora::factored_matrix;
using lora::index_t;
using lora::scaling_rule;

constexpr lora::scaling fixed{.alpha = 1.25, .rule = scaling_rule::fixed};

/// o1 x i1 and o2 x i2, with a rank or, at 0, dense.
struct shape {
  index_t o1, i1, rank1, o2, i2, rank2;
};

template <class T>
factored_matrix<T> drawn(test::random& g, index_t rows, index_t cols, index_t rank) {
  if (rank == 0) return {g.reals<T>(rows, cols, 1.5)};
  return {g.reals<T>(rows, rank, 1.5), g.reals<T>(rank, cols, 1.5)};
}
template <class T>
known definition(const lora::lokr_adapter<T>& l) {
  const known C1 = delta::known_of(l.C1()), C2 = delta::known_of(l.C2());
  const index_t more = C1.roundings + C2.roundings;
  return {delta::kron(C1.value, C2.value), delta::kron(C1.size, C2.size), more == 0 ? 1 : more + 4};
}
template <class T>
index_t depth(const lora::lokr_adapter<T>& l) {
  return l.C1().cols() + l.C2().cols() + (l.C1().is_dense() && l.C2().is_dense() ? 9 : 6);
}

template <class T, class Acc>
void check_all(std::uint64_t seed) {
  test::random g(seed);
  CAPTURE(seed);
  for (const shape& s :
       {shape{1, 1, 0, 1, 1, 0}, shape{3, 5, 0, 2, 7, 0}, shape{1, 1, 0, 33, 17, 3},
        shape{9, 2, 0, 5, 3, 1}, shape{2, 9, 0, 5, 35, 2}, shape{4, 3, 2, 8, 6, 2},
        shape{10, 12, 3, 3, 2, 0}, shape{3, 2, 5, 4, 3, 9}, shape{8, 8, 0, 40, 33, 4},
        shape{17, 9, 0, 32, 64, 1}}) {
    CAPTURE(s.o1, s.i1, s.rank1, s.o2, s.i2, s.rank2);
    const lora::lokr_adapter<T> l(drawn<T>(g, s.o1, s.i1, s.rank1),
                                  drawn<T>(g, s.o2, s.i2, s.rank2), 4, fixed);
    delta::check<Acc>(l, definition(l), depth(l), g);
    CHECK(delta::step_of<Acc>(l).source->expanded() == nullptr);
  }
  for (const index_t kernel : {index_t{1}, index_t{3}, index_t{9}}) {
    const index_t o2 = 6, channels = 5, r = 2;
    const factored_matrix<T> C2(g.reals<T>(r, r * kernel, 1.0), g.reals<T>(r, o2, 1.0),
                                g.reals<T>(r, channels, 1.0));
    const lora::lokr_adapter<T> l(drawn<T>(g, 3, 4, 0), C2, r, {.alpha = 5});
    CHECK(l.in_features() == 4 * channels * kernel);
    CHECK(l.scaling() == 2.5);
    delta::check<Acc>(l, definition(l), depth(l), g);
  }
}

}  // namespace

TEST_CASE("LoKr is a Kronecker product") {
  check_all<float, float>(1);
  check_all<float, double>(2);
  check_all<double, double>(3);
  check_all<lora::bfloat16, float>(4);
  check_all<lora::float16, float>(5);
  check_all<lora::bfloat16, double>(6);
}

TEST_CASE("LoKr's tokens in several blocks") {
  test::random g(7);
  const lora::lokr_adapter<float> l(drawn<float>(g, 40, 50, 0), drawn<float>(g, 60, 30, 2), 2,
                                    {.alpha = 1});
  const auto source = delta::step_of<float>(l).source;
  const test::col_matrix<float> x =
      g.reals<float>(1500, 131, 1.0);  // 60 * 50 accumulators a token, 43 tokens a block
  const auto y = delta::product_of(*source, x, 2400);
  for (const index_t t : {index_t{0}, index_t{42}, index_t{43}, index_t{130}})
    CHECK(test::same_bits(delta::product_of<float>(*source, x.col(t), 2400), y.col(t).eval()));
  CHECK(y.allFinite());
}

TEST_CASE(
    "LoKr's step has alpha / r times the strength, also of dense matrices, and strength 0 none") {
  test::random g(8);
  const lora::lokr_adapter<float> l{
      g.reals<float>(2, 3, 1), g.reals<float>(4, 5, 1), 8, {.alpha = 4}};
  CHECK(l.rank() == 8);
  CHECK(l.scaling() == 0.5);
  CHECK(delta::step_of<float>(l, -3).scale == -1.5);
  CHECK(l.steps<float>({.operation = "merge", .strength = 0}).empty());
  CHECK(test::mentions(test::refusal<lora::value_error>([&] {
                         (void)lora::lokr_adapter<float>(l.C1(), l.C2(), 1, {.alpha = 1e300})
                             .steps<float>({.operation = "merge", .strength = 1e300});
                       }),
                       {"lora::merge", "not finite"}));
}

TEST_CASE("LoKr's step outlives the adapter") {
  test::random g(9);
  std::vector<lora::step<float>> all;
  test::matrix<float> want;
  {
    const lora::lokr_adapter<float> l(drawn<float>(g, 2, 3, 0), drawn<float>(g, 4, 2, 1), 1,
                                      {.alpha = 2});
    want = delta::rows_of(*delta::step_of<float>(l).source, 8, 6);
    all = l.steps<float>({.operation = "merge"});
  }
  CHECK(test::same_bits(delta::rows_of(*std::get<lora::delta_step<float>>(all[0]).source, 8, 6),
                        want));
}

TEST_CASE("LoKr refuses what makes none") {
  test::random g(10);
  const auto says = [](const auto& C1, const auto& C2, index_t rank, const lora::scaling& s) {
    return test::refusal<lora::value_error>([&] {
      (void)lora::lokr_adapter<float>{C1, C2, rank, s};
    });
  };
  const auto dense = drawn<float>(g, 2, 3, 0), two = drawn<float>(g, 4, 6, 2);
  CHECK(test::mentions(says(dense, two, 4, {.alpha = 1}), {"C2 has rank 2", "rank is 4"}));
  CHECK(test::mentions(says(two, dense, 4, {.alpha = 1}), {"C1 has rank 2"}));
  CHECK(test::mentions(says(two, dense, 4, fixed), {"(no exception)"}));
  CHECK(test::mentions(says(dense, dense, 0, {.alpha = 1}), {"rank 0"}));
  CHECK(test::mentions(says(dense, dense, 1, {.alpha = std::numeric_limits<double>::quiet_NaN()}),
                       {"not finite"}));
  const factored_matrix<float> tall(test::matrix<float>(lora::detail::most_extent, 0)),
      wide(test::matrix<float>(4, 0));
  CHECK(test::mentions(test::refusal<lora::shape_error>([&] {
                         (void)lora::lokr_adapter<float>{tall, wide, 1, fixed};
                       }),
                       {"larger than a memory"}));
}

TEST_CASE("LoKr without elements") {
  const factored_matrix<float> none(test::matrix<float>(3, 0)), some(test::matrix<float>(2, 4)),
      thin(test::matrix<float>(0, 4));
  test::random g(11);
  for (const auto& C1 : {none, some, thin})
    for (const auto& C2 : {none, thin}) {
      const lora::lokr_adapter<float> l{C1, C2, 1, fixed};
      const auto source = delta::step_of<float>(l).source;
      const auto y = delta::product_of<float>(*source, g.reals<float>(l.in_features(), 2, 1.0),
                                              l.out_features());
      CHECK((y.array() == 0).all());
      CHECK(delta::rows_of(*source, l.out_features(), l.in_features()).size() == 0);
    }
}

TEST_CASE("LoKr of PEFT") {
  if (!test::have_outside()) return;
  const auto make = [](const lora::safetensors::file& file, const std::string& at, index_t r,
                       double alpha) {
    const auto one = [&](const std::string& n) -> factored_matrix<double> {
      if (file.contains(at + "lokr_w" + n))
        return {golden::kernel<double>(file, at + "lokr_w" + n)};
      const auto a = golden::kernel<double>(file, at + "lokr_w" + n + "_a"),
                 b = golden::kernel<double>(file, at + "lokr_w" + n + "_b");
      if (file.contains(at + "lokr_t" + n))
        return {golden::kernel<double>(file, at + "lokr_t" + n), a, b};
      return {a, b};
    };
    return lora::lokr_adapter<double>(one("1"), one("2"), r, {.alpha = alpha});
  };
  for (const char* folder : {"other_lokr", "other_lokr_both", "other_lokr_conv2d_effective"})
    delta::check_case(folder, "a", make);
  delta::check_case("mixed_kinds_loha_lokr", "adlokr", make);
  delta::check_case("mixed_kinds_lora_lokr", "adlokr", make);
}
