// SPDX-License-Identifier: Apache-2.0
//
// Threads of the caller's own: what README.md's table of thread safety promises. Const calls of one
// object run at the same time with the bits of a call alone, and a thread that asks OpenMP for one
// thread gets a serial call.
#include <thread>
#include <vector>

#include "lora/batch.hpp"
#include "lora/linear.hpp"
#include "support/catch.hpp"
#include "support/openmp.hpp"

namespace {

using matrix = Eigen::MatrixXf;
using lora::index_t;
constexpr index_t out = 192, in = 160, rank = 8, tokens = 24;  // enough for more than one thread

matrix pattern(index_t rows, index_t cols, int step) {
  matrix m(rows, cols);
  for (index_t k = 0; k < m.size(); ++k) m.data()[k] = static_cast<float>((k * step) % 31) / 15 - 1;
  return m;
}

/// call(thread) on several threads at once.
template <class Call>
void at_once(int threads, const Call& call) {
  std::vector<std::thread> running;
  for (int t = 0; t < threads; ++t) running.emplace_back([&call, t] { call(t); });
  for (auto& thread : running) thread.join();
}

}  // namespace

TEST_CASE("one packed weight, adapter, batch and linear serve several threads at once",
          "[threads]") {
  constexpr int threads = 4;
  const matrix W = pattern(out, in, 7), X = pattern(in, tokens, 3);
  const lora::adapter<float> l{pattern(rank, in, 5), pattern(out, rank, 11), {.alpha = 3}};
  const lora::packed_weight packed{W};
  const std::vector<lora::packed_adapter<float>> served{lora::packed_adapter<float>(l)};
  const auto who = [&] {
    lora::batch<float> b{served};
    for (index_t t = 0; t < tokens; ++t) b.add({{0, 0.5}});
    return b;
  }();
  lora::linear<float> q{W};
  q.attach("l", l);
  const lora::linear<float>& layer = q;

  matrix alone(out, tokens), batched(out, tokens), layered(out, tokens);
  lora::forward(packed, X, alone, served[0]);
  lora::workspace first;
  lora::forward(first, packed, X, batched, who);
  layer.forward(X, layered);

  std::vector<int> wrong(threads, 0);
  at_once(threads, [&](int t) {
    lora::workspace space;  // one for each thread
    for (int turn = 0; turn < 8; ++turn) {
      matrix Y(out, tokens);
      lora::forward(space, packed, X, Y, served[0]);
      wrong[static_cast<std::size_t>(t)] += Y != alone;
      lora::forward(space, packed, X, Y, who);
      wrong[static_cast<std::size_t>(t)] += Y != batched;
      layer.forward(space, X, Y);
      wrong[static_cast<std::size_t>(t)] += Y != layered;
      // Made and destroyed on any thread: small ones share huge pages with those of other threads.
      const lora::packed_adapter<float> mine{l};
      lora::forward(space, packed, X, Y, mine);
      wrong[static_cast<std::size_t>(t)] += Y != alone;
    }
  });
  for (const int w : wrong) CHECK(w == 0);
}

TEST_CASE("a thread of the caller's own that asks for one thread is serial", "[threads]") {
  constexpr double much = 1e9;
  const int here = lora::detail::threads_for(much);
  int in_own = 0, in_region = 0;
  at_once(1, [&](int) {
    omp_set_num_threads(1);
    in_own = lora::detail::threads_for(much);
  });
#if defined(_OPENMP)
#pragma omp parallel num_threads(2)
#pragma omp single
#endif
  in_region = lora::detail::threads_for(much);
  CHECK(in_own == 1);
  CHECK(in_region == 1);
  CHECK(here == omp_get_max_threads());
  CHECK(lora::detail::threads_for(much) == here);  // the other thread's wish is its own
}
