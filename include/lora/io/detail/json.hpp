// SPDX-License-Identifier: Apache-2.0
//
// Strict JSON as a stream of events. nlohmann-json finds the tokens; this adapter refuses what it lets pass (a byte order
// mark, text after a NUL, nesting without limit) and keeps apart what it converts silently (negative numbers, fractions).
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "lora/io/format_error.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

enum class json_kind { null, boolean, unsigned_integer, negative_integer, real, string, array, object };

inline const char* json_kind_name(json_kind kind) {
  switch (kind) {
    case json_kind::null: return "null";
    case json_kind::boolean: return "a boolean";
    case json_kind::unsigned_integer: return "an unsigned integer";
    case json_kind::negative_integer: return "a negative integer";
    case json_kind::real: return "a number with a fraction or exponent, or beyond 64 bits";
    case json_kind::string: return "a string";
    case json_kind::array: return "an array";
    case json_kind::object: return "an object";
  }
  return "nothing";
}

/// A value that is neither array nor object. The string is valid during the event only.
struct json_scalar {
  json_kind kind = json_kind::null;
  bool boolean = false;
  std::uint64_t unsigned_integer = 0;
  double number = 0;  ///< of every number, rounded to double
  std::string* string = nullptr;

  /// As it stands in a message.
  std::string text() const {
    if (kind == json_kind::boolean) return boolean ? "true" : "false";
    if (kind == json_kind::unsigned_integer) return std::to_string(unsigned_integer);
    if (kind == json_kind::string) return in_quotes(*string);
    return json_kind_name(kind);
  }
};

/// Where a JSON text lies: names the file in errors, and its offset there.
struct json_source {
  std::string_view text;
  std::string_view path;
  std::uint64_t offset = 0;
  int deepest = 32;
};

/// Reads characters and leaves their number where the handler of an event finds it.
class counting_iterator {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  counting_iterator() = default;
  counting_iterator(const char* at, const char** seen) : at_(at), seen_(seen) {}
  const char& operator*() const { return *at_; }
  counting_iterator& operator++() {
    *seen_ = ++at_;
    return *this;
  }
  counting_iterator operator++(int) {
    const auto before = *this;
    ++*this;
    return before;
  }
  friend bool operator==(const counting_iterator& a, const counting_iterator& b) { return a.at_ == b.at_; }
  friend bool operator!=(const counting_iterator& a, const counting_iterator& b) { return a.at_ != b.at_; }

 private:
  const char* at_ = nullptr;
  const char** seen_ = nullptr;
};

/// Passes nlohmann's events on to a Handler with
///   key(std::string&, offset), scalar(const json_scalar&, offset), begin(json_kind, offset), end(json_kind, offset)
/// where offset is a position in the file at the end of the token or just behind it. Handlers raise format_error.
template <class Handler>
class json_events {
 public:
  json_events(const json_source& source, Handler& handler) : source_(source), handler_(handler), seen_(source.text.data()) {}

  void run() {
    refuse_what_the_lexer_skips();
    const char* first = source_.text.data();
    const char* last = first + source_.text.size();
    nlohmann::json::sax_parse(counting_iterator(first, &seen_), counting_iterator(last, &seen_), this);
  }

  // The names below are nlohmann's.
  bool null() { return scalar({.kind = json_kind::null}); }
  bool boolean(bool value) { return scalar({.kind = json_kind::boolean, .boolean = value}); }
  bool number_integer(std::int64_t value) {
    return scalar({.kind = json_kind::negative_integer, .number = static_cast<double>(value)});
  }
  bool number_unsigned(std::uint64_t value) {
    return scalar({.kind = json_kind::unsigned_integer, .unsigned_integer = value, .number = static_cast<double>(value)});
  }
  bool number_float(double value, const std::string&) { return scalar({.kind = json_kind::real, .number = value}); }
  bool string(std::string& value) { return scalar({.kind = json_kind::string, .string = &value}); }
  bool binary(nlohmann::json::binary_t&) { return false; }
  bool start_object(std::size_t) { return open(json_kind::object); }
  bool start_array(std::size_t) { return open(json_kind::array); }
  bool end_object() { return close(json_kind::object); }
  bool end_array() { return close(json_kind::array); }
  bool key(std::string& name) {
    handler_.key(name, offset());
    return true;
  }
  bool parse_error(std::size_t position, const std::string& token, const nlohmann::json::exception& reason) {
    // nlohmann: "[json.exception.parse_error.101] parse error at line 1, column 2: <the reason>"
    std::string_view text = reason.what();
    if (const auto colon = text.find(": "); colon != std::string_view::npos) text.remove_prefix(colon + 2);
    const std::uint64_t at = position == 0 ? 0 : position - 1;
    const bool at_end = at >= source_.text.size();
    refuse(at, at_end ? "the JSON text ends too early: " + printable(text) : printable(text),
           token.empty() && source_.text.empty() ? "the text is empty" : "");
    return false;
  }

 private:
  bool scalar(const json_scalar& value) {
    handler_.scalar(value, offset());
    return true;
  }
  bool open(json_kind kind) {
    if (++depth_ > source_.deepest)
      refuse(inside(), "arrays and objects nested more than " + std::to_string(source_.deepest) + " deep", "");
    handler_.begin(kind, offset());
    return true;
  }
  bool close(json_kind kind) {
    --depth_;
    handler_.end(kind, offset());
    return true;
  }
  std::uint64_t inside() const { return static_cast<std::uint64_t>(seen_ - source_.text.data()); }
  std::uint64_t offset() const { return source_.offset + inside(); }

  void refuse_what_the_lexer_skips() const {
    if (source_.text.substr(0, 3) == "\xEF\xBB\xBF")
      refuse(0, "a byte order mark", "JSON text begins without one: save it as plain UTF-8");
    const auto nul = source_.text.find('\0');
    if (nul != std::string_view::npos)
      refuse(nul, "a NUL byte",
             "a header is padded with spaces; NUL padding comes from a broken writer, or the file is cut or zeroed");
  }
  [[noreturn]] void refuse(std::uint64_t at, std::string found, std::string hint) const {
    detail::raise(format_error({.path = std::string(source_.path),
                                .offset = source_.offset + at,
                                .expected = "strict JSON",
                                .found = std::move(found),
                                .hint = std::move(hint)}));
  }

  const json_source& source_;
  Handler& handler_;
  const char* seen_;
  int depth_ = 0;
};

/// Reads one JSON value and nothing after it. Throws format_error.
template <class Handler>
void parse_json(const json_source& source, Handler& handler) {
  json_events<Handler>(source, handler).run();
}

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
