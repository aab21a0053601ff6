// SPDX-License-Identifier: Apache-2.0
//
// Reading a file from disk: its size first, then exactly the bytes that are asked for. A file that
// is shorter than it was a moment ago is an error, never a short buffer.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <ios>
#include <memory>
#include <mutex>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <system_error>

#include "lora/io/detail/posix.hpp"
#include "lora/io/format_error.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// A file that is open for reading, any range of it at a time. Threads may share one. Throws
/// format_error.
class input_file {
 public:
  explicit input_file(const std::filesystem::path& path) : path_(path.string()) {
    std::error_code failure;
    if (std::filesystem::is_directory(path, failure)) refuse("a file", "a directory", "");
    // A pipe or a device would block, or never end.
    if (std::filesystem::exists(path, failure) && !std::filesystem::is_regular_file(path, failure))
      refuse("a regular file", "a pipe, a socket or a device", "copy its content to a file");
    open(path);
  }
  input_file(const input_file&) = delete;
  input_file& operator=(const input_file&) = delete;
  ~input_file();

  const std::string& path() const { return path_; }
  std::uint64_t size() const { return size_; }

  /// The bytes from `at` on; the caller has compared the range with size().
  void read(std::uint64_t at, std::span<std::byte> into) const {
    std::size_t got = 0;
    while (got < into.size()) {
      const std::size_t more = read_some(at + got, into.subspan(got));
      if (more == 0)
        refuse(
            sentence({std::to_string(into.size()), " bytes from byte ", std::to_string(at), " on"}),
            std::to_string(got), "the file became shorter while it was read, or the device failed");
      got += more;
    }
  }

 private:
  void open(const std::filesystem::path& path);
  /// How many bytes were read: at least one, or 0 at the end of the file or where reading fails.
  std::size_t read_some(std::uint64_t at, std::span<std::byte> into) const;

  [[noreturn]] void refuse(std::string_view expected, std::string_view found,
                           std::string_view hint) const {
    io_detail::refuse({.path = path_}, expected, found, hint);
  }
  [[noreturn]] void refuse_closed() const {
    refuse("a file that can be read", "none", "check the path and its permissions");
  }

  std::string path_;
  std::uint64_t size_ = 0;
#if LORA_IO_DETAIL_POSIX
  int descriptor_ = -1;
#else
  mutable std::mutex mutex_;
  mutable std::ifstream stream_;
#endif
};

#if LORA_IO_DETAIL_POSIX

inline void input_file::open(const std::filesystem::path& path) {
  descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) refuse_closed();
  struct ::stat status {};
  if (::fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(descriptor_);  // no destructor follows a constructor that throws
    refuse("a file whose size is known", "a stream", "copy it to a regular file");
  }
  size_ = static_cast<std::uint64_t>(status.st_size);
}

inline std::size_t input_file::read_some(std::uint64_t at, std::span<std::byte> into) const {
  // Some systems refuse more than 2^31 - 1 bytes in one call.
  const std::size_t count = std::min(into.size(), std::size_t{1} << 30);
  while (true) {
    const auto got = ::pread(descriptor_, into.data(), count, static_cast<off_t>(at));
    if (got < 0 && errno == EINTR) continue;
    return got < 0 ? 0 : static_cast<std::size_t>(got);
  }
}

inline input_file::~input_file() { ::close(descriptor_); }

#else

inline void input_file::open(const std::filesystem::path& path) {
  stream_.open(path, std::ios::binary | std::ios::ate);
  if (!stream_) refuse_closed();
  const auto end = stream_.tellg();
  if (end < 0) refuse("a file whose size is known", "a stream", "copy it to a regular file");
  size_ = static_cast<std::uint64_t>(end);
}

inline std::size_t input_file::read_some(std::uint64_t at, std::span<std::byte> into) const {
  const std::lock_guard lock(mutex_);
  stream_.clear();
  stream_.seekg(static_cast<std::streamoff>(at));
  stream_.read(reinterpret_cast<char*>(into.data()), static_cast<std::streamsize>(into.size()));
  return static_cast<std::size_t>(stream_.gcount());
}

inline input_file::~input_file() = default;

#endif

/// A whole text file of at most `limit` bytes. Throws format_error.
inline std::string read_text(const std::filesystem::path& path, std::uint64_t limit) {
  const input_file file(path);
  if (file.size() > limit)
    io_detail::refuse({.path = file.path()},
                      sentence({"at most ", std::to_string(limit), " bytes"}),
                      std::to_string(file.size()));
  std::string text(static_cast<std::size_t>(file.size()), '\0');
  file.read(0, std::as_writable_bytes(std::span(text)));
  return text;
}

/// Bytes that begin at a multiple of 64, so that no load of a vector register splits a cache line.
inline std::shared_ptr<std::byte> aligned_bytes(std::size_t count) {
  constexpr std::align_val_t alignment{64};
  return {static_cast<std::byte*>(::operator new(count == 0 ? 1 : count, alignment)),
          [](std::byte* bytes) { ::operator delete(bytes, std::align_val_t{64}); }};
}

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
