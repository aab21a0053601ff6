// SPDX-License-Identifier: Apache-2.0
//
// Reading a file from disk: its size first, then exactly the bytes that are asked for. A file that is shorter than it was
// a moment ago is an error, never a short buffer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <ios>
#include <memory>
#include <new>
#include <string>
#include <system_error>
#include <utility>

#include "lora/io/format_error.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// A file that is open for reading, read from front to back. Throws format_error.
class input_file {
 public:
  explicit input_file(const std::filesystem::path& path) : path_(path.string()) {
    std::error_code failure;
    if (std::filesystem::is_directory(path, failure)) refuse("a file", "a directory", "");
    // A pipe or a device would block, or never end.
    if (std::filesystem::exists(path, failure) && !std::filesystem::is_regular_file(path, failure))
      refuse("a regular file", "a pipe, a socket or a device", "copy its content to a file");
    stream_.open(path, std::ios::binary | std::ios::ate);
    if (!stream_) refuse("a file that can be read", "none", "check the path and its permissions");
    const auto end = stream_.tellg();
    stream_.seekg(0);
    if (end < 0 || !stream_) refuse("a file whose size is known", "a stream", "copy it to a regular file");
    size_ = static_cast<std::uint64_t>(end);
  }

  const std::string& path() const { return path_; }
  std::uint64_t size() const { return size_; }

  /// The next `count` bytes; the caller has compared count with size().
  void read(void* into, std::uint64_t count) {
    if (count == 0) return;
    stream_.read(static_cast<char*>(into), static_cast<std::streamsize>(count));
    const auto got = static_cast<std::uint64_t>(stream_.gcount());
    if (got != count)
      refuse(sentence({std::to_string(count), " bytes from byte ", std::to_string(read_), " on"}), std::to_string(got),
             "the file became shorter while it was read, or the device failed");
    read_ += count;
  }

 private:
  [[noreturn]] void refuse(std::string_view expected, std::string_view found, std::string_view hint) const {
    io_detail::refuse({.path = path_}, expected, found, hint);
  }

  std::string path_;
  std::ifstream stream_;
  std::uint64_t size_ = 0, read_ = 0;
};

/// A whole text file of at most `limit` bytes. Throws format_error.
inline std::string read_text(const std::filesystem::path& path, std::uint64_t limit) {
  input_file file(path);
  if (file.size() > limit)
    io_detail::refuse({.path = file.path()}, sentence({"at most ", std::to_string(limit), " bytes"}),
                      std::to_string(file.size()));
  std::string text(static_cast<std::size_t>(file.size()), '\0');
  file.read(text.data(), text.size());
  return text;
}

/// Bytes that begin at a multiple of 64, so that a vector register's load never splits a cache line.
inline std::shared_ptr<std::byte> aligned_bytes(std::size_t count) {
  constexpr std::align_val_t alignment{64};
  return {static_cast<std::byte*>(::operator new(count == 0 ? 1 : count, alignment)),
          [](std::byte* bytes) { ::operator delete(bytes, std::align_val_t{64}); }};
}

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
