// SPDX-License-Identifier: Apache-2.0
//
// The safetensors reader, rule by rule: files that break one rule and their neighbours that do not,
// every truncation and every flipped bit of a small file, numbers chosen by an enemy, and files
// that other projects wrote.
#include "lora/io/safetensors.hpp"

#include <sys/resource.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <string>
#include <vector>

#include "io/build.hpp"
#include "support/catch.hpp"
#include "support/outside.hpp"
#include "support/refused.hpp"

namespace {

namespace st = lora::safetensors;
using build::has;
using build::refused;
using build::safetensors;
using test::mentions;

/// Keeps the bytes that a parsed file looks at.
struct parsed {
  explicit parsed(const std::string& text, const st::limits& limit = {})
      : bytes(build::to_bytes(text)), file(st::parse(bytes, "test.safetensors", limit)) {}
  build::bytes bytes;
  st::file file;
};

void parse(const std::string& text, const st::limits& limit = {}) {
  // A copy of exact size, so that an address sanitizer sees a read behind the end.
  const parsed file(text, limit);
  for (const auto& t : file.file) {
    REQUIRE(t.bytes.data() >= file.bytes.data());
    REQUIRE(t.bytes.data() + t.bytes.size() <= file.bytes.data() + file.bytes.size());
  }
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return '"' + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" +
         offsets + "}";
}
std::string one(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return "{" + entry("t", dtype, shape, offsets) + "}";
}

struct bad {
  std::string json;
  std::size_t data;
  std::vector<std::string> says;
};

void all_refused(const std::vector<bad>& cases) {
  for (const auto& c : cases) {
    INFO(c.json);
    const std::string message = build::refusal([&] { parse(safetensors(c.json, c.data)); });
    CHECK(has(message, "test.safetensors"));
    for (const auto& part : c.says) {
      INFO(message << "\n  must say: " << part);
      CHECK(has(message, part));
    }
  }
}

void all_accepted(const std::vector<std::pair<std::string, std::size_t>>& cases) {
  for (const auto& [json, data] : cases) {
    INFO(json);
    CHECK_NOTHROW(parse(safetensors(json, data)));
  }
}

/// Three tensors with metadata: what the sweeps below cut and flip.
std::string seed_file() {
  return safetensors(
      "{\"__metadata__\":{\"format\":\"pt\"}," + entry("a", "F32", "[2,3]", "[0,24]") + "," +
          entry("b.c", "F16", "[3]", "[24,30]") + "," + entry("d", "U8", "[]", "[30,31]") + "}",
      31);
}

}  // namespace

TEST_CASE("a well-formed file is read as it is", "[safetensors]") {
  const parsed p(seed_file());
  const auto& f = p.file;
  CHECK(f.size() == 3);
  CHECK(f.metadata().at("format") == "pt");
  CHECK(f.contains("b.c"));
  CHECK_FALSE(f.contains("b"));
  CHECK(f.at("a").shape == std::vector<std::uint64_t>{2, 3});
  CHECK(f.at("a").text() == "F32 [2, 3]");
  CHECK(f.at("d").shape.empty());
  CHECK(f.at("d").bytes.size() == 1);
  CHECK(f.at("d").bytes[0] == std::byte{30});
  CHECK(f.at("b.c").offset == p.bytes.size() - 7);
  CHECK(f.names() == std::vector<std::string_view>{"a", "b.c", "d"});
}

TEST_CASE("iteration follows the data, names() the alphabet", "[safetensors]") {
  const parsed p(safetensors(
      "{" + entry("a", "U8", "[1]", "[2,3]") + "," + entry("b", "U8", "[2]", "[0,2]") + "}", 3));
  std::vector<std::string> order;
  for (const auto& t : p.file) order.emplace_back(t.name);
  CHECK(order == std::vector<std::string>{"b", "a"});
  CHECK(p.file.names() == std::vector<std::string_view>{"a", "b"});
}

TEST_CASE("a missing tensor is named with its neighbours", "[safetensors]") {
  const parsed p(seed_file());
  try {
    p.file.at("b.d");
    FAIL("found");
  } catch (const lora::value_error& e) {
    CHECK(has(e.what(), "\"b.d\""));
    CHECK(has(e.what(), "near: \"b.c\""));
  }
  // Each way of asking for it.
  const auto missing = [](const auto& ask) { return test::refusal<lora::value_error>(ask); };
  const std::initializer_list<const char*> says{"safetensors::at", "test.safetensors", "\"x\""};
  CHECK(mentions(missing([&] { (void)p.file.tensor<float, 2>("x"); }), says));
  CHECK(mentions(missing([&] { (void)p.file.copy<float>("x"); }), says));
  CHECK(mentions(missing([&] { (void)p.file.copy<std::uint8_t>(""); }), {"no tensor \"\""}));
  CHECK(mentions(missing([] { (void)parsed(safetensors("{}", 0)).file.at("x"); }),
                 {"\"x\"", "it is empty"}));
}

// ---- the rules of the format, numbered as in docs/formats.md
// ---------------------------------------------------------

TEST_CASE("rule 1: eight bytes of length", "[safetensors][rules]") {
  for (std::size_t k = 0; k < 8; ++k)
    refused([&] { parse(std::string(k, '\0')); }, {std::to_string(k) + " bytes in all"});
  CHECK_NOTHROW(parse(safetensors("{}", 0)));
}

TEST_CASE("rule 2: the length is at most 100,000,000, or the caller's limit",
          "[safetensors][rules]") {
  for (const std::uint64_t n : {100'000'001ull, 1ull << 40, ~0ull})
    refused([&] { parse(build::length_field(n) + "{}"); },
            {"byte 0", "at most 100000000", std::to_string(n)});
  refused([&] { parse(build::length_field(100'000'000) + "{}"); },
          {"header length 100000000", "2 bytes left"});
  CHECK_NOTHROW(parse(safetensors("{}  ", 0), {.header_bytes = 4}));
  refused([&] { parse(safetensors("{}   ", 0), {.header_bytes = 4}); }, {"at most 4"});
  refused([&] { parse(build::length_field(100'000'001) + "{}", {.header_bytes = ~0ull}); },
          {"at most 100000000"});
}

TEST_CASE("rule 3: the header lies inside the file", "[safetensors][rules]") {
  for (const std::uint64_t n : {3ull, 4ull, 1000ull})
    refused([&] { parse(build::length_field(n) + "{}"); },
            {"byte 0", "2 bytes left", "header length " + std::to_string(n)});
  CHECK_NOTHROW(parse(build::length_field(2) + "{}"));
  refused([] { parse(build::length_field(0)); }, {"byte 8"});
}

TEST_CASE("rule 4: strict UTF-8", "[safetensors][rules]") {
  const std::string rest = R"(":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})";
  for (const std::string name : {"\x80", "\xC0\xAF", "\xE2\x82", "\xED\xA0\x80", "\xF4\x90\x80\x80",
                                 "\xFF", "\xF0\x80\x80\xAF"}) {
    all_refused({{"{\"" + name + rest, 1, {"byte 1"}}});
    CHECK_FALSE(lora::io_detail::is_utf8("a" + name));
    CHECK_FALSE(lora::io_detail::is_utf8("a" + name + "b"));
  }
  for (const std::string name : {"\xC3\xA9", "\xE2\x82\xAC", "\xF0\x9F\x98\x80", "\x7F"}) {
    CHECK_NOTHROW(parse(safetensors("{\"" + name + rest, 1)));
    CHECK(lora::io_detail::is_utf8(name + "b" + name));
  }
  CHECK(lora::io_detail::is_utf8(""));
  CHECK(lora::io_detail::is_utf8(std::string_view("\0\n", 2)));  // a writer escapes them
}

TEST_CASE("rule 5: strict JSON and nothing else", "[safetensors][rules]") {
  const std::string t = entry("t", "U8", "[1]", "[0,1]");
  all_refused({{"\xEF\xBB\xBF{" + t + "}", 1, {"byte order mark", "byte 8"}},
               {"{" + t + "}/* */", 1, {"strict JSON"}},
               {"{" + t + ",}", 1, {"strict JSON"}},
               {"{" + t + "}{}", 1, {"strict JSON"}},
               {"{" + t + "}x", 1, {"strict JSON"}},
               {"{" + t, 1, {"ends too early"}},
               {"{\"t\n" + t.substr(2) + "}", 1, {"strict JSON"}},
               {R"({"\ud800)" + t.substr(2) + "}", 1, {"strict JSON"}},
               {R"({"\udc00x)" + t.substr(2) + "}", 1, {"strict JSON"}},
               {R"({"\x41)" + t.substr(2) + "}", 1, {"strict JSON"}},
               {one("U8", "[01]", "[0,1]"), 1, {"strict JSON"}},
               {one("U8", "[+1]", "[0,1]"), 1, {"strict JSON"}},
               {one("U8", "[NaN]", "[0,1]"), 1, {"strict JSON"}},
               {one("U8", "[1 1]", "[0,1]"), 1, {"strict JSON"}},
               {one("U8", "[1,]", "[0,1]"), 1, {"strict JSON"}},
               {"{'t':1}", 1, {"strict JSON"}},
               {"", 0, {"strict JSON"}},
               {"  ", 0, {"strict JSON"}},
               {"[]", 0, {"a JSON object", "an array"}},
               {"null", 0, {"a JSON object"}},
               {"7", 0, {"a JSON object"}},
               {"\"t\"", 0, {"a JSON object"}}});
  const std::string nul("\0\0\0", 3);
  all_refused({{"{" + t + "}" + nul, 1, {"NUL", "padded with spaces"}},
               {"{" + nul + t + "}", 1, {"NUL"}},
               {nul, 0, {"NUL"}}});
  all_accepted({{"{" + t + "} \t\r\n   ", 1},
                {"{ " + t + " }", 1},
                {R"({"\u0074\ud83d\ude00)" + t.substr(2) + "}", 1}});
}

TEST_CASE("rule 6: whitespace before the header is accepted", "[safetensors][rules]") {
  all_accepted({{"   {}", 0}, {"\n\t {}", 0}});
  all_refused({{"\v{}", 0, {"strict JSON"}}, {"\xC2\xA0{}", 0, {"strict JSON"}}});
}

TEST_CASE("rule 7: nesting of skipped fields is limited, without recursion",
          "[safetensors][rules]") {
  const auto nested = [](std::size_t depth) {  // the field's own arrays lie below two objects
    return R"({"t":{"x":)" + std::string(depth, '[') + std::string(depth, ']') +
           R"(,"dtype":"U8","shape":[1],"data_offsets":[0,1]}})";
  };
  all_accepted({{nested(1), 1}, {nested(30), 1}});
  all_refused({{nested(31), 1, {"nested more than 32"}},
               {nested(128), 1, {"nested more than 32"}},
               {nested(200'000), 1, {"nested more than 32"}},
               {std::string(200'000, '['), 0, {"a JSON object"}}});
  std::string objects = "1";
  for (int k = 0; k < 40; ++k) objects = "{\"k\":" + objects + "}";
  all_refused({{R"({"t":{"x":)" + objects + "}}", 0, {"nested more than 32"}}});
}

TEST_CASE("rule 8: shapes and offsets are unsigned integers", "[safetensors][rules]") {
  for (const std::string number : {"-4", "4.0", "4e0", "-0", "18446744073709551616", "\"4\"",
                                   "true", "null", "[4]", "{}", "1e999"}) {
    all_refused({{one("U8", "[" + number + "]", "[0,4]"), 4, {}},
                 {one("U8", "[4]", "[0," + number + "]"), 4, {}},
                 {one("U8", "[4]", "[" + number + ",4]"), 4, {}}});
  }
  all_refused({{one("U8", "[-4]", "[0,4]"),
                4,
                {"\"t\"", "unsigned integers in shape", "a negative integer"}},
               {one("U8", "[4]", "[0,4.0]"),
                4,
                {"\"t\"", "unsigned integers in data_offsets", "a fraction"}},
               {one("U8", "[4]", "[0]"), 4, {"two data_offsets", "found 1"}},
               {one("U8", "[4]", "[]"), 4, {"two data_offsets", "found 0"}},
               {one("U8", "[4]", "[0,4,4]"), 4, {"two data_offsets"}},
               {one("U8", "4", "[0,4]"), 4, {"an array of unsigned integers as shape"}},
               {one("U8", "{}", "[0,4]"), 4, {"an array of unsigned integers as shape"}},
               {one("U8", "[4]", "null"), 4, {"an array of unsigned integers as data_offsets"}}});
  all_accepted({{one("U8", "[4]", "[0,4]"), 4}, {one("U8", "[ 4 ]", "[0 , 4]"), 4}});
}

TEST_CASE("rule 9: the 22 dtypes, spelled exactly", "[safetensors][rules]") {
  for (const std::string name : {"f32", "F31", "FLOAT", "", "F32 ", "BFLOAT16", "bool", "F8"})
    all_refused({{one(name, "[1]", "[0,4]"), 4, {"\"t\"", "BOOL, F4", "\"" + name + "\""}}});
  all_refused(
      {{R"({"t":{"dtype":5,"shape":[1],"data_offsets":[0,4]}})", 4, {"dtype as text"}},
       {R"({"t":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}})", 4, {"dtype as text"}}});
  const std::array<std::pair<const char*, std::size_t>, 22> sizes{
      {{"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
       {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
       {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
       {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
       {"I64", 64},        {"U64", 64}}};
  for (const auto& [name, bits] : sizes) {
    INFO(name);
    const parsed p(safetensors(one(name, "[4]", "[0," + std::to_string(bits / 2) + "]"), bits / 2));
    CHECK(st::name_of(p.file.at("t").dtype) == name);
    CHECK(st::bits_of(p.file.at("t").dtype) == bits);
    CHECK(p.file.at("t").bytes.size() == bits / 2);
  }
}

TEST_CASE("rule 10: tensors fill the data without hole and overlap", "[safetensors][rules]") {
  const auto two = [](const std::string& first, const std::string& second,
                      const char* shape_a = "[2]", const char* shape_b = "[2]") {
    return "{" + entry("a", "U8", shape_a, first) + "," + entry("b", "U8", shape_b, second) + "}";
  };
  all_refused({{two("[1,3]", "[3,5]"), 5, {"\"a\"", "the beginning of the data", "a hole"}},
               {two("[0,2]", "[3,5]"), 5, {"\"b\"", "\"a\" [0, 2)", "begin at 2", "a hole"}},
               {two("[0,2]", "[1,3]"), 3, {"\"b\"", "\"a\" [0, 2)", "share bytes"}},
               {two("[0,2]", "[0,2]"), 2, {"share bytes"}},
               {two("[2,0]", "[2,4]"), 4, {"\"a\"", "begin before they end", "[2, 0)"}},
               {two("[0,2]", "[1,1]", "[2]", "[0]"), 2, {"share bytes"}}});
  all_accepted({{two("[0,2]", "[2,4]"), 4},
                {two("[2,4]", "[0,2]"), 4},
                {two("[0,2]", "[2,2]", "[2]", "[0]"), 2},
                {two("[0,2]", "[0,0]", "[2]", "[0]"), 2}});
}

TEST_CASE("rule 11: sizes are counted without overflow, in any order", "[safetensors][rules]") {
  all_refused(
      {{one("F32", "[4294967296,4294967296]", "[0,0]"), 0, {"\"t\"", "bytes can be counted"}},
       {one("U8", "[4294967296,4294967296]", "[0,0]"), 0, {"bytes can be counted"}},
       {one("F64", "[9223372036854775807]", "[0,0]"), 0, {"bytes can be counted"}},
       {one("U8", "[9223372036854775808]", "[0,0]"), 0, {"below 2^63"}},
       {one("U8", "[0,18446744073709551615]", "[0,0]"), 0, {"below 2^63"}},
       {one("U8", "[1152921504606846976]", "[0,1]"), 1, {"1152921504606846976 bytes", "found 1"}}});
  all_accepted({{one("F32", "[0,4294967296,4294967296,8]", "[0,0]"), 0},
                {one("F32", "[4294967296,4294967296,0]", "[0,0]"), 0},
                {one("F32", "[]", "[0,4]"), 4}});
}

TEST_CASE("rule 12: sub-byte elements fill whole bytes", "[safetensors][rules]") {
  all_refused({{one("F4", "[1]", "[0,1]"), 1, {"ends inside a byte"}},
               {one("F4", "[3]", "[0,2]"), 2, {"ends inside a byte"}},
               {one("F6_E2M3", "[2]", "[0,2]"), 2, {"ends inside a byte"}}});
  all_accepted({{one("F4", "[2]", "[0,1]"), 1}, {one("F6_E3M2", "[4]", "[0,3]"), 3}});
}

TEST_CASE("rule 13: offsets fit shape and dtype", "[safetensors][rules]") {
  all_refused({{one("F32", "[2]", "[0,7]"), 7, {"\"t\"", "8 bytes for F32 [2]", "found 7"}},
               {one("F32", "[2]", "[0,9]"), 9, {"8 bytes for F32 [2]", "found 9"}},
               {one("F32", "[]", "[0,0]"), 0, {"4 bytes for F32 []", "found 0"}},
               {one("F32", "[0]", "[0,4]"), 4, {"0 bytes for F32 [0]"}}});
  all_accepted({{one("F32", "[2]", "[0,8]"), 8}});
}

TEST_CASE("rule 14: the data ends with the file", "[safetensors][rules]") {
  const std::string json = one("F32", "[2]", "[0,8]");
  for (std::size_t extra = 1; extra <= 16; ++extra)
    refused([&] { parse(safetensors(json, 8 + extra)); },
            {"\"t\"", "to end at 8", "data size of " + std::to_string(8 + extra),
             std::to_string(extra) + " bytes too many"});
  for (std::size_t left = 0; left < 8; ++left)
    refused([&] { parse(safetensors(json, left)); },
            {std::to_string(8 - left) + " bytes missing", "cut off"});
  refused([] { parse(safetensors("{}", 1)); }, {"1 bytes too many"});
  CHECK_NOTHROW(parse(safetensors(json, 8)));
}

TEST_CASE("rule 15: metadata is text, null or empty", "[safetensors][rules]") {
  all_refused(
      {{R"({"__metadata__":{"a":1}})", 0, {"__metadata__", "\"a\"", "found 1"}},
       {R"({"__metadata__":{"a":null}})", 0, {"__metadata__", "null"}},
       {R"({"__metadata__":{"a":{}}})", 0, {"__metadata__", "an object"}},
       {R"({"__metadata__":{"a":["b"]}})", 0, {"__metadata__", "an array"}},
       {R"({"__metadata__":[]})", 0, {"__metadata__", "an array"}},
       {R"({"__metadata__":"a"})", 0, {"__metadata__"}},
       {R"({"__metadata__":{"a":"1","a":"2"}})", 0, {"\"a\"", "twice"}},
       {R"({"__metadata__":{"a":"1","\u0061":"2"}})", 0, {"\"a\"", "twice"}},
       {R"({"__metadata__":{},"__metadata__":{}})", 0, {"__metadata__", "twice"}},
       {R"({"__metadata__":null,"__metadata__":{"a":"b"}})", 0, {"__metadata__", "twice"}}});
  all_accepted({{R"({"__metadata__":null})", 0},
                {R"({"__metadata__":{}})", 0},
                {R"({"__metadata__":{"a":"","":"b"}})", 0}});
}

TEST_CASE("where the reference reader is laxer than its description", "[safetensors][rules]") {
  const std::string t = entry("t", "U8", "[1]", "[0,1]");
  all_refused(
      {// a name given twice, also when it is spelled with an escape
       {"{" + t + "," + t + "}", 1, {"\"t\"", "once", "twice"}},
       {"{" + t + "," + entry("\\u0074", "U8", "[1]", "[1,2]") + "}", 2, {"\"t\"", "twice"}},
       {"{" + t + "," + entry("u", "U8", "[1]", "[1,2]") + "," + entry("t", "U8", "[1]", "[2,3]") +
            "}",
        3,
        {"\"t\"", "twice"}},
       // a field given twice
       {R"({"t":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
        1,
        {"\"dtype\"", "twice"}},
       {R"({"t":{"dtype":"U8","shape":[1],"\u0073hape":[1],"data_offsets":[0,1]}})",
        1,
        {"\"shape\"", "twice"}},
       {R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1,"x":2}})",
        1,
        {"\"x\"", "twice"}},
       // the positional form
       {R"({"t":["U8",[1],[0,1]]})", 1, {"an object with dtype", "an array"}},
       {R"({"t":7})", 0, {"an object with dtype"}},
       {R"({"t":null})", 0, {"an object with dtype"}},
       // a field missing
       {R"({"t":{"shape":[1],"data_offsets":[0,1]}})", 1, {"the field dtype"}},
       {R"({"t":{"dtype":"U8","data_offsets":[0,1]}})", 1, {"the field shape"}},
       {R"({"t":{"dtype":"U8","shape":[1]}})", 1, {"the field data_offsets"}},
       {R"({"t":{}})", 0, {"the field dtype"}}});
  all_accepted(
      {{R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1,"y":{"x":[1.5,-2,null,{"x":"x"}]}}})",
        1},
       {"{" + entry("", "U8", "[1]", "[0,1]") + "}", 1},
       {"{" + entry("a\\u0000b", "U8", "[1]", "[0,1]") + "}", 1}});
}

TEST_CASE("limits can be lowered", "[safetensors][rules]") {
  const std::string two =
      "{" + entry("aa", "U8", "[1]", "[0,1]") + "," + entry("bb", "U8", "[1]", "[1,2]") + "}";
  CHECK_NOTHROW(parse(safetensors(two, 2), {.tensors = 2, .name_bytes = 2}));
  refused([&] { parse(safetensors(two, 2), {.tensors = 1}); }, {"\"bb\"", "at most 1 tensors"});
  refused([&] { parse(safetensors(two, 2), {.name_bytes = 1}); }, {"\"aa\"", "at most 1 bytes"});
  std::string ones = "1";
  for (int k = 1; k < 64; ++k) ones += ",1";
  CHECK_NOTHROW(parse(safetensors(one("U8", "[" + ones + "]", "[0,1]"), 1)));
  refused([&] { parse(safetensors(one("U8", "[" + ones + ",1]", "[0,1]"), 1)); },
          {"at most 64 dimensions"});
  const std::string longest(65536, 'n');
  CHECK_NOTHROW(parse(safetensors("{" + entry(longest, "U8", "[1]", "[0,1]") + "}", 1)));
  refused([&] { parse(safetensors("{" + entry(longest + "n", "U8", "[1]", "[0,1]") + "}", 1)); },
          {"at most 65536 bytes", "[...]"});
}

TEST_CASE("an error tells its parts, and a hostile name does no harm in it", "[safetensors]") {
  try {
    parse(safetensors("{" + entry("a\\u0000\\n\\u001b", "F32", "[2]", "[0,7]") + "}", 7));
    FAIL("accepted");
  } catch (const lora::format_error& e) {
    CHECK(e.path() == "test.safetensors");
    CHECK(e.item() == std::string("a\0\n\x1b", 4));
    REQUIRE(e.offset().has_value());
    CHECK(*e.offset() > 8);
    CHECK(e.expected() == "8 bytes for F32 [2]");
    CHECK(has(e.found(), "7 at [0, 7)"));
    CHECK(has(e.what(), R"("a\x00\x0a\x1b")"));
  }
}

TEST_CASE("files of other kinds are recognized by their first bytes", "[safetensors]") {
  refused([] { parse("version https://git-lfs.github.com/spec/v1\noid"); }, {"Git LFS"});
  refused([] { parse(std::string("PK\x03\x04") + std::string(20, 'x')); }, {"PyTorch"});
  refused([] { parse("<!DOCTYPE html><html>"); }, {"web page"});
  refused([] { parse("{\"a\":1, \"b\":2}"); }, {"JSON text"});
  refused([] { parse(""); }, {"empty"});
}

// ---- sweeps
// -------------------------------------------------------------------------------------------------

TEST_CASE("every truncation is refused", "[safetensors][sweep]") {
  const std::string whole = seed_file();
  CHECK_NOTHROW(parse(whole));
  for (std::size_t length = 0; length < whole.size(); ++length)
    CHECK_THROWS_AS(parse(whole.substr(0, length)), lora::format_error);
  for (std::size_t extra = 1; extra <= 16; ++extra)
    CHECK_THROWS_AS(parse(whole + std::string(extra, '\0')), lora::format_error);
}

TEST_CASE("every flipped bit of a header is refused or harmless", "[safetensors][sweep]") {
  const std::string whole = seed_file();
  const std::size_t header = whole.size() - 31;
  std::size_t accepted = 0, refusals = 0;
  for (std::size_t at = 0; at < header; ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string flipped = whole;
      flipped[at] = static_cast<char>(flipped[at] ^ (1 << bit));
      try {
        parse(flipped);  // checks that all bytes lie inside
        ++accepted;
      } catch (const lora::format_error&) {
        ++refusals;
      }
    }
  }
  CHECK(accepted + refusals == header * 8);
  CHECK(accepted > 0);  // letters of names and of metadata
  CHECK(refusals > accepted);
}

TEST_CASE("numbers chosen by an enemy cost no memory", "[safetensors][sweep]") {
  const std::vector<std::uint64_t> hostile{
      0, 1, 7, 0x7fffffff, 0x80000000, 1ull << 32, 1ull << 53, ~0ull >> 1, 1ull << 63, ~0ull};
  rusage before{};
  getrusage(RUSAGE_SELF, &before);
  std::size_t count = 0;
  const auto attempt = [&](const std::string& text) {
    ++count;
    try {
      parse(text);
    } catch (const lora::format_error&) {
    }
  };
  for (const auto n : hostile) {
    attempt(build::length_field(n) + seed_file().substr(8));
    const auto text = std::to_string(n);
    for (const std::string dtype : {"U8", "F32", "F64", "F4"}) {
      attempt(safetensors(one(dtype, "[" + text + "]", "[0,8]"), 8));
      attempt(safetensors(one(dtype, "[" + text + "," + text + "]", "[0,8]"), 8));
      attempt(safetensors(one(dtype, "[8]", "[" + text + ",8]"), 8));
      attempt(safetensors(one(dtype, "[8]", "[0," + text + "]"), 8));
      attempt(safetensors(one(dtype, "[8]", "[" + text + "," + text + "]"), 8));
    }
  }
  rusage after{};
  getrusage(RUSAGE_SELF, &after);
  CHECK(count == hostile.size() * 21);
  CHECK(after.ru_maxrss - before.ru_maxrss < 64 * 1024);
}

TEST_CASE("a header of the largest length is read", "[safetensors][.large]") {
  std::string json = "{}";
  json.resize(100'000'000, ' ');
  CHECK_NOTHROW(parse(safetensors(json, 0)));
  json += ' ';
  refused([&] { parse(safetensors(json, 0)); }, {"at most 100000000"});
}

// ---- values
// -------------------------------------------------------------------------------------------------

TEST_CASE("tensors are viewed where they lie", "[safetensors]") {
  const build::directory dir;
  const auto path =
      dir.write("f.safetensors", build::file()
                                     .add("m", {2, 3})
                                     .add<std::uint16_t>("h", "F16", {2}, {0x3c00, 0xc000})
                                     .add<std::uint16_t>("b", "BF16", {1, 2}, {0x3f80, 0xc000})
                                     .text());
  const auto f = st::read(path);
  const auto m = f.tensor<float, 2>("m");
  CHECK(m.shape() == std::array<lora::index_t, 2>{2, 3});
  CHECK(m.matrix()(1, 2) == 6.0F);
  CHECK(static_cast<const void*>(m.data()) == f.at("m").bytes.data());
  CHECK(reinterpret_cast<std::uintptr_t>(m.data()) % 64 == 0);
  CHECK(static_cast<float>(f.tensor<lora::float16, 1>("h").data()[1]) == -2.0F);
  CHECK(static_cast<float>(f.tensor<Eigen::half, 1>("h").data()[1]) == -2.0F);
  CHECK(static_cast<float>(f.tensor<lora::bfloat16, 2>("b").data()[0]) == 1.0F);
  refused([&] { (void)f.tensor<double, 2>("m"); },
          {"\"m\"", "expected F64", "F32 [2, 3]", "copy<T>()"});
  refused([&] { (void)f.tensor<float, 1>("m"); }, {"\"m\"", "1 dimensions"});
  refused([&] { (void)f.tensor<lora::float16, 2>("b"); }, {"\"b\"", "expected F16", "BF16 [1, 2]"});
}

TEST_CASE("copies widen exactly and never narrow", "[safetensors]") {
  const parsed p(build::file()
                     .add<float>("f", "F32", {2}, {1.5F, -0.1F})
                     .add<double>("d", "F64", {1}, {0.1})
                     .add<std::uint16_t>("h", "F16", {3}, {0x3c00, 0x0001, 0x7bff})
                     .add<std::uint16_t>("b", "BF16", {1}, {0x3f81})
                     .add<std::int64_t>("i", "I64", {2}, {-5, 1ll << 40})
                     .add<std::uint8_t>("u", "U8", {1}, {200})
                     .add("s", {})
                     .text());
  const auto& f = p.file;
  CHECK(f.copy<float>("f") == std::vector<float>{1.5F, -0.1F});
  CHECK(f.copy<double>("f") == std::vector<double>{1.5, static_cast<double>(-0.1F)});
  CHECK(f.copy<double>("d") == std::vector<double>{0.1});
  CHECK(f.copy<float>("h") == std::vector<float>{1.0F, 0x1p-24F, 65504.0F});
  CHECK(f.copy<double>("b") == std::vector<double>{1.0078125});
  CHECK(f.copy<lora::bfloat16>("b")[0].bits == 0x3f81);
  CHECK(f.copy<Eigen::half>("h").size() == 3);
  CHECK(f.copy<std::int64_t>("i") == std::vector<std::int64_t>{-5, 1ll << 40});
  CHECK(f.copy<std::uint8_t>("u") == std::vector<std::uint8_t>{200});
  CHECK(f.copy<float>("s") == std::vector<float>{1.0F});
  refused([&] { (void)f.copy<float>("d"); }, {"\"d\"", "F64 [1]", "wider type"});
  refused([&] { (void)f.copy<lora::float16>("f"); }, {"\"f\"", "F16", "F32 [2]"});
  refused([&] { (void)f.copy<lora::float16>("b"); }, {"\"b\""});
  refused([&] { (void)f.copy<lora::bfloat16>("h"); }, {"\"h\""});
  refused([&] { (void)f.copy<float>("i"); }, {"\"i\"", "I64 [2]"});
  refused([&] { (void)f.copy<std::int32_t>("i"); }, {"\"i\"", "expected I32"});
}

TEST_CASE("tensors without elements are viewed and copied", "[safetensors]") {
  const parsed p(build::file().add("t", {0, 3}).add<std::int64_t>("i", "I64", {2, 0}, {}).text());
  const auto t = p.file.tensor<float, 2>("t");
  CHECK((t.size() == 0 && t.matrix().rows() == 0 && t.matrix().cols() == 3));
  CHECK(p.file.copy<double>("t").empty());
  CHECK(p.file.copy<std::int64_t>("i").empty());
  refused([&] { (void)p.file.tensor<float, 2>("i"); }, {"\"i\"", "expected F32", "I64 [2, 0]"});
}

TEST_CASE("bytes of no length at all are refused under their name", "[safetensors]") {
  refused([] { (void)st::parse({}, "nothing"); }, {"nothing", "byte 0", "0 bytes in all"});
}

TEST_CASE("unaligned tensors are refused as views and readable as copies", "[safetensors]") {
  const std::string text =
      safetensors("{" + entry("a", "F32", "[1]", "[0,4]") + "}", std::string("\0\0\xC0\x3F", 4));
  build::bytes shifted(text.size() + 16);
  for (std::size_t shift = 0; shift < 8; ++shift) {
    std::memcpy(shifted.data() + shift, text.data(), text.size());
    const auto f = st::parse({shifted.data() + shift, text.size()}, "shifted");
    CHECK(f.copy<float>("a") == std::vector<float>{1.5F});
    if (st::file::aligned_for<float>(f.at("a")))
      CHECK(f.tensor<float, 1>("a").data()[0] == 1.5F);
    else
      refused([&] { (void)f.tensor<float, 1>("a"); }, {"\"a\"", "multiple of 4", "copy<T>()"});
  }
}

TEST_CASE("read() places the data so that tensors are aligned where that is possible",
          "[safetensors]") {
  const build::directory dir;
  // Three bytes before the floats: no tensor begins at a multiple of four, but a shift by one puts
  // all of them there.
  const auto path = dir.write(
      "shift", build::file().add("u", "U8", {3}, "abc").add("f", {2}).add("g", {1}).text());
  const auto f = st::read(path);
  CHECK(f.tensor<float, 1>("f").data()[1] == 2.0F);
  CHECK(f.tensor<float, 1>("g").data()[0] == 1.0F);
  // An F32 at 0 and another at 5 cannot both be aligned.
  const auto odd = st::read(
      dir.write("odd", build::file().add("f", {1}).add("u", "U8", {1}, "a").add("g", {1}).text()));
  CHECK(odd.tensor<float, 1>("f").data()[0] == 1.0F);
  refused([&] { (void)odd.tensor<float, 1>("g"); }, {"\"g\"", "copy<T>()"});
  CHECK(odd.copy<float>("g") == std::vector<float>{1.0F});
}

TEST_CASE("read() and parse() give the same, and a copy of a file keeps its bytes",
          "[safetensors]") {
  const build::directory dir;
  const auto path = dir.write("seed.safetensors", seed_file());
  std::vector<st::file> kept;
  {
    const auto f = st::read(path);
    kept.push_back(f);
  }
  std::filesystem::remove(path);
  const parsed p(seed_file());
  for (const auto& t : p.file) {
    const auto& same = kept[0].at(t.name);
    CHECK(same.shape == t.shape);
    CHECK(same.offset == t.offset);
    CHECK(std::equal(t.bytes.begin(), t.bytes.end(), same.bytes.begin(), same.bytes.end()));
  }
  CHECK(kept[0].name() == path.string());
}

TEST_CASE("read() refuses what is not a readable file", "[safetensors]") {
  const build::directory dir;
  refused([&] { (void)st::read(dir.path() / "none.safetensors"); },
          {"none.safetensors", "can be read"});
  refused([&] { (void)st::read(dir.path()); }, {"a directory"});
  refused([&] { (void)st::read(dir.write("empty", "")); }, {"empty", "0 bytes in all"});
  const std::string whole = seed_file();
  for (std::size_t length = 0; length < whole.size(); length += 5)
    CHECK_THROWS_AS(st::read(dir.write("cut", whole.substr(0, length))), lora::format_error);
}

// ---- files of other projects
// -----------------------------------------------------------------------------------------

namespace {

using test::have_outside;
using test::outside;

template <class T>
void check_six(const st::file& f, const std::string& name) {
  INFO(name);
  const auto values = f.copy<T>(name);
  REQUIRE(values.size() == 6);
  for (int k = 0; k < 6; ++k) {
    if constexpr (lora::scalar<T>)
      CHECK(static_cast<double>(values[static_cast<std::size_t>(k)]) == k - 3);
    else
      CHECK(values[static_cast<std::size_t>(k)] == static_cast<T>(k - 3));
  }
}

}  // namespace

TEST_CASE("outside: every plain dtype at every alignment", "[safetensors][outside]") {
  if (!have_outside()) return;
  const auto dir = outside / "alignment" / "safetensors-samples";
  const auto overall = st::read(dir / "overall.safetensors");
  CHECK(overall.size() == 9);
  CHECK(overall.metadata().at("test") == "a");
  const auto check_all = [&](auto tag, const char* name, bool own_file) {
    using T = decltype(tag);
    check_six<T>(overall, name);
    if (!own_file) return;
    const auto f = st::read(dir / (std::string(name) + ".safetensors"));
    if (!f.contains(name)) return;  // h and H on a file system that is blind to case
    check_six<T>(f, name);
    CHECK(st::file::aligned_for<T>(f.at(name)));
  };
  check_all(std::uint8_t{}, "B", false);
  check_all(std::int8_t{}, "b", true);
  check_all(std::int16_t{}, "h", true);
  check_all(std::uint16_t{}, "H", true);
  check_all(std::int32_t{}, "i", true);
  check_all(std::uint32_t{}, "I", true);
  check_all(lora::float16{0.0F}, "e", true);
  check_all(float{}, "f", true);
  check_all(double{}, "d", true);
  // No place of the data aligns all nine: I lies at 18, d at 48.
  CHECK_FALSE(st::file::aligned_for<std::uint32_t>(overall.at("I")));
  CHECK(overall.tensor<double, 1>("d").data()[5] == 2.0);
}

TEST_CASE("outside: broken files are refused with what is wrong", "[safetensors][outside]") {
  if (!have_outside()) return;
  const auto dir = outside / "malformed";
  refused([&] { (void)st::read(dir / "safetensors_abuse_attempt_1.safetensors"); },
          {"safetensors_abuse_attempt_1", "byte 0", "header length 1000", "80 bytes left"});
  refused([&] { (void)st::read(dir / "tiny.safetensors"); },
          {"tiny.safetensors", "test.weight.0", "32768", "32773", "5 bytes too many",
           "uncounted header padding"});
  refused([&] { (void)st::read(dir / "empty.gguf"); }, {"GGUF"});
}

TEST_CASE("outside: real files open, with as many tensors as they have", "[safetensors][outside]") {
  if (!have_outside()) return;
  const std::vector<std::pair<const char*, std::size_t>> files{
      {"adapters/sift-opf-zh/adapter_model.safetensors", 66},
      {"adapters/gradience-tiny-lora/adapter_model.safetensors", 24},
      {"adapters/mlx-lm-dpo/adapters.safetensors", 8},
      {"adapters/lycoris-lokr/smart_falcon_4_lokr.safetensors", 1750},
      {"adapters/diffusers-sd-pokemon/pytorch_lora_weights.safetensors", 256},
      {"adapters/cloneofsimo-lora/lora_disney_inpainting.safetensors", 386},
      {"adapters/sam-lora/lora_rank2.safetensors", 48},
      {"adapters/sam-lora/lora_rank8.safetensors", 48},
      {"bases/torchtune-gemma/gemma_hf_checkpoint.safetensors", 11},
      {"bases/hf2q-tiny/model.safetensors", 5},
      {"bases/stories260K/hf/model.safetensors", 47}};
  for (const auto& [path, count] : files) {
    INFO(path);
    const auto f = st::read(outside / path);
    CHECK(f.size() == count);
  }
  CHECK(st::read(outside / "adapters/lycoris-lokr/smart_falcon_4_lokr.safetensors")
            .metadata()
            .size() == 61);
}
