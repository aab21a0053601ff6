// SPDX-License-Identifier: Apache-2.0
//
// What an argument looks like, told by its members: entries of files, DoRA, packed forms, pointers,
// pairs, arrays. For the sentences of refusals.hpp, which name what was passed without including
// the header that defines it.
#pragma once

#include <iterator>
#include <type_traits>
#include <utility>

#include "lora/concepts.hpp"
#include "lora/detail/eigen.hpp"

namespace lora::inline LORA_DETAIL_ABI::detail {

template <class D>
void eigen_array_expression(const Eigen::ArrayBase<D>&);
template <class A>
concept eigen_array = requires(const bare<A>& a) { detail::eigen_array_expression(a); };
template <class A>
concept range_like = !eigen_matrix<A> && !eigen_array<A> && requires(const bare<A>& a) {
  std::begin(a);
  std::end(a);
};
template <range_like R>
using element_of = bare<decltype(*std::begin(std::declval<const bare<R>&>()))>;
template <class A>
concept pointer_like = !range_like<A> && !any_matrix<A> && requires(const bare<A>& a) { *a; };
template <class A>
concept pair_like = requires(const bare<A>& a) {
  a.first;
  a.second;
};
template <class A>
concept factors_like = requires(bare<A>& a) {
  a.lora_A();
  a.lora_B();
};
/// peft::entry, scaled or not.
template <class A>
concept entry_like = requires(const bare<A>& a) {
  a.factors();
  a.what_else();
} || requires(const bare<A>& a) { a.of().what_else(); };
/// dora_adapter, scaled or not.
template <class A>
concept dora_like = !entry_like<A> && (
                                          requires(const bare<A>& a) {
                                            a.factors().lora_A();
                                            a.magnitude();
                                          } || requires(const bare<A>& a) { a.of().magnitude(); });
/// Adapters of any kind that say their steps (steps.hpp).
template <class A>
concept says_steps = requires { &bare<A>::template steps<float>; };
/// mixed_form.
template <class A>
concept form_like = requires(const bare<A>& a) {
  a.steps();
  a.additive();
};
/// packed_adapter and scaled_packed_adapter.
template <class A>
concept packed_adapter_like = requires(const bare<A>& a) { a.A_panels(); } ||
                              requires(const bare<A>& a) { a.adapter().A_panels(); };
template <class A>
concept packed_weight_like = requires(const bare<A>& a) {
  a.panels();
  a.out_features();
};
template <class A>
concept batch_like = requires(bare<A>& a) {
  a.add();
  a.most_rank();
};
template <class A>
concept linear_like = requires(const bare<A>& a) {
  a.packed();
  a.names();
};
/// peft::adapter_file.
template <class A>
concept file_like = !linear_like<A> && requires(const bare<A>& a) {
  a.names();
  a.at(*std::begin(a.names()));
};
template <class A>
concept biased_like = requires(const bare<A>& a) {
  a.weight;
  a.bias;
};
template <class A>
concept tensor_like = requires(const bare<A>& a) {
  a.shape();
  a.matrix();
};

/// void and what is as small as a byte.
template <class T>
inline constexpr bool is_byte = std::is_void_v<T>;
template <class T>
  requires(sizeof(T) == 1)
inline constexpr bool is_byte<T> = true;

}  // namespace lora::inline LORA_DETAIL_ABI::detail
