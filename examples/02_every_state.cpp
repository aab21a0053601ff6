// SPDX-License-Identifier: Apache-2.0
//
// Two adapters on one layer, each merged (inside the weight) or mixed (computed beside it), in three
// formats of the weight: what the states differ by, and what they may differ by. One layer of
// 96 x 160, 12 tokens; activations and factors in float.
#include <cstdio>
#include <random>

#include "agreement.hpp"
#include "lora/lora.hpp"

namespace {

using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic>;

matrix normal(Eigen::Index rows, Eigen::Index cols, float spread) {
  static std::mt19937 generator(7);
  matrix m(rows, cols);
  // Sums of small integers are the same numbers on every machine; std::normal_distribution's are not.
  for (auto& value : m.reshaped()) {
    float sum = 0;
    for (int k = 0; k < 12; ++k) sum += static_cast<float>(generator() % 1024) / 1024;
    value = spread * (sum - 6);
  }
  return m;
}

struct layer {
  matrix W = normal(96, 160, 0.05F), x = normal(160, 12, 1);
  lora::adapter<float> style{normal(8, 160, 0.1F), normal(96, 8, 0.05F), {.alpha = 12}};
  lora::adapter<float> subject{
      normal(4, 160, 0.1F), normal(96, 4, 0.05F), {.alpha = 3, .rule = lora::scaling_rule::rank_stabilized}};
};

struct state {
  const char* name;
  bool style_merged, subject_merged;
};

template <class T>
void show(const char* format, const layer& data) {
  const auto subject = lora::scaled(-0.5, data.subject);
  lora::linear<T> q(data.W.cast<T>().eval());
  q.attach("style", data.style);
  q.attach("subject", subject);

  // The exact result, from the weight as it is stored: double has 29 bits more than float.
  const Eigen::MatrixXd W = agreement::in_double(q.weight()), x = data.x.cast<double>();
  const agreement::part parts[] = {agreement::part_of(data.style), agreement::part_of(subject)};
  Eigen::MatrixXd exact = W * x;
  for (const auto& p : parts) exact += p.s * p.B * (p.A * x);

  const auto before = agreement::in_double(q.weight());
  const auto formats = agreement::formats_of<T, float, float>();
  for (const state s : {state{"both mixed", false, false}, state{"style merged, subject mixed", true, false},
                        state{"subject merged, style mixed", false, true}, state{"both merged", true, true}}) {
    q.unmerge();
    if (s.style_merged) q.merge("style");
    if (s.subject_merged) q.merge("subject");
    matrix y(96, 12);
    q.forward(data.x, y);

    agreement::state where;
    (s.style_merged ? where.merged : where.mixed).push_back(parts[0]);
    (s.subject_merged ? where.merged : where.mixed).push_back(parts[1]);
    const Eigen::ArrayXXd bound = agreement::error_bound(W, {}, where, x, formats).array();
    const Eigen::ArrayXXd difference = (y.cast<double>() - exact).array().abs();
    std::printf("%-9s %-27s %.0e   %s\n", format, s.name, difference.maxCoeff(),
                (difference <= bound).all() ? "within the bound" : "MORE THAN ROUNDING");
  }
  q.unmerge();
  std::printf("%-9s after unmerging, the weight is %s\n\n", format,
              agreement::in_double(q.weight()) == before ? "the same, bit for bit" : "CHANGED");
}

}  // namespace

int main() {
  const layer data;
  std::printf("weight    state                       largest error\n");
  show<float>("float", data);
  show<lora::bfloat16>("bfloat16", data);
  show<lora::float16>("float16", data);
}
