// SPDX-License-Identifier: Apache-2.0
//
// The element types that a safetensors file can name, and which C++ type holds each.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>

#include "lora/concepts.hpp"
#include "lora/detail/convert.hpp"

namespace lora::inline LORA_DETAIL_ABI::safetensors {

/// All 22. f32, f64, f16 and bf16 take part in arithmetic; the others are checked and carried as
/// bytes.
enum class dtype : std::uint8_t {
  boolean,
  f4,
  f6_e2m3,
  f6_e3m2,
  u8,
  i8,
  f8_e5m2,
  f8_e4m3,
  f8_e8m0,
  f8_e4m3fnuz,
  f8_e5m2fnuz,
  i16,
  u16,
  f16,
  bf16,
  i32,
  u32,
  f32,
  c64,
  f64,
  i64,
  u64,
};

namespace dtype_detail {
struct row {
  std::string_view name;
  unsigned bits;
};
/// In the order of the enumeration.
inline constexpr std::array<row, 22> table{
    {{"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
     {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
     {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
     {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
     {"I64", 64},        {"U64", 64}}};
}  // namespace dtype_detail

/// As files spell it.
constexpr std::string_view name_of(dtype type) {
  return dtype_detail::table[static_cast<std::size_t>(type)].name;
}

/// Bits of one element.
constexpr unsigned bits_of(dtype type) {
  return dtype_detail::table[static_cast<std::size_t>(type)].bits;
}

/// Case-sensitive; nothing for a name that is not one of the 22.
constexpr std::optional<dtype> dtype_named(std::string_view name) {
  for (std::size_t k = 0; k < dtype_detail::table.size(); ++k)
    if (dtype_detail::table[k].name == name) return static_cast<dtype>(k);
  return std::nullopt;
}

/// "BOOL, F4, ...", for messages.
inline std::string all_dtype_names() {
  std::string result;
  for (const auto& row : dtype_detail::table)
    result += (result.empty() ? "" : ", ") + std::string(row.name);
  return result;
}

/// The type of the file whose elements are Ts bit for bit. Defined for the scalars of the library
/// and for the integers of 8 to 64 bits.
template <class T>
constexpr dtype dtype_of() {
  using stored = lora::detail::storage_t<T>;
  if constexpr (std::is_same_v<stored, float>) {
    return dtype::f32;
  } else if constexpr (std::is_same_v<stored, double>) {
    return dtype::f64;
  } else if constexpr (std::is_same_v<stored, float16>) {
    return dtype::f16;
  } else if constexpr (std::is_same_v<stored, bfloat16>) {
    return dtype::bf16;
  } else {
    static_assert(std::is_integral_v<T> && !std::is_same_v<T, bool>,
                  "lora::safetensors: no element type of a file is this C++ type");
    if constexpr (sizeof(T) == 1) return std::is_signed_v<T> ? dtype::i8 : dtype::u8;
    if constexpr (sizeof(T) == 2) return std::is_signed_v<T> ? dtype::i16 : dtype::u16;
    if constexpr (sizeof(T) == 4) return std::is_signed_v<T> ? dtype::i32 : dtype::u32;
    if constexpr (sizeof(T) == 8) return std::is_signed_v<T> ? dtype::i64 : dtype::u64;
  }
}

/// Whether every value of a file's element type is a T: the same type, or a narrower floating-point
/// type.
template <scalar T>
constexpr bool holds_exactly(dtype type) {
  switch (type) {
    case dtype::f32: return lora::detail::holds_exactly<T, float>;
    case dtype::f64: return lora::detail::holds_exactly<T, double>;
    case dtype::f16: return lora::detail::holds_exactly<T, float16>;
    case dtype::bf16: return lora::detail::holds_exactly<T, bfloat16>;
    default: return false;
  }
}

}  // namespace lora::inline LORA_DETAIL_ABI::safetensors
