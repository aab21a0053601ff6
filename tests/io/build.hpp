// SPDX-License-Identifier: Apache-2.0
//
// Files for the tests of the readers, made in memory: a safetensors file from tensors or from a
// header as it is wanted, a directory that disappears with the test, and the check that a refusal
// says what it must.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <initializer_list>
#include <iterator>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lora/io/format_error.hpp"
#include "support/catch.hpp"

namespace build {

using bytes = std::vector<std::byte>;

inline bytes to_bytes(std::string_view text) {
  const auto* first = reinterpret_cast<const std::byte*>(text.data());
  return {first, first + text.size()};
}

inline std::string length_field(std::uint64_t length) {
  std::string result(8, '\0');
  std::memcpy(result.data(), &length, 8);
  return result;
}

/// A header as given, and data.
inline std::string safetensors(const std::string& json, const std::string& data) {
  return length_field(json.size()) + json + data;
}
/// The same with `count` bytes 0, 1, 2, ... as data.
inline std::string safetensors(const std::string& json, std::size_t count) {
  std::string data(count, '\0');
  for (std::size_t k = 0; k < count; ++k) data[k] = static_cast<char>(k & 0x7f);
  return safetensors(json, data);
}

/// Tensors one after the other.
class file {
 public:
  file& add(const std::string& name, const std::string& dtype, std::initializer_list<int> shape,
            std::string_view data) {
    std::string list;
    for (const int extent : shape) list += (list.empty() ? "" : ",") + std::to_string(extent);
    header_ += (header_.empty() ? "" : ",") + ('"' + name + "\":{\"dtype\":\"") + dtype +
               "\",\"shape\":[" + list + "],\"data_offsets\":[" + std::to_string(data_.size()) +
               "," + std::to_string(data_.size() + data.size()) + "]}";
    data_ += data;
    return *this;
  }
  template <class T>
  file& add(const std::string& name, const std::string& dtype, std::initializer_list<int> shape,
            const std::vector<T>& values) {
    return add(
        name, dtype, shape,
        std::string_view(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)));
  }
  /// F32 values 1, 2, 3, ... times a step.
  file& add(const std::string& name, std::initializer_list<int> shape, float step = 1) {
    std::size_t count = 1;
    for (const int extent : shape) count *= static_cast<std::size_t>(extent);
    std::vector<float> values(count);
    for (std::size_t k = 0; k < count; ++k) values[k] = step * static_cast<float>(k + 1);
    return add(name, "F32", shape, values);
  }
  std::string text() const {
    std::string header = "{" + header_ + "}";
    while (header.size() % 8 != 0) header += ' ';
    return safetensors(header, data_);
  }

 private:
  std::string header_, data_;
};

/// A new directory under the system's, removed at the end.
class directory {
 public:
  directory() {
    static int count = 0;
    path_ = std::filesystem::temp_directory_path() /
            ("lora-io-test-" + std::to_string(reinterpret_cast<std::uintptr_t>(this)) + "-" +
             std::to_string(++count));
    std::filesystem::create_directories(path_);
  }
  ~directory() {
    std::error_code failure;
    std::filesystem::remove_all(path_, failure);
  }
  directory(const directory&) = delete;
  directory& operator=(const directory&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path write(const std::string& name, std::string_view text) const {
    std::ofstream(path_ / name, std::ios::binary)
        .write(text.data(), static_cast<std::streamsize>(text.size()));
    return path_ / name;
  }

 private:
  std::filesystem::path path_;
};

inline std::string slurp(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline bool has(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

/// The message with which `act` is refused; fails when it is not refused with a format_error.
inline std::string refusal(const std::function<void()>& act) {
  try {
    act();
  } catch (const lora::format_error& e) {
    CHECK_FALSE(e.path().empty());
    CHECK_FALSE((e.expected().empty() && e.found().empty()));
    return e.what();
  }
  FAIL("accepted");
  return "";
}

/// Refused, with a message that has every part.
inline void refused(const std::function<void()>& act,
                    std::initializer_list<std::string_view> parts) {
  const std::string message = refusal(act);
  for (const auto part : parts) {
    INFO(message << "\n  must say: " << part);
    CHECK(has(message, part));
  }
}

}  // namespace build
