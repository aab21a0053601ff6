// SPDX-License-Identifier: Apache-2.0
//
// PEFT's own weights and outputs for adapters of every kind that lora::peft::adapters reads,
// through their files: merged and mixed, in float within the tolerance that each case states and in
// double within 1e-9 of the float64 values.
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "lora/forward.hpp"
#include "lora/io/peft_adapters.hpp"
#include "lora/merge.hpp"
#include "lora/mixed.hpp"
#include "support/golden.hpp"
#include "support/outside.hpp"

namespace {

using golden::json;
using golden::MatrixXd;
using lora::index_t;
template <class T>
using vector = Eigen::Matrix<T, Eigen::Dynamic, 1>;

/// A case of two layers with a tanh between them, or of one convolution without padding.
class kind_case {
 public:
  explicit kind_case(const std::string& id) : files_{golden::root() / id} {
    for (const auto& each : about().at("adapters").items())
      sets_.emplace(each.key(), lora::peft::adapters(files_.folder / each.key()));
  }
  const json& about() const { return files_.about; }
  const lora::safetensors::file& io() const { return files_.io; }
  const lora::adapter_set& set(const std::string& adapter) const { return sets_.at(adapter); }

  std::vector<lora::module_adapter> active(const std::string& scenario,
                                           const std::string& module) const {
    std::vector<lora::module_adapter> result;
    for (const auto& pair : about().at("scenarios").at(scenario).at("adapters")) {
      REQUIRE(pair.at(1) == 1.0);
      result.push_back(sets_.at(pair.at(0).get<std::string>()).at(module));
    }
    return result;
  }
  /// As the base stores it; a kernel as out x (in * kernel).
  template <class T>
  test::matrix<T> weight(const std::string& module) const {
    return golden::kernel<T>(files_.base, module + ".weight");
  }
  template <class T>
  vector<T> bias(const std::string& module) const {
    return golden::tensor<T>(files_.base, module + ".bias").transpose();
  }

  template <class T>
  void merge(const std::string& scenario, const std::string& module, test::matrix<T>& W,
             vector<T>& b) const {
    const auto report = lora::merge(W, b, active(scenario, module));
    CHECK(report.became_nonfinite == 0);
  }
  /// The output, out x tokens; `merged`: by weights that were merged before.
  template <class T>
  test::col_matrix<T> output(const std::string& scenario, bool merged) const {
    const auto one_layer = [&](const std::string& module, const test::col_matrix<T>& x) {
      auto W = weight<T>(module);
      auto b = bias<T>(module);
      std::vector<lora::module_adapter> beside;
      const auto all = active(scenario, module);
      if (merged)
        merge(scenario, module, W, b);
      else
        beside = all;
      const bool in_out = all.front().stored_in_out();
      test::col_matrix<T> y(in_out ? W.cols() : W.rows(), x.cols());
      if (beside.empty()) {
        y = (in_out ? test::matrix<T>(W.transpose()) : W) * x;
        y.colwise() += b;
      } else {
        const auto form = lora::mixed(W, beside);
        lora::forward(lora::with_bias(W, b, form), x, y, form);
      }
      return y;
    };
    const test::col_matrix<T> x = golden::input<T>(files_);
    const json& first = about().at("graph").at(0);
    if (first.at("op") == "conv2d") return one_layer(first.at("module"), x);
    const test::col_matrix<T> hidden = one_layer("l0", x).array().tanh().matrix();
    return one_layer("l1", hidden);
  }

 private:
  golden::case_files files_;
  std::map<std::string, lora::adapter_set> sets_;
};

double largest(const MatrixXd& m) { return m.size() == 0 ? 0 : m.cwiseAbs().maxCoeff(); }

/// The largest errors: of float as a share of the case's tolerance, of double as it is.
struct errors {
  double in_float = 0, in_double = 0;
};

void check_weights(const kind_case& c, const json& entry, errors& worst) {
  const std::string scenario = entry.at("scenario"), name = entry.at("tensor");
  const std::string tensor = name.substr(("merged." + scenario + ".").size());
  const auto module = tensor.substr(0, tensor.rfind('.'));
  const auto of = [&]<class T>(T) -> MatrixXd {
    auto W = c.weight<T>(module);
    auto b = c.bias<T>(module);
    c.merge(scenario, module, W, b);
    if (tensor.ends_with("bias")) return b.template cast<double>();
    return W.template cast<double>();
  };
  const auto as_rows = [&](const std::string& which, const MatrixXd& like) {
    const auto values = c.io().copy<double>(which);
    return MatrixXd(
        Eigen::Map<const test::matrix<double>>(values.data(), like.rows(), like.cols()));
  };
  const MatrixXd in_float = of(float()), in_double = of(double());
  worst.in_float =
      std::max(worst.in_float, golden::share(in_float, as_rows(name, in_float), entry));
  worst.in_double =
      std::max(worst.in_double,
               largest(in_double - as_rows("merged64." + scenario + "." + tensor, in_double)));
}

void check_outputs(const kind_case& c, const json& entry, errors& worst) {
  const std::string scenario = entry.at("scenario"), name = entry.at("tensor");
  for (const bool merged : {false, true}) {
    const MatrixXd in_float = c.output<float>(scenario, merged).template cast<double>();
    worst.in_float = std::max(
        worst.in_float, golden::share(in_float, golden::columns<double>(c.io(), name), entry));
    worst.in_double =
        std::max(worst.in_double, largest(c.output<double>(scenario, merged) -
                                          golden::columns<double>(c.io(), "y64_" + scenario)));
  }
}

void check_case(const std::string& id, const std::string& kind) {
  if (!test::have_outside()) return;
  INFO(id);
  const kind_case c(id);
  for (const auto& each : c.about().at("adapters").items()) {
    const auto& set = c.set(each.key());
    CHECK(set.size() == c.about().at("graph").size() / 2 + c.about().at("graph").size() % 2);
    CHECK(set.replaced().empty());
    if (each.value().at("peft_type") == kind)
      for (const auto& one : set) CHECK(one.second.kind() == kind);
  }
  errors worst;
  for (const json& entry : c.about().at("expected")) {
    if (!entry.contains("scenario")) continue;
    const std::string name = entry.at("tensor");
    name.starts_with("merged.") ? check_weights(c, entry, worst) : check_outputs(c, entry, worst);
  }
  INFO("in float " << worst.in_float << " of the tolerance, in double " << worst.in_double);
  CHECK(worst.in_float <= 1);
  CHECK(worst.in_double < 1e-9);
  if (std::getenv("LORA_TABLE") != nullptr)
    WARN(id << ": in float " << worst.in_float << " of the tolerance, in double "
            << worst.in_double);
}

}  // namespace

TEST_CASE("PEFT's LoHa", "[golden]") {
  for (const char* id : {"other_loha", "other_loha_conv2d", "other_loha_conv2d_effective"})
    check_case(id, "LOHA");
}
TEST_CASE("PEFT's LoKr", "[golden]") {
  for (const char* id : {"other_lokr", "other_lokr_both", "other_lokr_conv2d_effective"})
    check_case(id, "LOKR");
}
TEST_CASE("PEFT's (IA)^3", "[golden]") {
  for (const char* id : {"other_ia3", "other_ia3_fan_in_fan_out"}) check_case(id, "IA3");
}
TEST_CASE("PEFT's OFT", "[golden]") {
  for (const char* id : {"other_oft", "other_oft_cayley", "other_oft_two"}) check_case(id, "OFT");
}
TEST_CASE("PEFT's AdaLoRA", "[golden]") { check_case("other_adalora", "ADALORA"); }

TEST_CASE("PEFT's VeRA", "[golden]") { check_case("other_vera", "VERA"); }

TEST_CASE("two kinds on one layer, in the order of the scenarios", "[golden]") {
  check_case("mixed_kinds_loha_lokr", "LOHA");
  check_case("mixed_kinds_lora_loha", "LORA");
  check_case("mixed_kinds_lora_lokr", "LOKR");
}

TEST_CASE("a set of LORA and DORA is what its entries are", "[golden]") {
  if (!test::have_outside()) return;
  for (const char* id : {"linear_mlp", "dora_linear", "conv1d_fan_in_fan_out", "lora_bias"}) {
    INFO(id);
    const auto folder = golden::root() / id / "a";
    const auto file = lora::peft::read(folder);
    const auto set = lora::peft::adapters(folder);
    CHECK(set.size() == file.size());
    for (const auto& [name, e] : file) {
      const auto& one = set.at(name);
      CHECK(one.kind() == (e.magnitude().empty() ? "LORA" : "DORA"));
      CHECK(one.target().weight == e.weight_name());
      test::matrix<float> W = test::matrix<float>::Constant(
          e.stored_in_out() ? e.in_features() : e.out_features(),
          e.stored_in_out() ? e.out_features() : e.in_features(), 0.5F);
      test::matrix<float> by_entry = W;
      vector<float> b = vector<float>::Zero(e.out_features()), b_by_entry = b;
      lora::merge(W, b, one);
      lora::merge(by_entry, b_by_entry, e);
      CHECK(test::same_bits(W, by_entry));
      CHECK(b == b_by_entry);
    }
  }
}

// An IA3 config without its tensors.
TEST_CASE("a config of a kind without tensors says which are missing", "[golden]") {
  if (!test::have_outside()) return;
  for (const char* name : {"ia3_mlp", "ia3_conv2d"}) {
    const auto path = golden::outside("refuse") / name;
    std::string message;
    try {
      (void)lora::peft::adapters(path);
    } catch (const lora::format_error& e) {
      message = e.what();
    }
    CHECK(message.find("peft_type \"IA3\"") != std::string::npos);
    CHECK(message.find("adapter_model.safetensors") != std::string::npos);
  }
}
