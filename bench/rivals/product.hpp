// SPDX-License-Identifier: Apache-2.0
//
// The base product of other libraries, on the same values: Y = W X with W out x in as a pool of
// layers, and tokens as columns. A rival that is absent, or has no fast kernel for the formats,
// adds nothing.
//   eigen         Y.noalias() = W * X, float only: its 16-bit products are 10 to 100 times slower
//   openblas      cblas_sgemm (one token: cblas_sgemv), float only: Debian's build has no other
//   onednn        matmul with weights reordered once to the format that it prefers
//                 (dnnl::memory::format_tag::any)
//   onednn_plain  the same on W as it lies in rows
#pragma once

#include <Eigen/Core>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../layers.hpp"
#include "../paired.hpp"
#include "versions.hpp"

namespace lora_bench {

struct rival {
  std::string name;
  way run;  ///< one call, on the next layer of the rotation
};

/// The operands of a row.
template <class T, class X>
struct product_operands {
  std::vector<weight_rows<T>>& weights;
  const std::vector<X>& x;
  std::vector<X>& y;
  index_t tokens;
};

template <class T, class X>
void add_eigen(std::vector<rival>& rivals, const product_operands<T, X>& o) {
  if constexpr (std::is_same_v<T, float> && std::is_same_v<X, float>) {
    rivals.push_back(
        {"eigen", [o, turn = rotation(o.weights)]() mutable {
           const auto& W = turn.next();
           using rows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
           const Eigen::Map<const rows> w(W.values.data(), W.layer.out, W.layer.in);
           if (o.tokens == 1)  // a vector by its type: Eigen then takes its matrix-vector product
             Eigen::Map<Eigen::VectorXf>(o.y.data(), W.layer.out).noalias() =
                 w * Eigen::Map<const Eigen::VectorXf>(o.x.data(), W.layer.in);
           else
             Eigen::Map<Eigen::MatrixXf>(o.y.data(), W.layer.out, o.tokens).noalias() =
                 w * Eigen::Map<const Eigen::MatrixXf>(o.x.data(), W.layer.in, o.tokens);
         }});
  }
}

template <class T, class X>
void add_openblas([[maybe_unused]] std::vector<rival>& rivals,
                  [[maybe_unused]] const product_operands<T, X>& o) {
#if defined(LORA_BENCH_OPENBLAS)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<X, float>) {
    rivals.push_back({"openblas", [o, turn = rotation(o.weights)]() mutable {
                        const auto& W = turn.next();
                        const auto [out, in, tokens] =
                            std::tuple(static_cast<int>(W.layer.out), static_cast<int>(W.layer.in),
                                       static_cast<int>(o.tokens));
                        if (tokens == 1)
                          cblas_sgemv(CblasRowMajor, CblasNoTrans, out, in, 1, W.values.data(), in,
                                      o.x.data(), 1, 0, o.y.data(), 1);
                        else
                          cblas_sgemm(CblasColMajor, CblasTrans, CblasNoTrans, out, tokens, in, 1,
                                      W.values.data(), in, o.x.data(), in, 0, o.y.data(), out);
                      }});
  }
#endif
}

#if defined(LORA_BENCH_ONEDNN)
template <class V>
constexpr dnnl::memory::data_type onednn_type() {
  return std::is_same_v<V, float> ? dnnl::memory::data_type::f32 : dnnl::memory::data_type::bf16;
}

/// One primitive, and the weights of the pool as it reads them.
template <class T, class X>
class onednn_product {
  using tag = dnnl::memory::format_tag;

 public:
  onednn_product(const product_operands<T, X>& o, bool reorder) {
    const shape layer = o.weights[0].layer;
    const dnnl::memory::desc x({o.tokens, layer.in}, onednn_type<X>(), tag::ab);
    const dnnl::memory::desc y({o.tokens, layer.out}, onednn_type<X>(), tag::ab);
    const dnnl::memory::desc rows({layer.in, layer.out}, onednn_type<T>(), tag::ba);
    const dnnl::memory::desc any({layer.in, layer.out}, onednn_type<T>(), tag::any);
    const dnnl::matmul::primitive_desc kernel(dnnl::matmul::desc(x, reorder ? any : rows, y),
                                              engine_);
    implementation_ = kernel.impl_info_str();
    if (is_reference()) return;
    primitive_ = dnnl::matmul(kernel);
    x_ = dnnl::memory(x, engine_, const_cast<X*>(o.x.data()));
    y_ = dnnl::memory(y, engine_, o.y.data());
    for (auto& W : o.weights) {
      dnnl::memory source(rows, engine_, W.values.data());
      if (!reorder) {
        weights_.push_back(source);
        continue;
      }
      storage_.emplace_back(static_cast<index_t>(kernel.weights_desc().get_size()));
      dnnl::memory packed(kernel.weights_desc(), engine_, storage_.back().data());
      dnnl::reorder(source, packed).execute(stream_, source, packed);
      stream_.wait();
      weights_.push_back(packed);
    }
  }

  /// oneDNN answers formats without a kernel for this processor by plain loops.
  bool is_reference() const { return implementation_.find("ref") != std::string::npos; }

  void run() {
    primitive_.execute(stream_, {{DNNL_ARG_SRC, x_},
                                 {DNNL_ARG_WEIGHTS, weights_[turn_++ % weights_.size()]},
                                 {DNNL_ARG_DST, y_}});
    stream_.wait();
  }

 private:
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  dnnl::matmul primitive_;
  std::string implementation_;
  dnnl::memory x_, y_;
  std::vector<buffer<std::byte>> storage_;
  std::vector<dnnl::memory> weights_;
  std::size_t turn_ = 0;
};
#endif

template <class T, class X>
void add_onednn([[maybe_unused]] std::vector<rival>& rivals,
                [[maybe_unused]] const product_operands<T, X>& o, [[maybe_unused]] bool reorder) {
#if defined(LORA_BENCH_ONEDNN)
  if constexpr (std::is_same_v<T, X> && !std::is_same_v<T, lora::float16>) {
    try {
      const auto product = std::make_shared<onednn_product<T, X>>(o, reorder);
      if (!product->is_reference())
        rivals.push_back({reorder ? "onednn" : "onednn_plain", [product] { product->run(); }});
    } catch (const dnnl::error& e) {
      if (e.status != dnnl_unimplemented) throw;
    }
  }
#endif
}

/// All that there are. `packed`: against our panels, so oneDNN may reorder its weights, too.
template <class T, class X>
std::vector<rival> product_rivals(const product_operands<T, X>& o, bool packed) {
  std::vector<rival> rivals;
  add_onednn(rivals, o, packed);
  // These two sit out the largest products, seconds a call each.
  if (o.weights[0].layer.size() * static_cast<double>(o.tokens) < 2e10) {
    add_openblas(rivals, o);
    add_eigen(rivals, o);
  }
  return rivals;
}

}  // namespace lora_bench
