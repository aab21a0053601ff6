// SPDX-License-Identifier: Apache-2.0
//
// lora::safetensors::read(path)           one safetensors file, read into memory and checked from
//                                         end to end
// lora::safetensors::parse(bytes, name)   the same for bytes that are in memory already; they are
//                                         viewed, not copied
//
//   file = 8 bytes N, little-endian | N bytes of JSON | data
// The JSON maps a tensor's name to {"dtype", "shape", "data_offsets": [begin, end)}, with offsets
// into the data; data is little-endian, row-major and packed. Every rule of the format is checked
// (docs/formats.md lists them with our policy where the reference reader is laxer than its
// description), before anything is allocated whose size the file chose.
//
//   throws   format_error naming the file, the tensor and the byte; value_error for a tensor that
//            the file does not have; std::bad_alloc.
//   memory   the header while it is read; then the data once, at a multiple of 64 bytes, and about
//            100 bytes per tensor.
//   cost     one pass over the header (about 0.2 GB/s) and one over the data.
//   limits   limits{...} as third argument; files that break the format in a known way are read
//            with tolerances{...} as the fourth, and file::tolerated() lists what was let pass.
// Format: huggingface/safetensors.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "lora/io/detail/input_file.hpp"
#include "lora/io/detail/safetensors_header.hpp"
#include "lora/io/dtype.hpp"
#include "lora/io/format_error.hpp"
#include "lora/io/safetensors_index.hpp"
#include "lora/tensor_view.hpp"

namespace lora::inline LORA_DETAIL_ABI::safetensors {

/// One tensor of a file in memory. Name, shape and bytes live as long as the file and its copies.
struct entry : tensor_info {
  std::span<const std::byte> bytes;
};

/// The tensors of one file, in the order of their data. Immutable; a copy shares the bytes. From
/// read() it owns them; from parse() it looks at the caller's, which must outlive all copies.
/// It has every function of index (lora/io/safetensors_index.hpp), and converts to one.
class file : public io_detail::tensor_table<entry> {
 public:
  /// The tensor where it lies, without a copy. Throws format_error when its dtype is not T, its
  /// rank not Rank, or its address not a multiple of alignof(T): then copy<T> reads it. Files
  /// written by the reference, and every file read with read() whose tensors lie at multiples of
  /// their element size from each other, are aligned.
  template <scalar T, std::size_t Rank>
  tensor_view<const T, Rank> tensor(std::string_view name) const;

  /// Whether tensor<T, Rank> finds the bytes where a T may lie.
  template <class T>
  static bool aligned_for(const entry& t) {
    return reinterpret_cast<std::uintptr_t>(t.bytes.data()) % alignof(T) == 0;
  }

 private:
  friend file parse(std::span<const std::byte>, std::string, const limits&, const tolerances&);
  friend file read(const std::filesystem::path&, const limits&, const tolerances&);

  file(std::string name, io_detail::header&& header, std::span<const std::byte> data,
       std::shared_ptr<const std::byte> owner)
      : file(std::move(name), std::move(header), data, std::move(owner), header.data_offset()) {}
  file(std::string name, io_detail::header&& header, std::span<const std::byte> data,
       std::shared_ptr<const std::byte> owner, std::uint64_t data_offset)
      : tensor_table(std::move(name), std::move(header),
                     {.memory = data, .memory_offset = data_offset, .owner = std::move(owner)},
                     [&](const tensor_info& t) {
                       return entry{t,
                                    data.subspan(static_cast<std::size_t>(t.offset - data_offset),
                                                 static_cast<std::size_t>(t.size))};
                     }) {}
};

/// Views bytes in memory as a file called `name` in messages.
inline file parse(std::span<const std::byte> bytes, std::string name, const limits& limit = {},
                  const tolerances& tolerate = {}) {
  io_detail::header header = io_detail::check_length(bytes, bytes.size(), name, limit);
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  const auto length = static_cast<std::size_t>(header.json_bytes);
  io_detail::read_header(header, text.substr(8, length), text.substr(8 + length).substr(0, 8),
                         limit, tolerate);
  const auto data = bytes.subspan(static_cast<std::size_t>(header.data_offset()));
  return file(std::move(name), std::move(header), data, nullptr);
}

/// Reads a whole file.
inline file read(const std::filesystem::path& path, const limits& limit = {},
                 const tolerances& tolerate = {}) {
  const io_detail::input_file input(path);
  io_detail::header header = io_detail::header_of(input, limit, tolerate);
  const auto count = static_cast<std::size_t>(header.data_bytes);
  const std::size_t shift = io_detail::aligning_shift(header.tensors);
  const auto buffer = io_detail::aligned_bytes(count + shift);
  const std::span data(buffer.get() + shift, count);
  input.read(header.data_offset(), data);
  return file(input.path(), std::move(header), data, buffer);
}

template <scalar T, std::size_t Rank>
tensor_view<const T, Rank> file::tensor(std::string_view name) const {
  const entry& t = at(name);
  if (t.dtype != dtype_of<T>())
    refuse(t, std::string(name_of(dtype_of<T>())), t.text(),
           "copy<T>() widens where that is exact");
  if (t.shape.size() != Rank)
    refuse(t, io_detail::sentence({std::to_string(Rank), " dimensions"}), t.text(), "");
  if (!aligned_for<T>(t))
    refuse(t,
           io_detail::sentence({"an address that is a multiple of ", std::to_string(alignof(T))}),
           "an unaligned one", "use copy<T>(), which reads from any address");
  std::array<index_t, Rank> shape{};
  std::transform(t.shape.begin(), t.shape.end(), shape.begin(),
                 [](std::uint64_t d) { return static_cast<index_t>(d); });
  return {
      std::span<const T>(reinterpret_cast<const T*>(t.bytes.data()), t.bytes.size() / sizeof(T)),
      shape};
}

}  // namespace lora::inline LORA_DETAIL_ABI::safetensors
