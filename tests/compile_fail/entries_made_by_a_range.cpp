// SPDX-License-Identifier: Apache-2.0
// expect: the range makes each entry as it is walked
#include "lora/lora.hpp"

#include "lora/io/peft_verbs.hpp"

struct iterator {
  const lora::peft::entry<float>* at;
#ifdef LORA_MUST_FAIL
  lora::peft::entry<float> operator*() const { return *at; }
#else
  lora::peft::scaled_entry<float> operator*() const { return lora::scaled(0.5, *at); }
#endif
  iterator& operator++() { return ++at, *this; }
  bool operator!=(const iterator& other) const { return at != other.at; }
};

struct range {
  const lora::peft::entry<float>* first;
  iterator begin() const { return {first}; }
  iterator end() const { return {first + 2}; }
};

void merge_all(Eigen::MatrixXf& W, const range& entries) { lora::merge(W, entries); }
