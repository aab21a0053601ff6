// SPDX-License-Identifier: Apache-2.0
//
// The one harness of the tests that compare with numbers of other projects (../shared/outside):
// where their files are, how a case is read, how ours are compared with theirs, and how far PEFT's
// own arithmetic may be from exact. A tolerance is a bound of docs/numerics.md, or the atol and
// rtol that a case states.
#pragma once

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "lora/concepts.hpp"
#include "lora/io/safetensors.hpp"
#include "support/agreement.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"

namespace golden {

namespace fs = std::filesystem;
using json = nlohmann::ordered_json;  // a pattern table is looked up in its order
using agreement::formats;
using agreement::part;
using agreement::state;
using Eigen::MatrixXd;
using Eigen::VectorXd;

inline fs::path outside(const fs::path& below) { return fs::path(LORA_OUTSIDE_DIR) / below; }
/// The cases of PEFT 0.21, a folder each.
inline fs::path root() { return outside("golden/peft-0.21"); }

inline json read_json(const fs::path& path) {
  std::ifstream stream(path);
  if (!stream) throw std::runtime_error(path.string() + ": cannot be opened");
  return json::parse(stream);
}

/// A case: what case.json says of it, the base, and the tensors of inputs and outputs.
struct case_files {
  fs::path folder;
  json about = read_json(folder / "case.json");
  lora::safetensors::file base =
      lora::safetensors::read(folder / about.value("base", "base.safetensors"));
  lora::safetensors::file io = lora::safetensors::read(folder / "io.safetensors");
};

/// A tensor as it lies in the file: its last dimension along a row. Activations are its transpose,
/// a token in a column.
template <class T>
test::matrix<T> tensor(const lora::safetensors::file& file, const std::string& name) {
  const auto values = file.copy<T>(name);
  const auto& shape = file.at(name).shape;
  const auto cols = shape.empty() ? 1 : static_cast<Eigen::Index>(shape.back());
  return Eigen::Map<const test::matrix<T>>(values.data(),
                                           static_cast<Eigen::Index>(values.size()) / cols, cols);
}
/// A kernel as a weight: its first dimension x the others.
template <class T>
test::matrix<T> kernel(const lora::safetensors::file& file, const std::string& name) {
  const auto values = file.copy<T>(name);
  const auto rows = static_cast<Eigen::Index>(file.at(name).shape[0]);
  return Eigen::Map<const test::matrix<T>>(values.data(), rows,
                                           static_cast<Eigen::Index>(values.size()) / rows);
}
/// Outputs [tokens, features], or [images, features, places ...], as features x (tokens or images *
/// places).
template <class T>
test::col_matrix<T> columns(const lora::safetensors::file& file, const std::string& name) {
  const auto& shape = file.at(name).shape;
  if (shape.size() == 2) return tensor<T>(file, name).transpose();
  const auto values = file.copy<T>(name);
  const auto images = static_cast<Eigen::Index>(shape[0]),
             features = static_cast<Eigen::Index>(shape[1]);
  const auto places = static_cast<Eigen::Index>(values.size()) / (images * features);
  test::col_matrix<T> result(features, images * places);
  for (Eigen::Index n = 0; n < images; ++n)
    result.middleCols(n * places, places) =
        Eigen::Map<const test::matrix<T>>(values.data() + n * features * places, features, places);
  return result;
}

// ---- Convolution, by its definition. ----

struct conv_shape {
  std::vector<lora::index_t> kernel, stride, padding, dilation;
  lora::index_t groups;
};

/// The matrix of patches: (channels * kernel) x positions of one sample [channels, extents...].
template <class T>
Eigen::Matrix<T, -1, -1> patches(const T* x, lora::index_t channels,
                                 const std::vector<lora::index_t>& extents, const conv_shape& c,
                                 std::vector<lora::index_t>& out) {
  const std::size_t n = extents.size();
  out.clear();
  lora::index_t positions = 1, taps = 1;
  for (std::size_t d = 0; d < n; ++d) {
    out.push_back(
        (extents[d] + 2 * c.padding[d] - c.dilation[d] * (c.kernel[d] - 1) - 1) / c.stride[d] + 1);
    positions *= out[d];
    taps *= c.kernel[d];
  }
  Eigen::Matrix<T, -1, -1> result(channels * taps, positions);
  for (lora::index_t p = 0; p < positions; ++p)
    for (lora::index_t channel = 0; channel < channels; ++channel)
      for (lora::index_t tap = 0; tap < taps; ++tap) {
        lora::index_t at = 0, rest_p = p, rest_t = tap;
        bool inside = true;
        std::vector<lora::index_t> coordinate(n);
        for (std::size_t d = n; d-- > 0;) {
          coordinate[d] = (rest_p % out[d]) * c.stride[d] - c.padding[d] +
                          (rest_t % c.kernel[d]) * c.dilation[d];
          rest_p /= out[d];
          rest_t /= c.kernel[d];
          inside = inside && coordinate[d] >= 0 && coordinate[d] < extents[d];
        }
        for (std::size_t d = 0; inside && d < n; ++d) at = at * extents[d] + coordinate[d];
        lora::index_t area = 1;
        for (const auto extent : extents) area *= extent;
        result(channel * taps + tap, p) = inside ? x[channel * area + at] : T(0);
      }
  return result;
}

/// The input x of a case with a graph, features x tokens: the patches of the images where the first
/// operation is a convolution with stride 1 and without padding.
template <class T>
test::col_matrix<T> input(const case_files& c) {
  const json& first = c.about.at("graph").at(0);
  if (first.at("op") != "conv2d") return tensor<T>(c.io, "x").transpose();
  const auto values = c.io.copy<T>("x");
  const auto& shape = c.io.at("x").shape;
  const auto images = static_cast<lora::index_t>(shape[0]),
             channels = static_cast<lora::index_t>(shape[1]);
  const lora::index_t k = first.at("kernel");
  const conv_shape conv{{k, k}, {1, 1}, {0, 0}, {1, 1}, 1};
  const std::vector<lora::index_t> extents(shape.begin() + 2, shape.end());
  test::col_matrix<T> result;
  for (lora::index_t n = 0; n < images; ++n) {
    std::vector<lora::index_t> places;
    const T* const image = values.data() + n * static_cast<lora::index_t>(values.size()) / images;
    const test::col_matrix<T> all = patches(image, channels, extents, conv, places);
    if (n == 0) result.resize(all.rows(), images * all.cols());
    result.middleCols(n * all.cols(), all.cols()) = all;
  }
  return result;
}

/// Largest |got - want| / allowed over the elements; infinite when anything is not a number.
inline double share(const MatrixXd& got, const MatrixXd& want, const MatrixXd& allowed) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  if (got.rows() != want.rows() || got.cols() != want.cols() || allowed.rows() != want.rows() ||
      allowed.cols() != want.cols() || !allowed.allFinite())
    return infinity;
  double largest = 0;
  for (Eigen::Index k = 0; k < got.size(); ++k) {
    const double difference = std::abs(got(k) - want(k));
    if (difference == 0) continue;
    const double ratio = difference / allowed(k);
    if (!(ratio <= largest)) largest = std::isnan(ratio) ? infinity : ratio;
  }
  return largest;
}
/// The same for one tolerance, or |got - want| <= atol + rtol |want| as case.json states it.
inline double share(const MatrixXd& got, const MatrixXd& want, double allowed) {
  return share(got, want, MatrixXd::Constant(want.rows(), want.cols(), allowed));
}
inline double share(const MatrixXd& got, const MatrixXd& want, const json& entry) {
  return share(
      got, want,
      (entry.at("rtol").get<double>() * want.array().abs() + entry.at("atol").get<double>())
          .matrix());
}

/// Largest |a - b|; infinite when anything is not a number.
inline double distance(const MatrixXd& a, const MatrixXd& b) { return share(a, b, 1.0); }

inline std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> result;
  for (std::size_t from = 0; from <= text.size();) {
    const auto end = std::min(text.find(at, from), text.size());
    result.push_back(text.substr(from, end - from));
    from = end + 1;
  }
  return result;
}

template <class T>
formats all_in() {
  return agreement::formats_of<T, T, T>();
}

/// sum of |s| |B| |A|
inline MatrixXd magnitude(const std::vector<part>& parts, Eigen::Index out, Eigen::Index in) {
  MatrixXd d = MatrixXd::Zero(out, in);
  for (const part& p : parts) d += std::abs(p.s) * p.B.cwiseAbs() * p.A.cwiseAbs();
  return d;
}
/// W + sum of s B A, in double.
inline MatrixXd exact_sum(const MatrixXd& W, const std::vector<part>& parts) {
  MatrixXd sum = MatrixXd::Zero(W.rows(), W.cols());
  for (const part& p : parts) sum += p.s * p.B * p.A;
  return W + sum;
}

/// PEFT merges one adapter after the other and rounds each sum to the weight's format. One such
/// step keeps the bound of our merge: s B A is a product of r terms, s is rounded and multiplied
/// once, W is added once (gamma_{r+3}).
inline MatrixXd one_by_one_bound(const MatrixXd& W, const std::vector<part>& parts,
                                 const formats& f) {
  MatrixXd largest = W.cwiseAbs(), bound = MatrixXd::Zero(W.rows(), W.cols());
  for (const part& p : parts) {
    bound += agreement::merge_bound(largest + bound, {p}, f);
    largest += magnitude({p}, W.rows(), W.cols());
  }
  return bound;
}

/// PEFT's linear layer: y = W x + b, then for each mixed adapter y += s B (A x), each rounded. A
/// term of the base meets n + 1 roundings and one more for each adapter, no more than the n + R + 1
/// of ours; a term of adapter i n + r_i + 2 and one for itself and each that follows, no more than
/// n + R + 3; but the bias, which may start the chain, as many as a term of the base. What is
/// merged was merged one by one.
inline MatrixXd peft_bound(const MatrixXd& W, const VectorXd& bias, const state& where,
                           const MatrixXd& x, const formats& f) {
  const auto steps =
      agreement::gamma(W.cols() + agreement::total_rank(where.mixed) + 1, f.accumulator.u);
  const MatrixXd more =
      one_by_one_bound(W, where.merged, f) - agreement::merge_bound(W, where.merged, f);
  MatrixXd bound =
      agreement::error_bound(W, bias, where, x, f) + (1 + steps) * more.cwiseAbs() * x.cwiseAbs();
  if (bias.size() != 0) bound.colwise() += steps * bias.cwiseAbs();
  return bound;
}

}  // namespace golden
