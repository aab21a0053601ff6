// SPDX-License-Identifier: Apache-2.0
//
// Strict JSON (RFC 8259) as a stream of events, in one pass without recursion. A header of a model
// file can be 100 MB, and every number in it decides over memory: so nothing is converted silently
// (negative numbers, fractions and numbers beyond 64 bits stay apart), and strings without escapes
// are views of the text. Refused: a byte order mark, comments, trailing commas, NaN, control
// characters, lone surrogates, broken UTF-8, NUL padding, anything behind the value.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora/io/detail/number_text.hpp"
#include "lora/io/format_error.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

enum class json_kind {
  null,
  boolean,
  unsigned_integer,
  negative_integer,
  real,
  string,
  array,
  object
};

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
  double number = 0;             ///< of every number, rounded to double
  std::string_view string = {};  ///< of a string; of a number, as it is written

  /// As it stands in a message.
  std::string text() const {
    if (kind == json_kind::boolean) return boolean ? "true" : "false";
    if (kind == json_kind::unsigned_integer) return std::to_string(unsigned_integer);
    if (kind == json_kind::string) return in_quotes(string);
    return json_kind_name(kind);
  }
};

/// Where a JSON text lies: names the file in errors, and its offset there.
struct json_source {
  std::string_view text;
  std::string_view path;
  std::uint64_t offset = 0;
  std::size_t deepest = 32;
};

/// Raises the one kind of error that a text which is not JSON gives.
[[noreturn]] inline void refuse_json(const json_source& source, std::size_t at,
                                     std::string_view found, std::string_view hint = {}) {
  io_detail::refuse({.path = source.path, .offset = source.offset + at}, "strict JSON", found,
                    hint);
}

/// Bytes of the well-formed UTF-8 character that begins at `at`; 0 where none does. From the
/// standard's table: no overlong form, no surrogate, nothing above U+10FFFF.
inline std::size_t utf8_length(std::string_view text, std::size_t at) {
  const auto byte = [&](std::size_t k) {
    return at + k < text.size() ? static_cast<unsigned char>(text[at + k]) : 0u;
  };
  const auto follows = [&](std::size_t k, unsigned low = 0x80, unsigned most = 0xbf) {
    return byte(k) >= low && byte(k) <= most;
  };
  const unsigned first = byte(0);
  if (first < 0x80) return at < text.size() ? 1 : 0;
  if (first >= 0xc2 && first <= 0xdf && follows(1)) return 2;
  if (first >= 0xe0 && first <= 0xef &&
      follows(1, first == 0xe0 ? 0xa0 : 0x80, first == 0xed ? 0x9f : 0xbf) && follows(2))
    return 3;
  if (first >= 0xf0 && first <= 0xf4 &&
      follows(1, first == 0xf0 ? 0x90 : 0x80, first == 0xf4 ? 0x8f : 0xbf) && follows(2) &&
      follows(3))
    return 4;
  return 0;
}

/// Whether a text is well-formed UTF-8, so that JSON can hold it.
inline bool is_utf8(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    const auto length = utf8_length(text, at);
    if (length == 0) return false;
    at += length;
  }
  return true;
}

/// Strings of a JSON text: their end, their escapes, their UTF-8.
class json_strings {
 public:
  explicit json_strings(const json_source& source) : source_(source) {}

  /// The string whose opening quote lies at `at`; `at` becomes the place behind the closing one. A
  /// view of the text, or of a buffer that the next call overwrites.
  std::string_view read(std::size_t& at) {
    const std::string_view text = source_.text;
    const std::size_t begin = ++at;
    while (true) {
      at = plain_end(at);
      if (at >= text.size())
        refuse_json(source_, text.size(), "the JSON text ends too early: inside a string");
      if (text[at] == '"') return text.substr(begin, at++ - begin);
      if (text[at] == '\\') return unescaped(begin, at);
      at += multibyte(at);
    }
  }

 private:
  static bool is_plain(unsigned char c) { return c >= 0x20 && c < 0x80 && c != '"' && c != '\\'; }

  /// The first character from `at` on that is not plain. Eight at a time: names of tensors are
  /// nearly all of a header.
  std::size_t plain_end(std::size_t at) const {
    const std::string_view text = source_.text;
    constexpr std::uint64_t ones = 0x0101010101010101u, high = 0x8080808080808080u;
    while (at + 8 <= text.size()) {
      std::uint64_t word;
      std::memcpy(&word, text.data() + at, 8);
      const std::uint64_t quote = word ^ (ones * '"'), slash = word ^ (ones * '\\');
      // A byte of `word` below 0x20, or of the others equal to 0, borrows into its high bit; a byte
      // above 0x7f has it set.
      if ((((word - ones * 0x20) | (quote - ones) | (slash - ones) | word) & high) != 0) break;
      at += 8;
    }
    while (at < text.size() && is_plain(static_cast<unsigned char>(text[at]))) ++at;
    return at;
  }

  /// Bytes of the character at `at`, which is not plain ASCII.
  std::size_t multibyte(std::size_t at) const {
    const auto first = static_cast<unsigned char>(source_.text[at]);
    if (first < 0x20) {
      refuse_json(source_, at,
                  first == 0
                      ? "a NUL byte"
                      : "a control character in a string, which must be written as an escape",
                  first == 0 ? "the file is cut or zeroed" : "");
    }
    if (const auto length = utf8_length(source_.text, at); length != 0) return length;
    refuse_json(source_, at, "an ill-formed UTF-8 byte", "the text is not UTF-8, or is damaged");
  }

  std::string_view unescaped(std::size_t begin, std::size_t& at) {
    buffer_.assign(source_.text.substr(begin, at - begin));
    while (true) {
      const std::size_t from = at;
      at = plain_end(at);
      buffer_.append(source_.text.substr(from, at - from));
      if (at >= source_.text.size())
        refuse_json(source_, source_.text.size(), "the JSON text ends too early: inside a string");
      if (source_.text[at] == '"') {
        ++at;
        return buffer_;
      }
      if (source_.text[at] == '\\') {
        escape(at);
      } else {
        const std::size_t bytes = multibyte(at);
        buffer_.append(source_.text.substr(at, bytes));
        at += bytes;
      }
    }
  }

  void escape(std::size_t& at) {
    constexpr std::string_view names = "\"\\/bfnrt", values = "\"\\/\b\f\n\r\t";
    const std::size_t start = at;
    const char kind = ++at < source_.text.size() ? source_.text[at] : '\0';
    ++at;
    if (const auto known = names.find(kind); known != std::string_view::npos && kind != '\0') {
      buffer_ += values[known];
      return;
    }
    if (kind != 'u') refuse_json(source_, start, "an escape that JSON does not have");
    std::uint32_t code = four_digits(at, start);
    if (code >= 0xdc00 && code < 0xe000) refuse_json(source_, start, "a lone surrogate");
    if (code >= 0xd800 && code < 0xdc00) {
      if (source_.text.substr(at, 2) != "\\u") refuse_json(source_, start, "a lone surrogate");
      at += 2;
      const std::uint32_t low = four_digits(at, start);
      if (low < 0xdc00 || low >= 0xe000) refuse_json(source_, start, "a lone surrogate");
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    append(code);
  }

  std::uint32_t four_digits(std::size_t& at, std::size_t start) const {
    std::uint32_t code = 0;
    const std::string_view digits = source_.text.substr(std::min(at, source_.text.size()), 4);
    const auto end = std::from_chars(digits.data(), digits.data() + digits.size(), code, 16);
    if (digits.size() != 4 || end.ec != std::errc() || end.ptr != digits.data() + 4)
      refuse_json(source_, start, "an escape \\u without four hexadecimal digits");
    at += 4;
    return code;
  }

  void append(std::uint32_t code) {
    const auto put = [&](std::uint32_t byte) {
      buffer_ += static_cast<char>(static_cast<unsigned char>(byte));
    };
    const auto tail = [&](int shift) { put(0x80 | ((code >> shift) & 0x3f)); };
    if (code < 0x80) {
      put(code);
    } else if (code < 0x800) {
      put(0xc0 | code >> 6);
      tail(0);
    } else if (code < 0x10000) {
      put(0xe0 | code >> 12);
      tail(6);
      tail(0);
    } else {
      put(0xf0 | code >> 18);
      tail(12);
      tail(6);
      tail(0);
    }
  }

  const json_source& source_;
  std::string buffer_;
};

/// Calls a Handler with
///   key(std::string_view, offset), scalar(const json_scalar&, offset), begin(json_kind, offset),
///   end(json_kind, offset)
/// where offset is a position in the file just behind the token. Handlers raise format_error.
template <class Handler>
class json_scanner {
 public:
  json_scanner(const json_source& source, Handler& handler)
      : source_(source), handler_(handler), strings_(source) {}

  void run() {
    if (source_.text.substr(0, 3) == "\xEF\xBB\xBF")
      refuse("a byte order mark", "JSON text begins without one: save it as plain UTF-8");
    skip_space();
    if (at_ == source_.text.size())
      refuse("the JSON text ends too early", source_.text.empty() ? "the text is empty" : "");
    value();
    while (!open_.empty()) inside();
    skip_space();
    if (at_ != source_.text.size()) refuse_rest();
  }

 private:
  // ---- structure
  /// One member or element of the innermost container, or its end.
  void inside() {
    const bool object = open_.back() == json_kind::object;
    skip_space();
    if (here() == (object ? '}' : ']')) return close();
    if (!first_) {
      if (here() != ',')
        refuse_token(object ? "a comma or } in an object" : "a comma or ] in an array");
      ++at_;
      skip_space();
    }
    first_ = false;
    if (object) {
      if (here() != '"') refuse_token("a key in quotes");
      const auto name = strings_.read(at_);
      handler_.key(name, offset());
      skip_space();
      if (here() != ':') refuse_token("a colon behind a key");
      ++at_;
      skip_space();
    }
    value();
  }

  void value() {
    switch (here()) {
      case '{': return open(json_kind::object);
      case '[': return open(json_kind::array);
      case '"': {
        const auto text = strings_.read(at_);
        return handler_.scalar({.kind = json_kind::string, .string = text}, offset());
      }
      case 't': return word("true", {.kind = json_kind::boolean, .boolean = true});
      case 'f': return word("false", {.kind = json_kind::boolean});
      case 'n': return word("null", {});
      default: return number();
    }
  }

  void open(json_kind kind) {
    if (open_.size() >= source_.deepest)
      refuse(sentence({"arrays and objects nested more than ", std::to_string(source_.deepest),
                       " deep"}),
             "");
    open_.push_back(kind);
    ++at_;
    first_ = true;
    handler_.begin(kind, offset());
  }
  void close() {
    const auto kind = open_.back();
    open_.pop_back();
    ++at_;
    first_ = false;
    handler_.end(kind, offset());
  }

  // ---- words and numbers
  void word(std::string_view expected, const json_scalar& meaning) {
    if (source_.text.substr(at_, expected.size()) != expected) refuse_token("a value");
    at_ += expected.size();
    handler_.scalar(meaning, offset());
  }

  void number() {
    const std::size_t begin = at_;
    json_scalar result{.kind = json_kind::unsigned_integer};
    if (here() == '-') {
      result.kind = json_kind::negative_integer;
      ++at_;
    }
    if (!is_digit()) {
      at_ = begin;
      refuse_token("a value");
    }
    const bool zero = here() == '0';
    bool fits = true;
    for (std::size_t digits = 0; is_digit(); ++digits, ++at_) {
      if (zero && digits > 0) refuse("a number with a leading zero", "");
      const auto digit = static_cast<unsigned>(here() - '0');
      fits = fits && result.unsigned_integer <= (UINT64_MAX - digit) / 10;
      result.unsigned_integer = fits ? result.unsigned_integer * 10 + digit : 0;
    }
    bool real = false;
    if (here() == '.') {
      real = true;
      ++at_;
      digits_needed();
    }
    if (here() == 'e' || here() == 'E') {
      real = true;
      ++at_;
      if (here() == '+' || here() == '-') ++at_;
      digits_needed();
    }
    const bool small = result.kind == json_kind::negative_integer &&
                       result.unsigned_integer <= std::uint64_t{1} << 63;
    if (real || !fits || (result.kind == json_kind::negative_integer && !small))
      result.kind = json_kind::real;
    result.number = static_cast<double>(result.unsigned_integer);
    if (result.kind != json_kind::unsigned_integer) {
      if (!read_double(source_.text.substr(begin, at_ - begin), result.number))
        refuse("a number beyond the range of double", "");
      result.unsigned_integer = 0;
    }
    result.string = source_.text.substr(begin, at_ - begin);
    handler_.scalar(result, offset());
  }
  bool is_digit() const { return here() >= '0' && here() <= '9'; }
  void digits_needed() {
    if (!is_digit()) refuse_token("a digit");
    while (is_digit()) ++at_;
  }

  // ---- characters
  char here() const { return at_ < source_.text.size() ? source_.text[at_] : '\0'; }
  void skip_space() {
    while (at_ < source_.text.size()) {
      const char c = source_.text[at_];
      if (c != ' ' && c != '\n' && c != '\r' && c != '\t') return;
      ++at_;
    }
  }
  std::uint64_t offset() const { return source_.offset + at_; }

  // ---- errors
  [[noreturn]] void refuse(std::string_view found, std::string_view hint) const {
    refuse_json(source_, at_, found, hint);
  }
  [[noreturn]] void refuse_token(const char* wanted) const {
    if (at_ >= source_.text.size())
      refuse(sentence({"the JSON text ends too early: ", wanted, " should follow"}),
             source_.text.empty() ? "the text is empty" : "");
    if (here() == '\0') refuse_nul();
    refuse(sentence({in_quotes(source_.text.substr(at_, 1)), " where ", wanted, " should be"}), "");
  }
  [[noreturn]] void refuse_rest() const {
    if (here() == '\0') refuse_nul();
    refuse(sentence({in_quotes(source_.text.substr(at_, 1)), " behind the end of the value"}), "");
  }
  [[noreturn]] void refuse_nul() const {
    refuse("a NUL byte",
           "a header is padded with spaces; NUL padding comes from a broken writer, or the file is "
           "cut or zeroed");
  }

  const json_source& source_;
  Handler& handler_;
  json_strings strings_;
  std::size_t at_ = 0;
  std::vector<json_kind> open_;
  bool first_ = false;  // no member of the innermost container was read yet
};

/// Reads one JSON value and nothing after it. Throws format_error.
template <class Handler>
void parse_json(const json_source& source, Handler& handler) {
  json_scanner<Handler>(source, handler).run();
}

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
