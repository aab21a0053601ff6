// SPDX-License-Identifier: Apache-2.0
//
// Whether two matrices in memory share an element, so that a verb can refuse an output that is also
// an input.
#pragma once

#include <cstdint>
#include <string>

#include "lora/error.hpp"
#include "lora/matrix_view.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

/// Where a matrix lies, in bytes: `count` runs of `run` bytes, `stride` bytes apart.
struct footprint {
  std::uintptr_t begin;
  std::uintptr_t run, stride, count;

  std::uintptr_t end() const { return begin + (count - 1) * stride + run; }
  bool empty() const { return run == 0 || count == 0; }
};

template <class T, storage_order Order>
footprint footprint_of(const matrix_view<T, Order>& m) {
  const auto bytes = [](index_t n) { return static_cast<std::uintptr_t>(n) * sizeof(T); };
  return {reinterpret_cast<std::uintptr_t>(m.data()), bytes(m.inner_size()),
          bytes(m.outer_stride()), static_cast<std::uintptr_t>(m.outer_size())};
}

/// True unless the two are provably disjoint: their address ranges do not meet, or they share a
/// stride and the runs of the one lie between the runs of the other (two column blocks of one
/// row-major matrix).
inline bool may_overlap(const footprint& a, const footprint& b) {
  if (a.empty() || b.empty() || a.end() <= b.begin || b.end() <= a.begin) return false;
  if (a.stride != b.stride || a.stride == 0) return true;
  const footprint& low = a.begin <= b.begin ? a : b;
  const footprint& high = a.begin <= b.begin ? b : a;
  const std::uintptr_t offset = (high.begin - low.begin) % a.stride;
  return offset < low.run || offset + high.run > a.stride;
}

template <class V, class W>
void refuse_overlap(const char* operation, const char* written, const V& output, const char* read,
                    const W& input) {
  if (may_overlap(footprint_of(output), footprint_of(input)))
    raise_shape(operation,
                std::string(written) + " is written and overlaps " + read +
                    " in memory, which would be read after it changed: give it memory of its own");
}

}  // namespace lora::inline LORA_DETAIL_ABI::detail
