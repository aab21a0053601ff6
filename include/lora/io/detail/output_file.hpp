// SPDX-License-Identifier: Apache-2.0
//
// Writing a file so that its name means the whole new content or the old one, never a part: a
// temporary file beside it is written, flushed to the device, closed, and renamed over it; then the
// folder is flushed, which makes the name durable. A failure at any step removes the temporary file
// and leaves the old one. A failed flush is never tried again: the system may have dropped the
// pages and would report success. Files that belong together are all finished before the first is
// published: what usually fails (no room, a broken device) then fails while nothing is visible.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <random>
#include <span>
#include <string>
#include <system_error>
#include <utility>

#include "lora/io/detail/posix.hpp"
#include "lora/io/format_error.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace safetensors {

/// What a finished write survives.
enum class durability {
  process,  ///< an end of this process; the system writes the bytes when it likes
  power,    ///< a loss of power: file and folder are flushed to the device (POSIX systems)
};

}  // namespace safetensors

namespace io_detail {

/// The temporary file that becomes `path`. Throws format_error with the system's reason.
class output_file {
 public:
  /// size: bytes that will be written; where the file system can, their space is taken at once, so
  /// that a full disk is found before the work.
  output_file(const std::filesystem::path& path, std::uint64_t size,
              safetensors::durability durable)
      : path_(path), durable_(durable) {
    std::error_code failure;
    if (std::filesystem::is_directory(path, failure)) refuse("a file to write", "a directory", 0);
    if (std::filesystem::exists(path, failure) && !std::filesystem::is_regular_file(path, failure))
      refuse("a file to write", "a pipe, a socket or a device", 0);
    static thread_local std::mt19937_64 random{std::random_device{}()};
    partial_ = path;
    partial_ += ".lorapart-" + std::to_string(random());
    open(size);
  }
  output_file(const output_file&) = delete;
  output_file& operator=(const output_file&) = delete;
  ~output_file() { abandon(); }

  void write(std::span<const std::byte> bytes);
  /// Flushes and closes the temporary file. Nothing is visible yet.
  void finish();
  /// Gives the finished file its name; if_not ends the message of a failure. flush_folder then
  /// makes the name durable.
  void publish(const char* if_not = unchanged);
  /// All of it, for a file that stands alone.
  void commit();

 private:
  void open(std::uint64_t size);
  void abandon() noexcept;
  [[noreturn]] void refuse(std::string_view expected, std::string_view found, int code,
                           std::string_view hint = unchanged) const {
    io_detail::refuse({.path = path_.string()}, expected,
                      code == 0 ? std::move(found) : std::generic_category().message(code), hint);
  }
  static constexpr const char* unchanged = "the file was not changed";

  std::filesystem::path path_, partial_;
  safetensors::durability durable_;
  bool published_ = false;
#if LORA_IO_DETAIL_POSIX
  int descriptor_ = -1;
#else
  std::ofstream stream_;
#endif
};

/// Makes the names of files that were published in the folder of `path` survive a loss of power.
/// Throws format_error.
inline void flush_folder(const std::filesystem::path& path, safetensors::durability durable);

inline void output_file::commit() {
  finish();
  publish();
  flush_folder(path_, durable_);
}

#if LORA_IO_DETAIL_POSIX

inline void output_file::open(std::uint64_t size) {
  // A new file gets the mode that the umask leaves; a file that is replaced keeps its own.
  struct ::stat old {};
  const bool replaces = ::stat(path_.c_str(), &old) == 0;
  descriptor_ = ::open(partial_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (descriptor_ < 0) refuse("a folder that can be written", "", errno);
  if (replaces) ::fchmod(descriptor_, old.st_mode & 07777u);
#if defined(__linux__)
  if (const int code = size == 0 ? 0 : ::posix_fallocate(descriptor_, 0, static_cast<off_t>(size));
      code == ENOSPC || code == EFBIG) {
    abandon();
    refuse(sentence({"room for ", std::to_string(size), " bytes"}), "", code);
  }
#else
  static_cast<void>(size);
#endif
}

inline void output_file::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const auto written = ::write(descriptor_, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0)
      refuse(sentence({"to write ", std::to_string(bytes.size()), " bytes"}), "",
             written == 0 ? ENOSPC : errno);
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
}

inline void output_file::finish() {
  if (durable_ == safetensors::durability::power && ::fsync(descriptor_) != 0)
    refuse("to flush the file to its device", "", errno);
  if (::close(std::exchange(descriptor_, -1)) != 0) refuse("to close the file", "", errno);
}

inline void output_file::publish(const char* if_not) {
  if (::rename(partial_.c_str(), path_.c_str()) != 0)
    refuse("to give the file its name", "", errno, if_not);
  published_ = true;
}

inline void flush_folder(const std::filesystem::path& path, safetensors::durability durable) {
  if (durable != safetensors::durability::power) return;
  const auto folder = path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
  const int descriptor = ::open(folder.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0)
    return;  // a folder that may be written but not read: nothing more can be done
  const int result = ::fsync(descriptor);
  const int code = errno;
  ::close(descriptor);
  // Some file systems cannot flush a folder and say EINVAL; the rename is then as durable as they
  // make it.
  if (result != 0 && code != EINVAL)
    io_detail::refuse({.path = path.string()}, "to flush the folder to its device",
                      std::generic_category().message(code),
                      "what was written is complete, but may vanish with a loss of power");
}

inline void output_file::abandon() noexcept {
  if (descriptor_ >= 0) ::close(std::exchange(descriptor_, -1));
  if (!published_) ::unlink(partial_.c_str());
}

#else

inline void output_file::open(std::uint64_t) {
  stream_.open(partial_, std::ios::binary | std::ios::trunc);
  if (!stream_) refuse("a folder that can be written", "it cannot", 0);
}

inline void output_file::write(std::span<const std::byte> bytes) {
  stream_.write(reinterpret_cast<const char*>(bytes.data()),
                static_cast<std::streamsize>(bytes.size()));
  if (!stream_)
    refuse(sentence({"to write ", std::to_string(bytes.size()), " bytes"}), "a failure", 0);
}

inline void output_file::finish() {
  stream_.close();
  if (!stream_) refuse("to close the file", "a failure", 0);
}

inline void output_file::publish(const char* if_not) {
  std::error_code failure;
  std::filesystem::rename(partial_, path_, failure);
  if (failure) refuse("to give the file its name", failure.message(), 0, if_not);
  published_ = true;
}

inline void flush_folder(const std::filesystem::path&, safetensors::durability) {}

inline void output_file::abandon() noexcept {
  if (published_) return;
  stream_.close();
  std::error_code failure;
  std::filesystem::remove(partial_, failure);
}

#endif

}  // namespace io_detail
}  // namespace lora::inline LORA_DETAIL_ABI
