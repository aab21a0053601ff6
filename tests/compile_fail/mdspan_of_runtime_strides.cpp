// SPDX-License-Identifier: Apache-2.0
// expect: layout has run-time strides: say which order it has with row_major
#include "lora/lora.hpp"

#include "../support/mdspan.hpp"

using span = test::md::mdspan<float, test::md::dextents<>, test::md::layout_stride>;

lora::index_t rows(const span& m) {
#ifdef LORA_MUST_FAIL
  return lora::as_matrix(m).rows();
#else
  return lora::row_major(m).rows();
#endif
}
