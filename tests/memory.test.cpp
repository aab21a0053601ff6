// SPDX-License-Identifier: Apache-2.0
//
// Memory for panels: aligned, apart from each other, and given back.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <utility>
#include <vector>

#include "lora/lora.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

using lora::index_t;
using lora::detail::array;
using lora::detail::huge_page;

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
    const index_t size = n == 0         ? 0
                         : g.one_in(20) ? g.integer(400'000, 1'200'000)
                                        : g.integer(1, 60'000);
    all.emplace_back(size);
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

TEST_CASE("large arrays begin at a huge page", "[memory]") {
  const array<char> large(static_cast<index_t>(huge_page) + 1),
      half(static_cast<index_t>(huge_page) / 2);
  CHECK(address(large.data()) % huge_page == 0);
  CHECK(address(half.data()) % huge_page == 0);
}

TEST_CASE("a size that no memory holds is refused", "[memory]") {
  CHECK_THROWS_AS(array<double>(-1), std::bad_alloc);
  CHECK_THROWS_AS(array<double>(std::numeric_limits<index_t>::max()), std::bad_alloc);
}
