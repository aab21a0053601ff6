// SPDX-License-Identifier: Apache-2.0
//
// The processor's own names for what avx512_emulated computes: AVX-512 and its dot products of
// bfloat16, in products, merges and layers of bfloat16 by bfloat16.
#include "lora/delta.hpp"
#include "lora/linear.hpp"

#if defined(__x86_64__) && !defined(LORA_DETAIL_DOTS)
#error "the flags of this file ask for AVX512-BF16"
#endif

template <class T>
using matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic>;
using lora::bfloat16;

void multiply(const lora::packed_weight<bfloat16>& packed, const matrix<bfloat16>& W,
              const matrix<bfloat16>& x, matrix<float>& y, const lora::adapter<float>& l) {
  lora::forward(packed, x, y, l);
  lora::forward(W, x, y, l);
}
void multiply(const lora::packed_weight<bfloat16>& packed, const matrix<bfloat16>& W,
              const matrix<bfloat16>& x, matrix<bfloat16>& y, const lora::adapter<bfloat16>& l,
              const lora::packed_adapter<bfloat16>& p) {
  lora::forward(packed, x, y, p);
  lora::forward(W, x, y, l);
  lora::apply(x, y, l);
}
void merge(matrix<bfloat16>& W, matrix<float>& V, const lora::adapter<float>& l) {
  lora::merge(W, l);
  lora::merge(V, l);
}
void merge(matrix<bfloat16>& W, matrix<float>& V, const lora::adapter<bfloat16>& l) {
  lora::merge(W, l);
  lora::merge(V, l);
  V = lora::delta_weight(l);
}
void change(lora::linear<bfloat16>& layer, const matrix<bfloat16>& x, matrix<bfloat16>& y,
            const lora::adapter<bfloat16>& l) {
  layer.attach("l", l);
  layer.forward(x, y);
  layer.merge("l");
}
