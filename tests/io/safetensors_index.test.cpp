// SPDX-License-Identifier: Apache-2.0
//
// The index of a safetensors file: it has what the whole file has; ranges are read straight into
// the caller's memory and widen exactly; a file that shrinks meanwhile is an error.
#include "lora/io/safetensors_index.hpp"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "io/build.hpp"
#include "lora/io/safetensors.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/refused.hpp"

namespace {

namespace st = lora::safetensors;
using build::refused;

/// Bit patterns of a 16-bit format: all exponents, both signs, NaN and subnormal numbers.
template <class T>
std::vector<T> patterns(std::size_t count) {
  std::vector<T> values(count);
  for (std::size_t k = 0; k < count; ++k)
    values[k] = T::from_bits(static_cast<std::uint16_t>(k * 977 + 13));
  return values;
}
std::vector<float> numbers(std::size_t count) {
  std::vector<float> values(count);
  for (std::size_t k = 0; k < count; ++k) values[k] = static_cast<float>(k) / 3 - 20;
  return values;
}

/// Tensors of several formats, one behind an odd number of bytes.
build::file several() {
  return build::file()
      .add("odd", "U8", {3}, "abc")
      .add("h", "F16", {7, 13}, patterns<lora::float16>(91))
      .add("b", "BF16", {13, 7}, patterns<lora::bfloat16>(91))
      .add("f", "F32", {5, 11}, numbers(55))
      .add("none", "F32", {0, 4}, "")
      .add("f again", "F32", {55}, numbers(55))
      .add("i", "I64", {2}, std::vector<std::int64_t>{-1, 1LL << 40})
      .add("one", "F64", {}, std::vector<double>{0.1});
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

}  // namespace

TEST_CASE("an index says what the file says, without its bytes", "[safetensors][index]") {
  const build::directory dir;
  const auto path = dir.write("several.safetensors", several().text());
  const auto whole = st::read(path);
  const st::index of_memory = whole;
  for (const auto& index : {st::open(path), of_memory}) {
    CHECK(index.name() == whole.name());
    CHECK(index.names() == whole.names());
    REQUIRE(index.size() == whole.size());
    for (const auto& t : index) {
      INFO(t.text());
      const auto& w = whole.at(t.name);
      CHECK(index.find(t.name) == &t);
      CHECK(t.text() == w.text());
      CHECK(t.shape == w.shape);
      CHECK(t.offset == w.offset);
      CHECK(t.size == w.bytes.size());
      CHECK(t.empty() == (t.name == "none"));
      CHECK(index.copy_bytes(t) == std::vector<std::byte>(w.bytes.begin(), w.bytes.end()));
    }
    CHECK(index.at("h").elements() == 91);
    CHECK(index.at("odd").elements() == 3);
    CHECK(index.at("one").elements() == 1);
  }
  CHECK(test::mentions(test::refusal<lora::value_error>([&] { (void)st::open(path).at("g"); }),
                       {"several.safetensors", "no tensor \"g\""}));
}

TEMPLATE_TEST_CASE("a range of elements widens in place, as a copy does", "[safetensors][index]",
                   float, double, lora::float16, lora::bfloat16) {
  using T = TestType;
  const build::directory dir;
  const auto path = dir.write("several.safetensors", several().text());
  const auto index = st::open(path);
  const auto whole = st::read(path);
  for (const auto& t : index) {
    INFO(t.text());
    if (!st::holds_exactly<T>(t.dtype)) {
      std::vector<T> one(1);
      refused([&] { index.read(t, std::span(one)); }, {"several.safetensors", t.name, t.text()});
      refused([&] { (void)index.template copy<T>(t.name); }, {"several.safetensors", t.text()});
      continue;
    }
    // Widened apart from the index, element by element.
    std::vector<T> expected;
    const auto& bytes = whole.at(t.name).bytes;
    const auto add = [&](auto stored) {
      if constexpr (lora::detail::holds_exactly<T, decltype(stored)>)
        for (std::size_t at = 0; at < bytes.size(); at += sizeof(stored)) {
          std::memcpy(&stored, bytes.data() + at, sizeof(stored));
          expected.push_back(lora::detail::exactly<T>(stored));
        }
    };
    if (t.dtype == st::dtype::f16) add(lora::float16());
    if (t.dtype == st::dtype::bf16) add(lora::bfloat16());
    if (t.dtype == st::dtype::f32) add(float());
    if (t.dtype == st::dtype::f64) add(double());
    REQUIRE(expected.size() == t.elements());
    CHECK(same_bits(index.template copy<T>(t.name), expected));
    CHECK(same_bits(whole.template copy<T>(t.name), expected));
    std::vector<T> widened;
    CHECK(st::widen_to(t.dtype, bytes, widened));
    CHECK(same_bits(widened, expected));

    for (const std::size_t first : {std::size_t{0}, std::size_t{1}, t.elements() / 2, t.elements()})
      for (const std::size_t count :
           {std::size_t{0}, std::size_t{1}, std::size_t{5}, t.elements()}) {
        std::vector<T> some(count + 2,
                            T(7.0F));  // one element before and one behind, not to be touched
        const auto into = std::span(some).subspan(1, count);
        if (first + count > t.elements()) {
          const auto elements = std::to_string(t.elements()) + " elements";
          CHECK(test::mentions(
              test::refusal<lora::value_error>([&] { index.read(t, into, first); }),
              {"safetensors::read", elements.c_str(), ("from " + std::to_string(first)).c_str()}));
        } else {
          index.read(t, into, first);
          std::vector<T> wanted(expected.begin() + static_cast<std::ptrdiff_t>(first),
                                expected.begin() + static_cast<std::ptrdiff_t>(first + count));
          wanted.insert(wanted.begin(), T(7.0F));
          wanted.push_back(T(7.0F));
          CHECK(same_bits(some, wanted));
        }
      }
  }
}

TEST_CASE("tensors are compared byte by byte, also behind the first block",
          "[safetensors][index]") {
  std::vector<std::uint8_t> values(200'000, 3);
  build::file tensors;
  tensors.add("a", "U8", {200'000}, values).add("same", "U8", {500, 400}, values);
  values.back() = 4;
  tensors.add("other", "U8", {200'000}, values);
  values.pop_back();
  tensors.add("shorter", "U8", {199'999}, values);
  const build::directory dir;
  const auto index = st::open(dir.write("f", tensors.text()));
  CHECK(index.same_bytes(index.at("a"), index.at("same")));
  CHECK_FALSE(index.same_bytes(index.at("a"), index.at("other")));
  CHECK_FALSE(index.same_bytes(index.at("a"), index.at("shorter")));
}

TEST_CASE("a file that became shorter after it was opened is refused", "[safetensors][index]") {
  const build::directory dir;
  const auto path = dir.write("shrinks.safetensors", several().text());
  const auto index = st::open(path);
  const auto& last = index.at("one");
  std::filesystem::resize_file(path, last.offset + 3);
  std::vector<double> value(1);
  refused([&] { index.read(last, std::span(value)); },
          {"shrinks.safetensors", "8 bytes from byte " + std::to_string(last.offset), "found 3",
           "became shorter"});
  CHECK(index.copy<float>("f").size() == 55);  // the rest is still there
}

TEST_CASE("the values of a large file are not read to index it", "[safetensors][index]") {
  const std::uint64_t size = std::uint64_t{1} << 38;
  const std::string json = R"({"t":{"dtype":"BF16","shape":[131072,1048576],"data_offsets":[0,)" +
                           std::to_string(size) + "]}}";
  const build::directory dir;
  const auto path = dir.write("large", build::safetensors(json, std::string()));
  std::error_code failure;
  std::filesystem::resize_file(path, 8 + json.size() + size, failure);  // a hole: it takes no space
  if (failure) {
    SUCCEED("no file of 256 GiB can be made here");
    return;
  }
  test::allocations::start(1 << 16);
  const auto index = st::open(path);
  std::vector<float> some(3);
  index.read(index.at("t"), std::span(some), index.at("t").elements() - 3);
  test::allocations::stop();
  CHECK(test::allocations::now.large_count == 0);
  CHECK(some == std::vector<float>(3));
}
