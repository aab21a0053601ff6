// SPDX-License-Identifier: Apache-2.0
//
// lora::safetensors::read(path)           one safetensors file, read into memory and checked from end to end
// lora::safetensors::parse(bytes, name)   the same for bytes that are in memory already; they are viewed, not copied
//
//   file = 8 bytes N, little-endian | N bytes of JSON | data
// The JSON maps a tensor's name to {"dtype", "shape", "data_offsets": [begin, end)}, with offsets into the data; data is
// little-endian, row-major and packed. Every rule of the format is checked (docs/formats.md lists them with our policy
// where the reference reader is laxer than its description), before anything is allocated whose size the file chose.
//
//   throws   format_error naming the file, the tensor and the byte; value_error for a tensor that the file does not have;
//            std::bad_alloc.
//   memory   the header while it is read; then the data once, at a multiple of 64 bytes, and about 100 bytes per tensor.
//   cost     one pass over the header (about 0.2 GB/s) and one over the data.
//   limits   limits{...} as third argument; files that break the format in a known way are read with tolerances{...} as the
//            fourth, and file::tolerated() lists what was let pass.
// Format: huggingface/safetensors.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/io/detail/input_file.hpp"
#include "lora/io/detail/safetensors_header.hpp"
#include "lora/io/dtype.hpp"
#include "lora/io/format_error.hpp"
#include "lora/tensor_view.hpp"

namespace lora::inline LORA_DETAIL_ABI::safetensors {

static_assert(std::endian::native == std::endian::little,
              "lora::safetensors: the format is little-endian and this reader does not swap bytes");

/// The extents of a tensor; empty for a single number.
class extents : public std::span<const std::uint64_t> {
 public:
  using std::span<const std::uint64_t>::span;
  extents(std::span<const std::uint64_t> values)  // NOLINT(google-explicit-constructor): it is that span, comparable
      : std::span<const std::uint64_t>(values) {}
  friend bool operator==(const extents& a, const extents& b) { return std::equal(a.begin(), a.end(), b.begin(), b.end()); }
  friend bool operator==(const extents& a, std::span<const std::uint64_t> b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  }
  friend bool operator==(const extents& a, const std::vector<std::uint64_t>& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  }
};

/// One tensor of a file. Name, shape and bytes live as long as the file and its copies.
struct entry {
  std::string_view name;
  safetensors::dtype dtype;
  extents shape;
  std::span<const std::byte> bytes;
  std::uint64_t offset;  ///< of the first byte, in the file

  /// "F32 [4, 2]", for messages.
  std::string text() const { return std::string(name_of(dtype)) + " " + io_detail::shape_list(shape); }
};

/// The tensors of one file, in the order of their data. Immutable; a copy shares the bytes. From read() it owns them; from
/// parse() it looks at the caller's, which must outlive it and every copy.
class file {
 public:
  /// How it is called in messages.
  const std::string& name() const { return name_; }
  /// The file's own text pairs; empty when it has none.
  const std::map<std::string, std::string, std::less<>>& metadata() const { return metadata_; }
  /// What a tolerance let pass, in words; empty for a well-formed file.
  const std::vector<std::string>& tolerated() const { return tolerated_; }

  std::size_t size() const { return tensors_.size(); }
  auto begin() const { return tensors_.begin(); }
  auto end() const { return tensors_.end(); }
  /// All names in byte order.
  std::vector<std::string_view> names() const;

  bool contains(std::string_view name) const { return find(name) != nullptr; }
  /// Null when there is no such tensor.
  const entry* find(std::string_view name) const;
  /// Throws value_error naming what is near.
  const entry& at(std::string_view name) const;

  /// The tensor where it lies, without a copy. Throws format_error when its dtype is not T, its rank not Rank, or its
  /// address not a multiple of alignof(T): then copy<T> reads it. Files written by the reference, and every file read
  /// with read() whose tensors lie at multiples of their element size from each other, are aligned.
  template <scalar T, std::size_t Rank>
  tensor_view<const T, Rank> tensor(std::string_view name) const;

  /// Its elements in their order, from any address. Floating-point types widen where every value stays the same (F16 and
  /// BF16 to float and double, F32 to double); integers of 8 to 64 bits must be T. Throws format_error otherwise.
  template <class T>
  std::vector<T> copy(std::string_view name) const;

  /// Whether tensor<T, Rank> finds the bytes where a T may lie.
  template <class T>
  static bool aligned_for(const entry& t) {
    return reinterpret_cast<std::uintptr_t>(t.bytes.data()) % alignof(T) == 0;
  }

 private:
  friend file parse(std::span<const std::byte>, std::string, const limits&, const tolerances&);
  friend file read(const std::filesystem::path&, const limits&, const tolerances&);

  file(std::string name, io_detail::header&& header, std::span<const std::byte> data,
       std::shared_ptr<const std::byte> owner);
  /// What the entries look at; shared, so that they stay valid when a file is copied or moved.
  struct texts {
    std::string names;
    std::vector<std::uint64_t> shapes;
  };
  [[noreturn]] void refuse(const entry& t, std::string_view expected, std::string_view found, std::string_view hint) const {
    io_detail::refuse({.path = name_, .item = t.name, .offset = t.offset}, expected, found, hint);
  }

  std::string name_;
  std::map<std::string, std::string, std::less<>> metadata_;
  std::vector<std::string> tolerated_;
  std::vector<entry> tensors_;  // in the order of their data
  std::vector<std::uint32_t> by_name_;
  std::shared_ptr<const texts> texts_;
  std::shared_ptr<const std::byte> owner_;
};

/// Views bytes in memory as a file called `name` in messages.
inline file parse(std::span<const std::byte> bytes, std::string name, const limits& limit = {},
                  const tolerances& tolerate = {}) {
  io_detail::header header = io_detail::check_length(bytes, bytes.size(), name, limit);
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  const auto length = static_cast<std::size_t>(header.json_bytes);
  io_detail::read_header(header, text.substr(8, length), text.substr(8 + length).substr(0, 8), limit, tolerate);
  const auto data = bytes.subspan(static_cast<std::size_t>(header.data_offset()));
  return file(std::move(name), std::move(header), data, nullptr);
}

/// Reads a whole file.
inline file read(const std::filesystem::path& path, const limits& limit = {}, const tolerances& tolerate = {}) {
  io_detail::input_file input(path);
  std::array<std::byte, 8> first{};
  input.read(first.data(), std::min<std::uint64_t>(input.size(), first.size()));
  io_detail::header header = io_detail::check_length(first, input.size(), input.path(), limit);
  std::string text(static_cast<std::size_t>(header.json_bytes), '\0');
  input.read(text.data(), text.size());
  // The first bytes of the data show whether a header was padded without being counted.
  std::array<char, 8> next{};
  const auto seen = static_cast<std::size_t>(std::min<std::uint64_t>(header.data_bytes, next.size()));
  input.read(next.data(), seen);
  io_detail::read_header(header, text, {next.data(), seen}, limit, tolerate);
  std::string().swap(text);
  const auto count = static_cast<std::size_t>(header.data_bytes);
  const std::size_t shift = io_detail::aligning_shift(header.tensors);
  const auto buffer = io_detail::aligned_bytes(count + shift);
  const auto skipped = std::min(static_cast<std::size_t>(header.padding), seen);
  const auto kept = std::min(seen - skipped, count);
  if (kept != 0) std::memcpy(buffer.get() + shift, next.data() + skipped, kept);
  input.read(buffer.get() + shift + kept, count - kept);
  return file(input.path(), std::move(header), {buffer.get() + shift, count}, buffer);
}

inline file::file(std::string name, io_detail::header&& header, std::span<const std::byte> data,
                  std::shared_ptr<const std::byte> owner)
    : name_(std::move(name)),
      metadata_(std::move(header.metadata)),
      tolerated_(std::move(header.tolerated)),
      by_name_(std::move(header.by_name)),
      owner_(std::move(owner)) {
  const std::uint64_t data_offset = header.data_offset();
  const auto shared = std::make_shared<texts>(texts{std::move(header.names), std::move(header.shapes)});
  tensors_.reserve(header.tensors.size());
  for (const auto& each : header.tensors)
    tensors_.push_back({std::string_view(shared->names).substr(each.name_at, each.name_size), each.type,
                        std::span<const std::uint64_t>(shared->shapes).subspan(each.shape_at, each.dimensions),
                        data.subspan(static_cast<std::size_t>(each.begin), static_cast<std::size_t>(each.end - each.begin)),
                        data_offset + each.begin});
  texts_ = shared;
}

inline std::vector<std::string_view> file::names() const {
  std::vector<std::string_view> result;
  result.reserve(by_name_.size());
  for (const auto k : by_name_) result.emplace_back(tensors_[k].name);
  return result;
}

inline const entry* file::find(std::string_view name) const {
  const auto found = std::lower_bound(by_name_.begin(), by_name_.end(), name,
                                      [&](std::uint32_t k, std::string_view wanted) { return tensors_[k].name < wanted; });
  return found != by_name_.end() && tensors_[*found].name == name ? &tensors_[*found] : nullptr;
}

inline const entry& file::at(std::string_view name) const {
  if (const auto* found = find(name)) return *found;
  const auto near = io_detail::near_names(name, tensors_, [](const auto& t) -> std::string_view { return t.name; });
  lora::detail::raise_value("safetensors::file::at",
                            io_detail::printable(name_) + " has no tensor " + io_detail::in_quotes(name) +
                                (near.empty() ? "; it is empty" : "; near: " + io_detail::listed(near)));
}

template <scalar T, std::size_t Rank>
tensor_view<const T, Rank> file::tensor(std::string_view name) const {
  const entry& t = at(name);
  if (t.dtype != dtype_of<T>())
    refuse(t, std::string(name_of(dtype_of<T>())), t.text(), "copy<T>() widens where that is exact");
  if (t.shape.size() != Rank) refuse(t, io_detail::sentence({std::to_string(Rank), " dimensions"}), t.text(), "");
  if (!aligned_for<T>(t))
    refuse(t, io_detail::sentence({"an address that is a multiple of ", std::to_string(alignof(T))}), "an unaligned one",
           "use copy<T>(), which reads from any address");
  std::array<index_t, Rank> shape{};
  std::transform(t.shape.begin(), t.shape.end(), shape.begin(), [](std::uint64_t d) { return static_cast<index_t>(d); });
  return {std::span<const T>(reinterpret_cast<const T*>(t.bytes.data()), t.bytes.size() / sizeof(T)), shape};
}

namespace file_detail {

/// One element at any address.
template <class T>
T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

/// The elements, which are Stored in the file, as Ts.
template <class Stored, class T>
void widen_all(std::span<const std::byte> bytes, std::vector<T>& result) {
  if constexpr (lora::detail::holds_exactly<T, Stored>) {
    result.reserve(bytes.size() / sizeof(Stored));
    for (std::size_t at = 0; at + sizeof(Stored) <= bytes.size(); at += sizeof(Stored)) {
      const auto stored = load<Stored>(bytes.data() + at);
      if constexpr (std::is_same_v<lora::detail::storage_t<T>, Stored>)
        result.push_back(std::bit_cast<T>(stored));
      else
        result.push_back(lora::detail::widen<T>(stored));
    }
  }
}

}  // namespace file_detail

/// The elements at any address as Ts, widened exactly; false, and nothing, for a type whose values T does not hold.
template <scalar T>
bool widen_to(dtype type, std::span<const std::byte> bytes, std::vector<T>& result) {
  if (!holds_exactly<T>(type)) return false;
  if (type == dtype::f32) file_detail::widen_all<float>(bytes, result);
  if (type == dtype::f64) file_detail::widen_all<double>(bytes, result);
  if (type == dtype::f16) file_detail::widen_all<float16>(bytes, result);
  if (type == dtype::bf16) file_detail::widen_all<bfloat16>(bytes, result);
  return true;
}

template <class T>
std::vector<T> file::copy(std::string_view name) const {
  const entry& t = at(name);
  std::vector<T> result;
  if constexpr (scalar<T>) {
    if (!widen_to(t.dtype, t.bytes, result))
      refuse(t, io_detail::sentence({name_of(dtype_of<T>()), " or a type whose every value it holds"}), t.text(),
             t.dtype == dtype::f64 || t.dtype == dtype::f32 ? "copy into a wider type, then round it yourself" : "");
  } else {
    if (t.dtype != dtype_of<T>()) refuse(t, std::string(name_of(dtype_of<T>())), t.text(), "");
    result.resize(t.bytes.size() / sizeof(T));
    if (!result.empty()) std::memcpy(result.data(), t.bytes.data(), t.bytes.size());
  }
  return result;
}

}  // namespace lora::inline LORA_DETAIL_ABI::safetensors
