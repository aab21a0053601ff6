// SPDX-License-Identifier: Apache-2.0
//
// The merge of other libraries, W += s B A in place; what each is stands in ../merge.cpp.
#pragma once

#include <Eigen/Core>
#include <functional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../layers.hpp"
#include "versions.hpp"

namespace lora_bench {

template <class T>
struct merge_rival {
  std::string name;
  std::function<void(weight_rows<T>& W, double sign)> merge;
};

template <class V>
using eigen_rows = Eigen::Matrix<V, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

template <class T>
void merge_with_eigen(weight_rows<T>& weight, float s, const eigen_rows<float>& B,
                      const eigen_rows<float>& A) {
  if constexpr (std::is_same_v<T, float>) {
    Eigen::Map<eigen_rows<float>>(weight.values.data(), B.rows(), A.cols()).noalias() += s * B * A;
  } else {
    using stored =
        std::conditional_t<std::is_same_v<T, lora::float16>, Eigen::half, Eigen::bfloat16>;
    Eigen::Map<eigen_rows<stored>> W(reinterpret_cast<stored*>(weight.values.data()), B.rows(),
                                     A.cols());
    eigen_rows<float> widened = W.template cast<float>();
    widened.noalias() += s * B * A;
    W = widened.template cast<stored>();
  }
}

/// The adapter must outlive the result.
template <class T>
std::vector<merge_rival<T>> merge_rivals(const shape& layer, const lora::adapter<float>& l) {
  std::vector<merge_rival<T>> rivals;
  // A temporary of the largest layers takes seconds to touch for the first time, on every call.
  if (std::is_same_v<T, float> || layer.size() < 1e8)
    rivals.push_back({"eigen", [&l](weight_rows<T>& W, double sign) {
                        merge_with_eigen(W, static_cast<float>(sign * l.scaling()), l.lora_B(),
                                         l.lora_A());
                      }});
#if defined(LORA_BENCH_OPENBLAS)
  if constexpr (std::is_same_v<T, float>)
    rivals.push_back({"openblas", [&l](weight_rows<float>& W, double sign) {
                        const auto [out, in, rank] = std::tuple(static_cast<int>(l.out_features()),
                                                                static_cast<int>(l.in_features()),
                                                                static_cast<int>(l.rank()));
                        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, out, in, rank,
                                    static_cast<float>(sign * l.scaling()), l.lora_B().data(), rank,
                                    l.lora_A().data(), in, 1, W.values.data(), in);
                      }});
#endif
  return rivals;
}

}  // namespace lora_bench
