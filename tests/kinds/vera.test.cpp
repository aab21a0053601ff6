// SPDX-License-Identifier: Apache-2.0
//
// VeRA: its factors in shared matrices, by hand and against PEFT's own weights and outputs.
#include "lora/kinds/vera.hpp"

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "kinds/by_hand.hpp"

static_assert(lora::adapter_kind<lora::vera_adapter<lora::bfloat16>>);

namespace {

using by_hand::acc_of;
using by_hand::index_t;
using lora::vera_adapter;

template <class T>
std::vector<T> values(const test::matrix<T>& m) {
  return std::vector<T>(m.data(), m.data() + m.size());
}
template <class T>
auto shared(const test::matrix<T>& m) {
  return std::make_shared<const lora::detail::row_major_matrix<T>>(m);
}

}  // namespace

TEMPLATE_TEST_CASE("the step is w diag(b) B[:out] diag(d) A[:, :in]", "[vera]", float, double,
                   lora::float16, lora::bfloat16) {
  using T = TestType;
  using acc = acc_of<T>;
  test::random g(61);
  for (const auto& [out, in, rank] : {std::array<index_t, 3>{5, 9, 3}, {7, 3, 4}, {1, 1, 1}})
    for (const double strength : {1.0, -0.35}) {
      CAPTURE(out, in, rank, strength, g.seed());
      const test::matrix<T> A = g.reals<T>(rank, 9, 1), B = g.reals<T>(7, rank, 1);
      const test::matrix<T> b = g.reals<T>(out, 1, 1), d = g.reals<T>(rank, 1, 1);
      const vera_adapter<T> kind(shared(A), shared(B), values(b), values(d), in);
      CHECK(kind.out_features() == out);
      CHECK(kind.in_features() == in);
      CHECK(kind.rank() == rank);
      const test::exact_matrix dA =
          test::exact(d).col(0).asDiagonal() * test::exact(A).leftCols(in);
      const test::exact_matrix bB =
          test::exact(b).col(0).asDiagonal() * test::exact(B).topRows(out);
      const test::exact_matrix want = strength * test::times(bB, dA);
      const test::exact_matrix size =
          std::abs(strength) * test::times(bB.cwiseAbs(), dA.cwiseAbs());
      const auto one = by_hand::only<lora::low_rank_step>(by_hand::of<acc>(kind, strength));
      CHECK(one.strength == strength);
      one.factors.visit([&](const auto& l) {
        const long double roundings = sizeof(T) == 2 ? 0 : by_hand::gamma<acc>(2);
        CHECK(by_hand::within(one.strength * test::exact_delta(l), want,
                              (roundings + 0x1p-52L) * size));
        if (sizeof(T) == 2) CHECK(test::exact(l.lora_A()) == dA);
      });
      CHECK(by_hand::of<acc>(kind, 0).empty());
    }
}

TEST_CASE("what is no VeRA is refused", "[vera]") {
  const auto A = shared<float>(test::matrix<float>::Ones(2, 4)),
             B = shared<float>(test::matrix<float>::Ones(3, 2));
  const auto refusal = [&](std::vector<float> b, std::vector<float> d, index_t in) {
    return test::refusal<lora::shape_error>([&] { (void)vera_adapter<float>(A, B, b, d, in); });
  };
  CHECK(test::mentions(refusal({1, 1, 1}, {1, 1, 1}, 4), {"A is 2x4", "lambda_d has 3"}));
  CHECK(test::mentions(refusal({1, 1, 1, 1}, {1, 1}, 4), {"4x4", "3 outputs"}));
  CHECK(test::mentions(refusal({1, 1, 1}, {1, 1}, 5), {"3x5", "4 inputs"}));
  CHECK(test::mentions(refusal({1, 1, 1}, {1, 1}, -1), {"-1"}));
  CHECK(test::mentions(test::refusal<lora::value_error>([&] {
                         (void)vera_adapter<float>(nullptr, B, {1}, {1, 1}, 1);
                       }),
                       {"not there"}));
}

TEST_CASE("PEFT's VeRA", "[vera][golden]") {
  by_hand::check_golden(
      "other_vera", {"a"}, [](const auto& file, const std::string& module, index_t, index_t in) {
        const auto matrix = [&](const std::string& name) {
          const auto all = file.template copy<float>(name);
          const auto& shape = file.at(name).shape;
          return shared<float>(Eigen::Map<const test::matrix<float>>(
              all.data(), static_cast<index_t>(shape[0]), static_cast<index_t>(shape[1])));
        };
        return vera_adapter<float>(matrix("base_model.vera_A"), matrix("base_model.vera_B"),
                                   file.template copy<float>(module + ".vera_lambda_b"),
                                   file.template copy<float>(module + ".vera_lambda_d"), in);
      });
}
