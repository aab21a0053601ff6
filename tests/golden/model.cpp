// SPDX-License-Identifier: Apache-2.0
#include "golden/peft_case.hpp"

template class golden::model<float>;
template class golden::model<double>;
