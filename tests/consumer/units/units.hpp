// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Eigen/Core>
#include <string>

struct unit_result {
  Eigen::VectorXf mixed, merged;
  std::string type;      ///< the mangled name of lora::adapter<float> in this unit
  bool refused = false;  ///< a wrong shape threw the shape_error of this unit
};

using unit = unit_result(const Eigen::MatrixXf& W, const Eigen::MatrixXf& A,
                         const Eigen::MatrixXf& B, const Eigen::VectorXf& x);
unit unit_0, unit_1, unit_2, unit_3, unit_4;
