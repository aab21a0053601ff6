// SPDX-License-Identifier: Apache-2.0
//
// The processor's own names for what avx512_emulated computes: AVX-512 and its dot products of bfloat16.
#include "lora/adapter.hpp"
#include "lora/forward.hpp"
#include "lora/merge.hpp"

#if !defined(LORA_DETAIL_DOTS)
#error "the flags of this file ask for AVX512-BF16"
#endif

template <class T>
using matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic>;

void multiply(const lora::packed_weight<lora::bfloat16>& packed, const matrix<lora::bfloat16>& W,
              const matrix<lora::bfloat16>& x, matrix<float>& y, const lora::adapter<float>& l) {
  lora::forward(packed, x, y, l);
  lora::forward(W, x, y, l);
}
void merge(matrix<lora::bfloat16>& W, matrix<float>& V, const lora::adapter<float>& l) {
  lora::merge(W, l);
  lora::merge(V, l);
}
