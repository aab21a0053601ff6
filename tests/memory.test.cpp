// SPDX-License-Identifier: Apache-2.0
//
// Memory for panels: aligned, apart from each other, and given back.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

#include "lora/lora.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

using lora::index_t;
using lora::detail::array;
using lora::detail::huge_page;
using lora::detail::lifetime;
using lora::detail::shared_huge_pages;

namespace {
std::uintptr_t address(const void* p) { return reinterpret_cast<std::uintptr_t>(p); }
}  // namespace

TEST_CASE("arrays of every size are aligned, keep what is written, and lie apart", "[memory]") {
  test::random g(1401);
  CAPTURE(g.seed());
  std::vector<array<std::uint32_t>> all;
  const auto value = [&](std::size_t n, index_t k) {
    return static_cast<std::uint32_t>(n * 1000003 + static_cast<std::size_t>(k));
  };
  std::vector<std::uint32_t> keys;
  const auto intact = [&](std::size_t at) {
    for (index_t k = 0; k < all[at].size(); ++k)
      if (all[at].data()[k] != value(keys[at], k)) return false;
    return true;
  };
  for (std::uint32_t n = 0; n < 200; ++n) {
    const index_t size = n == 0 ? 0 : g.one_in(20) ? g.integer(400'000, 1'200'000) : g.integer(1, 60'000);
    all.emplace_back(size, g.one_in(3) ? lifetime::call : lifetime::model);
    keys.push_back(n);
    REQUIRE(all.back().size() == size);
    CHECK(address(all.back().data()) % lora::detail::memory_alignment == 0);
    for (index_t k = 0; k < size; ++k) all.back().data()[k] = value(n, k);
    if (g.one_in(3)) {  // dropped, moved or copied in any order
      const auto at = static_cast<std::size_t>(g.integer(0, static_cast<index_t>(all.size()) - 1));
      std::swap(all[at], all.back());
      std::swap(keys[at], keys.back());
      CHECK(intact(all.size() - 1));
      all.pop_back();
      keys.pop_back();
    } else if (g.one_in(4)) {
      const auto at = static_cast<std::size_t>(g.integer(0, static_cast<index_t>(all.size()) - 1));
      all[at] = array<std::uint32_t>(all.back());
      keys[at] = keys.back();
    }
  }
  for (std::size_t at = 0; at < all.size(); ++at) CHECK(intact(at));
}

TEST_CASE("small adapters share huge pages, which are given back", "[memory]") {
  if constexpr (lora::detail::shares_huge_pages) {
    const auto pages_of = [](const std::vector<array<char>>& blocks) {
      std::vector<std::uintptr_t> pages;
      for (const auto& b : blocks) {
        const auto last = address(b.data()) + static_cast<std::uintptr_t>(b.size()) - 1;
        for (auto p = address(b.data()) / huge_page; p <= last / huge_page; ++p) pages.push_back(p);
      }
      std::sort(pages.begin(), pages.end());
      return std::unique(pages.begin(), pages.end()) - pages.begin();
    };
    test::allocations::start(100'000);
    std::vector<array<char>> blocks;
    for (int k = 0; k < 500; ++k) blocks.emplace_back(100'000, lifetime::model);
    const auto chunks = test::allocations::now.large_count.load();
    CHECK((chunks >= 2 && chunks <= 4));  // 50 MB, 16 MiB a time; one may be older
    CHECK(pages_of(blocks) <= 28);        // 24 hold them; in each chunk one may be begun
    const array<char> copy = blocks[7];
    CHECK(pages_of(blocks) <= 28);
    blocks.push_back(copy);
    CHECK(test::allocations::now.large_count <= chunks + 1);  // a copy lives as long
    blocks.clear();
    CHECK(test::allocations::now.live_large <= 2);  // that of the copy, and an empty one
    test::allocations::stop();
    for (const lifetime lives : {lifetime::call, lifetime::model}) {
      const array<char> large(static_cast<index_t>(huge_page) + 1, lives);
      CHECK(address(large.data()) % huge_page == 0);
    }
  } else {
    SUCCEED("each block is its own here");
  }
}

TEST_CASE("blocks of shared pages lie apart, and what is given back is used again", "[memory]") {
  test::random g(1402);
  CAPTURE(g.seed());
  shared_huge_pages pages;
  struct block {
    std::byte* begin;
    std::size_t bytes;
    std::uint8_t key;
  };
  std::vector<block> all;
  const auto intact = [](const block& b) {
    return std::all_of(b.begin, b.begin + b.bytes, [&](std::byte v) { return v == std::byte{b.key}; });
  };
  const auto give_back = [&](std::size_t at) {
    CHECK(intact(all[at]));
    const auto allocated = test::allocations::now.count.load();
    pages.give_back(all[at].begin, all[at].bytes);
    const auto after = test::allocations::now.count.load();
    CHECK(after == allocated);
    all[at] = all.back();
    all.pop_back();
  };
  test::allocations::start(shared_huge_pages::chunk_bytes);
  for (int n = 0; n < 3000; ++n) {
    const auto bytes = static_cast<std::size_t>(g.one_in(3) ? 70'001 : g.integer(1, 200'000));
    all.push_back({pages.take(bytes), bytes, static_cast<std::uint8_t>(n)});
    REQUIRE(address(all.back().begin) % lora::detail::memory_alignment == 0);
    std::fill_n(all.back().begin, bytes, std::byte{all.back().key});
    while (all.size() > 300 || (all.size() > 30 && g.one_in(3)))
      give_back(static_cast<std::size_t>(g.integer(0, static_cast<index_t>(all.size()) - 1)));
  }
  // At most 300 blocks of 90 KB on average, 27 MB, live at a time, out of 270 MB that were taken.
  CHECK(test::allocations::now.most_live_large >= 2);
  CHECK(test::allocations::now.most_live_large <= 4);
  // Every other one first: then there are most pieces.
  std::sort(all.begin(), all.end(), [](const block& a, const block& b) { return a.begin < b.begin; });
  for (std::size_t at = 0; at < all.size(); ++at) {
    give_back(at);
    std::sort(all.begin(), all.end(), [](const block& a, const block& b) { return a.begin < b.begin; });
  }
  while (!all.empty()) give_back(all.size() / 2);
  CHECK(test::allocations::now.live_large == 1);
  // All of it is one piece again.
  const auto count = test::allocations::now.large_count.load();
  std::byte* const whole = pages.take(shared_huge_pages::chunk_bytes);
  CHECK(test::allocations::now.large_count == count);
  pages.give_back(whole, shared_huge_pages::chunk_bytes);
  test::allocations::stop();
}

TEST_CASE("adapters are packed and dropped by several threads at once", "[memory][threads]") {
  std::vector<std::thread> threads;
  std::vector<int> wrong(8);
  for (std::size_t n = 0; n < wrong.size(); ++n)
    threads.emplace_back([&wrong, n] {
      std::vector<array<std::uint64_t>> mine;
      for (std::uint64_t k = 0; k < 300; ++k) {
        mine.emplace_back(static_cast<index_t>(1 + k * 37 % 9000), lifetime::model);
        std::fill_n(mine.back().data(), mine.back().size(), n * 1000 + k);
        if (k % 3 == 0) mine.erase(mine.begin());
      }
      for (const auto& a : mine)
        wrong[n] += std::count(a.data(), a.data() + a.size(), a.data()[0]) != a.size() || a.data()[0] / 1000 != n;
    });
  for (auto& t : threads) t.join();
  CHECK(std::count(wrong.begin(), wrong.end(), 0) == static_cast<std::ptrdiff_t>(wrong.size()));
}

TEST_CASE("when there is no memory, nothing is lost", "[memory]") {
  shared_huge_pages pages;
  std::byte* const first = pages.take(1000);
  *first = std::byte{7};
  // How many allocations fail, one after the other, until take succeeds.
  std::byte* block = nullptr;
  const auto failures_of_take = [&](std::size_t bytes) {
    long failures = 0;
    while (test::allocations::fails_at(failures, [&] { block = pages.take(bytes); })) ++failures;
    return failures;
  };
  CHECK(failures_of_take(shared_huge_pages::chunk_bytes) >= 2);  // a chunk, and its place among the others
  std::byte* const whole = block;
  std::vector<std::byte*> more;
  long failures = 0;
  for (std::ptrdiff_t n = 1; n < 10; ++n) {  // in the first chunk, whose list of pieces must grow
    failures += failures_of_take(1000);
    more.push_back(block);
    CHECK(block == first + 1024 * n);
  }
  CHECK(failures >= 1);
  CHECK(*first == std::byte{7});
  for (std::byte* const b : more) pages.give_back(b, 1000);
  pages.give_back(first, 1000);
  pages.give_back(whole, shared_huge_pages::chunk_bytes);
}
