// SPDX-License-Identifier: Apache-2.0
//
// Cases of golden/peft-0.21 whose model is a transformer: BERT with layers_to_transform, tied and
// untied heads with adapted embeddings, saved embeddings, replicated layers. A tied base is untied
// first: the head keeps the values that it had.
#include "golden/peft_case.hpp"

namespace {

using namespace golden;  // NOLINT: a test

template <class T>
using columns = Eigen::Matrix<T, -1, -1>;

/// Calls on a model's layers with matrices of tokens as columns.
template <class T>
class engine {
 public:
  engine(model<T>& m, const json& config) : m_(m), c_(config) {}

  columns<T> linear(const std::string& module, const columns<T>& x, bool in_out = false,
                    const std::string& weight = "") {
    array<T> in{{x.cols(), x.rows()}, {x.data(), x.data() + x.size()}};
    return columns<T>(m_.linear(module, in, in_out, weight).columns());
  }
  columns<T> embed(const std::string& module, const std::vector<index_t>& ids) {
    array<T> in{{static_cast<index_t>(ids.size())}, {}};
    for (const auto id : ids) in.values.push_back(static_cast<T>(id));
    return columns<T>(m_.embedding(module, in).columns());
  }
  auto vector(const std::string& name) {
    auto& values = m_.weight(name).values;
    return Eigen::Map<const Eigen::Matrix<T, -1, 1>>(values.data(),
                                                     static_cast<index_t>(values.size()));
  }

  columns<T> rms_norm(const std::string& name, const columns<T>& x, double epsilon) {
    columns<T> y = x;
    for (index_t t = 0; t < x.cols(); ++t)
      y.col(t) =
          x.col(t).cwiseProduct(vector(name)) /
          std::sqrt(x.col(t).squaredNorm() / static_cast<T>(x.rows()) + static_cast<T>(epsilon));
    return y;
  }
  columns<T> layer_norm(const std::string& name, const columns<T>& x, double epsilon) {
    columns<T> y = x;
    for (index_t t = 0; t < x.cols(); ++t) {
      const Eigen::Matrix<T, -1, 1> centred = x.col(t).array() - x.col(t).mean();
      y.col(t) = centred.cwiseProduct(vector(name + ".weight")) /
                     std::sqrt(centred.squaredNorm() / static_cast<T>(x.rows()) +
                               static_cast<T>(epsilon)) +
                 vector(name + ".bias");
    }
    return y;
  }
  static columns<T> attention(const columns<T>& q, const columns<T>& k, const columns<T>& v,
                              index_t heads, bool causal) {
    const index_t head = q.rows() / heads, group = heads / (k.rows() / head), tokens = q.cols();
    columns<T> out(q.rows(), tokens);
    for (index_t h = 0; h < heads; ++h) {
      columns<T> s = k.middleRows(h / group * head, head).transpose() *
                     q.middleRows(h * head, head) / std::sqrt(static_cast<T>(head));
      for (index_t t = 0; t < tokens; ++t) {
        const index_t seen = causal ? t + 1 : tokens;
        Eigen::Matrix<T, -1, 1> p =
            (s.col(t).head(seen).array() - s.col(t).head(seen).maxCoeff()).exp();
        p /= p.sum();
        out.block(h * head, t, head, 1) = v.middleRows(h / group * head, head).leftCols(seen) * p;
      }
    }
    return out;
  }
  /// Turns (j, j + head/2) of each head by position * theta^(-2j/head).
  static void rotate(columns<T>& x, index_t head, double theta) {
    for (index_t t = 0; t < x.cols(); ++t)
      for (index_t first = 0; first < x.rows(); first += head)
        for (index_t j = 0; j < head / 2; ++j) {
          const double angle =
              static_cast<double>(t) *
              std::pow(theta, -2.0 * static_cast<double>(j) / static_cast<double>(head));
          const auto c = static_cast<T>(std::cos(angle)), s = static_cast<T>(std::sin(angle));
          T& a = x(first + j, t);
          T& b = x(first + j + head / 2, t);
          const T turned = a * c - b * s;
          b = b * c + a * s;
          a = turned;
        }
  }

  /// base[k] is the base's layer that layer k shares.
  columns<T> llama(const std::vector<index_t>& ids, const std::vector<int>& base) {
    const index_t heads = c_.at("num_attention_heads"), head = c_.at("head_dim");
    const double epsilon = c_.at("rms_norm_eps"), theta = c_.at("rope_parameters").at("rope_theta");
    columns<T> h = embed("model.embed_tokens", ids);
    for (std::size_t k = 0; k < base.size(); ++k) {
      const std::string own = "model.layers." + std::to_string(k) + ".",
                        shared = "model.layers." + std::to_string(base[k]) + ".";
      const auto project = [&](const std::string& part, const columns<T>& x) {
        // A layer with a copy of its own was merged there.
        const auto weight = (m_.has(own + part + ".weight") ? own : shared) + part + ".weight";
        return linear(own + part, x, false, weight);
      };
      const auto n = rms_norm(shared + "input_layernorm.weight", h, epsilon);
      auto q = project("self_attn.q_proj", n), key = project("self_attn.k_proj", n);
      rotate(q, head, theta);
      rotate(key, head, theta);
      h += project("self_attn.o_proj",
                   attention(q, key, project("self_attn.v_proj", n), heads, true));
      const auto p = rms_norm(shared + "post_attention_layernorm.weight", h, epsilon);
      const auto gate = project("mlp.gate_proj", p);
      const columns<T> silu = gate.unaryExpr([](T v) { return v / (T(1) + std::exp(-v)); });
      h += project("mlp.down_proj", silu.cwiseProduct(project("mlp.up_proj", p)));
    }
    return linear("lm_head", rms_norm("model.norm.weight", h, epsilon));
  }

  columns<T> gpt2(const std::vector<index_t>& ids) {
    const index_t width = c_.at("n_embd"), heads = c_.at("n_head");
    const double epsilon = c_.at("layer_norm_epsilon");
    const index_t layers = c_.at("n_layer");
    columns<T> h = embed("transformer.wte", ids) + m_.weight("transformer.wpe.weight")
                                                       .matrix()
                                                       .topRows(static_cast<index_t>(ids.size()))
                                                       .transpose();
    for (index_t k = 0; k < layers; ++k) {
      const std::string p = "transformer.h." + std::to_string(k) + ".";
      const auto qkv = linear(p + "attn.c_attn", layer_norm(p + "ln_1", h, epsilon), true);
      h += linear(p + "attn.c_proj",
                  attention(qkv.topRows(width), qkv.middleRows(width, width), qkv.bottomRows(width),
                            heads, true),
                  true);
      const auto up = linear(p + "mlp.c_fc", layer_norm(p + "ln_2", h, epsilon), true);
      const columns<T> gelu = up.unaryExpr([](T v) {
        return T(0.5) * v *
               (T(1) +
                std::tanh(static_cast<T>(std::sqrt(2 / M_PI)) * (v + T(0.044715) * v * v * v)));
      });
      h += linear(p + "mlp.c_proj", gelu, true);
    }
    return linear("lm_head", layer_norm("transformer.ln_f", h, epsilon));
  }

  columns<T> bert(const std::vector<index_t>& ids) {
    const index_t heads = c_.at("num_attention_heads"), layers = c_.at("num_hidden_layers");
    const double epsilon = c_.at("layer_norm_eps");
    columns<T> h = embed("embeddings.word_embeddings", ids) +
                   m_.weight("embeddings.position_embeddings.weight")
                       .matrix()
                       .topRows(static_cast<index_t>(ids.size()))
                       .transpose();
    h.colwise() += m_.weight("embeddings.token_type_embeddings.weight").matrix().row(0).transpose();
    h = layer_norm("embeddings.LayerNorm", h, epsilon);
    for (index_t k = 0; k < layers; ++k) {
      const std::string p = "encoder.layer." + std::to_string(k) + ".";
      const auto a =
          attention(linear(p + "attention.self.query", h), linear(p + "attention.self.key", h),
                    linear(p + "attention.self.value", h), heads, false);
      h = layer_norm(p + "attention.output.LayerNorm", h + linear(p + "attention.output.dense", a),
                     epsilon);
      const auto up = linear(p + "intermediate.dense", h);
      const columns<T> gelu =
          up.unaryExpr([](T v) { return T(0.5) * v * (T(1) + std::erf(v / std::sqrt(T(2)))); });
      h = layer_norm(p + "output.LayerNorm", h + linear(p + "output.dense", gelu), epsilon);
    }
    return h;
  }

 private:
  model<T>& m_;
  const json& c_;
};

template <class T>
struct setting {
  description about;
  std::filesystem::path base;
  json config;
  weights<T> values;
  explicit setting(const std::string& id)
      : about(id),
        base(about.folder() / about.text.at("base").get<std::string>()),
        config(read_json(base.parent_path() / "config.json")),
        values(load_all<T>(base)) {
    // Untied: the head keeps what the embedding was.
    if (config.value("tie_word_embeddings", false) && config.at("model_type") != "bert")
      values["lm_head.weight"] =
          values.at(config.at("model_type") == "gpt2" ? "transformer.wte.weight"
                                                      : "model.embed_tokens.weight");
  }

  array<T> run(model<T>& m, const std::vector<int>& layers = {}) const {
    const auto x = load<double>(st::read(about.folder() / "io.safetensors"), "x");
    engine<T> e(m, config);
    array<T> y{{x.shape[0], x.shape[1], 0}, {}};
    for (index_t b = 0; b < x.shape[0]; ++b) {
      std::vector<index_t> ids;
      for (index_t t = 0; t < x.shape[1]; ++t)
        ids.push_back(static_cast<index_t>(x.values[static_cast<std::size_t>(b * x.shape[1] + t)]));
      std::vector<int> base_layers = layers;
      if (base_layers.empty())
        for (int k = 0; k < config.value("num_hidden_layers", 0); ++k) base_layers.push_back(k);
      const std::string kind = config.at("model_type");
      const columns<T> out = kind == "gpt2"   ? e.gpt2(ids)
                             : kind == "bert" ? e.bert(ids)
                                              : e.llama(ids, base_layers);
      y.shape[2] = out.rows();
      y.values.insert(y.values.end(), out.data(), out.data() + out.size());
    }
    return y;
  }
};

/// y in float within the tolerance, in double within 1e-9 of the exact one.
template <class Run>
void check(const description& about, const std::string& tensor_name, const std::string& exact,
           bool compare_with_peft, const Run& run) {
  INFO(about.id << ": " << tensor_name << " against " << exact);
  const auto io = st::read(about.folder() / "io.safetensors");
  const auto f = run(float());
  const auto d = run(double());
  const auto want = load<double>(io, exact);
  CHECK(relative(d, want) < 1e-9);
  CHECK(within(f, want, 1e-4, 1e-5));
  if (compare_with_peft) CHECK(within(f, load<float>(io, tensor_name), 1e-4, 1e-5));
  table().add(about.id, about.text.at("what"), relative(f, want), relative(d, want),
              relative(load<double>(io, tensor_name), want));
}

}  // namespace

TEST_CASE("golden: embeddings and heads, tied and untied, mixed and merged", "[golden][peft]") {
  for (const std::string id :
       {"llama_embed_tied", "llama_embed_tied_both", "llama_embed_tied_ensure",
        "llama_embed_untied", "llama_embed_untied_modules_to_save"}) {
    const description about(id);
    check(about, "y_base", "y64_base", true, [&]<class T>(T) {
      const setting<T> s(id);
      model<T> m(s.about, s.values, {}, way::mixed);
      return s.run(m);
    });
    for (const auto how : {way::mixed, way::merged}) {
      const auto run = [&]<class T>(T) {
        const setting<T> s(id);
        const auto file = peft::read<T>(s.about.folder() / "ad");
        model<T> m(s.about, s.values, {{&file, 1.0}}, how);
        return s.run(m);
      };
      // Merging into a tied weight changes the head as well: PEFT's merged logits are wrong there,
      // ours are not.
      check(about, "y_ad", "y64_unmerged", true, run);
      check(about, "y_merged_ad", "y64_unmerged", id.find("untied") != std::string::npos, run);
    }
  }
}

TEST_CASE("golden: with ensure_weight_tying embedding and head have one delta", "[golden][peft]") {
  const auto file = peft::read<double>(root() / "llama_embed_tied_ensure/ad");
  const auto& head = file.at("lm_head").factors();
  const auto& embedding = file.at("model.embed_tokens").factors();
  CHECK(head.lora_A() == embedding.lora_B().transpose());
  CHECK(head.lora_B() == embedding.lora_A().transpose());
  CHECK(head.scaling() == embedding.scaling());
}

TEST_CASE("golden: GPT-2's tied embedding, one side and both", "[golden][peft]") {
  const description about("gpt2_tied_wte");
  for (const auto how : {way::mixed, way::merged})
    check(about, "y_tied", "y64_input_side_only", true, [&]<class T>(T) {
      const setting<T> s("gpt2_tied_wte");
      const auto file = peft::read<T>(s.about.folder() / "tied");
      model<T> m(s.about, s.values, {{&file, 1.0}}, how);
      return s.run(m);
    });
  // What merging into the shared tensor gives.
  check(about, "y_merged_tied", "y64_both_sides", true, [&]<class T>(T) {
    const setting<T> s("gpt2_tied_wte");
    const auto file = peft::read<T>(s.about.folder() / "tied");
    model<T> m(s.about, s.values, {{&file, 1.0}}, way::merged);
    m.weight("lm_head.weight") = m.weight("transformer.wte.weight");
    return s.run(m);
  });
}

TEST_CASE("golden: BERT, the second adapter on one layer", "[golden][peft]") {
  const description about("bert_tiny");
  const auto io = st::read(about.folder() / "io.safetensors");
  for (const std::string label : {"base", "a", "b", "a+b"})
    for (const auto how : {way::mixed, way::merged})
      check(about, "y_" + label, "y64_" + label, true, [&]<class T>(T) {
        const setting<T> s("bert_tiny");
        const auto a = peft::read<T>(s.about.folder() / "a"),
                   b = peft::read<T>(s.about.folder() / "b");
        std::vector<active<T>> on;
        if (label.find('a') == 0) on.push_back({&a, 1.0});
        if (label.ends_with("b")) on.push_back({&b, 1.0});
        if (label == "base") on.clear();
        model<T> m(s.about, s.values, on, how);
        if (how == way::merged)
          for (const auto& expected : about.expected()) {
            const std::string name = expected.at("tensor"), start = "merged." + label + ".";
            if (!name.starts_with(start)) continue;
            CHECK(within(m.tensors().at(name.substr(start.size())), load<float>(io, name),
                         expected.at("atol"), expected.at("rtol")));
          }
        return s.run(m);
      });
}

TEST_CASE("golden: replicated layers share their weights and have adapters of their own",
          "[golden][peft]") {
  const description about("llama_layer_replication");
  const std::vector<int> layers{0, 1, 1};
  check(about, "y_base", "y64_base", true, [&]<class T>(T) {
    const setting<T> s("llama_layer_replication");
    model<T> m(s.about, s.values, {}, way::mixed);
    return s.run(m, layers);
  });
  check(about, "y_rep", "y64_rep", true, [&]<class T>(T) {
    const setting<T> s("llama_layer_replication");
    const auto file = peft::read<T>(s.about.folder() / "rep");
    model<T> m(s.about, s.values, {{&file, 1.0}}, way::mixed);
    return s.run(m, layers);
  });
  // Merged into a copy of the weight for each layer; PEFT merges into the shared one and is wrong.
  check(about, "y_merged_rep", "y64_rep", false, [&]<class T>(T) {
    setting<T> s("llama_layer_replication");
    const auto file = peft::read<T>(s.about.folder() / "rep");
    const auto published = s.values;
    for (const auto& [name, e] : file) {
      auto& copy = s.values[name + ".weight"] = published.at(e.weight_name());
      lora::merge(lora::as_matrix(copy.matrix()), e.factors());
    }
    model<T> m(s.about, s.values, {}, way::mixed);
    return s.run(m, layers);
  });
}
