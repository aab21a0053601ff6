// SPDX-License-Identifier: Apache-2.0
//
// lora::safetensors::write(path, tensors, metadata)   one safetensors file, complete and durable or
//                                                     not at all
// lora::safetensors::to_bytes(tensors, metadata)      the same bytes in memory
//
//   const auto A = lora::safetensors::tensor_of<float>("m.lora_A.weight", {8, 64}, a_values);
//   lora::safetensors::write("adapter_model.safetensors", std::vector{A, B}, {{"format", "pt"}});
//
//   bytes    a function of the arguments alone: tensors in the reference writer's order (wider
//            dtypes first, then by name), metadata sorted by key, the header padded with spaces so
//            that the data begins at a multiple of 8 and every tensor at a multiple of its
//            element's size. For one metadata pair the bytes are those of the reference.
//   writes   a temporary file in the same folder, flushed, then renamed over `path`: whatever
//            fails, `path` is the old file or the complete new one (see durability). The file may
//            be one that is being read: its bytes stay as they are.
//   throws   value_error (a name twice, bytes that do not fit the shape, text that is not UTF-8,
//            more than the reader's default limits take) before anything is written; format_error
//            with the system's reason.
// Format and order: huggingface/safetensors.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora/io/detail/json_text.hpp"
#include "lora/io/detail/output_file.hpp"
#include "lora/io/safetensors.hpp"

namespace lora::inline LORA_DETAIL_ABI::safetensors {

/// A tensor to write: its name and shape, and where its bytes lie (little-endian, row-major,
/// packed) until they are written.
struct tensor {
  std::string name;
  safetensors::dtype dtype;
  std::vector<std::uint64_t> shape;
  std::span<const std::byte> bytes;
};

/// Values in memory as a tensor; looks at them.
template <class T>
tensor tensor_of(std::string name, std::vector<std::uint64_t> shape,
                 std::span<const std::type_identity_t<T>> values) {
  return {std::move(name), dtype_of<T>(), std::move(shape), std::as_bytes(values)};
}

/// A tensor of a file that was read, to be written again.
inline tensor tensor_of(const entry& t) {
  return {std::string(t.name), t.dtype, {t.shape.begin(), t.shape.end()}, t.bytes};
}

using metadata_map = std::map<std::string, std::string, std::less<>>;

struct write_options {
  safetensors::durability durability = safetensors::durability::power;
};

namespace write_detail {

/// Throws value_error for text that a reader would refuse.
inline void check_text(std::string_view text, const char* what) {
  if (!io_detail::is_utf8(text))
    lora::detail::raise_value(
        "safetensors::write",
        std::string(what) + " " + io_detail::in_quotes(text) + " is not UTF-8 text");
}

/// Throws value_error for more than a reader takes whose limits are the default ones.
inline void check_limit(std::uint64_t count, std::uint64_t most, const char* what,
                        std::string_view of) {
  if (count > most)
    lora::detail::raise_value("safetensors::write",
                              std::string(what) + " of " + io_detail::in_quotes(of) + ", " +
                                  std::to_string(count) + ", is above the reader's limit of " +
                                  std::to_string(most));
}

inline void check_tensor(const tensor& t) {
  constexpr limits most;
  check_limit(t.name.size(), most.name_bytes, "the length in bytes of the name", t.name);
  check_limit(t.shape.size(), most.dimensions, "the number of dimensions", t.name);
  for (const auto extent : t.shape)
    check_limit(extent, std::numeric_limits<std::int64_t>::max(), "a dimension", t.name);
  check_text(t.name, "the name");
  const auto needed = io_detail::bytes_of(t.shape, t.dtype);
  if (t.name == "__metadata__")
    lora::detail::raise_value("safetensors::write", "a tensor must not be called __metadata__");
  if (!needed || *needed != t.bytes.size())
    lora::detail::raise_value("safetensors::write",
                              io_detail::in_quotes(t.name) + " is " +
                                  std::string(name_of(t.dtype)) + " " +
                                  io_detail::shape_list(t.shape) + ", which takes " +
                                  (needed ? std::to_string(*needed) : "no countable number of") +
                                  " bytes, but has " + std::to_string(t.bytes.size()));
}

/// The reference's order. Throws value_error for a name that is there twice.
inline std::vector<const tensor*> in_order(std::span<const tensor> tensors) {
  std::vector<const tensor*> result;
  for (const auto& t : tensors) result.push_back(&t);
  std::sort(result.begin(), result.end(), [](auto* a, auto* b) { return a->name < b->name; });
  for (std::size_t k = 1; k < result.size(); ++k)
    if (result[k]->name == result[k - 1]->name)
      lora::detail::raise_value("safetensors::write",
                                "two tensors are called " + io_detail::in_quotes(result[k]->name));
  std::stable_sort(result.begin(), result.end(),
                   [](auto* a, auto* b) { return a->dtype > b->dtype; });
  return result;
}

inline std::string header_of(const std::vector<const tensor*>& tensors,
                             const metadata_map& metadata) {
  check_limit(metadata.size(), limits{}.metadata, "the number of pairs", "__metadata__");
  std::string json = "{";
  const auto comma = [&] {
    if (json.size() > 1) json += ',';
  };
  if (!metadata.empty()) {
    json += "\"__metadata__\":{";
    bool first = true;
    for (const auto& [key, value] : metadata) {
      check_text(key, "the metadata key");
      check_text(value, "the metadata value");
      // Piece by piece: gcc 12 warns of text + std::string at -O3 (its bug 105651).
      if (!first) json += ',';
      json += io_detail::json_string(key) + ":" + io_detail::json_string(value);
      first = false;
    }
    json += '}';
  }
  std::uint64_t at = 0;
  for (const auto* t : tensors) {
    comma();
    json += io_detail::json_string(t->name) + ":{\"dtype\":\"" + std::string(name_of(t->dtype)) +
            "\",\"shape\":[";
    for (std::size_t k = 0; k < t->shape.size(); ++k) {
      if (k != 0) json += ',';
      json += std::to_string(t->shape[k]);
    }
    json += "],\"data_offsets\":[" + std::to_string(at) + ",";
    at += t->bytes.size();
    json += std::to_string(at) + "]}";
  }
  json += '}';
  json.append((8 - json.size() % 8) % 8, ' ');
  if (const auto most = limits{}.header_bytes; json.size() > most)
    lora::detail::raise_value("safetensors::write", "the header would take " +
                                                        std::to_string(json.size()) +
                                                        " bytes, more than the " +
                                                        std::to_string(most) + " of the format");
  return json;
}

/// put(bytes) for every piece of the file, in order.
template <class Put>
void emit(const std::vector<const tensor*>& tensors, const std::string& header, const Put& put) {
  std::array<std::byte, 8> length{};
  for (std::size_t k = 0; k < 8; ++k)
    length[k] = static_cast<std::byte>(header.size() >> (8 * k) & 0xff);
  put(std::span<const std::byte>(length));
  put(std::as_bytes(std::span(header.data(), header.size())));
  for (const auto* t : tensors) put(t->bytes);
}

inline std::uint64_t size_of(const std::vector<const tensor*>& tensors, const std::string& header) {
  std::uint64_t total = 8 + header.size();
  for (const auto* t : tensors) total += t->bytes.size();
  return total;
}

}  // namespace write_detail

/// The bytes of a file with these tensors.
inline std::vector<std::byte> to_bytes(std::span<const tensor> tensors,
                                       const metadata_map& metadata = {}) {
  for (const auto& t : tensors) write_detail::check_tensor(t);
  const auto ordered = write_detail::in_order(tensors);
  const auto header = write_detail::header_of(ordered, metadata);
  std::vector<std::byte> result(static_cast<std::size_t>(write_detail::size_of(ordered, header)));
  std::byte* at = result.data();
  write_detail::emit(ordered, header, [&](std::span<const std::byte> piece) {
    if (!piece.empty()) std::memcpy(at, piece.data(), piece.size());
    at += piece.size();
  });
  return result;
}

/// Writes a file with these tensors; see the top of this file.
inline void write(const std::filesystem::path& path, std::span<const tensor> tensors,
                  const metadata_map& metadata = {}, const write_options& options = {}) {
  for (const auto& t : tensors) write_detail::check_tensor(t);
  const auto ordered = write_detail::in_order(tensors);
  const auto header = write_detail::header_of(ordered, metadata);
  io_detail::output_file file(path, write_detail::size_of(ordered, header), options.durability);
  write_detail::emit(ordered, header, [&](std::span<const std::byte> piece) { file.write(piece); });
  file.commit();
}

}  // namespace lora::inline LORA_DETAIL_ABI::safetensors
