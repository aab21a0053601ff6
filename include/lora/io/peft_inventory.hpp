// SPDX-License-Identifier: Apache-2.0
//
// lora::peft::inventory_of(file)   what a PEFT file holds, as rows: for each module its kind, rank,
//                                  scaling, dtype and the norm of its delta weight; the tensors
//                                  that replace ones of the base; what was not used, and why
//
//   norm   Frobenius, of s B A: |s| sqrt(trace((B^T B)(A A^T))), in double. The delta is formed
//          only where the rank exceeds a dimension, so that it is smaller than a factor.
//          Cancellation can leave about 1e-8 of |s| |B| |A| where the exact norm is smaller than
//          that.
//   cost   2 r^2 (in + out) FLOPs per module; 2 r in out where the rank exceeds a dimension
// For a convolution with groups the norm is that over all channels (peft_verbs.hpp); for experts,
// of all of them together. It is the delta alone: a magnitude, a bias and a change of the base are
// named beside it, not measured.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "lora/io/peft.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {

struct inventory_row {
  std::string module;
  std::string weight;  ///< the base's tensor
  entry_kind kind;
  index_t rank, out_features, in_features, experts;
  double scaling;
  std::string dtype;
  double norm;
  std::string more;  ///< entry::what_else()
};

struct inventory {
  std::vector<inventory_row> modules;
  /// The base's tensors that the file replaces, wholly or in rows.
  std::vector<std::string> replaced;
  /// Tensors and config keys that play no part, with the reason.
  std::vector<std::string> not_used;
  std::vector<std::string>
      notes;        ///< adapter_file::notes(), and modules with values that are not finite
  double norm = 0;  ///< of all deltas together: sqrt(sum of squares)

  /// A table for people, one line a module.
  std::string text() const {
    std::string result;
    std::size_t widest = 6;
    for (const auto& row : modules) widest = std::max(widest, row.module.size());
    const auto pad = [](std::string cell, std::size_t width) {
      cell.resize(std::max(cell.size(), width), ' ');
      return cell + "  ";
    };
    const auto number = [](double value) {
      std::array<char, 32> buffer{};
      const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value,
                                     std::chars_format::general, 4);
      return std::string(buffer.data(), end.ptr);
    };
    const auto line = [&](const std::vector<std::string>& cells) {
      const std::size_t widths[] = {widest, 18, 4, 13, 8, 5, 8};
      std::string text;
      for (std::size_t k = 0; k < cells.size(); ++k)
        text += k < 7 ? pad(cells[k], widths[k]) : cells[k];
      result += text.substr(0, text.find_last_not_of(' ') + 1) + "\n";
    };
    line({"module", "kind", "rank", "out x in", "scaling", "dtype", "norm", ""});
    for (const auto& row : modules)
      line({io_detail::printable(row.module), name_of(row.kind), std::to_string(row.rank),
            std::to_string(row.out_features) + "x" + std::to_string(row.in_features) +
                (row.experts > 1 ? " x" + std::to_string(row.experts) : ""),
            number(row.scaling), row.dtype, number(row.norm), row.more});
    for (const auto& name : replaced) result += "replaces  " + name + "\n";
    for (const auto& name : not_used) result += "not used  " + name + "\n";
    for (const auto& note : notes) result += "note      " + note + "\n";
    return result;
  }
};

namespace inventory_detail {

template <class M>
Eigen::MatrixXd widened(const M& m) {
  Eigen::MatrixXd wide(m.rows(), m.cols());
  for (index_t j = 0; j < m.cols(); ++j)
    for (index_t i = 0; i < m.rows(); ++i) wide(i, j) = lora::detail::widen<double>(m(i, j));
  return wide;
}
template <class M>
Eigen::MatrixXd gram_of_columns(const M& m) {
  const auto wide = widened(m);
  return wide.transpose() * wide;
}
template <class M>
Eigen::MatrixXd gram_of_rows(const M& m) {
  const auto wide = widened(m);
  return wide * wide.transpose();
}

/// |s B A|^2 = s^2 trace((B^T B)(A A^T)); where the rank is above a dimension the smaller product
/// is formed instead.
template <scalar T>
double squared_norm(const adapter<T>& l) {
  const auto A = as_matrix(l.lora_A());
  const auto B = as_matrix(l.lora_B());
  const bool thin = A.rows() <= A.cols() && B.cols() <= B.rows();
  const double sum = thin ? gram_of_columns(B).cwiseProduct(gram_of_rows(A)).sum()
                          : (widened(B) * widened(A)).squaredNorm();
  return l.scaling() * l.scaling() * std::max(sum, 0.0);
}

/// "12 of 14 values are not finite", or nothing.
template <scalar T>
std::string nonfinite_values(const entry<T>& e) {
  std::size_t count = 0, total = 0;
  const auto look = [&](const T* values, index_t size) {
    total += static_cast<std::size_t>(size);
    count += static_cast<std::size_t>(
        std::count_if(values, values + size, [](T v) { return !lora::detail::is_finite(v); }));
  };
  for (const auto& l : e.parts().experts) {
    look(l.lora_A().data(), l.lora_A().size());
    look(l.lora_B().data(), l.lora_B().size());
  }
  for (const auto* values : {&e.parts().bias, &e.parts().magnitude, &e.parts().diagonal})
    look(values->data(), static_cast<index_t>(values->size()));
  if (count == 0) return {};
  return std::to_string(count) + " of " + std::to_string(total) + " values are not finite";
}

}  // namespace inventory_detail

template <scalar T>
inventory inventory_of(const adapter_file<T>& file) {
  inventory result;
  double total = 0;
  for (const auto& [name, e] : file) {
    double squares = 0;
    for (const auto& l : e.parts().experts) squares += inventory_detail::squared_norm(l);
    total += squares;
    if (const auto bad = inventory_detail::nonfinite_values(e); !bad.empty())
      result.notes.push_back(io_detail::printable(name) + ": " + bad);
    result.modules.push_back(
        {name, e.weight_name(), e.kind(), e.rank(), e.out_features(), e.in_features(), e.experts(),
         e.scaling(), std::string(name_of(e.parts().dtype_A)), std::sqrt(squares), e.what_else()});
  }
  result.norm = std::sqrt(total);
  result.notes.insert(result.notes.end(), file.notes().begin(), file.notes().end());
  for (const auto& each : file.replacements()) {
    if (each.applies())
      result.replaced.push_back(io_detail::printable(each.name) +
                                (each.why == replacement::reason::unasked
                                     ? ", if the base has it: the config does not ask"
                                     : ""));
    else
      result.not_used.push_back(io_detail::printable(each.key) +
                                ": a copy that PEFT writes beside the value that counts");
  }
  for (const auto& [name, rows] : file.token_rows())
    result.replaced.push_back(io_detail::printable(name) + ".weight, " +
                              std::to_string(rows.ids().size()) + " rows");
  for (const auto& name : file.left_out())
    result.not_used.push_back(io_detail::printable(name) + ": left out as asked");
  for (const auto& what : file.passed_over()) result.not_used.push_back(what);
  for (const auto& key : file.unused_patterns()) result.not_used.push_back(key);
  for (const auto& key : file.ignored_keys())
    result.not_used.push_back("config key " + io_detail::in_quotes(key));
  return result;
}

}  // namespace lora::inline LORA_DETAIL_ABI::peft
