// SPDX-License-Identifier: Apache-2.0
//
// The names of the library's types without their definitions, for headers that only pass them on.
// Needs no Eigen.
#pragma once

#include "lora/version.hpp"

namespace lora::inline LORA_DETAIL_ABI {

struct float16;
struct bfloat16;
enum class storage_order;
struct scaling;
struct merge_report;
class workspace;
class any_kind;
class module_adapter;
class adapter_set;
template <class Acc>
class mixed_form;
template <class T>
class packed_weight;
template <class F>
class packed_adapter;
template <class F>
class batch;
template <class T>
class linear;
template <class T>
class model;

}  // namespace lora::inline LORA_DETAIL_ABI
