// SPDX-License-Identifier: Apache-2.0
//
// format_error: a file is not what it should be. One exception for every kind of file, with the
// parts of its message as fields, so that a program can act on them and a person can read them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "lora/error.hpp"
#include "lora/io/detail/text.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// A file that cannot be read, breaks its format, or asks for something that the library does not
/// do. what() reads
///   <path>: <item>, byte <offset>: expected <expected>, found <found>; <hint>
/// where a part that does not apply is left out. Names that come from the file are quoted there,
/// with unprintable bytes as \xNN and shortened when long; the fields hold them as they are.
/// Copying does not throw.
class format_error : public error {
 public:
  struct parts {
    std::string path;       ///< the file, or the name given for bytes in memory
    std::string item = {};  ///< the tensor or the config key; empty for the file as a whole
    std::optional<std::uint64_t> offset = {};  ///< where in the file, in bytes from its beginning
    std::string expected = {};
    std::string found = {};
    std::string hint = {};  ///< what to do, or what probably happened; may be empty
  };

  explicit format_error(parts p)
      : error(text(p)), parts_(std::make_shared<const parts>(std::move(p))) {}

  const std::string& path() const { return parts_->path; }
  const std::string& item() const { return parts_->item; }
  std::optional<std::uint64_t> offset() const { return parts_->offset; }
  const std::string& expected() const { return parts_->expected; }
  const std::string& found() const { return parts_->found; }
  const std::string& hint() const { return parts_->hint; }

 private:
  static std::string text(const parts& p) {
    std::string where = "lora: " + io_detail::printable(p.path);
    if (!p.item.empty()) where += ": " + io_detail::in_quotes(p.item);
    if (p.offset)
      where += std::string(p.item.empty() ? ": " : ", ") + "byte " + std::to_string(*p.offset);
    std::string what = p.expected.empty() ? p.found : "expected " + p.expected;
    if (!p.expected.empty() && !p.found.empty()) what += ", found " + p.found;
    return where + ": " + what + (p.hint.empty() ? "" : "; " + p.hint);
  }

  std::shared_ptr<const parts> parts_;
};

namespace io_detail {

/// Where a fault is: a file, an item of it, a byte. Looks at its texts.
struct place {
  std::string_view path;
  std::string_view item = {};
  std::optional<std::uint64_t> offset = {};
};

/// Throws format_error. The texts are views, so that a call site builds no string from a literal.
[[noreturn, gnu::cold, gnu::noinline]] inline void refuse(const place& at,
                                                          std::string_view expected,
                                                          std::string_view found,
                                                          std::string_view hint = {}) {
  detail::raise(format_error({.path = std::string(at.path),
                              .item = std::string(at.item),
                              .offset = at.offset,
                              .expected = std::string(expected),
                              .found = std::string(found),
                              .hint = std::string(hint)}));
}

}  // namespace io_detail
}  // namespace lora::inline LORA_DETAIL_ABI
