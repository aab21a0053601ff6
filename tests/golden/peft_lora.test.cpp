// SPDX-License-Identifier: Apache-2.0
//
// The outputs and weights of PEFT's models that are graphs (0.21, and four of 0.6.1): each tensor
// under `expected`, in float within the stated tolerance, in double against the float64 value
// within 1e-9, mixed and merged.
#include <set>

#include "golden/peft_case.hpp"
#include "support/refused.hpp"

namespace {

using namespace golden;  // NOLINT: a test

/// The tensor of io.safetensors with the exact value; empty when the case has none.
std::string exact_name(const json& expected) {
  if (expected.contains("ref")) return expected.at("ref");
  if (!expected.contains("scenario")) return "";
  const std::string name = expected.at("tensor"), scenario = expected.at("scenario");
  if (name.starts_with("y")) return "y64_" + scenario;
  return "merged64." + scenario + ".";
}

/// "merged.a+b.l0.weight" is the base's tensor l0.weight: the longest ending that the base has.
std::string base_name(const std::string& tensor, const std::set<std::string>& names) {
  for (auto dot = tensor.find('.'); dot != std::string::npos; dot = tensor.find('.', dot + 1))
    if (names.contains(tensor.substr(dot + 1))) return tensor.substr(dot + 1);
  return "";
}

template <class T>
class runner {
 public:
  explicit runner(const description& about)
      : about_(about), base_(load_all<T>(about.folder() / "base.safetensors")) {
    const auto io = st::read(about.folder() / "io.safetensors");
    x_ = load<T>(io, "x");
    for (const auto& [name, value] : base_) names_.insert(name);
  }

  const std::set<std::string>& names() const { return names_; }
  const weights<T>& base() const { return base_; }

  const peft::adapter_file<T>& adapter(const std::string& name, bool twice = false) {
    auto& kept = adapters_[name + (twice ? "*2" : "")];
    if (!kept) {
      auto options = about_.options();
      options.attention_out_proj_twice = twice;
      kept.emplace(peft::read<T>(about_.folder() / name, options));
    }
    return *kept;
  }

  model<T> make(const json& scenario, way how) {
    std::vector<active<T>> adapters;
    const bool twice = scenario.value("mha_out_factor", 1.0) == 2.0;
    for (const auto& a : scenario.at("adapters"))
      adapters.push_back({&adapter(a.at(0), twice), a.at(1).template get<double>()});
    return model<T>(about_, base_, std::move(adapters), how);
  }

  array<T> output(const json& scenario, way how) {
    if (!scenario.contains("rows")) return make(scenario, how).run(x_);
    // One adapter for each sample of the batch.
    array<T> y;
    const index_t batch = x_.shape[0], step = x_.size() / batch;
    for (index_t b = 0; b < batch; ++b) {
      auto shape = x_.shape;
      shape[0] = 1;
      const array<T> sample{shape,
                            {x_.values.begin() + b * step, x_.values.begin() + (b + 1) * step}};
      const std::string name = scenario.at("rows").at(static_cast<std::size_t>(b));
      const json one = {{"adapters", name == "__base__" ? json::array()
                                                        : json::array({json::array({name, 1.0})})}};
      const auto part = make(one, how).run(sample);
      if (b == 0) y.shape = part.shape;
      y.shape[0] = batch;
      y.values.insert(y.values.end(), part.values.begin(), part.values.end());
    }
    return y;
  }

 private:
  const description& about_;
  weights<T> base_;
  array<T> x_;
  std::set<std::string> names_;
  std::map<std::string, std::optional<peft::adapter_file<T>>> adapters_;
};

/// A weight after the adapters were merged and unmerged again.
template <class T>
array<T> there_and_back(runner<T>& run, const std::string& tensor_name, const std::string& base) {
  const std::string label = tensor_name.substr(9, tensor_name.size() - 9 - base.size() - 1);
  std::vector<peft::scaled_entry<T>> entries;
  for (std::size_t from = 0; from <= label.size();) {
    const auto plus = std::min(label.find('+', from), label.size());
    for (const auto& [name, e] : run.adapter(label.substr(from, plus - from)))
      if (e.weight_name() == base || e.bias_name() == base) entries.push_back(lora::scaled(1, e));
    from = plus + 1;
  }
  auto all = run.base();
  if (entries.empty()) return all.at(base);
  const auto& first = entries.front().of();
  auto W = all.at(first.weight_name()).matrix();
  const auto view = lora::as_matrix(W);
  if (decomposed(entries)) {
    const auto layer = lora::mixed(view, entries);
    lora::merge(view, layer);  // as it is stored
    lora::unmerge(view, layer);
  } else if (!first.lora_bias().empty()) {
    auto& bias = all.at(first.bias_name()).values;
    lora::merge(view, bias, entries);
    lora::unmerge(view, bias, entries);
  } else {
    lora::merge(view, entries);
    lora::unmerge(view, entries);
  }
  return all.at(base);
}

/// Everything that a case expects of its scenarios. Returns how many tensors were compared.
std::size_t check_case(const std::string& id) {
  const description about(id);
  const auto io = st::read(about.folder() / "io.safetensors");
  runner<float> in_float(about);
  runner<double> in_double(about);
  std::size_t compared = 0;
  for (const auto& expected : about.expected()) {
    if (!expected.contains("scenario")) continue;
    const std::string name = expected.at("tensor");
    INFO(id << ": " << name << ", scenario " << expected.at("scenario"));
    const bool wrong = expected.value("wrong_in_peft", false);
    const json scenario = about.scenario(expected.at("scenario"));
    const double atol = expected.at("atol"), rtol = expected.at("rtol");
    std::string exact = exact_name(expected);
    array<float> mixed, merged;
    array<double> mixed_double, merged_double;
    if (name.starts_with("y")) {
      mixed = in_float.output(scenario, way::mixed);
      mixed_double = in_double.output(scenario, way::mixed);
      // A convolution with groups has no merged weight.
      const bool can_merge = id != "conv2d_grouped" && id != "hotswap_conv2d_grouped";
      merged = can_merge ? in_float.output(scenario, way::merged) : mixed;
      merged_double = can_merge ? in_double.output(scenario, way::merged) : mixed_double;
    } else {
      const auto base = base_name(name, in_float.names());
      REQUIRE_FALSE(base.empty());
      exact += base;
      if (name.starts_with("unmerged.")) {
        mixed = merged = there_and_back(in_float, name, base);
        mixed_double = merged_double = there_and_back(in_double, name, base);
        exact.clear();
        CHECK(relative(merged_double, in_double.base().at(base)) < 1e-12);
      } else {
        mixed = merged = in_float.make(scenario, way::merged).tensors().at(base);
        mixed_double = merged_double = in_double.make(scenario, way::merged).tensors().at(base);
      }
    }
    if (!wrong) {
      const auto want = load<float>(io, name);
      CHECK(within(mixed, want, atol, rtol));
      CHECK(within(merged, want, atol, rtol));
    }
    ++compared;
    if (exact.empty() || !io.contains(exact)) continue;
    const auto exact_value = load<double>(io, exact);
    CHECK(within(mixed, exact_value, atol, rtol));
    CHECK(within(merged, exact_value, atol, rtol));
    const double ours =
        std::max(relative(mixed_double, exact_value), relative(merged_double, exact_value));
    // An adapter that is made plain with its base is as exact as the float factors of PEFT's own
    // conversion.
    const bool redone = name == "y_unconverted_loaded" || name == "y_trained";
    CHECK(ours <= (redone ? 1e-5 : 1e-9));
    table().add(id, about.text.at("what"),
                std::max(relative(mixed, exact_value), relative(merged, exact_value)), ours,
                relative(load<double>(io, name), exact_value));
  }
  return compared;
}

const std::vector<std::string> cases{"bdlora",
                                     "conv1d",
                                     "conv1d_fan_in_fan_out",
                                     "conv2d_1x1",
                                     "conv2d_3x3",
                                     "conv2d_dilated",
                                     "conv2d_grouped",
                                     "conv2d_stride_pad",
                                     "conv3d",
                                     "conv3d_1_1_k",
                                     "dora_bf16",
                                     "dora_conv1d",
                                     "dora_conv1d_fan_in_fan_out",
                                     "dora_conv2d",
                                     "dora_conv3d",
                                     "dora_embedding",
                                     "dora_fp16",
                                     "dora_linear",
                                     "dora_plus_lora",
                                     "embedding_embed_scale",
                                     "embedding_linear",
                                     "half_bf16_base_bf16_adapter",
                                     "half_bf16_base_bf16_adapter_dyadic",
                                     "half_bf16_base_f32_adapter",
                                     "half_bf16_base_f32_adapter_dyadic",
                                     "half_fp16_base_f32_adapter",
                                     "half_fp16_base_fp16_adapter",
                                     "hotswap_alpha_pattern",
                                     "hotswap_conv2d",
                                     "hotswap_conv2d_grouped",
                                     "hotswap_fewer_targets",
                                     "hotswap_incompatible",
                                     "hotswap_rank_alpha",
                                     "hotswap_rank_pattern",
                                     "init_eva",
                                     "init_gaussian",
                                     "init_olora",
                                     "init_olora_rslora",
                                     "init_orthogonal",
                                     "init_pissa",
                                     "init_pissa_niter_8",
                                     "init_pissa_rslora",
                                     "linear_mlp",
                                     "lora_bias",
                                     "lora_bias_conv2d",
                                     "mha",
                                     "mixed_batch_bf16",
                                     "mixed_batch_conv2d",
                                     "mixed_batch_embedding",
                                     "mixed_batch_linear",
                                     "modules_to_save",
                                     "modules_to_save_bias_all",
                                     "modules_to_save_bias_lora_only",
                                     "modules_to_save_two",
                                     "pattern_order_roundtrip",
                                     "rslora_patterns",
                                     "scale",
                                     "target_parameters_both_in_out",
                                     "target_parameters_both_out_in",
                                     "target_parameters_first_in_out",
                                     "target_parameters_first_out_in",
                                     "target_parameters_last_in_out",
                                     "target_parameters_last_out_in",
                                     "target_parameters_linear_weight",
                                     "trainable_tokens"};

}  // namespace

TEST_CASE("golden: every graph of PEFT 0.21, in float and double, mixed and merged",
          "[golden][peft]") {
  for (const auto& id : cases) {
    INFO(id);
    CHECK(check_case(id) > 0);
  }
}

// ---- what has no scenario

TEST_CASE("golden: the base that PiSSA and OLoRA leave is computed again", "[golden][peft]") {
  for (const std::string id :
       {"init_pissa", "init_pissa_rslora", "init_olora", "init_olora_rslora"}) {
    const description about(id);
    const auto io = st::read(about.folder() / "io.safetensors");
    const auto base = load_all<double>(about.folder() / "base.safetensors");
    const auto file = peft::read<double>(about.folder() / "unconverted");
    for (const std::string module : {"l0", "l1"}) {
      INFO(id << " " << module);
      const auto& e = file.at(module);
      const auto& W = base.at(module + ".weight");
      // Of the plain adapter, the part that is not the trained factors: W minus it is PEFT's
      // residual.
      const auto plain = plain_entry(W, e);
      array<double> residual = W;
      const Eigen::MatrixXd delta = lora::delta_weight(plain.factors()),
                            trained = lora::delta_weight(e.factors());
      residual.matrix() += delta - trained;
      for (const auto& expected : about.expected())
        if (expected.at("tensor") == "residual." + module + ".weight")
          CHECK(within(residual, load<double>(io, expected.at("tensor")), expected.at("atol"),
                       expected.at("rtol")));
      CHECK_THROWS_AS((void)lora::merged(W.matrix(), e), lora::value_error);
    }
  }
}

TEST_CASE("golden: an initialization that depends on random numbers is refused unconverted",
          "[golden][peft]") {
  const description about("init_pissa_niter_8");
  CHECK_THROWS_WITH(peft::read(about.folder() / "unconverted"),
                    Catch::Contains("pissa_niter_8") && Catch::Contains("random numbers"));
  CHECK_NOTHROW(peft::read(about.folder() / "converted"));
}

TEST_CASE("golden: KaSA drops the smallest components of the base", "[golden][peft]") {
  const description about("kasa");
  const auto io = st::read(about.folder() / "io.safetensors");
  const auto run = [&]<class T>(T, double tolerance, way how) {
    const auto file = peft::read<T>(about.folder() / "kasa");
    const auto x = load<T>(io, "x");
    model<T> m(about, load_all<T>(about.folder() / "base.safetensors"), {{&file, 1.0}}, how);
    const auto y = m.run(x);
    CHECK(within(y, load<float>(io, "y_kasa"), 2.2e-6, 1e-5));
    CHECK(relative(y, load<double>(io, "y64_kasa")) < tolerance);
    if (how == way::merged)
      for (const std::string name : {"l0.weight", "l1.weight"})
        CHECK(within(m.tensors().at(name), load<float>(io, "merged.kasa." + name), 1.3e-6, 1e-5));
    table().add("kasa", about.text.at("what"),
                std::is_same_v<T, float> ? relative(y, load<double>(io, "y64_kasa")) : 0,
                std::is_same_v<T, double> ? relative(y, load<double>(io, "y64_kasa")) : 0,
                relative(load<double>(io, "y_kasa"), load<double>(io, "y64_kasa")));
  };
  for (const auto how : {way::mixed, way::merged}) {
    run(float(), 1e-6, how);
    run(double(), 1e-9, how);
  }
  // Without the adapter PEFT keeps the truncated base; ours is the published one, and the
  // truncation is a part of the adapter.
  const auto base = load_all<double>(about.folder() / "base.safetensors");
  auto truncated = base;
  for (const std::string name : {"l0.weight", "l1.weight"}) {
    const auto part = lora::smallest_part(base.at(name).matrix(), 3);
    truncated.at(name).matrix() -= part.B * part.A;
  }
  model<double> m(about, truncated, {}, way::mixed);
  CHECK(within(m.run(load<double>(io, "x")), load<float>(io, "y_disabled_peft"), 1.3e-6, 1e-5));
}

TEST_CASE("golden: what PEFT corrupts between merge and unmerge, linear restores",
          "[golden][peft]") {
  const description about("scale");
  const auto base = load_all<float>(about.folder() / "base.safetensors");
  const auto io = st::read(about.folder() / "io.safetensors");
  const auto file = peft::read(about.folder() / "a");
  for (const std::string module : {"l0", "l1"}) {
    const auto& W = base.at(module + ".weight");
    lora::linear<float> layer(W.matrix());
    layer.attach("a", lora::scaled(0.5, file.at(module).plain()));
    layer.merge("a");
    layer.set_strength("a", 2.0);
    layer.unmerge("a");
    CHECK(test::same_bits(layer.weight(), W.matrix()));
    for (const std::string label : {"context_then_unmerge_peft", "set_scale_between_peft"})
      CHECK(relative(load<float>(io, "unmerged." + label + "." + module + ".weight"), W) > 0.1);
  }
}

TEST_CASE(
    "golden: of overlapping patterns the first in the file wins, as PEFT finds it after saving",
    "[golden][peft]") {
  const description about("pattern_order_roundtrip");
  const auto file = peft::read<double>(about.folder() / "a");
  CHECK(file.at("net.q_proj").scaling() == 1.0);
  // In memory, before it was saved, PEFT had another order and the scaling 10.
  const auto io = st::read(about.folder() / "io.safetensors");
  model<double> m(about, load_all<double>(about.folder() / "base.safetensors"), {{&file, 10.0}},
                  way::mixed);
  CHECK(within(m.run(load<double>(io, "x")), load<float>(io, "y_in_memory"), 1.1e-5, 1e-5));
}

TEST_CASE("golden: a PEFT merge with layers that share a weight is refused, and mixing is right",
          "[golden][peft]") {
  const auto file = peft::read(root() / "llama_layer_replication/rep");
  const auto& shared = file.at("model.layers.2.self_attn.q_proj");
  CHECK(shared.shared_with() == "model.layers.1.self_attn.q_proj");
  CHECK(file.at("model.layers.0.self_attn.q_proj").shared_with().empty());
  Eigen::MatrixXf W = Eigen::MatrixXf::Zero(64, 64);
  CHECK_THROWS_WITH(lora::merge(W, shared),
                    Catch::Contains("share the weight of") && Catch::Contains("copy the weight"));
  CHECK_NOTHROW(lora::merge(W, file.at("model.layers.0.self_attn.q_proj")));
}

TEST_CASE("golden: PEFT 0.6.1 outputs", "[golden][peft]") {
  const fs::path folder = outside("golden/peft-0.6.1");
  const auto check = [&](const std::string& id, const json& graph, double tolerance, bool image) {
    INFO(id);
    const auto io = st::read(folder / id / "golden_io.safetensors");
    description about("linear_mlp");
    about.text["graph"] = graph;
    const auto file = peft::read<double>(folder / id);
    auto x = load<double>(io, "input");
    if (image) x.shape = {2, 5, 3, 3};
    const auto want = load<double>(io, "output");
    for (const auto how : {way::mixed, way::merged}) {
      model<double> m(about, load_all<double>(folder / id / "base.safetensors"), {{&file, 1.0}},
                      how);
      auto y = m.run(x);
      for (index_t j = 0; j < y.columns().cols(); ++j) {
        auto column = y.columns().col(j);
        const double top = column.maxCoeff();
        column.array() -= top + std::log((column.array() - top).exp().sum());
      }
      CHECK(within(y, want, tolerance, 0));
    }
  };
  const auto linear = [](const char* module) { return json{{"op", "linear"}, {"module", module}}; };
  const json relu{{"op", "relu"}};
  const json mlp = json::array({linear("lin0"), relu, linear("lin1")});
  check("lora_mlp", mlp, 1e-5, false);
  check("lora_mlp_modules_to_save", mlp, 1e-5, false);
  check("lora_emb_conv1d",
        json::array({json{{"op", "embedding"}, {"module", "emb"}},
                     json{{"op", "conv1d_t"}, {"module", "conv1d"}}, relu, json{{"op", "flatten"}},
                     linear("lin0")}),
        1e-6, false);
  check("lora_conv2d",
        json::array({json{{"op", "conv2d"}, {"module", "conv2d"}, {"kernel", 3}}, relu,
                     json{{"op", "flatten"}}, linear("lin0")}),
        2e-5, true);
  CHECK(test::mentions(
      test::refusal<lora::format_error>([&] { (void)peft::read(folder / "adalora_mlp"); }),
      {"peft_type", "ADALORA"}));
}
