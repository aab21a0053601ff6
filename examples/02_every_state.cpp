// SPDX-License-Identifier: Apache-2.0
//
// Two adapters on one layer, each merged (inside the weight) or mixed (computed beside it), in
// three formats of the weight: what the states differ by, and what they may differ by. One layer of
// 96 x 160, 12 tokens; activations and factors in float.
#include <cstdio>
#include <random>

#include "lora/lora.hpp"

namespace {

using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic>;

matrix normal(Eigen::Index rows, Eigen::Index cols, float spread) {
  static std::mt19937 generator(7);
  matrix m(rows, cols);
  // Sums of small integers are the same numbers on every machine; std::normal_distribution's are
  // not.
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
  lora::adapter<float> subject{normal(4, 160, 0.1F),
                               normal(96, 4, 0.05F),
                               {.alpha = 3, .rule = lora::scaling_rule::rank_stabilized}};
};

template <class T>
void show(const char* format, const layer& data) {
  const auto& style = data.style;
  const auto subject = lora::scaled(-0.5, data.subject);
  lora::linear<T> q(data.W.cast<T>().eval());
  q.attach("style", style);
  q.attach("subject", subject);

  // The exact result, from the weight as it is stored: double has 29 bits more than float.
  const auto W = q.weight();
  const Eigen::MatrixXd x = data.x.cast<double>();
  Eigen::MatrixXd exact = W.template cast<double>() * x;
  const auto add_exact = [&](const auto& l) {
    exact +=
        l.scaling() * l.lora_B().template cast<double>() * (l.lora_A().template cast<double>() * x);
  };
  add_exact(style);
  add_exact(subject);

  matrix y(96, 12);
  const auto check = [&](const char* state, const Eigen::MatrixXd& bound) {
    q.forward(data.x, y);
    const Eigen::MatrixXd difference = (y.cast<double>() - exact).cwiseAbs();
    std::printf(
        "%-9s %-27s %.0e   %s\n", format, state, difference.maxCoeff(),
        (difference.array() <= bound.array()).all() ? "within the bound" : "MORE THAN ROUNDING");
  };
  check("both mixed", lora::forward_bound(W, data.x, y, style, subject));
  q.merge("style");
  check("style merged, subject mixed",
        lora::forward_bound(lora::with_merged(W, style), data.x, y, subject));
  q.unmerge("style");
  q.merge("subject");
  check("subject merged, style mixed",
        lora::forward_bound(lora::with_merged(W, subject), data.x, y, style));
  q.merge();
  check("both merged", lora::forward_bound(lora::with_merged(W, style, subject), data.x, y));
  q.unmerge();
  std::printf("%-9s after unmerging, the weight is %s\n\n", format,
              q.weight() == W ? "the same, bit for bit" : "CHANGED");
}

}  // namespace

int main() {
  const layer data;
  std::printf("weight    state                       largest error\n");
  show<float>("float", data);
  show<lora::bfloat16>("bfloat16", data);
  show<lora::float16>("float16", data);
}
