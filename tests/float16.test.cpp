// SPDX-License-Identifier: Apache-2.0
//
// The 16-bit formats against a definition that shares no code with them: a value is (-1)^s * 1.m *
// 2^(e - bias), and a number narrows to the nearer of its two neighbours, on a tie to the one whose
// last bit is 0. All midpoints of both formats are floats, so each of the 2^16 results owns an
// interval of floats between two exact midpoints; every float of every interval is narrowed. A
// build with a sanitizer or without optimization takes one float in 1021 and all interval ends.
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/sanitized.hpp"

namespace {

#if !defined(__OPTIMIZE__) || LORA_TEST_ASAN
constexpr std::uint64_t step = 1021;
#else
constexpr std::uint64_t step = 1;
#endif

/// The definition of a format.
template <class T>
struct definition;
template <>
struct definition<lora::float16> {
  static constexpr int exponent_bits = 5, mantissa_bits = 10;
};
template <>
struct definition<lora::bfloat16> {
  static constexpr int exponent_bits = 8, mantissa_bits = 7;
};

template <class T>
constexpr std::uint32_t infinity_bits =
    ((1u << definition<T>::exponent_bits) - 1) << definition<T>::mantissa_bits;

/// The value of a magnitude up to infinity's, for which it gives what an unbounded exponent would:
/// the number whose midpoint with the largest finite one is where overflow begins.
template <class T>
double defined_value(std::uint32_t magnitude) {
  constexpr int bias = (1 << (definition<T>::exponent_bits - 1)) - 1;
  constexpr int bits = definition<T>::mantissa_bits;
  const int exponent = static_cast<int>(magnitude >> bits);
  const double mantissa = static_cast<double>(magnitude & ((1u << bits) - 1));
  return exponent == 0 ? std::ldexp(mantissa, 1 - bias - bits)
                       : std::ldexp(mantissa + (1 << bits), exponent - bias - bits);
}

/// Where the numbers that narrow to `magnitude` end; the end belongs to the even one of the two.
template <class T>
double midpoint_above(std::uint32_t magnitude) {
  return (defined_value<T>(magnitude) + defined_value<T>(magnitude + 1)) / 2;
}

std::uint32_t float_bits(double value) {
  const float same = static_cast<float>(value);
  if (static_cast<double>(same) != value) throw std::logic_error("a midpoint is not a float");
  return std::bit_cast<std::uint32_t>(same);
}

/// check(result, first, last): all positive floats that narrow to each result, finite or infinite,
/// ordered.
template <class T, class Check>
void for_intervals(const Check& check) {
  std::uint32_t first = 0;
  for (std::uint32_t result = 0; result <= infinity_bits<T>; ++result) {
    const bool is_last = result == infinity_bits<T>;
    const std::uint32_t middle = is_last ? 0x7f80'0000u : float_bits(midpoint_above<T>(result));
    const std::uint32_t last = is_last || result % 2 == 0 ? middle : middle - 1;
    check(result, first, last);
    first = last + 1;
  }
}

struct interval {
  std::uint32_t result, first, last;
};

struct outcome {
  std::uint64_t checked = 0, wrong = 0;
};

/// Narrows the floats [first, last] of both signs and compares with the bits that both must give.
template <class T, class Narrow>
void sweep(const interval& i, const Narrow& narrow, outcome& seen) {
  const auto expected = static_cast<std::uint16_t>(i.result),
             negative = static_cast<std::uint16_t>(i.result | 0x8000u);
  const auto visit = [&](std::uint32_t bits) {
    return static_cast<std::uint32_t>(narrow(std::bit_cast<float>(bits)) != expected) +
           static_cast<std::uint32_t>(narrow(std::bit_cast<float>(bits | 0x8000'0000u)) !=
                                      negative);
  };
  for (std::uint64_t bits = i.first; bits <= i.last; bits += step) {
    seen.wrong += visit(static_cast<std::uint32_t>(bits));
    seen.checked += 2;
  }
  if (step > 1) {
    seen.wrong += visit(i.last);
    seen.checked += 2;
  }
}

template <class T, class Narrow>
outcome sweep_all(const Narrow& narrow) {
  std::vector<interval> all;
  for_intervals<T>([&](std::uint32_t result, std::uint32_t first, std::uint32_t last) {
    // The interval of infinity is a third of all floats in float16: cut the long ones.
    constexpr std::uint32_t piece = 1u << 20;
    while (last - first >= piece) {
      all.push_back({result, first, first + piece - 1});
      first += piece;
    }
    all.push_back({result, first, last});
  });
  const unsigned threads = std::max(1u, std::thread::hardware_concurrency());
  std::vector<outcome> seen(threads);
  std::vector<std::thread> team;
  for (unsigned t = 0; t < threads; ++t)
    team.emplace_back([&, t] {
      outcome mine;
      for (std::size_t k = t; k < all.size(); k += threads) sweep<T>(all[k], narrow, mine);
      seen[t] = mine;
    });
  for (auto& thread : team) thread.join();
  outcome sum;
  for (const auto& one : seen) {
    sum.checked += one.checked;
    sum.wrong += one.wrong;
  }
  return sum;
}

/// The two zeros, the finite numbers and the infinities; the other floats are NaN.
constexpr std::uint64_t not_nan = 2 * (0x7f80'0000ull + 1);

void require_all(const char* what, const outcome& seen) {
  std::printf("%s: %llu floats, %llu wrong\n", what, static_cast<unsigned long long>(seen.checked),
              static_cast<unsigned long long>(seen.wrong));
  if (step == 1) {
    REQUIRE(seen.checked == not_nan);
  } else {
    REQUIRE(seen.checked > not_nan / step);
  }
  REQUIRE(seen.wrong == 0);
}

}  // namespace

TEMPLATE_TEST_CASE("all 2^16 values widen exactly", "[float16]", lora::float16, lora::bfloat16) {
  std::uint32_t wrong = 0, count = 0;
  for (std::uint32_t magnitude = 0; magnitude <= 0x7fff; ++magnitude)
    for (const bool negative : {false, true}) {
      ++count;
      const auto v =
          TestType::from_bits(static_cast<std::uint16_t>(magnitude | (negative ? 0x8000u : 0u)));
      const auto f = static_cast<float>(v);
      const auto d = static_cast<double>(v);
      bool right = std::signbit(f) == negative && std::signbit(d) == negative;
      if (magnitude < infinity_bits<TestType>)
        right = right && std::abs(static_cast<double>(f)) == defined_value<TestType>(magnitude) &&
                d == static_cast<double>(f);
      else if (magnitude == infinity_bits<TestType>)
        right = right && std::isinf(f) && std::isinf(d);
      else  // the payload, in the upper bits of float's
        right = right && std::isnan(f) && std::isnan(d) &&
                (std::bit_cast<std::uint32_t>(f) & 0x7f'ffffu) ==
                    (magnitude & ((1u << definition<TestType>::mantissa_bits) - 1))
                        << (23 - definition<TestType>::mantissa_bits);
      wrong += !right;
    }
  CHECK(wrong == 0);
  CHECK(count == 65536);
}

TEMPLATE_TEST_CASE("what was widened narrows back to the same bits", "[float16]", lora::float16,
                   lora::bfloat16) {
  std::uint32_t wrong = 0;
  for (std::uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const auto v = TestType::from_bits(static_cast<std::uint16_t>(bits));
    const bool is_nan = (bits & 0x7fffu) > infinity_bits<TestType>;
    // A signaling NaN comes back quiet; everything else as it was.
    const std::uint32_t expected =
        is_nan ? bits | (1u << (definition<TestType>::mantissa_bits - 1)) : bits;
    wrong += TestType(static_cast<float>(v)).bits != expected;
    wrong += TestType(static_cast<double>(v)).bits != expected;
  }
  CHECK(wrong == 0);
}

TEST_CASE("every float narrows to the nearest float16, ties to even", "[float16][slow]") {
  require_all("float16 from float",
              sweep_all<lora::float16>([](float v) { return lora::float16(v).bits; }));
}

TEST_CASE("every float narrows to the nearest bfloat16, ties to even", "[float16][slow]") {
  require_all("bfloat16 from float",
              sweep_all<lora::bfloat16>([](float v) { return lora::bfloat16(v).bits; }));
}

TEST_CASE("every float, as a double, narrows to the nearest float16", "[float16][slow]") {
  require_all("float16 from double", sweep_all<lora::float16>([](float v) {
                return lora::float16(static_cast<double>(v)).bits;
              }));
}

TEST_CASE("every float, as a double, narrows to the nearest bfloat16", "[float16][slow]") {
  require_all("bfloat16 from double", sweep_all<lora::bfloat16>([](float v) {
                return lora::bfloat16(static_cast<double>(v)).bits;
              }));
}

TEMPLATE_TEST_CASE("every NaN stays a quiet NaN with its sign and upper payload", "[float16]",
                   lora::float16, lora::bfloat16) {
  constexpr int bits = definition<TestType>::mantissa_bits;
  std::uint64_t wrong = 0, checked = 0;
  for (std::uint64_t payload = 1; payload <= 0x7f'ffff; payload += step) {
    for (const std::uint32_t sign : {0u, 0x8000u}) {
      const auto nan = (sign << 16) | 0x7f80'0000u | static_cast<std::uint32_t>(payload);
      const auto expected = sign | infinity_bits<TestType> | (1u << (bits - 1)) |
                            static_cast<std::uint32_t>(payload >> (23 - bits));
      wrong += TestType(std::bit_cast<float>(nan)).bits != expected;
      const std::uint64_t wide = (static_cast<std::uint64_t>(sign) << 48) |
                                 0x7ff0'0000'0000'0000ull | (payload << 29) |
                                 (payload & 1);  // payload bits that only a double has, too
      wrong += TestType(std::bit_cast<double>(wide)).bits != expected;
      checked += 2;
    }
  }
  CHECK(wrong == 0);
  CHECK(checked == 4 * ((0x7f'ffff - 1) / step + 1));
}

#if defined(__x86_64__) && defined(__GNUC__)
namespace {
__attribute__((target("avx,f16c"))) std::uint64_t differing_from_hardware(std::uint32_t first,
                                                                          std::uint64_t count) {
  std::uint64_t wrong = 0;
  alignas(32) float values[8];
  alignas(16) std::uint16_t narrowed[8];
  for (std::uint64_t k = 0; k < count; k += 8 * step) {
    for (std::uint32_t i = 0; i < 8; ++i)
      values[i] = std::bit_cast<float>(first + static_cast<std::uint32_t>(k) + i);
    _mm_store_si128(reinterpret_cast<__m128i*>(narrowed),
                    _mm256_cvtps_ph(_mm256_load_ps(values), _MM_FROUND_TO_NEAREST_INT));
    for (int i = 0; i < 8; ++i) wrong += lora::float16(values[i]).bits != narrowed[i];
  }
  return wrong;
}
}  // namespace

TEST_CASE("float16 agrees with the processor's own conversion on every float, NaN included",
          "[float16][slow]") {
  if (__builtin_cpu_supports(
          "avx2")) {  // every processor with AVX2 has F16C; clang 14 cannot be asked for that
    const unsigned threads = 2;
    std::uint64_t wrong[threads] = {};
    std::vector<std::thread> team;
    for (unsigned t = 0; t < threads; ++t)
      team.emplace_back([&wrong, t] { wrong[t] = differing_from_hardware(t << 31, 1ull << 31); });
    for (auto& thread : team) thread.join();
    std::printf("float16 against F16C: %llu floats\n",
                static_cast<unsigned long long>((1ull << 32) / step));
    CHECK(wrong[0] + wrong[1] == 0);
  } else {
    WARN("this processor may have no F16C: compared with the definition only");
    CHECK(lora::float16(1.0F).bits == 0x3c00);
  }
}
#endif

TEMPLATE_TEST_CASE("doubles beside a tie are not rounded twice", "[float16]", lora::float16,
                   lora::bfloat16) {
  // The next double above a midpoint rounds, as a float, to the midpoint itself, and then to the
  // even neighbour: wrong for every odd result below and every even one above it.
  std::uint32_t wrong = 0, float_would_err = 0, midpoints = 0;
  for (std::uint32_t low = 0; low < infinity_bits<TestType>; ++low) {
    const double middle = midpoint_above<TestType>(low);
    const double above = std::nextafter(middle, std::numeric_limits<double>::infinity());
    const double below = std::nextafter(middle, 0.0);
    for (const double sign : {1.0, -1.0}) {
      const std::uint32_t bit = sign < 0 ? 0x8000u : 0u;
      wrong += TestType(sign * below).bits != (low | bit);
      wrong += TestType(sign * above).bits != ((low + 1) | bit);
      wrong += TestType(sign * middle).bits != ((low % 2 == 0 ? low : low + 1) | bit);
      // The values themselves and their neighbours.
      const double v = sign * defined_value<TestType>(low);
      wrong += TestType(v).bits != (low | bit);
      wrong += TestType(std::nextafter(v, 2 * sign)).bits != (low | bit);
      wrong += TestType(std::nextafter(v, sign * 0.0)).bits != (low | bit);
    }
    float_would_err += TestType(static_cast<float>(above)).bits != low + 1;
    float_would_err += TestType(static_cast<float>(below)).bits != low;
    ++midpoints;
  }
  CHECK(wrong == 0);
  CHECK(midpoints == infinity_bits<TestType>);
  CHECK(float_would_err == midpoints);  // so this test would see a detour through float
}

TEMPLATE_TEST_CASE("random doubles go to the nearer neighbour", "[float16]", lora::float16,
                   lora::bfloat16) {
  test::random g(160001);
  CAPTURE(g.seed());
  const double largest = defined_value<TestType>(infinity_bits<TestType> - 1);
  std::uint32_t wrong = 0, finite = 0, below_normal = 0;
  for (int k = 0; k < 200000; ++k) {
    // Exponents from far below the smallest subnormal to beyond overflow.
    const int range = TestType(1.0F).bits == 0x3c00 ? 45 : 290;
    const double v = std::ldexp(g.uniform(1, 2) * (g.one_in(2) ? 1 : -1),
                                static_cast<int>(g.integer(-range / 2 - 20, range / 2)));
    const auto narrowed = TestType(v);
    const std::uint32_t magnitude = narrowed.bits & 0x7fffu;
    const double size = std::abs(v);
    if (magnitude == infinity_bits<TestType>) {
      wrong += size < midpoint_above<TestType>(magnitude - 1);
    } else {
      // Differences of a double and a neighbour within a factor of two are exact; further away only
      // their order matters.
      const double off = std::abs(size - defined_value<TestType>(magnitude));
      wrong += off > std::abs(size - defined_value<TestType>(magnitude + 1));
      if (magnitude > 0) wrong += off > std::abs(size - defined_value<TestType>(magnitude - 1));
      ++finite;
      below_normal += magnitude > 0 && magnitude < (1u << definition<TestType>::mantissa_bits);
    }
    wrong += (narrowed.bits >> 15) != std::uint32_t{std::signbit(v)};
    wrong += size <= largest && magnitude == infinity_bits<TestType>;
  }
  CHECK(wrong == 0);
  CHECK(finite > 100000);
  CHECK(below_normal > 1000);
}

TEMPLATE_TEST_CASE("the ends of the range", "[float16]", lora::float16, lora::bfloat16) {
  const std::uint32_t infinity = infinity_bits<TestType>;
  const double largest = defined_value<TestType>(infinity - 1),
               overflow = midpoint_above<TestType>(infinity - 1);
  CHECK(TestType(largest).bits == infinity - 1);
  CHECK(TestType(std::nextafter(overflow, 0.0)).bits == infinity - 1);
  CHECK(TestType(overflow).bits == infinity);  // a tie, and the largest is odd
  CHECK(TestType(-overflow).bits == (infinity | 0x8000u));
  CHECK(TestType(1e308).bits == infinity);
  CHECK(TestType(std::numeric_limits<float>::infinity()).bits == infinity);
  CHECK(TestType(-std::numeric_limits<double>::infinity()).bits == (infinity | 0x8000u));

  const double smallest = defined_value<TestType>(1);
  CHECK(TestType(smallest / 2).bits == 0);  // a tie, and 0 is even
  CHECK(TestType(std::nextafter(smallest / 2, 1.0)).bits == 1);
  CHECK(TestType(-smallest / 2).bits == 0x8000);
  CHECK(TestType(std::numeric_limits<double>::denorm_min()).bits == 0);
  CHECK(TestType(-std::numeric_limits<double>::min()).bits == 0x8000);
  CHECK(TestType(-0.0).bits == 0x8000);
  CHECK(TestType(-0.0F).bits == 0x8000);
  CHECK(TestType(0.0F).bits == 0);
}

TEST_CASE("bits that everybody knows", "[float16]") {
  CHECK(lora::float16(1.0F).bits == 0x3c00);
  CHECK(lora::float16(-2.0).bits == 0xc000);
  CHECK(lora::float16(65504.0F).bits == 0x7bff);
  CHECK(lora::float16(65519.996).bits == 0x7bff);
  CHECK(lora::float16(65520.0).bits == 0x7c00);
  CHECK(lora::float16(1.0F / 3).bits == 0x3555);
  CHECK(lora::bfloat16(1.0F).bits == 0x3f80);
  CHECK(lora::bfloat16(-2.0).bits == 0xc000);
  CHECK(lora::bfloat16(3.14159274F).bits == 0x4049);
  CHECK(lora::bfloat16(3.3895313892515355e38).bits == 0x7f7f);
  CHECK(static_cast<float>(lora::float16::from_bits(0x3555)) == 0.333251953125F);
  CHECK(static_cast<double>(lora::bfloat16::from_bits(0x4049)) == 3.140625);
  // 257 lies between 256 and 258; 259 between 258 and 260.
  CHECK(static_cast<float>(lora::bfloat16(257)) == 256.0F);
  CHECK(static_cast<float>(lora::bfloat16(259)) == 260.0F);
}

TEMPLATE_TEST_CASE("integers convert once, from all of their bits", "[float16]", lora::float16,
                   lora::bfloat16) {
  for (const int v : {0, 1, -1, 3, 255, 257, 2049, -65504, 65519, 65520, 1 << 30})
    CHECK(TestType(v).bits == TestType(static_cast<double>(v)).bits);
  // 2^24 + 2^16 + 1 is no float: through one it would fall back to the tie of bfloat16 and to its
  // even side.
  CHECK(TestType((1 << 24) + (1 << 16) + 1).bits == TestType(16842753.0).bits);
  if (definition<TestType>::exponent_bits == 8)
    CHECK(TestType((1 << 24) + (1 << 16) + 1).bits == 0x4b81);
  CHECK(TestType(4294967295u).bits == TestType(4294967295.0).bits);
  CHECK(TestType(true).bits == TestType(1.0).bits);
  static_assert(!std::is_constructible_v<TestType, long long>, "a double does not hold it");
  static_assert(!std::is_convertible_v<float, TestType>, "a rounding must be written");
  static_assert(!std::is_convertible_v<TestType, float>);
}

TEMPLATE_TEST_CASE("comparison is of values", "[float16]", lora::float16, lora::bfloat16) {
  const auto nan = std::numeric_limits<TestType>::quiet_NaN();
  CHECK(TestType(0.0F) == TestType(-0.0F));
  CHECK_FALSE(TestType(0.0F).bits == TestType(-0.0F).bits);
  CHECK_FALSE(nan == nan);
  CHECK(nan != nan);
  CHECK(TestType(1.5F) == TestType(1.5));
  CHECK(TestType(1.5F) != TestType(-1.5F));
}

TEMPLATE_TEST_CASE("the rounding mode of the processor has no say", "[float16]", lora::float16,
                   lora::bfloat16) {
  std::uint32_t wrong[3] = {};
  int mode_index = 0;
  for (const int mode : {FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO}) {
    std::vector<double> middles;  // computed before the mode changes
    for (std::uint32_t low = 0; low < infinity_bits<TestType>; ++low)
      middles.push_back(midpoint_above<TestType>(low));
    REQUIRE(std::fesetround(mode) == 0);
    for (std::uint32_t low = 0; low < infinity_bits<TestType>; ++low) {
      const std::uint32_t even = low % 2 == 0 ? low : low + 1;
      wrong[mode_index] += TestType(middles[low]).bits != even;
      wrong[mode_index] += TestType(static_cast<float>(middles[low])).bits != even;
      wrong[mode_index] +=
          TestType(static_cast<float>(TestType::from_bits(static_cast<std::uint16_t>(low)))).bits !=
          low;
    }
    std::fesetround(FE_TONEAREST);
    CHECK(wrong[mode_index] == 0);
    ++mode_index;
  }
}

TEMPLATE_TEST_CASE("numeric_limits says what the format is", "[float16]", lora::float16,
                   lora::bfloat16) {
  using limits = std::numeric_limits<TestType>;
  const std::uint32_t infinity = infinity_bits<TestType>;
  static_assert(limits::is_specialized && limits::is_signed && !limits::is_integer &&
                limits::radix == 2);
  static_assert(limits::digits == definition<TestType>::mantissa_bits + 1);
  CHECK(static_cast<double>(limits::max()) == defined_value<TestType>(infinity - 1));
  CHECK(static_cast<double>(limits::lowest()) == -defined_value<TestType>(infinity - 1));
  CHECK(static_cast<double>(limits::min()) ==
        defined_value<TestType>(1u << definition<TestType>::mantissa_bits));
  CHECK(static_cast<double>(limits::denorm_min()) == defined_value<TestType>(1));
  CHECK(std::isinf(static_cast<float>(limits::infinity())));
  CHECK(std::isnan(static_cast<float>(limits::quiet_NaN())));
  CHECK(std::isnan(static_cast<float>(limits::signaling_NaN())));
  CHECK((limits::signaling_NaN().bits & (1u << (definition<TestType>::mantissa_bits - 1))) == 0);
  // By their meaning in the standard: epsilon is the step above 1; min is 2^(min_exponent - 1); max
  // is below 2^max_exponent.
  const std::uint32_t one = TestType(1.0F).bits;
  CHECK(static_cast<double>(limits::epsilon()) == defined_value<TestType>(one + 1) - 1.0);
  CHECK(static_cast<double>(limits::min()) == std::ldexp(1.0, limits::min_exponent - 1));
  CHECK(static_cast<double>(limits::max()) < std::ldexp(1.0, limits::max_exponent));
  CHECK(static_cast<double>(limits::max()) >= std::ldexp(1.0, limits::max_exponent - 1));
  CHECK(static_cast<double>(limits::round_error()) == 0.5);
  const double log2 = std::log10(2.0);
  CHECK(limits::digits10 == static_cast<int>(std::floor((limits::digits - 1) * log2)));
  CHECK(limits::max_digits10 == static_cast<int>(std::ceil(limits::digits * log2 + 1)));
  CHECK(limits::min_exponent10 ==
        static_cast<int>(std::ceil(std::log10(static_cast<double>(limits::min())))));
  CHECK(limits::max_exponent10 ==
        static_cast<int>(std::floor(std::log10(static_cast<double>(limits::max())))));
}

// Conversions are usable where constants are made.
static_assert(lora::float16(1.0F).bits == 0x3c00 && lora::bfloat16(1.0).bits == 0x3f80);
static_assert(static_cast<float>(lora::float16::from_bits(0x0001)) == 0x1p-24F);
static_assert(static_cast<double>(lora::bfloat16::from_bits(0x0001)) == 0x1p-133);
static_assert(std::is_trivially_default_constructible_v<lora::float16> &&
              std::is_trivially_copyable_v<lora::bfloat16>);
