// SPDX-License-Identifier: Apache-2.0
//
// What mixed(W, entry) returns takes the same W as mixed did: a weight stored in x out
// (fan_in_fan_out) as it is stored, by every verb, also where W is square and its shape tells
// nothing.
#include <string>
#include <vector>

#include "io/peft_file.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

namespace {

namespace peft = lora::peft;
using build::assemble;
using build::config;
using build::prefix;
using lora::index_t;

constexpr std::uint64_t seed = 20261203;

std::vector<float> values(test::random& g, index_t count, double low, double high) {
  std::vector<float> result;
  for (index_t k = 0; k < count; ++k) result.push_back(static_cast<float>(g.uniform(low, high)));
  return result;
}

/// A DoRA entry of one linear module, and a second one without magnitude.
peft::adapter_file<float> linear_file(test::random& g, int out, int in, bool in_out, bool dora) {
  build::file f;
  f.add(prefix + "m.lora_A.weight", "F32", {2, in}, values(g, 2 * in, -1, 1));
  f.add(prefix + "m.lora_B.weight", "F32", {out, 2}, values(g, 2 * out, -1, 1));
  if (dora) f.add(prefix + "m.lora_magnitude_vector", "F32", {out}, values(g, out, 1, 3));
  const std::string more = std::string(R"("fan_in_fan_out":)") + (in_out ? "true" : "false") +
                           (dora ? R"(,"use_dora":true)" : "");
  return assemble(config(more), f);
}

lora::dora_adapter<float> core_of(const peft::entry<float>& e) {
  return {e.factors(), e.magnitude()};
}

}  // namespace

TEST_CASE("what mixed returns takes W as it is stored", "[peft][dora]") {
  test::random g(seed);
  for (const auto& [out, in] : std::vector<std::array<int, 2>>{{5, 5}, {4, 7}, {7, 3}})
    for (const bool in_out : {false, true}) {
      CAPTURE(g.seed(), out, in, in_out);
      const auto first = linear_file(g, out, in, in_out, true),
                 second = linear_file(g, out, in, in_out, false);
      const auto& e = first.at("m");
      const auto& plain = second.at("m");
      const test::matrix<float> W = g.reals<float>(out, in, 1), x = g.reals<float>(in, 3, 1);
      const test::matrix<float> stored = in_out ? test::matrix<float>(W.transpose()) : W;
      // The core's verbs on W out x in say what is right.
      const auto dora = core_of(e);
      const auto want = lora::mixed(W, lora::scaled(0.7, dora), plain.factors());
      auto merged = W;
      lora::merge(merged, want);
      auto unmerged = merged;
      lora::unmerge(unmerged, want);
      const std::vector<float> bias = values(g, out, -1, 1);
      test::matrix<float> want_y(out, 3), y(out, 3);
      lora::forward(lora::with_bias(W, bias), x, want_y, want);

      const auto layer = lora::mixed(stored, lora::scaled(0.7, e), plain);
      CHECK(layer.stored_in_out() == in_out);
      const auto turned = [&](const test::matrix<float>& m) {
        return in_out ? test::matrix<float>(m.transpose()) : m;
      };
      auto got = stored;
      lora::merge(got, layer);
      CHECK(test::same_bits(got, turned(merged)));
      lora::unmerge(got, layer);
      CHECK(test::same_bits(got, turned(unmerged)));
      lora::forward(lora::with_bias(stored, bias, layer), x, y, layer);
      CHECK(test::same_bits(y, want_y));
      CHECK_THROWS_AS(lora::with_bias(stored, std::vector<float>(9), layer), lora::shape_error);
      lora::forward(stored, x, y, layer);
      lora::forward(W, x, want_y, want);
      CHECK(test::same_bits(y, want_y));
      y = want_y = g.reals<float>(out, 3, 1);
      lora::apply(x, y, layer);
      lora::apply(x, want_y, want);
      CHECK(test::same_bits(y, want_y));
      // The other way round is refused where the shape tells.
      if (out != in) {
        auto wrong = test::matrix<float>(stored.transpose());
        const auto before = wrong;
        CHECK_THROWS_WITH(lora::merge(wrong, layer), Catch::Contains("as it was then"));
        CHECK_THROWS_AS(lora::unmerge(wrong, layer), lora::shape_error);
        CHECK_THROWS_AS(lora::forward(wrong, x, y, layer), lora::shape_error);
        CHECK(test::same_bits(wrong, before));
      }
    }
}

TEST_CASE("what mixed returns for an embedding takes W vocabulary x features", "[peft][dora]") {
  test::random g(seed + 1);
  for (const auto& [vocabulary, features] : std::vector<std::array<int, 2>>{{4, 4}, {6, 3}}) {
    CAPTURE(g.seed(), vocabulary, features);
    build::file f;
    f.add(prefix + "e.lora_embedding_A", "F32", {2, vocabulary}, values(g, 2 * vocabulary, -1, 1));
    f.add(prefix + "e.lora_embedding_B", "F32", {features, 2}, values(g, 2 * features, -1, 1));
    f.add(prefix + "e.lora_magnitude_vector", "F32", {features}, values(g, features, 1, 3));
    const auto file = assemble(config(R"("use_dora":true)"), f);
    const auto& e = file.at("e");
    auto W = g.reals<float>(vocabulary, features, 1);
    const auto layer = lora::mixed(W, e);
    const auto want = lora::mixed(W.transpose(), core_of(e));
    const std::vector<int> ids{3, 0, 3};
    test::matrix<float> y(features, 3), want_y(features, 3);
    lora::embed(lora::scaled_embedding(W, 1.5), ids, y, layer);
    lora::embed(lora::scaled_embedding(W, 1.5), ids, want_y, want);
    CHECK(test::same_bits(y, want_y));
    auto merged = W;
    lora::merge(merged, layer);
    lora::merge(W.transpose(), want);
    CHECK(test::same_bits(merged, W));
  }
}
