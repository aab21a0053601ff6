// SPDX-License-Identifier: Apache-2.0
//
// The header of a safetensors file: its length, its JSON, and the rules that tie both to the size
// of the file. Everything is checked against the size of the file before memory of that size is
// asked for.
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

/// What a reader is willing to take. The defaults are those of the format, or far above every real
/// file; lower them for files from strangers.
struct limits {
  std::uint64_t header_bytes = 100'000'000;  ///< may be lowered, not raised: the format's own limit
  std::uint64_t tensors = 4'000'000;
  std::uint64_t dimensions = 64;  ///< of one tensor; at most 65535
  std::uint64_t name_bytes = 65536;
  std::uint64_t metadata = 65536;     ///< pairs
  std::uint64_t other_fields = 1024;  ///< of one tensor, beside dtype, shape and data_offsets
};

/// Breaches of the format that files in the wild have, each to be allowed by its name. What was let
/// pass is listed by file::tolerated(). The default allows none.
struct tolerances {
  /// Bytes behind the last tensor. They are not read. Not with fewer than eight bytes that look
  /// like uncounted_padding: then where the data begins is not known.
  bool trailing_bytes = false;
  /// NUL bytes behind the header's JSON in place of spaces.
  bool nul_padding = false;
  /// A header that was padded with NUL bytes or spaces to a multiple of 8 without counting them in
  /// its length: the data begins behind them.
  bool uncounted_padding = false;
};

}  // namespace safetensors

namespace io_detail {

inline std::string shape_list(std::span<const std::uint64_t> shape) {
  std::string result;
  for (const auto extent : shape) result += (result.empty() ? "" : ", ") + std::to_string(extent);
  return "[" + result + "]";
}

/// One tensor, without memory of its own: a header can name more than a million.
struct header_entry {
  std::uint64_t begin = 0, end = 0;          // in the data
  std::uint32_t name_at = 0, name_size = 0;  // in header::names
  std::uint32_t shape_at = 0;                // in header::shapes
  std::uint32_t offset = 0;                  // of the name, in the file: at most 8 + 100,000,000
  std::uint16_t dimensions = 0;
  safetensors::dtype type = safetensors::dtype::f32;
};

struct header {
  std::string path;
  std::uint64_t json_bytes = 0, data_bytes = 0;
  std::uint64_t padding = 0;          // between JSON and data, not counted in json_bytes
  std::string names;                  // of all tensors
  std::vector<std::uint64_t> shapes;  // of all tensors
  std::vector<header_entry> tensors;  // in the order of their data
  std::vector<std::uint32_t> by_name;
  std::map<std::string, std::string, std::less<>> metadata;
  std::vector<std::string> tolerated;

  std::uint64_t data_offset() const { return 8 + json_bytes + padding; }
  std::string_view name_of(const header_entry& t) const {
    return std::string_view(names).substr(t.name_at, t.name_size);
  }
  std::span<const std::uint64_t> shape_of(const header_entry& t) const {
    return std::span(shapes).subspan(t.shape_at, t.dimensions);
  }
};

/// What to do about a header that contradicts itself or the format.
inline constexpr const char* damaged_hint =
    "the file is damaged, or its writer is wrong: download or save it again";

/// What a file is that does not begin with a sensible length, by its first bytes.
inline std::string hint_from_first_bytes(std::span<const std::byte> bytes) {
  const std::string_view first(reinterpret_cast<const char*>(bytes.data()),
                               std::min<std::size_t>(bytes.size(), 8));
  const auto is = [&](std::string_view magic) { return first.substr(0, magic.size()) == magic; };
  if (is_git_lfs_pointer(first)) return git_lfs_hint;
  if (is("PK\x03\x04") || is("\x80\x02"))
    return "this is a PyTorch file (.bin, .pt): convert it to safetensors";
  if (is("GGUF")) return "this is a GGUF file";
  if (is("<!") || is("<html")) return "this is a web page, saved in place of the file";
  if (is("{") || is("\n{"))
    return "this is JSON text, without the length that comes before a header";
  return "";
}

/// Rules 1 to 3: the first eight bytes against the size of the whole file. Throws format_error.
inline header check_length(std::span<const std::byte> first, std::uint64_t file_bytes,
                           std::string_view path, const safetensors::limits& limit) {
  const auto refuse = [&](std::string_view expected, std::string_view found,
                          std::string_view hint) {
    io_detail::refuse({.path = path, .offset = 0}, expected, found, hint);
  };
  if (file_bytes < 8)
    refuse("a safetensors file, which begins with 8 bytes of header length",
           sentence({std::to_string(file_bytes), " bytes in all"}),
           file_bytes == 0 ? "the file is empty: was the download or the save interrupted?"
                           : damaged_hint);
  std::uint64_t length = 0;
  for (std::size_t k = 8; k-- > 0;) length = length << 8 | std::to_integer<std::uint64_t>(first[k]);
  const std::uint64_t largest = std::min<std::uint64_t>(limit.header_bytes, 100'000'000);
  if (length > largest)
    refuse(sentence({"a header length of at most ", std::to_string(largest)}),
           std::to_string(length), hint_from_first_bytes(first));
  if (length > file_bytes - 8)
    refuse(sentence({"a header length that the file holds, ", std::to_string(file_bytes - 8),
                     " bytes left"}),
           sentence({"header length ", std::to_string(length)}),
           "the file is cut off, or its length field is wrong: download or save it again");
  header result;
  result.path = std::string(path);
  result.json_bytes = length;
  result.data_bytes = file_bytes - 8 - length;
  return result;
}

/// Turns the header's JSON into entries. Fields other than dtype, shape and data_offsets are passed
/// over.
class header_handler {
 public:
  header_handler(header& result, const safetensors::limits& limit)
      : result_(result), limit_(limit) {}

  void key(std::string_view name, std::uint64_t offset) {
    switch (level_) {
      case level::root: begin_item(name, offset); break;
      case level::metadata:
        if (result_.metadata.find(name) != result_.metadata.end())
          refuse(offset, std::string(name), "a __metadata__ key once", "it twice");
        if (result_.metadata.size() >= limit_.metadata)
          refuse(offset, metadata_name,
                 sentence({"at most ", std::to_string(limit_.metadata), " pairs"}), "more");
        metadata_key_ = name;
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
        if (value.kind != json_kind::null)
          refuse(offset, metadata_name, "an object of texts, or null", value.text());
        break;
      case level::metadata:
        if (value.kind != json_kind::string)
          refuse(offset, metadata_name, sentence({"text under the key ", in_quotes(metadata_key_)}),
                 value.text());
        result_.metadata.emplace(std::move(metadata_key_), value.string);
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
      refuse(offset, metadata_name, sentence({"text under the key ", in_quotes(metadata_key_)}),
             json_kind_name(kind));
    } else if (level_ == level::entry) {
      begin_field_value(kind, offset);
    } else {
      refuse_tensor(offset, sentence({"unsigned integers in ", fields[field_]}),
                    json_kind_name(kind));
    }
  }

  void end(json_kind, std::uint64_t offset) {
    switch (level_) {
      case level::skipped:
        if (--skipped_depth_ == 0) level_ = level::entry;
        break;
      case level::shape: level_ = level::entry; break;
      case level::offsets:
        if (offsets_ != 2) refuse_tensor(offset, "two data_offsets", std::to_string(offsets_));
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

  void begin_item(std::string_view name, std::uint64_t offset) {
    in_metadata_ = name == metadata_name;
    if (in_metadata_) {
      if (std::exchange(metadata_seen_, true)) refuse(offset, metadata_name, "it once", "it twice");
      return;
    }
    if (name.size() > limit_.name_bytes)
      refuse(offset, std::string(name),
             sentence({"a name of at most ", std::to_string(limit_.name_bytes), " bytes"}),
             std::to_string(name.size()));
    if (result_.tensors.size() >= limit_.tensors)
      refuse(offset, std::string(name),
             sentence({"at most ", std::to_string(limit_.tensors), " tensors"}), "more");
    entry_ = {.name_at = static_cast<std::uint32_t>(result_.names.size()),
              .name_size = static_cast<std::uint32_t>(name.size()),
              .shape_at = static_cast<std::uint32_t>(result_.shapes.size()),
              .offset = static_cast<std::uint32_t>(offset)};
    result_.names += name;
    seen_ = {};
    other_fields_.clear();
  }

  void begin_field(std::string_view name, std::uint64_t offset) {
    field_ =
        static_cast<std::size_t>(std::find(fields.begin(), fields.end(), name) - fields.begin());
    if (field_ == other) {
      if (other_fields_.size() >= limit_.other_fields)
        refuse_tensor(offset,
                      sentence({"at most ", std::to_string(limit_.other_fields), " other fields"}),
                      "more", "safetensors::limits raises it");
      other_fields_.emplace_back(name);
      return;
    }
    if (seen_[field_])
      refuse_tensor(offset, sentence({"the field ", in_quotes(name), " once"}), "it twice");
    seen_[field_] = true;
  }

  void field_value(const json_scalar& value, std::uint64_t offset) {
    if (field_ == dtype_field) {
      if (value.kind != json_kind::string) refuse_tensor(offset, "a dtype as text", value.text());
      const auto known = safetensors::dtype_named(value.string);
      if (!known)
        refuse_tensor(
            offset, sentence({"a dtype this reader knows (", safetensors::all_dtype_names(), ")"}),
            in_quotes(value.string), "save the tensor as one of them");
      entry_.type = *known;
    } else if (field_ != other) {
      refuse_tensor(offset, sentence({"an array of unsigned integers as ", fields[field_]}),
                    value.text());
    }
  }

  void begin_field_value(json_kind kind, std::uint64_t offset) {
    if (field_ == dtype_field) refuse_tensor(offset, "a dtype as text", json_kind_name(kind));
    if (field_ != other && kind != json_kind::array)
      refuse_tensor(offset, sentence({"an array of unsigned integers as ", fields[field_]}),
                    json_kind_name(kind));
    level_ = field_ == other         ? level::skipped
             : field_ == shape_field ? level::shape
                                     : level::offsets;
    if (level_ == level::skipped) skipped_depth_ = 1;
    if (level_ == level::offsets) offsets_ = 0;
  }

  void add_extent(const json_scalar& value, std::uint64_t offset) {
    if (value.kind != json_kind::unsigned_integer)
      refuse_tensor(offset, "unsigned integers in shape", value.text());
    if (value.unsigned_integer >
        static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
      refuse_tensor(offset, "a dimension below 2^63", value.text());
    if (entry_.dimensions >=
        std::min<std::uint64_t>(limit_.dimensions, std::numeric_limits<std::uint16_t>::max()))
      refuse_tensor(offset,
                    sentence({"at most ", std::to_string(limit_.dimensions), " dimensions"}),
                    "more", "safetensors::limits raises it");
    result_.shapes.push_back(value.unsigned_integer);
    ++entry_.dimensions;
  }

  void add_offset(const json_scalar& value, std::uint64_t offset) {
    if (value.kind != json_kind::unsigned_integer)
      refuse_tensor(offset, "unsigned integers in data_offsets", value.text());
    if (offsets_ == 0) entry_.begin = value.unsigned_integer;
    if (offsets_ == 1) entry_.end = value.unsigned_integer;
    if (++offsets_ > 2) refuse_tensor(offset, "two data_offsets", "more");
  }

  void finish_entry(std::uint64_t offset) {
    for (std::size_t k = 0; k < fields.size(); ++k)
      if (!seen_[k]) refuse_tensor(offset, sentence({"the field ", fields[k]}), "none");
    if (other_fields_.size() > 1) {
      std::sort(other_fields_.begin(), other_fields_.end());
      const auto twice = std::adjacent_find(other_fields_.begin(), other_fields_.end());
      if (twice != other_fields_.end())
        refuse_tensor(offset, sentence({"the field ", in_quotes(*twice), " once"}), "it twice");
    }
    result_.tensors.push_back(entry_);
  }

  [[noreturn]] void refuse_entry(std::uint64_t offset, std::string_view found) const {
    refuse_tensor(offset, "an object with dtype, shape and data_offsets", found);
  }
  /// Of the tensor that is being read.
  [[noreturn]] void refuse_tensor(std::uint64_t offset, std::string_view expected,
                                  std::string_view found,
                                  std::string_view hint = damaged_hint) const {
    refuse(offset, std::string(result_.name_of(entry_)), expected, found, hint);
  }
  [[noreturn]] void refuse(std::uint64_t offset, std::string_view item, std::string_view expected,
                           std::string_view found, std::string_view hint = {}) const {
    io_detail::refuse({.path = result_.path, .item = item, .offset = offset}, expected, found,
                      hint);
  }

  static constexpr std::array<std::string_view, 3> fields{"dtype", "shape", "data_offsets"};
  static constexpr std::size_t dtype_field = 0, shape_field = 1, other = fields.size();

  header& result_;
  const safetensors::limits& limit_;
  level level_ = level::start;
  bool in_metadata_ = false, metadata_seen_ = false;
  std::string metadata_key_;
  std::size_t field_ = other;
  std::vector<std::string> other_fields_;
  header_entry entry_;
  std::array<bool, 3> seen_{};
  std::size_t offsets_ = 0;
  std::uint64_t skipped_depth_ = 0;
};

/// Bytes that a shape takes; nothing when they do not fit 64 bits, or when sub-byte elements do not
/// fill the last byte.
inline std::optional<std::uint64_t> bytes_of(std::span<const std::uint64_t> shape,
                                             safetensors::dtype type) {
  std::uint64_t bits = safetensors::bits_of(type);
  if (std::find(shape.begin(), shape.end(), 0u) != shape.end()) return 0;
  for (const auto extent : shape) {
    if (extent > std::numeric_limits<std::uint64_t>::max() / bits) return std::nullopt;
    bits *= extent;
  }
  return bits % 8 == 0 ? std::optional(bits / 8) : std::nullopt;
}

/// The order of names by their bytes, for many of them: behind what all share, eight bytes are
/// compared as one number.
class name_order {
 public:
  explicit name_order(const header& h) : h_(h), shared_(shared_beginning()) {}

  std::vector<std::uint32_t> sorted() const {
    struct item {
      std::uint64_t key;
      std::uint32_t index;
    };
    std::vector<item> items(h_.tensors.size());
    for (std::size_t k = 0; k < items.size(); ++k)
      items[k] = {key(k), static_cast<std::uint32_t>(k)};
    const auto less = [&](const item& a, const item& b) {
      if (a.key != b.key) return a.key < b.key;
      const int order = name(a.index).compare(name(b.index));
      return order != 0 ? order < 0 : h_.tensors[a.index].offset < h_.tensors[b.index].offset;
    };
    if (!std::is_sorted(items.begin(), items.end(), less))
      std::sort(items.begin(), items.end(), less);
    std::vector<std::uint32_t> result(items.size());
    std::transform(items.begin(), items.end(), result.begin(),
                   [](const item& i) { return i.index; });
    return result;
  }

 private:
  std::string_view name(std::size_t k) const { return h_.name_of(h_.tensors[k]); }
  std::size_t shared_beginning() const {
    if (h_.tensors.empty()) return 0;
    const std::string_view first = name(0);
    std::size_t length = first.size();
    for (std::size_t k = 1; k < h_.tensors.size() && length > 0; ++k) {
      const std::string_view other = name(k);
      length = static_cast<std::size_t>(
          std::mismatch(first.begin(),
                        first.begin() + static_cast<std::ptrdiff_t>(std::min(length, other.size())),
                        other.begin())
              .first -
          first.begin());
    }
    return length;
  }
  std::uint64_t key(std::size_t k) const {
    const std::string_view rest = name(k).substr(shared_);
    std::uint64_t result = 0;
    for (std::size_t i = 0; i < 8; ++i)
      result = result << 8 | (i < rest.size() ? static_cast<unsigned char>(rest[i]) : 0u);
    return result;
  }

  const header& h_;
  std::size_t shared_;
};

/// The rules that need more than one value at a time. Throws format_error.
class header_rules {
 public:
  header_rules(header& h, std::string_view after_json, const safetensors::tolerances& tolerate)
      : h_(h), after_json_(after_json), tolerate_(tolerate) {}

  void check() {
    sort_by_name();
    for (const auto& t : h_.tensors) check_size(t);
    const auto before = [](const auto& a, const auto& b) {
      return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
    };
    const bool in_order = std::is_sorted(h_.tensors.begin(), h_.tensors.end(), before);
    if (!in_order) std::sort(h_.tensors.begin(), h_.tensors.end(), before);
    check_order();
    check_end();
    if (!in_order) sort_by_name();  // again: the numbers changed
  }

 private:
  void sort_by_name() {
    h_.by_name = name_order(h_).sorted();
    for (std::size_t k = 1; k < h_.by_name.size(); ++k) {
      const auto& second = h_.tensors[h_.by_name[k]];
      if (h_.name_of(second) == h_.name_of(h_.tensors[h_.by_name[k - 1]]))
        refuse(second, "every tensor name once", "it twice",
               "readers differ in which of the two they take");
    }
  }

  void check_size(const header_entry& t) const {
    if (t.end < t.begin)
      refuse(t, "data_offsets that begin before they end", range(t), damaged_hint);
    const auto needed = bytes_of(h_.shape_of(t), t.type);
    if (needed && t.end - t.begin == *needed) return;
    const std::string what =
        std::string(safetensors::name_of(t.type)) + " " + shape_list(h_.shape_of(t));
    if (!needed)
      refuse(t, "a shape whose bytes can be counted", what,
             "it overflows 64 bits or ends inside a byte");
    refuse(t, sentence({std::to_string(*needed), " bytes for ", what}),
           sentence({std::to_string(t.end - t.begin), " at ", range(t)}), damaged_hint);
  }

  void check_order() const {
    std::uint64_t at = 0;
    const header_entry* before = nullptr;
    for (const auto& t : h_.tensors) {
      if (t.begin != at) {
        const std::string neighbour = before == nullptr
                                          ? "the beginning of the data"
                                          : in_quotes(h_.name_of(*before)) + " " + range(*before);
        refuse(
            t, sentence({"to begin at ", std::to_string(at), ", where ", neighbour, " ends"}),
            range(t),
            sentence({std::string(t.begin > at ? "a hole in the data" : "two tensors share bytes"),
                      "; ", damaged_hint}));
      }
      at = t.end;
      before = &t;
    }
  }

  void check_end() {
    const std::uint64_t end = h_.tensors.empty() ? 0 : h_.tensors.back().end;
    if (end == h_.data_bytes) return;
    const bool cut = end > h_.data_bytes;
    const std::uint64_t off = cut ? end - h_.data_bytes : h_.data_bytes - end;
    const bool padding = !cut && looks_like_padding(off);
    if (padding && tolerate_.uncounted_padding) return take_padding(off);
    if (!cut && !padding && tolerate_.trailing_bytes) return drop_trailing(off);
    io_detail::refuse({.path = h_.path,
                       .item = h_.tensors.empty() ? "" : std::string(h_.name_of(h_.tensors.back())),
                       .offset = h_.data_offset() + std::min(end, h_.data_bytes)},
                      sentence({"tensor data to end at ", std::to_string(end)}),
                      sentence({"a data size of ", std::to_string(h_.data_bytes), ", ",
                                std::to_string(off), (cut ? " bytes missing" : " bytes too many")}),
                      cut ? "the file is cut off: download or save it again"
                      : padding
                          ? "probably uncounted header padding: the data would be shifted by it "
                            "(tolerances::uncounted_padding reads it so)"
                          : "tolerances::trailing_bytes reads the file without them");
  }

  /// As many bytes as bring the header to a multiple of 8, and all of them NUL or all spaces.
  bool looks_like_padding(std::uint64_t bytes) const {
    if (bytes >= 8 || (h_.json_bytes + bytes) % 8 != 0 || after_json_.size() < bytes) return false;
    const auto first = after_json_.substr(0, static_cast<std::size_t>(bytes));
    return first.find_first_not_of('\0') == std::string_view::npos ||
           first.find_first_not_of(' ') == std::string_view::npos;
  }
  void take_padding(std::uint64_t bytes) {
    h_.padding = bytes;
    h_.data_bytes -= bytes;
    h_.tolerated.push_back(std::to_string(bytes) +
                           " bytes of header padding, not counted in the header's length");
  }
  void drop_trailing(std::uint64_t bytes) {
    h_.data_bytes -= bytes;
    h_.tolerated.push_back(std::to_string(bytes) + " bytes behind the last tensor");
  }

  static std::string range(const header_entry& t) {
    return "[" + std::to_string(t.begin) + ", " + std::to_string(t.end) + ")";
  }
  [[noreturn]] void refuse(const header_entry& t, std::string_view expected, std::string_view found,
                           std::string_view hint) const {
    io_detail::refuse({.path = h_.path, .item = std::string(h_.name_of(t)), .offset = t.offset},
                      expected, found, hint);
  }

  header& h_;
  std::string_view after_json_;
  const safetensors::tolerances& tolerate_;
};

/// Reads the JSON of a header whose length is checked already, and applies every rule. after_json
/// are the up to 8 bytes that follow the header. Throws format_error.
inline void read_header(header& result, std::string_view json, std::string_view after_json,
                        const safetensors::limits& limit, const safetensors::tolerances& tolerate) {
  if (tolerate.nul_padding) {
    const auto kept = json.find_last_not_of('\0') + 1;
    if (kept < json.size())
      result.tolerated.push_back(std::to_string(json.size() - kept) +
                                 " NUL bytes of header padding in place of spaces");
    json = json.substr(0, kept);
  }
  header_handler handler(result, limit);
  parse_json({.text = json, .path = result.path, .offset = 8}, handler);
  header_rules(result, after_json, tolerate).check();
}

/// How far behind a multiple of 64 the data must begin so that each tensor lies at a multiple of
/// its element's size; 0 when no distance does it.
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
