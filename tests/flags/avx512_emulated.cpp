// SPDX-License-Identifier: Apache-2.0
//
// The AVX-512 code on a machine without it: SIMDe computes the intrinsics, so that a mistake in
// those branches of simd.hpp shows on every machine. Products from panels and from matrices against
// plain double loops, merges against their definition, at shapes around the tile's 8 x 32.
#include <immintrin.h>

#include <Eigen/Core>

// After the compiler's own header, whose names SIMDe then takes over. What it lacks is written out.
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

static inline simde__m512 widened_halves(__m256i halves) {
  alignas(32) unsigned short from[16];
  alignas(64) float to[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(from), halves);
  for (int i = 0; i < 16; ++i) to[i] = _cvtsh_ss(from[i]);
  return simde_mm512_loadu_ps(to);
}
static inline __m256i narrowed_halves(simde__m512 values) {
  alignas(64) float from[16];
  alignas(32) unsigned short to[16];
  simde_mm512_storeu_ps(from, values);
  for (int i = 0; i < 16; ++i) to[i] = _cvtss_sh(from[i], 0);
  return _mm256_load_si256(reinterpret_cast<__m256i*>(to));
}
/// One bit for each lane of Lane that differs.
template <class Lane>
static inline unsigned differing_lanes(simde__m512i a, simde__m512i b) {
  constexpr int lanes = 64 / static_cast<int>(sizeof(Lane));
  Lane x[lanes], y[lanes];
  __builtin_memcpy(x, &a, sizeof x);
  __builtin_memcpy(y, &b, sizeof y);
  unsigned mask = 0;
  for (int i = 0; i < lanes; ++i) mask |= (x[i] != y[i] ? 1U : 0U) << i;
  return mask;
}
#undef _mm512_cmpneq_epi16_mask
#undef _mm512_cmpneq_epi32_mask
#undef _mm512_cmpneq_epi64_mask
#define _mm512_cmpneq_epi16_mask(a, b) differing_lanes<short>(a, b)
#define _mm512_cmpneq_epi32_mask(a, b) differing_lanes<int>(a, b)
#define _mm512_cmpneq_epi64_mask(a, b) differing_lanes<long long>(a, b)
#define _mm512_stream_ps(p, v) simde_mm512_storeu_ps(p, v)
#define _mm512_stream_pd(p, v) simde_mm512_storeu_pd(p, v)
#define _mm512_cvtph_ps(h) widened_halves(h)
#define _mm512_cvtps_ph(v, rounding) narrowed_halves(v)
/// One addition after the other, subnormal numbers as zero, as the processor does.
static inline float normal_or_zero(float v) { return __builtin_fabsf(v) < 0x1p-126F ? v * 0 : v; }
template <class Pairs>
static inline simde__m512 added_dots(simde__m512 sums, const Pairs& a, const Pairs& b) {
  alignas(64) float c[16];
  unsigned short x[32], y[32];
  static_assert(sizeof a == sizeof x);
  simde_mm512_storeu_ps(c, sums);
  __builtin_memcpy(x, &a, sizeof x);
  __builtin_memcpy(y, &b, sizeof y);
  const auto widened = [](unsigned short bits) {
    const unsigned wide = static_cast<unsigned>(bits) << 16;
    float v;
    __builtin_memcpy(&v, &wide, sizeof v);
    return normal_or_zero(v);
  };
  for (int i = 0; i < 16; ++i)
    for (int n = 1; n >= 0; --n)
      c[i] = normal_or_zero(
          __builtin_fmaf(widened(x[2 * i + n]), widened(y[2 * i + n]), normal_or_zero(c[i])));
  return simde_mm512_loadu_ps(c);
}
/// To nearest even, subnormal numbers as zero; the second operand's lanes come first.
template <class V>
static inline __m512bh narrowed_pairs(const V& upper, const V& lower) {
  alignas(64) float from[32];
  unsigned short to[32];
  simde_mm512_storeu_ps(from, lower);
  simde_mm512_storeu_ps(from + 16, upper);
  for (int i = 0; i < 32; ++i) {
    const float value = normal_or_zero(from[i]);
    unsigned bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    to[i] = static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  __m512bh pairs;
  static_assert(sizeof pairs == sizeof to);
  __builtin_memcpy(&pairs, to, sizeof pairs);
  return pairs;
}
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh(upper, lower) narrowed_pairs(upper, lower)
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps(c, a, b) added_dots(c, a, b)
#define __AVX512F__ 1
#define LORA_DETAIL_EMULATED 1
#define __AVX512BF16__ 1
#include "lora/lora.hpp"
#include "support/agreement.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

static_assert(lora::detail::tile_rows == 8 && lora::detail::simd<float>::width == 16 &&
              lora::detail::simd<double>::width == 8);

namespace {

template <class T, class F>
void check(std::uint64_t seed) {
  test::random g(seed);
  CAPTURE(g.seed());
  using acc = lora::accumulator_t<T, F>;
  double worst = 0;
  for (const lora::index_t out : {1, 15, 16, 31, 32, 33, 65})
    for (const lora::index_t in : {1, 2, 8, 31, 300})
      for (const lora::index_t tokens : {1, 2, 8, 9, 140}) {
        const lora::index_t rank = g.integer(1, 70);
        const auto W = g.reals<T>(out, in, 1);
        const lora::adapter<F> l{
            g.reals<F>(rank, in, 1), g.reals<F>(out, rank, 1), {.alpha = 0.5 * double(rank)}};
        const test::col_matrix<acc> x = g.reals<acc>(in, tokens, 1);
        test::col_matrix<acc> y(out, tokens), plain(out, tokens);
        lora::packed_weight<T> packed{W};
        REQUIRE(test::same_bits(packed.matrix(), W));
        lora::forward(packed, x, y, lora::packed_adapter<F>{l});
        lora::forward(W, x, plain, l);
        REQUIRE(test::same_bits(y, plain));
        const test::exact_matrix exact =
            test::times(test::exact(W) + test::exact_delta(l), test::exact(x));
        const test::exact_matrix size =
            test::times(test::exact(W).cwiseAbs() +
                            std::abs(l.scaling()) * test::times(test::exact(l.lora_B()).cwiseAbs(),
                                                                test::exact(l.lora_A()).cwiseAbs()),
                        test::exact(x).cwiseAbs());
        // gamma_{n+R+3} of everything, docs/numerics.md.
        const double u = static_cast<double>(std::numeric_limits<acc>::epsilon()) / 2;
        const double gamma =
            static_cast<double>(in + rank + 3) * u / (1 - static_cast<double>(in + rank + 3) * u);
        worst = std::max(
            worst, static_cast<double>(
                       ((test::exact(y) - exact).cwiseAbs().array() / size.array()).maxCoeff()) /
                       gamma);
        test::matrix<T> merged = W, expected = W;
        lora::merge(merged, l);
        lora::merge(packed, l);
        const auto delta = lora::delta_weight(l).template cast<acc>().eval();
        if constexpr (std::is_same_v<acc, float>)
          for (lora::index_t i = 0; i < out; ++i)
            for (lora::index_t j = 0; j < in; ++j)
              expected(i, j) =
                  lora::detail::narrow<T>(lora::detail::widen<acc>(W(i, j)) + delta(i, j));
        else
          expected = merged;
        REQUIRE(test::same_bits(merged, expected));
        REQUIRE(test::same_bits(packed.matrix(), expected));
      }
  CHECK(worst <= 1);
}

/// W * x by dot products of bfloat16, and A * x where the factors F are bfloat16, too: within its
/// bound, and the same bits from panels and rows, alone and in company, whatever else is beside the
/// layer.
template <class F>
void check_dots(std::uint64_t seed, double spread) {
  using lora::bfloat16;
  static_assert(lora::flush_threshold_of_product<float, bfloat16, bfloat16>() > 0);
  static_assert(lora::flush_threshold_of_product<float, bfloat16, float>() == 0);
  test::random g(seed);
  CAPTURE(g.seed());
  double worst = 0;
  for (const lora::index_t out : {1, 31, 33, 65})
    for (const lora::index_t in : {1, 2, 31, 300, 513})
      for (const lora::index_t tokens : {1, 2, 3, 8, 9, 33, 140}) {
        const auto W = g.reals<bfloat16>(out, in, spread);
        const lora::adapter<F> l{
            g.reals<F>(5, in, spread), g.reals<F>(out, 5, spread), {.alpha = 7}};
        const test::col_matrix<bfloat16> x = g.reals<bfloat16>(in, tokens, spread);
        const lora::packed_weight packed{W};
        test::col_matrix<float> y(out, tokens), plain(out, tokens), one(out, 1);
        lora::forward(packed, x, y, l);
        lora::forward(W, x, plain, l);
        REQUIRE(test::same_bits(y, plain));
        lora::forward(packed, x.col(tokens - 1), one, lora::packed_adapter<F>{l});
        REQUIRE(test::same_bits(one, test::col_matrix<float>(y.col(tokens - 1))));
        // An adapter of another format, which adds nothing, makes the activations be widened, too.
        const lora::adapter<float> nothing{
            g.reals<float>(3, in, 1), test::matrix<float>::Zero(out, 3).eval(), {.alpha = 3}};
        lora::forward(packed, x, plain, l, nothing);
        REQUIRE(plain == y);
        lora::linear<bfloat16> layer{W};
        layer.attach("l", l);
        layer.forward(x, plain);
        REQUIRE(test::same_bits(y, plain));
        // The padding behind an odd in_features meets a zero, which makes nothing of a number only.
        layer.merge("l");
        layer.forward(x, plain);
        REQUIRE(plain.allFinite());
        const auto X = agreement::in_double(x);
        const Eigen::MatrixXd exact =
            test::times(test::exact(W) + test::exact_delta(l), test::exact(x))
                .template cast<double>();
        const Eigen::MatrixXd bound = agreement::error_bound(
            agreement::in_double(W), {}, {.merged = {}, .mixed = {agreement::part_of(l)}}, X,
            agreement::formats_of<bfloat16, float, float, bfloat16>());
        worst = std::max(
            worst,
            ((agreement::in_double(y) - exact).cwiseAbs().array() / bound.array()).maxCoeff());
      }
  CHECK(worst <= 1);
  CHECK(worst > 0);
}

}  // namespace

TEST_CASE("products of bfloat16 by dot products", "[avx512][dots]") {
  SECTION("numbers of a model") { check_dots<float>(1206, 1); }
  SECTION("subnormal products") { check_dots<float>(1207, 1e-20); }
  SECTION("subnormal operands") { check_dots<float>(1208, 3e-39); }
  SECTION("bfloat16 factors") { check_dots<lora::bfloat16>(1209, 1); }
  SECTION("bfloat16 factors, subnormal products") { check_dots<lora::bfloat16>(1210, 1e-20); }
  SECTION("bfloat16 factors, subnormal operands") { check_dots<lora::bfloat16>(1211, 3e-39); }
}

TEST_CASE("the AVX-512 kernels compute what the others do", "[avx512]") {
  SECTION("float") { check<float, float>(1201); }
  SECTION("double") { check<double, double>(1202); }
  SECTION("bfloat16") { check<lora::bfloat16, lora::bfloat16>(1203); }
  SECTION("float16, float factors") { check<lora::float16, float>(1204); }
  SECTION("bfloat16, float16 factors") { check<lora::bfloat16, lora::float16>(1205); }
}
