// SPDX-License-Identifier: Apache-2.0
//
// The header of a safetensors file: its length, its JSON, and the rules that tie both to the size of the file. Everything
// is checked against the size of the file before memory of that size is asked for.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora/io/detail/json.hpp"
#include "lora/io/dtype.hpp"
#include "lora/io/format_error.hpp"

namespace lora::inline LORA_DETAIL_ABI {
namespace safetensors {

/// What a reader is willing to take. The defaults are those of the format; lower them for files from strangers.
struct limits {
  std::uint64_t header_bytes = 100'000'000;  ///< may be lowered, not raised: the format's own limit
  std::uint64_t tensors = 4'000'000;
  std::uint64_t dimensions = 64;
  std::uint64_t name_bytes = 65536;
};

}  // namespace safetensors

namespace io_detail {

inline std::string shape_list(const std::vector<std::uint64_t>& shape) {
  std::string result;
  for (const auto extent : shape) result += (result.empty() ? "" : ", ") + std::to_string(extent);
  return "[" + result + "]";
}

struct header_entry {
  std::string name;
  safetensors::dtype type = safetensors::dtype::f32;
  std::vector<std::uint64_t> shape;
  std::uint64_t begin = 0, end = 0;  // in the data
  std::uint64_t offset = 0;          // of the name, in the file
};

struct header {
  std::string path;
  std::uint64_t json_bytes = 0, data_bytes = 0;
  std::vector<header_entry> tensors;  // in the order of their data
  std::vector<std::uint32_t> by_name;
  std::map<std::string, std::string> metadata;

  std::uint64_t data_offset() const { return 8 + json_bytes; }
};

/// What a file is that does not begin with a sensible length, by its first bytes.
inline std::string hint_from_first_bytes(std::span<const std::byte> bytes) {
  const std::string_view first(reinterpret_cast<const char*>(bytes.data()), std::min<std::size_t>(bytes.size(), 8));
  const auto is = [&](std::string_view magic) { return first.substr(0, magic.size()) == magic; };
  if (is("version ")) return "this is a Git LFS pointer: fetch the file itself with git lfs pull";
  if (is("PK\x03\x04") || is("\x80\x02")) return "this is a PyTorch file (.bin, .pt): convert it to safetensors";
  if (is("GGUF")) return "this is a GGUF file";
  if (is("<!") || is("<html")) return "this is a web page, saved in place of the file";
  if (is("{") || is("\n{")) return "this is JSON text, without the length that comes before a header";
  return "";
}

/// Rules 1 to 3: the first eight bytes against the size of the whole file. Throws format_error.
inline header check_length(std::span<const std::byte> first, std::uint64_t file_bytes, std::string_view path,
                           const safetensors::limits& limit) {
  const auto refuse = [&](std::string expected, std::string found, std::string hint) {
    detail::raise(format_error({.path = std::string(path),
                                .offset = 0,
                                .expected = std::move(expected),
                                .found = std::move(found),
                                .hint = std::move(hint)}));
  };
  if (file_bytes < 8)
    refuse("a safetensors file, which begins with 8 bytes of header length", std::to_string(file_bytes) + " bytes in all",
           file_bytes == 0 ? "the file is empty: was the download or the save interrupted?" : "");
  std::uint64_t length = 0;
  for (std::size_t k = 8; k-- > 0;) length = length << 8 | std::to_integer<std::uint64_t>(first[k]);
  const std::uint64_t largest = std::min<std::uint64_t>(limit.header_bytes, 100'000'000);
  if (length > largest)
    refuse("a header length of at most " + std::to_string(largest), std::to_string(length), hint_from_first_bytes(first));
  if (length > file_bytes - 8)
    refuse("a header length that the file holds, " + std::to_string(file_bytes - 8) + " bytes left",
           "header length " + std::to_string(length), "the file is cut off, or its length field is wrong");
  header result;
  result.path = std::string(path);
  result.json_bytes = length;
  result.data_bytes = file_bytes - 8 - length;
  return result;
}

/// Turns the header's JSON into entries. Fields other than dtype, shape and data_offsets are passed over.
class header_handler {
 public:
  header_handler(header& result, const safetensors::limits& limit) : result_(result), limit_(limit) {}

  void key(std::string& name, std::uint64_t offset) {
    switch (level_) {
      case level::root: begin_item(name, offset); break;
      case level::metadata:
        if (result_.metadata.contains(name)) refuse(offset, name, "a __metadata__ key once", "it twice");
        metadata_key_ = std::move(name);
        break;
      case level::entry: begin_field(name, offset); break;
      default: break;
    }
  }

  void scalar(const json_scalar& value, std::uint64_t offset) {
    switch (level_) {
      case level::start: refuse(offset, "", "a JSON object", value.text());
      case level::root:
        if (!in_metadata_) refuse_entry(offset, value.text());
        if (value.kind != json_kind::null) refuse(offset, metadata_name, "an object of texts, or null", value.text());
        break;
      case level::metadata:
        if (value.kind != json_kind::string)
          refuse(offset, metadata_name, "text under the key " + in_quotes(metadata_key_), value.text());
        result_.metadata.emplace(std::move(metadata_key_), std::move(*value.string));
        break;
      case level::entry: field_value(value, offset); break;
      case level::shape: add_extent(value, offset); break;
      case level::offsets: add_offset(value, offset); break;
      case level::skipped: break;
    }
  }

  void begin(json_kind kind, std::uint64_t offset) {
    if (level_ == level::skipped) {
      ++skipped_depth_;
    } else if (level_ == level::start) {
      if (kind != json_kind::object) refuse(offset, "", "a JSON object", json_kind_name(kind));
      level_ = level::root;
    } else if (level_ == level::root) {
      if (in_metadata_ && kind != json_kind::object)
        refuse(offset, metadata_name, "an object of texts, or null", json_kind_name(kind));
      if (!in_metadata_ && kind != json_kind::object) refuse_entry(offset, json_kind_name(kind));
      level_ = in_metadata_ ? level::metadata : level::entry;
    } else if (level_ == level::metadata) {
      refuse(offset, metadata_name, "text under the key " + in_quotes(metadata_key_), json_kind_name(kind));
    } else if (level_ == level::entry) {
      begin_field_value(kind, offset);
    } else {
      refuse(offset, entry_.name, "unsigned integers in " + field_, json_kind_name(kind));
    }
  }

  void end(json_kind, std::uint64_t offset) {
    switch (level_) {
      case level::skipped:
        if (--skipped_depth_ == 0) level_ = level::entry;
        break;
      case level::shape: level_ = level::entry; break;
      case level::offsets:
        if (offsets_ != 2) refuse(offset, entry_.name, "two data_offsets", std::to_string(offsets_));
        level_ = level::entry;
        break;
      case level::entry:
        finish_entry(offset);
        level_ = level::root;
        break;
      case level::metadata: level_ = level::root; break;
      default: break;
    }
  }

 private:
  enum class level { start, root, metadata, entry, shape, offsets, skipped };
  static constexpr const char* metadata_name = "__metadata__";

  void begin_item(std::string& name, std::uint64_t offset) {
    in_metadata_ = name == metadata_name;
    if (in_metadata_) {
      if (std::exchange(metadata_seen_, true)) refuse(offset, metadata_name, "it once", "it twice");
      return;
    }
    if (name.size() > limit_.name_bytes)
      refuse(offset, name, "a name of at most " + std::to_string(limit_.name_bytes) + " bytes", std::to_string(name.size()));
    if (result_.tensors.size() >= limit_.tensors)
      refuse(offset, name, "at most " + std::to_string(limit_.tensors) + " tensors", "more");
    entry_ = {};
    entry_.name = std::move(name);
    entry_.offset = offset;
    seen_ = {};
    other_fields_.clear();
  }

  void begin_field(const std::string& name, std::uint64_t offset) {
    field_ = name;
    const auto known = std::find(fields.begin(), fields.end(), std::string_view(name));
    if (known == fields.end()) {
      other_fields_.push_back(name);
      return;
    }
    auto& seen = seen_[static_cast<std::size_t>(known - fields.begin())];
    if (seen) refuse(offset, entry_.name, "the field " + in_quotes(name) + " once", "it twice");
    seen = true;
  }

  void field_value(const json_scalar& value, std::uint64_t offset) {
    if (field_ == fields[0]) {
      if (value.kind != json_kind::string) refuse(offset, entry_.name, "a dtype as text", value.text());
      const auto known = safetensors::dtype_named(*value.string);
      if (!known)
        refuse(offset, entry_.name, "a dtype this reader knows (" + safetensors::all_dtype_names() + ")",
               in_quotes(*value.string));
      entry_.type = *known;
    } else if (field_ == fields[1] || field_ == fields[2]) {
      refuse(offset, entry_.name, "an array of unsigned integers as " + field_, value.text());
    }
  }

  void begin_field_value(json_kind kind, std::uint64_t offset) {
    if (field_ == fields[0]) refuse(offset, entry_.name, "a dtype as text", json_kind_name(kind));
    const bool known = field_ == fields[1] || field_ == fields[2];
    if (known && kind != json_kind::array)
      refuse(offset, entry_.name, "an array of unsigned integers as " + field_, json_kind_name(kind));
    level_ = !known ? level::skipped : field_ == fields[1] ? level::shape : level::offsets;
    if (level_ == level::skipped) skipped_depth_ = 1;
    if (level_ == level::offsets) offsets_ = 0;
  }

  void add_extent(const json_scalar& value, std::uint64_t offset) {
    if (value.kind != json_kind::unsigned_integer) refuse(offset, entry_.name, "unsigned integers in shape", value.text());
    if (value.unsigned_integer > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
      refuse(offset, entry_.name, "a dimension below 2^63", value.text());
    if (entry_.shape.size() >= limit_.dimensions)
      refuse(offset, entry_.name, "at most " + std::to_string(limit_.dimensions) + " dimensions", "more");
    entry_.shape.push_back(value.unsigned_integer);
  }

  void add_offset(const json_scalar& value, std::uint64_t offset) {
    if (value.kind != json_kind::unsigned_integer)
      refuse(offset, entry_.name, "unsigned integers in data_offsets", value.text());
    if (offsets_ == 0) entry_.begin = value.unsigned_integer;
    if (offsets_ == 1) entry_.end = value.unsigned_integer;
    if (++offsets_ > 2) refuse(offset, entry_.name, "two data_offsets", "more");
  }

  void finish_entry(std::uint64_t offset) {
    for (std::size_t k = 0; k < fields.size(); ++k)
      if (!seen_[k]) refuse(offset, entry_.name, "the field " + std::string(fields[k]), "none");
    std::sort(other_fields_.begin(), other_fields_.end());
    const auto twice = std::adjacent_find(other_fields_.begin(), other_fields_.end());
    if (twice != other_fields_.end()) refuse(offset, entry_.name, "the field " + in_quotes(*twice) + " once", "it twice");
    result_.tensors.push_back(std::move(entry_));
  }

  [[noreturn]] void refuse_entry(std::uint64_t offset, std::string found) const {
    refuse(offset, entry_.name, "an object with dtype, shape and data_offsets", std::move(found));
  }
  [[noreturn]] void refuse(std::uint64_t offset, std::string item, std::string expected, std::string found) const {
    detail::raise(format_error({.path = result_.path,
                                .item = std::move(item),
                                .offset = offset,
                                .expected = std::move(expected),
                                .found = std::move(found)}));
  }

  static constexpr std::array<std::string_view, 3> fields{"dtype", "shape", "data_offsets"};

  header& result_;
  const safetensors::limits& limit_;
  level level_ = level::start;
  bool in_metadata_ = false, metadata_seen_ = false;
  std::string metadata_key_, field_;
  std::vector<std::string> other_fields_;
  header_entry entry_;
  std::array<bool, 3> seen_{};
  std::size_t offsets_ = 0;
  std::uint64_t skipped_depth_ = 0;
};

/// Bytes that a shape takes; nothing when they do not fit 64 bits, or when sub-byte elements do not fill the last byte.
inline std::optional<std::uint64_t> bytes_of(const std::vector<std::uint64_t>& shape, safetensors::dtype type) {
  std::uint64_t bits = safetensors::bits_of(type);
  if (std::find(shape.begin(), shape.end(), 0u) != shape.end()) return 0;
  for (const auto extent : shape) {
    if (extent > std::numeric_limits<std::uint64_t>::max() / bits) return std::nullopt;
    bits *= extent;
  }
  return bits % 8 == 0 ? std::optional(bits / 8) : std::nullopt;
}

/// The rules that need more than one value at a time. Throws format_error.
class header_rules {
 public:
  explicit header_rules(header& h) : h_(h) {}

  void check() {
    sort_by_name();
    for (const auto& t : h_.tensors) check_size(t);
    std::sort(h_.tensors.begin(), h_.tensors.end(),
              [](const auto& a, const auto& b) { return std::pair(a.begin, a.end) < std::pair(b.begin, b.end); });
    check_order();
    check_end();
    sort_by_name();  // again: the numbers changed
  }

 private:
  void sort_by_name() {
    h_.by_name.resize(h_.tensors.size());
    for (std::size_t k = 0; k < h_.by_name.size(); ++k) h_.by_name[k] = static_cast<std::uint32_t>(k);
    const auto& t = h_.tensors;
    std::sort(h_.by_name.begin(), h_.by_name.end(), [&](auto a, auto b) {
      const int order = t[a].name.compare(t[b].name);
      return order != 0 ? order < 0 : t[a].offset < t[b].offset;
    });
    for (std::size_t k = 1; k < h_.by_name.size(); ++k) {
      const auto& second = t[h_.by_name[k]];
      if (second.name == t[h_.by_name[k - 1]].name)
        refuse(second, "every tensor name once", "it twice", "readers differ in which of the two they take");
    }
  }

  void check_size(const header_entry& t) const {
    if (t.end < t.begin) refuse(t, "data_offsets that begin before they end", range(t), "");
    const auto needed = bytes_of(t.shape, t.type);
    const std::string what = std::string(safetensors::name_of(t.type)) + " " + shape_list(t.shape);
    if (!needed) refuse(t, "a shape whose bytes can be counted", what, "it overflows 64 bits or ends inside a byte");
    if (t.end - t.begin != *needed)
      refuse(t, std::to_string(*needed) + " bytes for " + what, std::to_string(t.end - t.begin) + " at " + range(t), "");
  }

  void check_order() const {
    std::uint64_t at = 0;
    const header_entry* before = nullptr;
    for (const auto& t : h_.tensors) {
      if (t.begin != at) {
        const std::string neighbour =
            before == nullptr ? "the beginning of the data" : in_quotes(before->name) + " " + range(*before);
        refuse(t, "to begin at " + std::to_string(at) + ", where " + neighbour + " ends", range(t),
               t.begin > at ? "a hole in the data" : "two tensors share bytes");
      }
      at = t.end;
      before = &t;
    }
  }

  void check_end() const {
    const std::uint64_t end = h_.tensors.empty() ? 0 : h_.tensors.back().end;
    if (end == h_.data_bytes) return;
    const bool cut = end > h_.data_bytes;
    const std::uint64_t off = cut ? end - h_.data_bytes : h_.data_bytes - end;
    const bool padding = !cut && off < 8 && (h_.json_bytes + off) % 8 == 0;
    detail::raise(format_error({.path = h_.path,
                                .item = h_.tensors.empty() ? "" : h_.tensors.back().name,
                                .offset = h_.data_offset() + std::min(end, h_.data_bytes),
                                .expected = "tensor data to end at " + std::to_string(end),
                                .found = "a data size of " + std::to_string(h_.data_bytes) + ", " + std::to_string(off) +
                                         (cut ? " bytes missing" : " bytes too many"),
                                .hint = cut       ? "the file is cut off"
                                        : padding ? "probably uncounted header padding: the data would be shifted by it"
                                                  : ""}));
  }

  static std::string range(const header_entry& t) {
    return "[" + std::to_string(t.begin) + ", " + std::to_string(t.end) + ")";
  }
  [[noreturn]] void refuse(const header_entry& t, std::string expected, std::string found, std::string hint) const {
    detail::raise(format_error({.path = h_.path,
                                .item = t.name,
                                .offset = t.offset,
                                .expected = std::move(expected),
                                .found = std::move(found),
                                .hint = std::move(hint)}));
  }

  header& h_;
};

/// Reads the JSON of a header whose length is checked already, and applies every rule. Throws format_error.
inline void read_header(header& result, std::string_view json, const safetensors::limits& limit) {
  header_handler handler(result, limit);
  parse_json({.text = json, .path = result.path, .offset = 8}, handler);
  header_rules(result).check();
}

/// How far behind a multiple of 64 the data must begin so that each tensor lies at a multiple of its element's size; 0
/// when no distance does it.
inline std::size_t aligning_shift(const std::vector<header_entry>& tensors) {
  for (std::size_t shift = 0; shift < 8; ++shift) {
    const bool all = std::all_of(tensors.begin(), tensors.end(), [&](const header_entry& t) {
      const unsigned bytes = safetensors::bits_of(t.type) / 8;
      return bytes < 2 || (t.begin + shift) % bytes == 0;
    });
    if (all) return shift;
  }
  return 0;
}

}  // namespace io_detail
}  // namespace lora::inline LORA_DETAIL_ABI
