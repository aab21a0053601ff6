// SPDX-License-Identifier: Apache-2.0
//
// How many elements a merge says that it changed is what a comparison finds, for every format, order
// and shape. A count of comparison masks came out larger than the weight in an optimized build of
// gcc 12 for AVX-512; so this file is optimized.
#include <cstddef>
#include <cstring>

#include "lora/lora.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

using lora::index_t;

namespace {

template <class M>
std::size_t differing(const M& a, const M& b) {
  std::size_t count = 0;
  for (index_t i = 0; i < a.rows(); ++i)
    for (index_t j = 0; j < a.cols(); ++j)
      count += std::memcmp(&a(i, j), &b(i, j), sizeof a(i, j)) != 0;
  return count;
}

template <class M>
void check(test::random& g, index_t out, index_t in, index_t rank, double size) {
  using T = typename M::Scalar;
  const M before = g.reals<T>(out, in, 1);
  M W = before;
  const lora::adapter<float> l{
      g.reals<float>(rank, in, size), g.reals<float>(out, rank, size), {.alpha = 3}};
  CAPTURE(out, in, rank, size);
  const auto of_matrix = lora::merge(W, l);
  CHECK(of_matrix.changed == differing(W, before));
  lora::packed_weight<T> panels{before};
  const auto report = lora::merge(panels, l);
  CHECK(report.changed == differing(M(panels.matrix()), before));
  CHECK(report.elements == static_cast<std::size_t>(before.size()));
}

}  // namespace

TEMPLATE_TEST_CASE("the changed elements are those that differ", "[reports]", float, double,
                   lora::float16, lora::bfloat16) {
  test::random g(3201);
  CAPTURE(g.seed());
  for (const index_t out : {1, 7, 8, 9, 17, 40})
    for (const index_t in : {1, 16, 31, 33, 45, 100})
      for (const index_t rank : {1, 5, 17})
        // At the smaller size rounding keeps some elements of 16 bits as they are.
        for (const double size : {0.7, 0.02}) {
          check<test::matrix<TestType>>(g, out, in, rank, size);
          check<test::col_matrix<TestType>>(g, out, in, rank, size);
        }
}
