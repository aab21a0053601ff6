// SPDX-License-Identifier: Apache-2.0
//
// One translation unit of a program whose units are built with different flags. UNIT is its number.
#include <cstring>
#include <typeinfo>

#include "lora/lora.hpp"
#include "units.hpp"

#define PASTE(a, b) a##b
#define NAME(a, b) PASTE(a, b)

unit_result NAME(unit_, UNIT)(const Eigen::MatrixXf& W, const Eigen::MatrixXf& A,
                              const Eigen::MatrixXf& B, const Eigen::VectorXf& x) {
  const lora::adapter<float> l{A, B, {.alpha = 7}};
  unit_result result;
  result.mixed.resize(W.rows());
  lora::forward(W, x, result.mixed, l);
  lora::linear<float> layer{W};
  layer.attach("l", l);
  layer.merge();
  result.merged.resize(W.rows());
  layer.forward(x, result.merged);
  result.type = typeid(l).name();
#if defined(__cpp_exceptions)
  try {
    lora::forward(W, result.mixed, result.merged, l);
    result.refused = W.rows() == W.cols();
  } catch (const lora::shape_error&) {
    result.refused = true;
  }
#else
  result.refused = true;  // would end the program
#endif
  return result;
}
