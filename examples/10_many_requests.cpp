// SPDX-License-Identifier: Apache-2.0
//
// A server that holds one base and many adapters: packed once, then each call mixes requests with
// different adapters in one product. A request's result does not depend on what else is in its
// batch, bit for bit, so a server may group requests as it likes. At the end: when would merging
// have been faster?
#include <cstdio>
#include <string>
#include <vector>

#include "lora/lora.hpp"

namespace {

using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Numbers that are the same on every machine.
matrix pattern(Eigen::Index rows, Eigen::Index cols, int step, float size) {
  matrix m(rows, cols);
  for (Eigen::Index k = 0; k < m.size(); ++k)
    m.data()[k] = size * (static_cast<float>((k * step) % 31) / 15 - 1);
  return m;
}
lora::adapter<float> tenant(int number, Eigen::Index rank) {
  return {pattern(rank, 96, 3 + 2 * number, 0.2F),
          pattern(64, rank, 5 + 2 * number, 0.3F),
          {.alpha = 2.0 * number + 1}};
}

const char* yes_or_no(bool same) { return same ? "yes" : "NO"; }

}  // namespace

int main() {
  // Once: the base as it is stored, in bfloat16, and the adapters of all tenants; ranks need not be
  // equal.
  const auto W = pattern(64, 96, 7, 0.3F).cast<lora::bfloat16>().eval();
  const lora::packed_weight packed{W};
  const std::vector<lora::adapter<float>> adapters{tenant(0, 4), tenant(1, 16), tenant(2, 1)};
  const lora::packed_adapters<float> served{adapters};
  lora::workspace space;

  // Every call: which adapters each of its tokens gets, and one product for all of them.
  const Eigen::MatrixXf X = pattern(96, 5, 17, 1);
  Eigen::MatrixXf Y(64, 5);
  lora::batch who{served};
  who.add();                                        // token 0: the base alone
  who.add({{1}});                                   // token 1: tenant 1
  who.add({{0, 0.7}, {2, 0.3}});                    // token 2: a blend of two
  who.add_each(std::vector<lora::index_t>{1, -1});  // tokens 3 and 4: tenant 1 again, and nobody
  lora::forward(space, packed, X, Y, who);

  // Each token alone gives the same bits.
  const auto alone = [&](Eigen::Index token, const auto&... l) {
    Eigen::VectorXf y(64);
    lora::forward(packed, X.col(token), y, l...);
    return Y.col(token) == y;
  };
  std::printf("token 0, the base alone:    %8.4f   same bits alone: %s\n",
              static_cast<double>(Y(0, 0)), yes_or_no(alone(0)));
  std::printf("token 1, tenant 1:          %8.4f   same bits alone: %s\n",
              static_cast<double>(Y(0, 1)), yes_or_no(alone(1, served[1])));
  std::printf("token 2, tenants 0 and 2:   %8.4f   same bits alone: %s\n",
              static_cast<double>(Y(0, 2)),
              yes_or_no(alone(2, lora::scaled(0.7, served[0]), lora::scaled(0.3, served[2]))));

  // The batch is filled again for the next call, here with the same requests in another order:
  // nothing is allocated.
  const std::size_t held = space.size();
  who.clear();
  who.add({{0, 0.7}, {2, 0.3}});
  who.add_each(std::vector<lora::index_t>{-1, 1, -1, 1});
  lora::forward(space, packed, X, Y, who);
  std::printf("a second call needs more memory: %s\n", space.size() == held ? "no" : "YES");

  // Merge or mix? For a machine of 200 GFLOP/s that reads 40 GB/s; lora::machine_limits() measures
  // yours.
  const lora::machine_rates machine{.flops = 200e9, .read = 40e9, .read_write = 40e9, .threads = 8};
  for (const double stay : {20.0, 20000.0}) {
    const auto what = lora::advise<lora::bfloat16>(
        machine, {.out_features = 4096, .in_features = 4096}, {16}, {.tokens_per_switch = stay});
    std::printf("%5.0f tokens per change of adapters: %s (break-even at %.0f)\n", stay,
                what.merge ? "merge" : "mix", what.break_even_tokens);
  }
}
