// SPDX-License-Identifier: Apache-2.0
//
// What README's snippets assume to exist. Each snippet is compiled inside a function of its own.
#pragma once

#include <cstdio>
#include <vector>

#include "lora/io/peft.hpp"
#include "lora/lora.hpp"

// A snippet declares what the context declares for the others.
#pragma GCC diagnostic ignored "-Wshadow"

inline Eigen::MatrixXf base_weight() { return Eigen::MatrixXf::Random(24, 16); }
inline const Eigen::MatrixXf A = Eigen::MatrixXf::Random(4, 16), B = Eigen::MatrixXf::Random(24, 4);
inline const Eigen::MatrixXf C = Eigen::MatrixXf::Random(3, 16), D = Eigen::MatrixXf::Random(24, 3);
inline const lora::adapter<float> style{A, B, {.alpha = 16}};
inline const lora::adapter<float> subject{
    C, D, {.alpha = 4, .rule = lora::scaling_rule::rank_stabilized}};
inline const std::vector<lora::adapter<float>> adapters{style, subject};
inline const Eigen::VectorXf x = Eigen::VectorXf::Random(16);
inline Eigen::VectorXf y(24), y_1(24), y_2(24);
inline const Eigen::MatrixXf X = Eigen::MatrixXf::Random(16, 5);
inline Eigen::MatrixXf Y(24, 5);
inline const auto W_bf16 = base_weight().cast<lora::bfloat16>().eval();
inline Eigen::MatrixXf& weight_of(const std::string&) {
  static Eigen::MatrixXf weight = base_weight();
  return weight;
}
