// SPDX-License-Identifier: Apache-2.0
//
// lora::safetensors::open(path)   the index of one safetensors file: its header, read and checked;
//                                 values are read from disk when they are asked for
//
//   const auto index = lora::safetensors::open("adapter_model.safetensors");
//   const auto& A = index.at("m.lora_A.weight");
//   std::vector<float> values(A.elements());
//   index.read(A, std::span(values));                    // straight into memory of the caller
//   index.read(A, std::span(values).first(8), 16);       // elements 16 to 23
//
// The rules are those of read(), which has the whole file in memory (lora/io/safetensors.hpp,
// docs/formats.md). The file stays open as long as the index or a copy of it lives.
//
//   throws   format_error naming the file, the tensor and the byte, also where the file became
//            shorter after open(); value_error for a tensor that the file does not have, or
//            elements that a tensor does not have; std::bad_alloc. Values that are changed in the
//            file after open() are read as they are then: nothing notices it.
//   memory   the header while it is read, then about 100 bytes per tensor; read() needs none.
//   cost     open: one pass over the header (about 0.2 GB/s). read: the bytes of the elements.
//   threads  const functions may run at the same time.
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
#include <utility>
#include <vector>

#include "lora/io/detail/input_file.hpp"
#include "lora/io/detail/safetensors_header.hpp"
#include "lora/io/dtype.hpp"
#include "lora/io/format_error.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace safetensors {

static_assert(std::endian::native == std::endian::little,
              "lora::safetensors: the format is little-endian and this reader does not swap bytes");

/// The extents of a tensor; empty for a single number.
class extents : public std::span<const std::uint64_t> {
 public:
  using std::span<const std::uint64_t>::span;
  extents(std::span<const std::uint64_t>
              values)  // NOLINT(google-explicit-constructor): it is that span, comparable
      : std::span<const std::uint64_t>(values) {}
  friend bool operator==(const extents& a, const extents& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  }
  friend bool operator==(const extents& a, std::span<const std::uint64_t> b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  }
  friend bool operator==(const extents& a, const std::vector<std::uint64_t>& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  }
};

/// One tensor of a file, without its values. Name and shape live as long as the index or file that
/// it is of, and their copies.
struct tensor_info {
  std::string_view name;
  safetensors::dtype dtype;
  extents shape;
  std::uint64_t offset;  ///< of the first byte, in the file
  std::uint64_t size;    ///< in bytes

  bool empty() const { return size == 0; }
  std::size_t elements() const {
    const std::uint64_t bits = bits_of(dtype);
    return static_cast<std::size_t>(size / bits * 8 + size % bits * 8 / bits);  // no overflow
  }
  /// "F32 [4, 2]", for messages.
  std::string text() const {
    return std::string(name_of(dtype)) + " " + io_detail::shape_list(shape);
  }
};

}  // namespace safetensors

namespace io_detail {

/// The bytes behind an index: of a file on disk, or in memory.
struct tensor_bytes {
  std::shared_ptr<const input_file> file = {};  ///< null for bytes in memory
  std::span<const std::byte> memory = {};       ///< the data
  std::uint64_t memory_offset = 0;              ///< of the data, in the file
  std::shared_ptr<const std::byte> owner = {};  ///< of `memory`; null where the caller owns it

  void read(std::uint64_t at, std::span<std::byte> into) const {
    if (file != nullptr) return file->read(at, into);
    const auto from = memory.subspan(static_cast<std::size_t>(at - memory_offset), into.size());
    if (!into.empty()) std::memcpy(into.data(), from.data(), into.size());
  }
};

/// Where elements of a stored type lie until they are widened: the last bytes of the room for Ts.
template <class T>
std::span<std::byte> stored_part(safetensors::dtype type, std::span<T> values) {
  return std::as_writable_bytes(values).last(values.size() * (safetensors::bits_of(type) / 8));
}

/// Widens stored_part(type, values) to `values`, from front to back. Exact. The k-th T ends where
/// element k + 1 begins or before, so that no element is overwritten before it is widened.
template <scalar T>
void widen_in_place(safetensors::dtype type, std::span<T> values) {
  const auto widen_from = [&]<class Stored>(Stored stored) {
    if constexpr (lora::detail::holds_exactly<T, Stored>) {
      const std::byte* from = stored_part(type, values).data();
      for (T& value : values) {
        std::memcpy(&stored, from, sizeof(Stored));
        value = lora::detail::exactly<T>(stored);
        from += sizeof(Stored);
      }
    }
  };
  if (type == safetensors::dtype_of<T>()) return;
  if (type == safetensors::dtype::f32) widen_from(float());
  if (type == safetensors::dtype::f16) widen_from(float16());
  if (type == safetensors::dtype::bf16) widen_from(bfloat16());
}

/// The names and shapes of all tensors. Copies of a table share them, so that entries stay valid.
struct header_texts {
  std::string names;
  std::vector<std::uint64_t> shapes;
};

/// What an index and a file have in common: the tensors in the order of their data, found by name,
/// and a reader of their values.
template <class Entry>
class tensor_table {
 public:
  /// How the file is called in messages.
  const std::string& name() const { return name_; }
  /// The file's own text pairs; empty when it has none.
  const std::map<std::string, std::string, std::less<>>& metadata() const { return metadata_; }
  /// What a tolerance let pass, in words; empty for a well-formed file.
  const std::vector<std::string>& tolerated() const { return tolerated_; }

  std::size_t size() const { return tensors_.size(); }
  auto begin() const { return tensors_.begin(); }
  auto end() const { return tensors_.end(); }
  /// All names in byte order.
  std::vector<std::string_view> names() const {
    std::vector<std::string_view> result;
    result.reserve(by_name_.size());
    for (const auto k : by_name_) result.emplace_back(tensors_[k].name);
    return result;
  }

  bool contains(std::string_view name) const { return find(name) != nullptr; }
  /// Null when there is no such tensor.
  const Entry* find(std::string_view name) const {
    const auto found = std::lower_bound(
        by_name_.begin(), by_name_.end(), name,
        [&](std::uint32_t k, std::string_view wanted) { return tensors_[k].name < wanted; });
    return found != by_name_.end() && tensors_[*found].name == name ? &tensors_[*found] : nullptr;
  }
  /// Throws value_error naming what is near.
  const Entry& at(std::string_view name) const {
    if (const auto* found = find(name)) return *found;
    const auto near =
        near_names(name, tensors_, [](const auto& t) -> std::string_view { return t.name; });
    lora::detail::raise_value("safetensors::at",
                              printable(name_) + " has no tensor " + in_quotes(name) +
                                  (near.empty() ? "; it is empty" : "; near: " + listed(near)));
  }

  /// into := the elements from `first` on, widened exactly, without a copy of them elsewhere. T is
  /// the stored type, or one that holds its values (F16 and BF16 in float and double, F32 in
  /// double). Throws format_error for another type, value_error for elements that t does not have.
  template <scalar T>
  void read(const safetensors::tensor_info& t, std::span<T> into, std::size_t first = 0) const {
    check_holds<T>(t);
    if (first > t.elements() || into.size() > t.elements() - first)
      lora::detail::raise_value("safetensors::read",
                                in_quotes(t.name) + " has " + std::to_string(t.elements()) +
                                    " elements, not " + std::to_string(into.size()) + " from " +
                                    std::to_string(first) + " on");
    const std::uint64_t skipped = first * std::uint64_t{safetensors::bits_of(t.dtype) / 8};
    bytes_.read(t.offset + skipped, stored_part(t.dtype, into));
    widen_in_place(t.dtype, into);
  }

  /// All elements in their order. Floating-point types as read(); integers of 8 to 64 bits must be
  /// T. Throws format_error otherwise.
  template <class T>
  std::vector<T> copy(std::string_view name) const {
    const safetensors::tensor_info& t = at(name);
    if constexpr (scalar<T>)
      check_holds<T>(t);
    else if (t.dtype != safetensors::dtype_of<T>())
      refuse(t, std::string(name_of(safetensors::dtype_of<T>())), t.text(), "");
    std::vector<T> result(t.elements());
    if constexpr (scalar<T>)
      read(t, std::span(result));
    else
      bytes_.read(t.offset, std::as_writable_bytes(std::span(result)));
    return result;
  }

  /// The stored bytes of a tensor of any type.
  std::vector<std::byte> copy_bytes(const safetensors::tensor_info& t) const {
    std::vector<std::byte> result(static_cast<std::size_t>(t.size));
    bytes_.read(t.offset, result);
    return result;
  }
  /// Whether two tensors have the same bytes; of dtype and shape it says nothing.
  bool same_bytes(const safetensors::tensor_info& a, const safetensors::tensor_info& b) const {
    if (a.size != b.size) return false;
    std::vector<std::byte> some(static_cast<std::size_t>(std::min<std::uint64_t>(a.size, 1 << 16)));
    std::vector<std::byte> others(some.size());
    for (std::uint64_t at = 0; at < a.size; at += some.size()) {
      const auto count =
          static_cast<std::size_t>(std::min<std::uint64_t>(some.size(), a.size - at));
      bytes_.read(a.offset + at, std::span(some).first(count));
      bytes_.read(b.offset + at, std::span(others).first(count));
      if (std::memcmp(some.data(), others.data(), count) != 0) return false;
    }
    return true;
  }

 protected:
  template <class Other>
  friend class tensor_table;

  /// make(tensor_info) for each tensor of the header.
  template <class Make>
  tensor_table(std::string name, header&& h, tensor_bytes bytes, const Make& make)
      : name_(std::move(name)),
        metadata_(std::move(h.metadata)),
        tolerated_(std::move(h.tolerated)),
        by_name_(std::move(h.by_name)),
        bytes_(std::move(bytes)) {
    const auto shared =
        std::make_shared<header_texts>(header_texts{std::move(h.names), std::move(h.shapes)});
    tensors_.reserve(h.tensors.size());
    for (const auto& each : h.tensors)
      tensors_.push_back(make(safetensors::tensor_info{
          std::string_view(shared->names).substr(each.name_at, each.name_size), each.type,
          std::span<const std::uint64_t>(shared->shapes).subspan(each.shape_at, each.dimensions),
          h.data_offset() + each.begin, each.end - each.begin}));
    texts_ = shared;
  }
  /// The same tensors, without what Other says beyond Entry.
  template <class Other>
  explicit tensor_table(const tensor_table<Other>& other)
      : name_(other.name_),
        metadata_(other.metadata_),
        tolerated_(other.tolerated_),
        tensors_(other.tensors_.begin(), other.tensors_.end()),
        by_name_(other.by_name_),
        texts_(other.texts_),
        bytes_(other.bytes_) {}

  [[noreturn]] void refuse(const safetensors::tensor_info& t, std::string_view expected,
                           std::string_view found, std::string_view hint) const {
    io_detail::refuse({.path = name_, .item = t.name, .offset = t.offset}, expected, found, hint);
  }

 private:
  template <scalar T>
  void check_holds(const safetensors::tensor_info& t) const {
    if (safetensors::holds_exactly<T>(t.dtype)) return;
    const bool wider = t.dtype == safetensors::dtype::f64 || t.dtype == safetensors::dtype::f32;
    refuse(t,
           sentence({name_of(safetensors::dtype_of<T>()), " or a type whose every value it holds"}),
           t.text(), wider ? "copy into a wider type, then round it yourself" : "");
  }

  std::string name_;
  std::map<std::string, std::string, std::less<>> metadata_;
  std::vector<std::string> tolerated_;
  std::vector<Entry> tensors_;  // in the order of their data
  std::vector<std::uint32_t> by_name_;
  std::shared_ptr<const header_texts> texts_;
  tensor_bytes bytes_;
};

/// The checked header of an open file.
inline header header_of(const input_file& input, const safetensors::limits& limit,
                        const safetensors::tolerances& tolerate) {
  std::array<std::byte, 8> length{};
  input.read(0, std::span(length).first(std::min<std::uint64_t>(input.size(), length.size())));
  header result = check_length(length, input.size(), input.path(), limit);
  // With the first bytes of the data, which show whether a header was padded without being counted.
  const auto json = static_cast<std::size_t>(result.json_bytes);
  const auto seen = static_cast<std::size_t>(std::min<std::uint64_t>(result.data_bytes, 8));
  std::string text(json + seen, '\0');
  input.read(8, std::as_writable_bytes(std::span(text)));
  const std::string_view all = text;
  read_header(result, all.substr(0, json), all.substr(json), limit, tolerate);
  return result;
}

}  // namespace io_detail

namespace safetensors {

/// The tensors of one file, in the order of their data; values stay in the file. Immutable; copies
/// share the open file.
class index : public io_detail::tensor_table<tensor_info> {
 public:
  /// The index of a lora::safetensors::file, which is in memory; shares its bytes.
  template <class Entry>
  index(const io_detail::tensor_table<Entry>&
            file)  // NOLINT(google-explicit-constructor): it has more
      : tensor_table(file) {}

 private:
  friend index open(const std::filesystem::path&, const limits&, const tolerances&);
  index(const std::shared_ptr<const io_detail::input_file>& input, io_detail::header&& header)
      : tensor_table(input->path(), std::move(header), {.file = input},
                     [](const tensor_info& t) { return t; }) {}
};

/// Opens a file and reads its header; see the top of this header.
inline index open(const std::filesystem::path& path, const limits& limit = {},
                  const tolerances& tolerate = {}) {
  const auto input = std::make_shared<const io_detail::input_file>(path);
  return {input, io_detail::header_of(*input, limit, tolerate)};
}

/// The elements of `bytes`, at any address, as Ts, widened exactly; false, and nothing, for a type
/// whose values T does not hold.
template <scalar T>
bool widen_to(dtype type, std::span<const std::byte> bytes, std::vector<T>& result) {
  if (!holds_exactly<T>(type)) return false;
  result.resize(bytes.size() / (bits_of(type) / 8));
  const auto part = io_detail::stored_part(type, std::span(result));
  if (!part.empty()) std::memcpy(part.data(), bytes.data(), part.size());
  io_detail::widen_in_place(type, std::span(result));
  return true;
}

}  // namespace safetensors
}  // namespace lora::inline LORA_DETAIL_ABI
