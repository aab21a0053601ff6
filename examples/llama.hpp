// SPDX-License-Identifier: Apache-2.0
//
// A small Llama on lora::linear: every projection is a layer that keeps its adapters, so switching,
// mixing and merging them is a call, also in the middle of a text. Written to be read: no cache, no
// threads of its own, one matrix per step.
//
//   llama::model<float> model = llama::read<float>("data/base");
//   model.attach("style", lora::peft::read("data/adapters/style"));
//   model.merge("style");
//   const auto text = model.greedy(prompt, 40, end_token);
//
// The architecture (Touvron et al., arXiv 2302.13971) as Hugging Face stores it: RMSNorm, rotary
// positions that turn the halves of a head, grouped key/value heads, SwiGLU. Activations are hidden
// x tokens: a token is a column.
#pragma once

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "lora/io/peft.hpp"
#include "lora/io/safetensors.hpp"
#include "lora/lora.hpp"

namespace llama {

using lora::index_t;
using tokens = std::vector<std::int64_t>;

struct shape {
  index_t hidden, intermediate, layers, heads, kv_heads, head, vocabulary;
  double norm_epsilon, rope_theta;
  bool tied;  ///< the embedding is the output matrix too
};

/// Reads config.json; throws std::runtime_error when it asks for something that this engine does
/// not compute.
inline shape read_shape(const std::filesystem::path& path) {
  std::ifstream stream(path);
  if (!stream) throw std::runtime_error(path.string() + ": cannot be opened");
  const auto config = nlohmann::json::parse(stream);
  const auto need = [&](bool holds, const char* what) {
    if (!holds) throw std::runtime_error(path.string() + ": this engine needs " + what);
  };
  const auto rope = config.value("rope_parameters", nlohmann::json::object());
  need(config.value("model_type", "") == "llama", "model_type llama");
  need(config.value("hidden_act", "silu") == "silu", "hidden_act silu");
  need(!config.value("attention_bias", false) && !config.value("mlp_bias", false),
       "layers without bias");
  need(rope.value("rope_type", "default") == "default" &&
           config.value("rope_scaling", nlohmann::json()).is_null(),
       "plain rotary positions");
  shape s{.hidden = config.at("hidden_size"),
          .intermediate = config.at("intermediate_size"),
          .layers = config.at("num_hidden_layers"),
          .heads = config.at("num_attention_heads"),
          .kv_heads = config.at("num_key_value_heads"),
          .head = 0,
          .vocabulary = config.at("vocab_size"),
          .norm_epsilon = config.at("rms_norm_eps"),
          .rope_theta = rope.value("rope_theta", config.value("rope_theta", 10000.0)),
          .tied = config.value("tie_word_embeddings", false)};
  need(s.hidden > 0 && s.heads > 0 && s.kv_heads > 0 && s.heads % s.kv_heads == 0,
       "heads in equal groups");
  s.head = config.value("head_dim", s.hidden / s.heads);
  need(s.head > 0 && s.head % 2 == 0, "an even head_dim");
  return s;
}

/// Weights stored as T; activations in float, or in double for T = double.
template <class T>
class model {
 public:
  using real = lora::accumulator_t<T>;
  using matrix = Eigen::Matrix<real, Eigen::Dynamic, Eigen::Dynamic>;
  using layer = lora::linear<T>;
  /// Sees what goes into each layer: (its name, in_features x tokens).
  using observer = std::function<void(const std::string& layer, const matrix& input)>;

  model(const llama::shape& s, const lora::safetensors::file& weights) : shape_(s) {
    embedding_ = load(weights, "model.embed_tokens.weight", s.vocabulary, s.hidden);
    for (index_t i = 0; i < s.layers; ++i) {
      const std::string block = block_name(i);
      load_norm(weights, block + "input_layernorm");
      load_norm(weights, block + "post_attention_layernorm");
      load_layer(weights, block + "self_attn.q_proj", s.heads * s.head, s.hidden);
      load_layer(weights, block + "self_attn.k_proj", s.kv_heads * s.head, s.hidden);
      load_layer(weights, block + "self_attn.v_proj", s.kv_heads * s.head, s.hidden);
      load_layer(weights, block + "self_attn.o_proj", s.hidden, s.heads * s.head);
      load_layer(weights, block + "mlp.gate_proj", s.intermediate, s.hidden);
      load_layer(weights, block + "mlp.up_proj", s.intermediate, s.hidden);
      load_layer(weights, block + "mlp.down_proj", s.hidden, s.intermediate);
    }
    load_norm(weights, "model.norm");
    if (s.tied)
      layers_.emplace("lm_head", layer(embedding_.template cast<T>().eval()));
    else
      load_layer(weights, "lm_head", s.vocabulary, s.hidden);
  }

  const llama::shape& shape() const { return shape_; }
  /// The layers that can hold adapters, by the names that PEFT uses.
  const std::map<std::string, layer>& layers() const { return layers_; }

  /// Attaches a whole file or, when it does not fit, nothing: every module of the file must be a
  /// layer of the model.
  template <class F>
  void attach(const std::string& name, const lora::peft::adapter_file<F>& file, double weight = 1) {
    for (const auto& [module, entry] : file)
      if (layers_.count(module) == 0)
        throw lora::value_error("the adapter \"" + name + "\" is for " + module +
                                ", which this model does not have");
    std::vector<layer*> done;
    try {
      for (const auto& [module, entry] : file) {
        layers_.at(module).attach(name, lora::scaled(weight, entry.plain()));
        done.push_back(&layers_.at(module));
      }
    } catch (...) {
      for (layer* one : done) one->detach(name);
      throw;
    }
  }

  // As the members of lora::linear, in every layer that has the adapter.
  void detach(const std::string& name) {
    each(name, [&](layer& one) { one.detach(name); });
  }
  void set_strength(const std::string& name, double strength) {
    each(name, [&](layer& one) { one.set_strength(name, strength); });
  }
  void activate(const std::string& name) {
    each(name, [&](layer& one) { one.activate(name); });
  }
  void deactivate(const std::string& name) {
    each(name, [&](layer& one) { one.deactivate(name); });
  }
  void merge(const std::string& name) {
    each(name, [&](layer& one) { one.merge(name); });
  }
  void unmerge(const std::string& name) {
    each(name, [&](layer& one) { one.unmerge(name); });
  }

  /// vocabulary x tokens: column t scores what follows token t.
  matrix logits(std::span<const std::int64_t> ids, const observer& see = nullptr) const {
    matrix h(shape_.hidden, static_cast<index_t>(ids.size()));
    for (index_t t = 0; t < h.cols(); ++t)
      h.col(t) = embedding_.row(checked(ids[static_cast<std::size_t>(t)])).transpose();
    for (index_t i = 0; i < shape_.layers; ++i) {
      const std::string block = block_name(i);
      h += attention(block + "self_attn.", normalized(block + "input_layernorm", h), see);
      h += mlp(block + "mlp.", normalized(block + "post_attention_layernorm", h), see);
    }
    return run("lm_head", normalized("model.norm", h), see);
  }

  /// The most likely continuation, up to `most` tokens or the end token (which is included).
  tokens greedy(tokens ids, std::size_t most, std::int64_t end) const {
    const std::size_t prompt = ids.size();
    for (std::size_t n = 0; n < most && (n == 0 || ids.back() != end); ++n)
      ids.push_back(next(ids));
    return {ids.begin() + static_cast<std::ptrdiff_t>(prompt), ids.end()};
  }
  std::int64_t next(const tokens& ids) const {
    index_t best = 0;
    logits(ids).rightCols(1).col(0).maxCoeff(&best);
    return best;
  }

 private:
  static std::string block_name(index_t i) { return "model.layers." + std::to_string(i) + "."; }

  static matrix load(const lora::safetensors::file& file, const std::string& name, index_t rows,
                     index_t cols) {
    const auto& tensor = file.at(name);
    if (tensor.bytes.empty() ||
        tensor.shape !=
            (cols == 1 ? std::vector{extent(rows)} : std::vector{extent(rows), extent(cols)}))
      throw std::runtime_error(file.name() + ": " + name + " is " + tensor.text() +
                               ", not as config.json says");
    const std::vector<real> values = file.copy<real>(name);
    return Eigen::Map<const Eigen::Matrix<real, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>(
        values.data(), rows, cols);
  }
  static std::uint64_t extent(index_t n) { return static_cast<std::uint64_t>(n); }
  void load_norm(const lora::safetensors::file& file, const std::string& name) {
    norms_[name] = load(file, name + ".weight", shape_.hidden, 1);
  }
  /// Rounds to T where the file's type is wider.
  void load_layer(const lora::safetensors::file& file, const std::string& name, index_t out,
                  index_t in) {
    layers_.emplace(name, layer(load(file, name + ".weight", out, in).template cast<T>().eval()));
  }

  template <class Act>
  void each(const std::string& name, const Act& act) {
    bool found = false;
    for (auto& [module, one] : layers_)
      if (one.contains(name)) {
        act(one);
        found = true;
      }
    if (!found)
      throw lora::value_error("no adapter named \"" + name + "\" is attached to this model");
  }

  index_t checked(std::int64_t id) const {
    if (id < 0 || id >= shape_.vocabulary)
      throw std::out_of_range("token " + std::to_string(id) + " is not in the vocabulary");
    return id;
  }

  matrix run(const std::string& name, const matrix& x, const observer& see) const {
    const layer& one = layers_.at(name);
    if (see) see(name, x);
    matrix y(one.out_features(), x.cols());
    one.forward(x, y);
    return y;
  }

  matrix normalized(const std::string& name, const matrix& h) const {
    const auto mean = h.colwise().squaredNorm().array() / static_cast<real>(h.rows());
    const auto scale = (mean + static_cast<real>(shape_.norm_epsilon)).rsqrt().eval();
    return norms_.at(name).col(0).asDiagonal() * h * scale.matrix().asDiagonal();
  }

  matrix mlp(const std::string& block, const matrix& x, const observer& see) const {
    const auto gate = run(block + "gate_proj", x, see);
    const auto up = run(block + "up_proj", x, see);
    return run(block + "down_proj",
               (gate.array() / (1 + (-gate.array()).exp()) * up.array()).matrix(), see);
  }

  matrix attention(const std::string& block, const matrix& x, const observer& see) const {
    matrix q = run(block + "q_proj", x, see), k = run(block + "k_proj", x, see);
    const matrix v = run(block + "v_proj", x, see);
    turn(q, shape_.heads);
    turn(k, shape_.kv_heads);
    matrix mixed(q.rows(), q.cols());
    for (index_t h = 0; h < shape_.heads; ++h) {
      const index_t kv = h / (shape_.heads / shape_.kv_heads);
      const matrix weights = attention_weights(head_of(k, kv), head_of(q, h));
      head_of(mixed, h).noalias() = head_of(v, kv) * weights;
    }
    return run(block + "o_proj", mixed, see);
  }

  template <class M>
  auto head_of(M& m, index_t h) const {
    return m.middleRows(h * shape_.head, shape_.head);
  }

  /// Softmax of k' q / sqrt(head) over the tokens up to each one: column t holds the weights for
  /// token t.
  template <class K, class Q>
  matrix attention_weights(const K& k, const Q& q) const {
    matrix weights = k.transpose() * q / std::sqrt(static_cast<real>(shape_.head));
    for (index_t t = 0; t < weights.cols(); ++t) {
      auto seen = weights.col(t).head(t + 1);
      seen = (seen.array() - seen.maxCoeff()).exp().matrix().eval();
      seen /= seen.sum();
      weights.col(t).tail(weights.rows() - t - 1).setZero();
    }
    return weights;
  }

  /// Rotary positions: (a, b) = elements j and j + head/2 of each head turn by t *
  /// theta^(-2j/head).
  void turn(matrix& x, index_t heads) const {
    const index_t half = shape_.head / 2;
    for (index_t j = 0; j < half; ++j) {
      const double step = std::pow(
          shape_.rope_theta, -2.0 * static_cast<double>(j) / static_cast<double>(shape_.head));
      for (index_t t = 0; t < x.cols(); ++t) {
        const auto c = static_cast<real>(std::cos(static_cast<double>(t) * step));
        const auto s = static_cast<real>(std::sin(static_cast<double>(t) * step));
        for (index_t h = 0; h < heads; ++h) {
          real& a = x(h * shape_.head + j, t);
          real& b = x(h * shape_.head + j + half, t);
          const real turned = a * c - b * s;
          b = b * c + a * s;
          a = turned;
        }
      }
    }
  }

  llama::shape shape_;
  matrix embedding_;  ///< vocabulary x hidden
  std::map<std::string, matrix> norms_;
  std::map<std::string, layer> layers_;
};

/// A model from a directory with config.json and model.safetensors.
template <class T>
model<T> read(const std::filesystem::path& directory) {
  return {read_shape(directory / "config.json"),
          lora::safetensors::read(directory / "model.safetensors")};
}

/// One token per character, and named tokens in angle brackets: the tiny model's vocabulary.json, a
/// list in the order of the ids.
class vocabulary {
 public:
  explicit vocabulary(const std::filesystem::path& path) {
    std::ifstream stream(path);
    if (!stream) throw std::runtime_error(path.string() + ": cannot be opened");
    pieces_ = nlohmann::json::parse(stream).get<std::vector<std::string>>();
  }
  std::int64_t id(const std::string& piece) const {
    const auto found = std::find(pieces_.begin(), pieces_.end(), piece);
    if (found == pieces_.end()) throw std::runtime_error("the vocabulary has no \"" + piece + "\"");
    return found - pieces_.begin();
  }
  std::int64_t end() const { return id("</s>"); }
  /// The begin token, then one token per character.
  tokens encode(const std::string& text) const {
    tokens ids{id("<s>")};
    for (const char c : text) ids.push_back(id(std::string(1, c)));
    return ids;
  }
  /// Without the tokens in angle brackets.
  std::string decode(const tokens& ids) const {
    std::string text;
    for (const auto i : ids)
      if (const auto& piece = pieces_.at(static_cast<std::size_t>(i)); piece.size() == 1)
        text += piece;
    return text;
  }

 private:
  std::vector<std::string> pieces_;
};

}  // namespace llama
