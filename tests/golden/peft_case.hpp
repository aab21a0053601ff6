// SPDX-License-Identifier: Apache-2.0
//
// One case of golden/peft-0.21: a base, adapters as PEFT wrote them, and tensors that PEFT computed
// next to float64 ones. The case's model is a list of operations; it is run here with our verbs,
// mixed and merged, in float and in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "lora/io/peft.hpp"
#include "lora/io/peft_convert.hpp"
#include "lora/lora.hpp"
#include "support/golden.hpp"

namespace golden {

using lora::index_t;
namespace st = lora::safetensors;
namespace peft = lora::peft;

/// Row-major, as PyTorch has it. Token numbers are values too: they are small.
template <class T>
struct array {
  std::vector<index_t> shape;
  std::vector<T> values;

  index_t size() const { return static_cast<index_t>(values.size()); }
  index_t last() const { return shape.back(); }
  /// Features x tokens: the last dimension is a column.
  auto columns() {
    return Eigen::Map<Eigen::Matrix<T, -1, -1>>(values.data(), last(), size() / last());
  }
  auto columns() const {
    return Eigen::Map<const Eigen::Matrix<T, -1, -1>>(values.data(), last(), size() / last());
  }
  /// First dimension x the others.
  auto matrix() {
    return Eigen::Map<Eigen::Matrix<T, -1, -1, Eigen::RowMajor>>(values.data(), shape[0],
                                                                 size() / shape[0]);
  }
  auto matrix() const {
    return Eigen::Map<const Eigen::Matrix<T, -1, -1, Eigen::RowMajor>>(values.data(), shape[0],
                                                                       size() / shape[0]);
  }
};

template <class T>
array<T> zeros(std::vector<index_t> shape) {
  index_t size = 1;
  for (const auto extent : shape) size *= extent;
  return {std::move(shape), std::vector<T>(static_cast<std::size_t>(size), T(0))};
}

template <class T>
array<T> load(const st::file& file, const std::string& name) {
  const auto& t = file.at(name);
  array<T> result{{t.shape.begin(), t.shape.end()}, {}};
  if (t.dtype == st::dtype::i64) {
    for (const auto v : file.copy<std::int64_t>(name)) result.values.push_back(static_cast<T>(v));
  } else if (t.dtype == st::dtype::f64 && !std::is_same_v<T, double>) {
    for (const auto v : file.copy<double>(name)) result.values.push_back(static_cast<T>(v));
  } else {
    result.values = file.copy<T>(name);
  }
  return result;
}

template <class T>
using weights = std::map<std::string, array<T>>;

template <class T>
weights<T> load_all(const fs::path& path) {
  const auto file = st::read(path);
  weights<T> result;
  for (const auto& t : file)
    result.emplace(std::string(t.name), load<T>(file, std::string(t.name)));
  return result;
}

/// What a case says, without numbers.
struct description {
  std::string id;
  json text = read_json(folder() / "case.json");
  fs::path folder() const { return root() / id; }
  explicit description(std::string name) : id(std::move(name)) {}
  const json& expected() const { return text.at("expected"); }
  bool has_graph() const { return text.contains("graph"); }
  json scenario(const std::string& name) const { return text.at("scenarios").at(name); }

  /// What a caller knows beyond the files: the order of registration and the storage of bare
  /// parameters.
  peft::read_options options() const {
    peft::read_options result;
    if (!has_graph()) return result;
    for (const auto& op : text.at("graph")) {
      if (op.at("op") == "conv1d_t")
        result.fan_in_fan_out = true;  // PEFT corrects the config when it sees the base
      if (op.at("op") != "moe") continue;
      for (const auto& p : op.at("params")) result.parameter_order.push_back(p.at("name"));
      result.parameters_in_out = op.at("is_transposed");
    }
    return result;
  }
};

enum class way { mixed, merged };

/// An adapter with its weight.
template <class T>
struct active {
  const peft::adapter_file<T>* file;
  double weight;
};

inline std::vector<index_t> per_dimension(const json& op, const char* key, index_t otherwise,
                                          std::size_t dimensions) {
  if (!op.contains(key)) return std::vector<index_t>(dimensions, otherwise);
  if (op.at(key).is_array()) return op.at(key).get<std::vector<index_t>>();
  return std::vector<index_t>(dimensions, op.at(key).get<index_t>());
}

/// Whether any of the entries has a magnitude.
template <class V>
bool decomposed(const V& entries) {
  return std::any_of(entries.begin(), entries.end(),
                     [](const auto& e) { return !e.of().magnitude().empty(); });
}

/// A model of a case with some adapters, computed in T.
template <class T>
class model {
 public:
  model(const description& about, weights<T> base, std::vector<active<T>> adapters, way how)
      : about_(about), w_(std::move(base)), adapters_(std::move(adapters)), way_(how) {
    replace();
    if (way_ == way::merged) merge_all();
  }

  const weights<T>& tensors() const { return w_; }

  array<T> run(const array<T>& x) {
    values_.clear();
    values_["h"] = x;
    for (const auto& op : about_.text.at("graph")) step(op);
    return values_.at("h");
  }

  // ---- what the transformers of peft_models use as well
  bool has(const std::string& name) const { return w_.contains(name); }
  array<T>& weight(const std::string& name) { return w_.at(name); }

  /// The active entries of a module, in order.
  std::vector<peft::scaled_entry<T>> entries(const std::string& module) const {
    std::vector<peft::scaled_entry<T>> result;
    for (const auto& a : adapters_)
      if (a.file->contains(module)) result.push_back(lora::scaled(a.weight, converted(a, module)));
    return result;
  }

  /// y = W x + b with the module's adapters; in_out: W is stored in x out.
  array<T> linear(const std::string& module, const array<T>& x, bool in_out = false,
                  std::string weight = "", std::string bias = "") {
    if (weight.empty()) weight = module + ".weight";
    if (bias.empty()) bias = module + ".bias";
    const auto& stored = w_.at(weight);
    auto shape = x.shape;
    shape.back() = in_out ? stored.shape[1] : stored.shape[0];
    auto y = zeros<T>(shape);
    auto to = y.columns();
    const auto W = lora::as_matrix(stored.matrix());
    const auto from = x.columns();
    // A weight can be targeted as a module or as a bare parameter.
    std::vector<peft::scaled_entry<T>> mixed;
    if (way_ == way::mixed) mixed = entries(entries(module).empty() ? weight : module);
    if (in_out)
      lora::forward(W.transpose(), from, to);
    else
      lora::forward(W, from, to);
    if (decomposed(mixed))
      lora::apply(from, to, lora::mixed(stored.matrix(), mixed));
    else if (!mixed.empty())
      lora::apply(from, to, mixed);
    if (w_.contains(bias))
      to.colwise() +=
          Eigen::Map<const Eigen::Matrix<T, -1, 1>>(w_.at(bias).values.data(), to.rows());
    return y;
  }

  array<T> embedding(const std::string& module, const array<T>& ids, double scale = 1) {
    const auto& stored = w_.at(module + ".weight");
    std::vector<index_t> rows;
    for (const auto id : ids.values) rows.push_back(static_cast<index_t>(id));
    auto shape = ids.shape;
    shape.push_back(stored.shape[1]);
    auto y = zeros<T>(shape);
    auto to = y.columns();
    const auto W = lora::scaled_embedding(stored.matrix(), scale);
    const auto mixed = way_ == way::mixed ? entries(module) : std::vector<peft::scaled_entry<T>>{};
    if (mixed.empty())
      lora::embed(W, rows, to);
    else if (decomposed(mixed))
      lora::embed(W, rows, to, lora::mixed(stored.matrix(), mixed));
    else
      lora::embed(W, rows, to, mixed);
    if (way_ == way::mixed)
      for (const auto& a : adapters_)
        if (const auto found = a.file->token_rows().find(module);
            found != a.file->token_rows().end())
          lora::overwrite_rows(rows, to, found->second, scale);
    return y;
  }

  way how() const { return way_; }

 private:
  /// Plain as it is, or made plain with the base as published.
  const peft::entry<T>& converted(const active<T>& a, const std::string& module) const {
    const auto& e = a.file->at(module);
    if (e.change() == peft::base_change::none) return e;
    auto& kept = converted_[&e];
    if (!kept) kept.emplace(peft::converted(pristine_.at(e.weight_name()).matrix(), e));
    return *kept;
  }

  /// Saved modules, trained biases and saved embeddings are values: the same in both ways.
  void replace() {
    pristine_ = w_;
    for (const auto& a : adapters_)
      for (const auto& each : a.file->replacements())
        if (each.applies())
          w_[each.name] = {{each.shape.begin(), each.shape.end()}, each.template values<T>()};
  }

  void merge_all() {
    std::map<std::string, std::vector<peft::scaled_entry<T>>> by_module;
    for (const auto& a : adapters_) {
      for (const auto& [name, rows] : a.file->token_rows()) {
        auto W = w_.at(name + ".weight").matrix();
        lora::assign_rows(W, rows);
      }
      for (const auto& [name, e] : *a.file)
        by_module[name].push_back(lora::scaled(a.weight, converted(a, name)));
    }
    for (const auto& [name, list] : by_module) merge_one(list);
  }

  void merge_one(const std::vector<peft::scaled_entry<T>>& list) {
    const auto& first = list.front().of();
    auto& stored = w_.at(first.weight_name());
    if (first.experts() > 1) {
      lora::merge(lora::tensor_view<T, 3>(stored.values,
                                          {stored.shape[0], stored.shape[1], stored.shape[2]}),
                  list);
      return;
    }
    auto W = stored.matrix();
    if (std::any_of(list.begin(), list.end(),
                    [](const auto& e) { return !e.of().lora_bias().empty(); }))
      lora::merge(W, w_.at(first.bias_name()).values, list);
    else
      lora::merge(W, list);
  }

  // ---- the operations of a graph
  void step(const json& op) {
    const std::string kind = op.at("op"), to = op.value("dst", "h");
    const auto source = [&](std::size_t k) -> const array<T>& {
      if (!op.contains("src")) return values_.at("h");
      return values_.at(op.at("src").is_array() ? op.at("src").at(k).get<std::string>()
                                                : op.at("src").get<std::string>());
    };
    array<T> result;
    if (kind == "linear" || kind == "conv1d_t") {
      result = linear(op.at("module"), source(0), kind == "conv1d_t");
    } else if (kind == "embedding") {
      result = embedding(op.at("module"), source(0), op.value("scale", 1.0));
    } else if (kind == "conv1d" || kind == "conv2d" || kind == "conv3d") {
      result = convolution(op, source(0));
    } else if (kind == "mha") {
      result = attention(op, source(0));
    } else if (kind == "moe") {
      result = experts(op, source(0));
    } else if (kind == "flatten") {
      result = source(0);
      result.shape = {result.shape[0], result.size() / result.shape[0]};
    } else if (kind == "relu" || kind == "tanh") {
      result = source(0);
      for (auto& v : result.values) v = kind == "relu" ? std::max(v, T(0)) : std::tanh(v);
    } else {
      REQUIRE((kind == "add" || kind == "mul"));
      result = source(0);
      for (std::size_t k = 0; k < result.values.size(); ++k)
        result.values[k] = kind == "add" ? result.values[k] + source(1).values[k]
                                         : result.values[k] * source(1).values[k];
    }
    values_[to] = std::move(result);
  }

  array<T> convolution(const json& op, const array<T>& x) {
    const std::string module = op.at("module");
    const auto& stored = w_.at(module + ".weight");
    const std::size_t n = stored.shape.size() - 2;
    const conv_shape c{per_dimension(op, "kernel", 1, n), per_dimension(op, "stride", 1, n),
                       per_dimension(op, "padding", 0, n), per_dimension(op, "dilation", 1, n),
                       op.value("groups", index_t{1})};
    const index_t out = stored.shape[0], channels = x.shape[1];
    const std::vector<index_t> extents(x.shape.begin() + 2, x.shape.end());
    std::vector<index_t> positions, shape{x.shape[0], out};
    array<T> y;
    const auto mixed = way_ == way::mixed ? entries(module) : std::vector<peft::scaled_entry<T>>{};
    for (index_t sample = 0; sample < x.shape[0]; ++sample) {
      const Eigen::Matrix<T, -1, -1> all = patches(
          x.values.data() + sample * (x.size() / x.shape[0]), channels, extents, c, positions);
      if (sample == 0) {
        shape.insert(shape.end(), positions.begin(), positions.end());
        y = zeros<T>(shape);
      }
      auto to = lora::row_major(y.values.data() + sample * out * all.cols(), out, all.cols());
      const index_t group_out = out / c.groups, group_in = all.rows() / c.groups;
      const auto W = lora::as_matrix(stored.matrix());
      for (index_t g = 0; g < c.groups; ++g) {
        const Eigen::Matrix<T, -1, -1> piece = all.middleRows(g * group_in, group_in);
        lora::forward(W.middle_rows(g * group_out, group_out), piece,
                      to.middle_rows(g * group_out, group_out));
      }
      // The caller's convolution: the kernel lora_A over all channels, with the base's stride,
      // padding and dilation.
      const auto down = [&](const auto& lora_A) {
        Eigen::Matrix<T, -1, -1> U(lora_A.rows(), all.cols());
        lora::forward(lora_A, all, U);
        return U;
      };
      if (decomposed(mixed))
        lora::apply_through(down, to, lora::mixed(stored.matrix(), mixed));
      else if (!mixed.empty())
        lora::apply_through(down, to, mixed);
      if (const auto bias = w_.find(module + ".bias"); bias != w_.end())
        for (index_t i = 0; i < out; ++i)
          for (index_t p = 0; p < all.cols(); ++p)
            to(i, p) += bias->second.values[static_cast<std::size_t>(i)];
    }
    return y;
  }

  array<T> attention(const json& op, const array<T>& x) {
    const std::string module = op.at("module");
    const index_t width = op.at("embed"), heads = op.at("heads"), head = width / heads;
    const auto qkv =
        linear(module + ".in_proj", x, false, module + ".in_proj_weight", module + ".in_proj_bias");
    auto mixed = zeros<T>(x.shape);
    const index_t batch = x.shape[0], tokens = x.shape[1];
    const auto all = qkv.columns();
    for (index_t b = 0; b < batch; ++b)
      for (index_t h = 0; h < heads; ++h) {
        const auto piece = [&](index_t which) {
          return Eigen::Matrix<T, -1, -1>(
              all.block(which * width + h * head, b * tokens, head, tokens));
        };
        Eigen::Matrix<T, -1, -1> scores =
            piece(1).transpose() * piece(0) / std::sqrt(static_cast<T>(head));
        for (index_t t = 0; t < tokens; ++t) {
          scores.col(t) = (scores.col(t).array() - scores.col(t).maxCoeff()).exp();
          scores.col(t) /= scores.col(t).sum();
        }
        mixed.columns().block(h * head, b * tokens, head, tokens) = piece(2) * scores;
      }
    return linear(module + ".out_proj", mixed);
  }

  /// The mean over experts of relu(x W0) W1.
  array<T> experts(const json& op, const array<T>& x) {
    const std::string module = op.at("module");
    const index_t count = op.at("experts");
    const bool in_out = op.at("is_transposed");
    array<T> y;
    for (index_t e = 0; e < count; ++e) {
      auto h = x;
      for (const auto& p : op.at("params")) {
        h = expert(module + "." + p.at("name").get<std::string>(), e, h, in_out);
        if (&p == &op.at("params").front())
          for (auto& v : h.values) v = std::max(v, T(0));
      }
      if (e == 0) y = zeros<T>(h.shape);
      for (std::size_t k = 0; k < y.values.size(); ++k)
        y.values[k] += h.values[k] / static_cast<T>(count);
    }
    return y;
  }
  array<T> expert(const std::string& name, index_t e, const array<T>& x, bool in_out) {
    auto& stored = w_.at(name);
    const auto slice =
        lora::tensor_view<T, 3>(stored.values, {stored.shape[0], stored.shape[1], stored.shape[2]})
            .slice(e);
    auto shape = x.shape;
    shape.back() = in_out ? stored.shape[2] : stored.shape[1];
    auto y = zeros<T>(shape);
    auto to = y.columns();
    const auto from = x.columns();
    if (in_out)
      lora::forward(slice.matrix().transpose(), from, to);
    else
      lora::forward(slice.matrix(), from, to);
    if (way_ == way::mixed)
      for (const auto& a : entries(name))
        lora::apply(from, to, lora::scaled(a.strength(), a.of().expert(e)));
    return y;
  }

  const description& about_;
  weights<T> w_, pristine_;
  std::vector<active<T>> adapters_;
  way way_;
  std::map<std::string, array<T>> values_;
  mutable std::map<const peft::entry<T>*, std::optional<peft::entry<T>>> converted_;
};

// ---- comparing

/// |got - want| <= atol + rtol |want| for every element.
template <class T, class U>
bool within(const array<T>& got, const array<U>& want, double atol, double rtol) {
  if (got.values.size() != want.values.size()) return false;
  for (std::size_t k = 0; k < got.values.size(); ++k) {
    const auto g = static_cast<double>(got.values[k]), w = static_cast<double>(want.values[k]);
    if (!(std::abs(g - w) <= atol + rtol * std::abs(w))) return false;
  }
  return true;
}

/// Frobenius norm of the difference over that of the wanted one.
template <class T, class U>
double relative(const array<T>& got, const array<U>& want) {
  REQUIRE(got.values.size() == want.values.size());
  double difference = 0, norm = 0;
  for (std::size_t k = 0; k < got.values.size(); ++k) {
    const auto w = static_cast<double>(want.values[k]);
    difference += std::pow(static_cast<double>(got.values[k]) - w, 2);
    norm += w * w;
  }
  return norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm);
}

/// Rows of docs/peft-agreement.md: the largest errors of a case. Written to the file that
/// LORA_TABLE names, when it does.
class agreement_table {
 public:
  void add(const std::string& id, const std::string& what, double ours, double ours_double,
           double pefts) {
    auto& row = rows_[id];
    if (row.what.empty()) row.what = what;
    row.ours = std::max(row.ours, ours);
    row.ours_double = std::max(row.ours_double, ours_double);
    row.pefts = std::max(row.pefts, pefts);
    ++row.tensors;
  }
  ~agreement_table() {
    const char* path = std::getenv("LORA_TABLE");
    if (path == nullptr) return;
    std::ofstream out(path, std::ios::app);
    for (const auto& [id, row] : rows_) {
      char line[256];
      std::snprintf(line, sizeof line, "| %s | %s | %zu | %.1e | %.1e | %.1e |\n", id.c_str(),
                    row.what.c_str(), row.tensors, row.ours, row.ours_double, row.pefts);
      out << line;
    }
  }

 private:
  struct errors {
    std::string what;
    double ours = 0, ours_double = 0, pefts = 0;
    std::size_t tensors = 0;
  };
  std::map<std::string, errors> rows_;
};

inline agreement_table& table() {
  static agreement_table t;
  return t;
}

/// An entry without the change of the base that its file asks for.
template <class T>
peft::entry<T> plain_entry(const array<T>& W, const peft::entry<T>& e) {
  return peft::converted(W.matrix(), e);
}

// Compiled once, in model.cpp: the tests of the goldens all run these.
extern template peft::entry<float> plain_entry(const array<float>&, const peft::entry<float>&);
extern template peft::entry<double> plain_entry(const array<double>&, const peft::entry<double>&);
extern template class model<float>;
extern template class model<double>;

}  // namespace golden
