// SPDX-License-Identifier: Apache-2.0
//
// A trained public Llama (stories260K, 5 layers) with two trained PEFT adapters: logits and greedy
// text of every state against PEFT's, each layer against its bound, and the checkpoints that PEFT
// merged in three formats.
#include <cstdint>
#include <cstring>

#include "golden/checkpoint.hpp"
#include "llama.hpp"
#include "support/golden.hpp"
#include "support/layers.hpp"

namespace {

using golden::MatrixXd;
namespace fs = golden::fs;

fs::path base_folder() { return golden::outside("bases/stories260K/hf"); }
fs::path folder() { return golden::outside("golden/stories260K"); }

constexpr int prompts = 2;
const std::vector<std::string> names = {"dragon", "rain"};

/// The adapters' strengths; 0 is "not attached".
struct mixture {
  const char* name;  ///< in golden.safetensors
  double weights[2];
  /// Whether the adapters of the bits of `merged` are there to be merged.
  bool allows(unsigned merged) const {
    return ((merged & 1) == 0 || weights[0] != 0) && ((merged & 2) == 0 || weights[1] != 0);
  }
};
constexpr mixture mixtures[] = {{"base", {0, 0}},
                                {"dragon", {1, 0}},
                                {"rain", {0, 1}},
                                {"dragon+rain", {1, 1}},
                                {"0.7dragon+0.3rain", {0.7, 0.3}},
                                {"dragon-0.5rain", {1, -0.5}}};
constexpr mixture both = mixtures[3];

class world {
 public:
  world()
      : about(golden::read_json(folder() / "case.json")),
        golden(lora::safetensors::read(folder() / "golden.safetensors")),
        base(lora::safetensors::read(base_folder() / "model.safetensors")),
        shape(llama::read_shape(base_folder() / "config.json")) {
    for (const auto& name : names) {
      in_float.push_back(lora::peft::read<float>(folder() / name));
      in_double.push_back(lora::peft::read<double>(folder() / name));
    }
  }

  template <class T>
  llama::model<T> model(const lora::safetensors::file& weights, const mixture& m,
                        unsigned merged = 0) const {
    llama::model<T> result(shape, weights);
    for (std::size_t k = 0; k < 2; ++k) {
      if (m.weights[k] == 0) continue;
      if constexpr (std::is_same_v<T, double>)
        result.attach(names[k], in_double[k], m.weights[k]);
      else
        result.attach(names[k], in_float[k], m.weights[k]);
      if ((merged >> k & 1) != 0) result.merge(names[k]);
    }
    return result;
  }
  template <class T>
  llama::model<T> model(const mixture& m, unsigned merged = 0) const {
    return model<T>(base, m, merged);
  }

  llama::tokens ids(const std::string& kind, int prompt) const {
    return golden.copy<std::int64_t>(kind + "." + std::to_string(prompt));
  }
  /// Vocabulary x tokens of both prompts.
  template <class T>
  MatrixXd logits(const llama::model<T>& model) const {
    MatrixXd all(shape.vocabulary, 0);
    for (int p = 0; p < prompts; ++p)
      append(all, model.logits(ids("input_ids", p)).template cast<double>());
    return all;
  }
  MatrixXd logits(const std::string& name) const {
    MatrixXd all(shape.vocabulary, 0);
    for (int p = 0; p < prompts; ++p)
      append(
          all,
          golden::tensor<double>(golden, "logits." + name + "." + std::to_string(p)).transpose());
    return all;
  }

  // What PEFT in float may be off, by the one state that it also computed in double. That is how
  // far roundings travel through this network, for which there is no bound; another evaluation in
  // float may be off by four times that.
  double peft_in_float() const {
    return about.at("largest_difference").at("unmerged f32 vs float64");
  }
  static constexpr double times_peft = 4;

  static void append(MatrixXd& all, const MatrixXd& more) {
    all.conservativeResize(Eigen::NoChange, all.cols() + more.cols());
    all.rightCols(more.cols()) = more;
  }

  golden::json about;
  lora::safetensors::file golden, base;
  llama::shape shape;
  std::vector<lora::peft::adapter_file<float>> in_float;
  std::vector<lora::peft::adapter_file<double>> in_double;
};

/// Tensors rounded to T where they are wider, as one file in memory; it looks at `bytes`.
template <class T>
lora::safetensors::file file_of(const golden::shards& from, std::string& bytes) {
  golden::json header = golden::json::object();
  std::string data;
  for (const auto& file : from.files())
    for (const auto& t : file) {
      const auto begin = data.size();
      for (const double v : file.copy<double>(t.name)) {
        const T rounded(static_cast<float>(v));
        data.append(reinterpret_cast<const char*>(&rounded), sizeof rounded);
      }
      header[t.name] = {{"dtype", lora::safetensors::name_of(lora::safetensors::dtype_of<T>())},
                        {"shape", t.shape},
                        {"data_offsets", {begin, data.size()}}};
    }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const std::uint64_t length = text.size();
  bytes.assign(sizeof length, '\0');
  std::memcpy(bytes.data(), &length, sizeof length);
  bytes += text + data;
  return lora::safetensors::parse(std::as_bytes(std::span(bytes)), "in memory");
}

/// The beginning of a text; less of it under a sanitizer.
llama::tokens first(std::size_t count, llama::tokens text) {
  text.resize(count / layers::thinning / 4 * 4);
  return text;
}

double largest(const MatrixXd& m) { return m.cwiseAbs().maxCoeff(); }

/// Every layer with adapters on the inputs that it saw, in every state of merging, against the
/// bound.
template <class T>
void check_layers(const world& w) {
  std::map<std::string, MatrixXd> inputs;
  const auto model = w.model<T>(both);
  for (int p = 0; p < prompts; ++p)
    model.logits(w.ids("input_ids", p), [&](const std::string& layer, const auto& x) {
      world::append(inputs.try_emplace(layer, x.rows(), 0).first->second,
                    x.template cast<double>());
    });
  int compared = 0;
  for (const auto& [name, pristine] : model.layers()) {
    if (pristine.names().empty()) continue;
    INFO(name);
    using real = lora::accumulator_t<T>;
    const test::col_matrix<real> x = inputs.at(name).template cast<real>();
    const MatrixXd W = agreement::in_double(pristine.weight());
    std::vector<agreement::part> parts;
    for (std::size_t k = 0; k < 2; ++k)
      if (w.in_float[k].contains(name))
        parts.push_back(agreement::part_of(w.in_float[k].at(name).plain()));
    const MatrixXd exact = layers::reference(W, {}, parts, inputs.at(name)).template cast<double>();
    for (unsigned merged = 0; merged < 1u << parts.size(); ++merged) {
      CAPTURE(merged);
      auto layer = pristine.clone();
      agreement::state where;
      for (std::size_t k = 0; k < parts.size(); ++k) {
        const bool inside = (merged >> k & 1) != 0;
        if (inside) layer.merge(pristine.names()[k]);
        (inside ? where.merged : where.mixed).push_back(parts[k]);
      }
      test::col_matrix<real> y(layer.out_features(), x.cols());
      layer.forward(x, y);
      const auto bound = agreement::error_bound(W, {}, where, inputs.at(name),
                                                agreement::formats_of<T, real, real>());
      CHECK(golden::share(y.template cast<double>(), exact, bound) <= 1);
      ++compared;
    }
  }
  CHECK(compared ==
        5 * (4 * 4 + 3 * 2));  // both on q, v, up and down, dragon alone on k, o and gate
}

}  // namespace

// Recorded in float64 throughout and rounded to float once, without PEFT.
TEST_CASE("a trained Llama without adapters gives its logits and its published story", "[golden]") {
  const world w;
  const auto recorded = lora::safetensors::read(base_folder() / "golden.safetensors");
  const auto ids = [&](const char* name) { return recorded.copy<std::int64_t>(name); };
  const auto model = w.model<double>(mixtures[0]);
  const MatrixXd logits = golden::tensor<double>(recorded, "logits").transpose();
  const MatrixXd allowed =
      (std::ldexp(1.0, -24) * logits.array().abs() + 1e-9 * largest(logits)).matrix();
  CHECK(golden::share(model.logits(ids("input_ids")), logits, allowed) <= 1);
  const auto continuation = first(64, ids("continuation_ids")),
             story = first(128, ids("story_ids"));
  CHECK(model.greedy(ids("input_ids"), continuation.size(), -1) == continuation);
  CHECK(w.model<float>(mixtures[0]).greedy({1}, story.size(), -1) == story);
}

TEST_CASE("a trained Llama gives PEFT's logits in every state", "[golden]") {
  const world w;
  for (const mixture& m : mixtures) {
    INFO(m.name);
    // The reference: our double with nothing merged. PEFT's float confirms it in each state, in one
    // its float64 too, which transformers leaves in float for norms, rotary tables and softmax:
    // some of the roundings of PEFT's float.
    const MatrixXd exact = w.logits(w.model<double>(m)), peft = w.logits(m.name);
    if (w.golden.contains("logits.float64." + std::string(m.name) + ".0")) {
      const MatrixXd peft64 = w.logits("float64." + std::string(m.name));
      CHECK(golden::share(exact, peft64, golden::distance(peft, peft64)) <= 1);
      for (unsigned merged = 0; merged < 4; ++merged)
        CHECK(golden::share(w.logits(w.model<float>(m, merged)), peft64,
                            world::times_peft * golden::distance(peft, peft64)) <= 1);
    }
    CHECK(golden::share(peft, exact, world::times_peft * w.peft_in_float()) <= 1);
    for (unsigned merged = 0; merged < 4; ++merged) {
      if (!m.allows(merged)) continue;
      CAPTURE(merged);
      CHECK(golden::share(w.logits(w.model<double>(m, merged)), exact, 1e-9 * largest(exact)) <= 1);
      CHECK(golden::share(w.logits(w.model<float>(m, merged)), exact,
                          world::times_peft * golden::distance(peft, exact)) <= 1);
    }
  }
}

TEST_CASE("its greedy text in float is PEFT's, token by token, in every state", "[golden]") {
  const world w;
  for (const mixture& m : mixtures)
    for (unsigned merged = 0; merged < 4; ++merged) {
      if (!m.allows(merged)) continue;
      const auto model = w.model<float>(m, merged);
      for (int p = 0; p < prompts; ++p) {
        INFO(m.name << ", merged " << merged << ", prompt " << p);
        const auto text = first(48, w.ids("greedy." + std::string(m.name), p));
        CHECK(model.greedy(w.ids("input_ids", p), text.size(), -1) == text);
      }
    }
}

TEST_CASE("an adapter merged, set and unmerged in mid-text changes no token", "[golden]") {
  const world w;
  auto model = w.model<float>(both);
  const auto text = first(48, w.ids("greedy.dragon+rain", 0));
  const auto prompt = w.ids("input_ids", 0);
  auto ids = prompt;
  const auto go_on = [&] {
    const auto more = model.greedy(ids, text.size() / 4, -1);
    ids.insert(ids.end(), more.begin(), more.end());
  };
  go_on();
  model.merge("dragon");
  go_on();
  model.merge("rain");
  go_on();
  model.unmerge("dragon");
  model.set_strength("rain", 0.25);
  model.set_strength("rain", 1);
  go_on();
  CHECK(llama::tokens(ids.begin() + static_cast<std::ptrdiff_t>(prompt.size()), ids.end()) == text);
}

TEMPLATE_TEST_CASE("every layer of it keeps the bound in every state", "[golden]", float, double,
                   lora::bfloat16, lora::float16) {
  check_layers<TestType>(world());
}

TEMPLATE_TEST_CASE("the checkpoints of it that PEFT merged", "[golden]", float, lora::bfloat16,
                   lora::float16) {
  const world w;
  const std::string name = std::is_same_v<TestType, float>            ? "merged-f32"
                           : std::is_same_v<TestType, lora::bfloat16> ? "merged-bf16"
                                                                      : "merged-f16";
  INFO(name);
  const golden::shards checkpoint(folder() / name), weights(w.base);

  SECTION("one rounding against PEFT's two, weight by weight") {
    golden::check_checkpoint<TestType>(checkpoint, weights, {&w.in_float[0], &w.in_float[1]});
  }

  SECTION("the same checkpoint gives the same logits") {
    std::string bytes;
    const auto file = file_of<TestType>(checkpoint, bytes);
    const MatrixXd peft = w.logits(name), exact = w.logits(w.model<double>(file, mixtures[0]));
    CHECK(golden::share(peft, exact, world::times_peft * w.peft_in_float()) <= 1);
    const double allowed = world::times_peft * golden::distance(peft, exact);
    CHECK(golden::share(w.logits(w.model<float>(file, mixtures[0])), exact, allowed) <= 1);
    CHECK(golden::share(w.logits(w.model<TestType>(file, mixtures[0])), exact, allowed) <= 1);
  }

  SECTION("our merge on the same base is no farther from exact than PEFT's may be") {
    std::string bytes;
    const auto file = file_of<TestType>(weights, bytes);
    const MatrixXd peft = w.logits(name), exact = w.logits(w.model<double>(file, both));
    for (unsigned merged = 0; merged < 4; ++merged) {
      CAPTURE(merged);
      // Beside the weight nothing is rounded to its format.
      const double allowed =
          world::times_peft * (merged == 0 ? w.peft_in_float() : golden::distance(peft, exact));
      CHECK(golden::share(w.logits(w.model<TestType>(file, both, merged)), exact, allowed) <= 1);
    }
  }
}
