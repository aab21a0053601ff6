// SPDX-License-Identifier: Apache-2.0
//
// Units built for different instruction sets, with and without OpenMP, fast math and exceptions, in
// one program: each must run its own code. If the linker had merged two of them, a unit for the
// baseline would execute AVX2, or the names of their types would be the same. The results differ by
// rounding only, within the bound of docs/numerics.md.
#include <cmath>
#include <cstdio>
#include <set>

#include "units.hpp"

int main() {
  const Eigen::Index out = 37, in = 53, rank = 5;
  std::srand(20);
  const Eigen::MatrixXf W = Eigen::MatrixXf::Random(out, in), A = Eigen::MatrixXf::Random(rank, in),
                        B = Eigen::MatrixXf::Random(out, rank);
  const Eigen::VectorXf x = Eigen::VectorXf::Random(in);
  const Eigen::MatrixXd delta =
      7.0 / static_cast<double>(rank) * B.cast<double>() * A.cast<double>();
  const Eigen::VectorXd exact = (W.cast<double>() + delta) * x.cast<double>();
  // gamma_n (|W| + 2 |s B| |A|) |x| with n = in + rank + 4 roundings, for the merged and for the
  // mixed way.
  const double gamma = static_cast<double>(in + rank + 4) * 0x1p-24 * 1.001;
  const Eigen::VectorXd size = (W.cwiseAbs().cast<double>() +
                                2.8 * B.cwiseAbs().cast<double>() * A.cwiseAbs().cast<double>()) *
                               x.cwiseAbs().cast<double>();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  unit* const units[] = {unit_0, unit_1, unit_2, unit_3, unit_4};
  std::set<std::string> types;
  int run = 0, wrong = 0;
  for (unit* const one : units) {
    if (one == unit_1 && !avx2) continue;
    const unit_result result = one(W, A, B, x);
    for (const auto* y : {&result.mixed, &result.merged})
      if (!((y->cast<double>() - exact).cwiseAbs().array() <= gamma * size.array()).all()) ++wrong;
    if (!result.refused) ++wrong;
    types.insert(result.type);
    ++run;
  }
  std::printf("%d units, %zu different types, %d wrong%s\n", run, types.size(), wrong,
              avx2 ? "" : " (no AVX2 here)");
  return wrong != 0 || types.size() != static_cast<std::size_t>(run);
}
