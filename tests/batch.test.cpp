// SPDX-License-Identifier: Apache-2.0
//
// Batches whose tokens have their own adapters: the right sum for each token, and the same bits
// whatever else is in it.
#include <vector>

#include "lora/lora.hpp"
#include "support/agreement.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/openmp.hpp"
#include "support/random.hpp"
#include "support/refused.hpp"

using lora::assignment;
using lora::index_t;
using test::mentions;
using test::refusal;
using test::same_bits;

namespace {

template <class T, class F, class X>
void check_batches(std::uint64_t seed, int trials) {
  test::random g(seed);
  CAPTURE(g.seed());
  lora::workspace space;
  for (int trial = 0; trial < trials; ++trial) {
    const index_t out = g.integer(1, 60), in = g.one_in(5) ? g.integer(91, 1300) : g.integer(1, 90);
    const index_t tokens = g.one_in(4) ? g.integer(90, 210) : g.integer(1, 30);
    CAPTURE(trial, out, in, tokens);
    const test::matrix<T> W = g.reals<T>(out, in, 1);
    const test::col_matrix<X> x = g.reals<X>(in, tokens, 1);
    std::vector<lora::adapter<F>> plain;
    std::vector<lora::packed_adapter<F>> adapters;
    for (index_t n = g.integer(1, 6); n > 0; --n) {
      const index_t rank = g.integer(1, 40);
      plain.push_back({g.reals<F>(rank, in, 0.3),
                       g.reals<F>(out, rank, 0.3),
                       {.alpha = 0.7 * static_cast<double>(rank)}});
      adapters.emplace_back(plain.back());
    }
    lora::batch who{adapters};
    std::vector<std::vector<assignment>> lists(static_cast<std::size_t>(tokens));
    for (auto& list : lists) {
      for (index_t n = g.integer(0, 3); n > 0; --n)
        list.push_back({g.integer(0, static_cast<index_t>(adapters.size()) - 1),
                        g.one_in(5) ? 0.0 : g.uniform(-2, 2)});
      who.add(list);
    }
    const lora::packed_weight<T> packed{W};
    test::col_matrix<X> y(out, tokens), plain_y(out, tokens);
    lora::forward(space, packed, x, y, who);
    lora::forward(W, x, plain_y, who);
    CHECK(same_bits(y, plain_y));
    using acc = lora::accumulator_t<T, F, X>;
    const auto formats = agreement::formats_of<T, X, acc>();
    for (index_t t = 0; t < tokens; ++t) {
      const auto& list = lists[static_cast<std::size_t>(t)];
      lora::batch alone{adapters};
      alone.add(list);
      test::col_matrix<X> one(out, 1);
      lora::forward(space, packed, x.col(t), one, alone);
      CHECK(same_bits(one, y.col(t)));
      agreement::state where;
      Eigen::MatrixXd exact = agreement::in_double(W) * agreement::in_double(x.col(t));
      for (const assignment& e : list) {
        if (e.weight == 0) continue;
        auto part = agreement::part_of(plain[static_cast<std::size_t>(e.adapter)]);
        part.s *= e.weight;
        exact += part.s * part.B * (part.A * agreement::in_double(x.col(t)));
        where.mixed.push_back(part);
      }
      const auto bound = agreement::error_bound(agreement::in_double(W), {}, where,
                                                agreement::in_double(x.col(t)), formats);
      // The reference is rounded too: in double, by far less than a float result may be.
      const double slack = std::is_same_v<acc, double> ? 2 : 1.001;
      CHECK(
          ((agreement::in_double(one) - exact).cwiseAbs().array() <= slack * bound.array()).all());
    }
  }
}

}  // namespace

TEST_CASE("each token gets its adapters, and its bits do not depend on the others", "[batch]") {
  SECTION("float") { check_batches<float, float, float>(1101, 60); }
  SECTION("bfloat16") { check_batches<lora::bfloat16, lora::bfloat16, lora::bfloat16>(1102, 30); }
  SECTION("float16, float factors") { check_batches<lora::float16, float, float>(1103, 30); }
  SECTION("double") { check_batches<double, double, double>(1104, 30); }
  SECTION("float16 panels in a sum of doubles") {
    check_batches<double, lora::float16, float>(1105, 20);
  }
}

TEST_CASE("a token with one adapter at strength 1 is forward with that adapter, bit for bit",
          "[batch]") {
  test::random g(1106);
  CAPTURE(g.seed());
  const auto W = g.reals<float>(45, 77, 1);
  const test::col_matrix<float> x = g.reals<float>(77, 20, 1);
  std::vector<lora::packed_adapter<float>> adapters;
  for (const index_t rank : {3, 17, 90})
    adapters.emplace_back(lora::adapter<float>{g.reals<float>(rank, 77, 0.3),
                                               g.reals<float>(45, rank, 0.3),
                                               {.alpha = 2.0 * double(rank)}});
  std::vector<index_t> ids;
  for (index_t t = 0; t < 20; ++t) ids.push_back(t * 7 % 4 - 1);
  lora::batch who{adapters};
  who.add_each(ids);
  test::col_matrix<float> y(45, 20), expected(45, 1);
  lora::forward(W, x, y, who);
  for (index_t t = 0; t < 20; ++t) {
    if (ids[std::size_t(t)] == -1)
      lora::forward(W, x.col(t), expected);
    else
      lora::forward(W, x.col(t), expected, adapters[std::size_t(ids[std::size_t(t)])]);
    CHECK(same_bits(y.col(t), expected));
  }
}

TEST_CASE("threads and tiles change no bit", "[batch][threads]") {
  test::random g(1107);
  CAPTURE(g.seed());
  const index_t out = 517, in = 1031, tokens = 131;
  const auto W = g.reals<lora::bfloat16>(out, in, 1);
  const test::col_matrix<float> x = g.reals<float>(in, tokens, 1);
  std::vector<lora::packed_adapter<float>> adapters;
  std::vector<lora::adapter<float>> plain;
  for (const index_t rank : {5, 16, 33, 70}) {
    plain.push_back({g.reals<float>(rank, in, 0.1),
                     g.reals<float>(out, rank, 0.1),
                     {.alpha = 2.0 * double(rank)}});
    adapters.emplace_back(plain.back());
  }
  lora::batch who{adapters};
  for (index_t t = 0; t < tokens; ++t) who.add({{t * t % 4, 0.5}, {t % 3, -1.5}});
  const lora::packed_weight packed{W};
  struct outcome {
    test::col_matrix<float> mixed, batched, unpacked;
    test::matrix<lora::bfloat16> merged;
  };
  const auto run = [&](int threads) {
    const int before = omp_get_max_threads();
    omp_set_num_threads(threads);
    outcome o;
    o.mixed.resize(out, tokens), o.batched.resize(out, tokens), o.unpacked.resize(out, tokens);
    lora::forward(packed, x, o.mixed, adapters);
    lora::forward(packed, x, o.batched, who);
    lora::forward(W, x, o.unpacked, plain);
    o.merged = lora::merged(packed, plain).matrix();
    omp_set_num_threads(before);
    return o;
  };
  const outcome one = run(1);
  CHECK(same_bits(one.mixed, one.unpacked));
  for (const int threads : {2, 3, 8}) {
    CAPTURE(threads);
    const outcome many = run(threads);
    CHECK(same_bits(many.mixed, one.mixed));
    CHECK(same_bits(many.batched, one.batched));
    CHECK(same_bits(many.unpacked, one.unpacked));
    CHECK(same_bits(many.merged, one.merged));
  }
  // Blocks of tokens, and tokens one by one.
  for (const index_t t : {0, 5, 64, 130}) {
    test::col_matrix<float> y(out, 1);
    lora::forward(packed, x.col(t), y, adapters);
    CHECK(same_bits(y, one.mixed.col(t)));
  }
}

TEMPLATE_TEST_CASE("long tokens in short blocks change no bit", "[batch]", float, double) {
  // 30,000 in_features: blocks of 4 tiles, so that these tokens are several blocks.
  test::random g(1110);
  CAPTURE(g.seed());
  const index_t out = 9, in = 30000, tokens = 41;
  const auto W = g.reals<TestType>(out, in, 1);
  const test::col_matrix<TestType> x = g.reals<TestType>(in, tokens, 1);
  std::vector<lora::packed_adapter<TestType>> adapters;
  for (const index_t rank : {2, 5})
    adapters.emplace_back(lora::adapter<TestType>{
        g.reals<TestType>(rank, in, 0.1), g.reals<TestType>(out, rank, 1), {.alpha = 3}});
  lora::batch who{adapters};
  for (index_t t = 0; t < tokens; ++t) who.add({{t % 2, 0.5}, {(t / 3) % 2, -1.5}});
  const lora::packed_weight<TestType> packed{W};
  test::col_matrix<TestType> mixed(out, tokens), batched(out, tokens), one(out, 1);
  lora::forward(packed, x, mixed, adapters);
  lora::forward(packed, x, batched, who);
  for (index_t t = 0; t < tokens; ++t) {
    lora::forward(packed, x.col(t), one, adapters);
    CHECK(same_bits(one, mixed.col(t)));
    lora::batch alone{adapters};
    alone.add({{t % 2, 0.5}, {(t / 3) % 2, -1.5}});
    lora::forward(packed, x.col(t), one, alone);
    CHECK(same_bits(one, batched.col(t)));
  }
}

namespace {

/// So many adapters that their ranks are multiplied while the next panel of W is.
template <class T, class F, class X>
void check_many_adapters(std::uint64_t seed, index_t in) {
  test::random g(seed);
  CAPTURE(g.seed(), in);
  const index_t out = 149, count = 130, tokens = 140;
  const test::matrix<T> W = g.reals<T>(out, in, 1);
  const test::col_matrix<X> x = g.reals<X>(in, tokens, 1);
  std::vector<lora::packed_adapter<F>> adapters;
  for (index_t n = 0; n < count; ++n) {
    const index_t rank =
        n % 10 < 6 ? 16 : g.integer(0, 40);  // some alike, which are multiplied together
    adapters.emplace_back(lora::adapter<F>{g.reals<F>(rank, in, 0.3),
                                           g.reals<F>(out, rank, 0.3),
                                           {.alpha = 0.7, .rule = lora::scaling_rule::fixed}});
  }
  lora::batch who{adapters};
  std::vector<std::vector<assignment>> lists(static_cast<std::size_t>(tokens));
  for (index_t t = 0; t < tokens; ++t) {
    auto& list = lists[static_cast<std::size_t>(t)];
    if (t % 17 != 0) list.push_back({t * 37 % count, g.uniform(-2, 2)});
    if (t % 5 == 0) list.push_back({g.integer(0, count - 1), g.uniform(-2, 2)});
    who.add(list);
  }
  const lora::packed_weight<T> packed{W};
  test::col_matrix<X> alone(out, tokens);
  for (index_t t = 0; t < tokens; ++t) {
    lora::batch one{adapters};
    one.add(lists[static_cast<std::size_t>(t)]);
    lora::forward(packed, x.col(t), alone.col(t), one);
  }
  const int before = omp_get_max_threads();
  for (const int threads : {1, 2, 7}) {
    CAPTURE(threads);
    omp_set_num_threads(threads);
    test::col_matrix<X> y(out, tokens), rows(out, tokens);
    lora::forward(packed, x, y, who);
    lora::forward(W, x, rows, who);
    CHECK(same_bits(y, alone));
    CHECK(same_bits(rows, alone));
  }
  omp_set_num_threads(before);
}

}  // namespace

TEST_CASE("many adapters in a batch: each token has the bits that it has alone",
          "[batch][threads]") {
  // in_features of less than a chunk of W, and of several.
  for (const index_t in : {1, 70, 900}) {
    check_many_adapters<float, float, float>(1111, in);
    check_many_adapters<lora::bfloat16, lora::bfloat16, lora::bfloat16>(1112, in);
    check_many_adapters<lora::float16, float, float>(1113, in);
    check_many_adapters<double, double, double>(1114, in);
  }
}

TEST_CASE("adapters of rank 0 beside others change nothing", "[batch]") {
  test::random g(1115);
  CAPTURE(g.seed());
  const index_t out = 40, in = 8,
                tokens = 9;  // each adapter has one: single rows are multiplied together
  std::vector<lora::packed_adapter<float>> adapters;
  for (index_t n = 0; n < 9; ++n) {
    const index_t rank = n < 8 ? 0 : 1;
    adapters.emplace_back(lora::adapter<float>{g.reals<float>(rank, in, 1),
                                               g.reals<float>(out, rank, 1),
                                               {.alpha = 3, .rule = lora::scaling_rule::fixed}});
  }
  lora::batch who{adapters};
  for (index_t t = 0; t < tokens; ++t) who.add({{t % 9}});
  const lora::packed_weight W{g.reals<float>(out, in, 1)};
  const test::col_matrix<float> x = g.reals<float>(in, tokens, 1);
  test::col_matrix<float> y(out, tokens), base(out, tokens), with(out, tokens);
  lora::forward(W, x, y, who);
  lora::forward(W, x, base);
  lora::forward(W, x, with, adapters[8]);
  for (index_t t = 0; t < tokens; ++t)
    CHECK(same_bits(y.col(t), t % 9 == 8 ? with.col(t) : base.col(t)));
}

TEST_CASE("an adapter at strength 0 is not read; an unused one neither", "[batch]") {
  const Eigen::MatrixXf W = Eigen::MatrixXf::Identity(4, 4) * 3, x = Eigen::MatrixXf::Ones(4, 3);
  std::vector<lora::packed_adapter<float>> adapters;
  adapters.emplace_back(lora::adapter<float>{
      Eigen::MatrixXf::Constant(2, 4, NAN), Eigen::MatrixXf::Ones(4, 2), {.alpha = 3}});
  adapters.emplace_back(
      lora::adapter<float>{Eigen::MatrixXf::Ones(1, 4), Eigen::MatrixXf::Ones(4, 1), {.alpha = 2}});
  lora::batch who{adapters};
  who.add({{0, 0.0}, {1}});
  who.add();
  who.add({{1, 0.5}});
  Eigen::MatrixXf y(4, 3);
  lora::forward(W, x, y, who);
  CHECK(y.col(0) == Eigen::VectorXf::Constant(4, 11));
  CHECK(y.col(1) == Eigen::VectorXf::Constant(4, 3));
  CHECK(y.col(2) == Eigen::VectorXf::Constant(4, 7));
}

TEST_CASE("a batch is refilled without allocating", "[batch]") {
  test::random g(1108);
  const lora::packed_weight packed{g.reals<float>(33, 65, 1)};
  std::vector<lora::packed_adapter<float>> adapters;
  for (const index_t rank : {4, 9})
    adapters.emplace_back(lora::adapter<float>{
        g.reals<float>(rank, 65, 1), g.reals<float>(33, rank, 1), {.alpha = 3}});
  const test::col_matrix<float> x = g.reals<float>(65, 12, 1);
  test::col_matrix<float> y(33, 12);
  lora::workspace space;
  lora::batch who{adapters};
  const auto step = [&] {
    who.clear();
    for (index_t t = 0; t < 12; ++t) who.add({{t % 2, 0.5}});
    lora::forward(space, packed, x, y, who);
  };
  step();
  test::allocations::start(0);
  step();
  test::allocations::stop();
  CHECK(test::allocations::now.count == 0);
  CHECK(y.allFinite());
}

TEST_CASE("what a batch cannot mean is refused", "[batch]") {
  test::random g(1109);
  std::vector<lora::packed_adapter<float>> adapters;
  adapters.emplace_back(
      lora::adapter<float>{g.reals<float>(2, 6, 1), g.reals<float>(5, 2, 1), {.alpha = 3}});
  lora::batch who{adapters};
  CHECK(mentions(refusal<lora::value_error>([&] {
                   who.add({{0}, {1}});
                 }),
                 {"batch::add", "adapter 1", "token 0", "of the 1"}));
  CHECK(
      mentions(refusal<lora::value_error>([&] { who.add({{-1}}); }), {"batch::add", "adapter -1"}));
  CHECK(mentions(refusal<lora::value_error>([&] {
                   who.add({{0, NAN}});
                 }),
                 {"batch::add", "not finite"}));
  CHECK(mentions(refusal<lora::value_error>([&] {
                   who.add_each(std::vector<index_t>{0, 7});
                 }),
                 {"batch::add", "adapter 7", "token 1"}));
  CHECK(who.tokens() == 0);
  who.add({{0}});
  const auto W = g.reals<float>(5, 6, 1), wrong = g.reals<float>(5, 4, 1);
  test::col_matrix<float> y = g.reals<float>(5, 2, 1);
  const test::col_matrix<float> before = y, x = g.reals<float>(6, 2, 1);
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::forward(W, x, y, who); }),
                 {"forward", "1 tokens", "2"}));
  who.add();
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::forward(wrong, x.topRows(4), y, who); }),
                 {"forward", "5x6", "5x4"}));
  CHECK(same_bits(y, before));
  // An adapter that is another one by now: its rank, or its scaling, is not the one that was
  // planned with.
  auto& first = adapters.front();
  const auto original = first;
  const lora::adapter<float> larger{
      g.reals<float>(50, 6, 1), g.reals<float>(5, 50, 1), {.alpha = 75}};
  for (const auto& replaced : {lora::packed_adapter<float>(larger),
                               lora::packed_adapter<float>(lora::scaled(0, larger))}) {
    first = replaced;
    CHECK(mentions(refusal<lora::value_error>([&] { lora::forward(W, x, y, who); }),
                   {"forward", "adapter 0", "changed"}));
    CHECK(same_bits(y, before));
  }
  first = original;
  lora::forward(W, x, y, who);
  CHECK_FALSE(same_bits(y, before));
  // Moving copies: the batch that was moved from is still one.
  const lora::batch taken = std::move(who);
  CHECK(taken.tokens() == 2);
  CHECK(who.tokens() == 2);  // NOLINT(bugprone-use-after-move): that is what is tested
  // No tokens at all.
  lora::batch nobody{adapters};
  test::col_matrix<float> none(5, 0);
  lora::forward(W, test::col_matrix<float>(6, 0), none, nobody);
  CHECK(none.size() == 0);
}
