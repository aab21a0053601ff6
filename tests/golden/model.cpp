// SPDX-License-Identifier: Apache-2.0
#include "golden/peft_case.hpp"

template lora::peft::entry<float> golden::plain_entry(const array<float>&,
                                                      const lora::peft::entry<float>&);
template lora::peft::entry<double> golden::plain_entry(const array<double>&,
                                                       const lora::peft::entry<double>&);
template class golden::model<float>;
template class golden::model<double>;
