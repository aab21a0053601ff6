// SPDX-License-Identifier: Apache-2.0
//
// Memory for panels: aligned, apart from each other, and given back.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <thread>
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
    test::allocations::start(huge_page);
    std::vector<array<char>> blocks;
    for (int k = 0; k < 500; ++k) blocks.emplace_back(100'000, lifetime::model);
    CHECK(test::allocations::now.large_count <= 4);  // 50 MB, 16 MiB a time
    // 24 huge pages hold them; a few more where one is begun.
    CHECK(pages_of(blocks) <= 28);
    const auto place = address(blocks.back().data());
    const array<char> copy = blocks[7];
    CHECK(address(copy.data()) / huge_page - place / huge_page <= 1);  // a copy lives as long
    blocks.clear();
    CHECK(test::allocations::now.live_large == 1);  // the newest has room
    test::allocations::stop();
    for (const lifetime lives : {lifetime::call, lifetime::model}) {
      const array<char> large(static_cast<index_t>(huge_page) + 1, lives);
      CHECK(address(large.data()) % huge_page == 0);
    }
  } else {
    SUCCEED("each block is its own here");
  }
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

TEST_CASE("when there is no memory for a chunk, nothing is lost", "[memory]") {
  if constexpr (lora::detail::shares_huge_pages) {
    shared_huge_pages pages;
    const auto first = pages.take(1000);
    *first = std::byte{7};
    for (long n = 0; n < 2; ++n)  // the chunk, and what counts its owners
      CHECK(test::allocations::fails_at(n, [&] { static_cast<void>(pages.take(shared_huge_pages::chunk_bytes)); }));
    const auto second = pages.take(1000);
    CHECK(address(second.get()) == address(first.get()) + 1024);
    CHECK(*first == std::byte{7});
    CHECK(pages.take(shared_huge_pages::chunk_bytes) != nullptr);
  } else {
    SUCCEED("each block is its own here");
  }
}
