// SPDX-License-Identifier: Apache-2.0
//
// Reference cases of other projects: a folder with a base, adapters as PEFT saves them, case.json,
// and what PEFT computed with them beside float64 values from elsewhere. check_case(folder)
// compares every tensor that case.json lists, with our numbers in every state of merging;
// check_expected does so with outputs compared by the caller, check_weights without outputs, where
// the base is a model that is not described as a graph.
//
// Every tolerance is a bound: the hard bound of docs/numerics.md for our arithmetic plus the one
// for PEFT's (support/golden.hpp), carried through the graph; and, where the case states one, also
// its own atol and rtol.
#pragma once

#include <algorithm>
#include <filesystem>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "golden/graph.hpp"
#include "lora/io/peft.hpp"
#include "support/golden.hpp"

namespace golden {

/// Adapters and the factors of their strength, in the order in which they are active.
using scenario = std::vector<std::pair<std::string, double>>;

class reference_case {
 public:
  explicit reference_case(const fs::path& folder) : files_{folder} {
    for (const auto& op : graph()) in_out_ = in_out_ || op.at("op") == "conv1d_t";
    in_out_ = in_out_ || about().value("arch", "") == "gpt2";
    // PEFT corrects the word in the config when it sees a base that stores in x out; here the case
    // says so.
    const lora::peft::read_options options{.fan_in_fan_out = in_out_};
    for (const auto& [name, settings] : about().at("adapters").items()) {
      in_float_.emplace(name, lora::peft::read<float>(folder / name, options));
      in_double_.emplace(name, lora::peft::read<double>(folder / name, options));
    }
  }

  const json& about() const { return files_.about; }
  const lora::safetensors::file& base() const { return files_.base; }
  const lora::safetensors::file& io() const { return files_.io; }
  json graph() const { return about().value("graph", json::array()); }
  /// The base stores its weights in_features x out_features.
  bool in_out() const { return in_out_; }
  template <class T>
  const auto& adapters() const {
    if constexpr (std::is_same_v<T, double>)
      return in_double_;
    else
      return in_float_;
  }

  scenario scenario_of(const std::string& name) const {
    scenario result;
    if (about().contains("scenarios")) {
      for (const auto& pair : about().at("scenarios").at(name).at("adapters"))
        result.emplace_back(pair.at(0), pair.at(1));
    } else if (name != "base") {
      for (const auto& adapter : split(name, '+')) result.emplace_back(adapter, 1.0);
    }
    return result;
  }

  /// The adapters of a scenario that a module has, exact; those of the bits of `merged` apart from
  /// the others.
  state parts_of(const std::string& module, const scenario& active, unsigned merged = 0) const {
    state result;
    for (std::size_t k = 0; k < active.size(); ++k) {
      const auto& file = in_double_.at(active[k].first);
      if (!file.contains(module)) continue;
      part p = agreement::part_of(file.at(module).factors());
      p.s *= active[k].second;
      ((merged >> k & 1) != 0 ? result.merged : result.mixed).push_back(std::move(p));
    }
    return result;
  }

  /// out x in, whatever the base stores.
  MatrixXd weight(const std::string& module) const {
    return turned(tensor<double>(base(), module + ".weight"));
  }
  VectorXd bias(const std::string& module) const {
    return base().contains(module + ".bias")
               ? VectorXd(tensor<double>(base(), module + ".bias").transpose())
               : VectorXd();
  }
  MatrixXd turned(const MatrixXd& m) const { return in_out_ ? MatrixXd(m.transpose()) : m; }

  /// A layer with every adapter of the case: those of the scenario active, merged by the bits of
  /// `merged`; the others merged and then deactivated.
  template <class T>
  lora::linear<T> layer(const std::string& module, const scenario& active, unsigned merged) const {
    const test::matrix<T> W = weight(module).template cast<T>();
    const Eigen::Matrix<T, Eigen::Dynamic, 1> b = bias(module).template cast<T>();
    auto result = b.size() == 0 ? lora::linear<T>(W) : lora::linear<T>(lora::with_bias(W, b));
    for (const auto& each : adapters<T>()) {
      const std::string& name = each.first;
      if (!each.second.contains(module)) continue;
      const auto found = std::find_if(active.begin(), active.end(),
                                      [&](const auto& a) { return a.first == name; });
      const auto& l = each.second.at(module).factors();
      if (found == active.end()) {
        result.attach(name, l);
        result.merge(name);
        result.deactivate(name);
      } else {
        result.attach(name, lora::scaled(found->second, l));
        if ((merged >> (found - active.begin()) & 1) != 0) result.merge(name);
      }
    }
    return result;
  }

  /// The output of the graph, out x tokens, in T.
  template <class T>
  MatrixXd output(const scenario& active, unsigned merged) const {
    const test::col_matrix<T> x = tensor<T>(io(), "x").transpose();
    return run_graph(graph(), x,
                     [&](const json& op, const test::col_matrix<T>& input) {
                       const auto one = layer<T>(op.at("module"), active, merged);
                       test::col_matrix<T> y(one.out_features(), input.cols());
                       one.forward(input, y);
                       return y;
                     })
        .template cast<double>();
  }

  /// How far such an output may be from exact, by a bound for one layer: agreement::error_bound for
  /// ours, or peft_bound.
  template <class Bound>
  MatrixXd output_bound(const scenario& active, unsigned merged, const formats& f,
                        const Bound& bound_of) const {
    const MatrixXd x = tensor<double>(io(), "x").transpose();
    const auto layer = [&](const json& op, const tracked& in) -> tracked {
      const std::string module = op.at("module");
      const MatrixXd W = weight(module), largest = in.value.cwiseAbs() + in.bound;
      const VectorXd b = bias(module);
      const auto all = parts_of(module, active).mixed;
      MatrixXd value = exact_sum(W, all) * in.value;
      if (b.size() != 0) value.colwise() += b;
      return {value,
              bound_of(W, b, parts_of(module, active, merged), largest, f) +
                  (W.cwiseAbs() + magnitude(all, W.rows(), W.cols())) * in.bound,
              in.u};
    };
    return run_graph(graph(), tracked{x, MatrixXd::Zero(x.rows(), x.cols()), f.accumulator.u},
                     layer)
        .bound;
  }

 private:
  case_files files_;
  bool in_out_ = false;
  std::map<std::string, lora::peft::adapter_file<float>> in_float_;
  std::map<std::string, lora::peft::adapter_file<double>> in_double_;
};

/// Names, ranks and scalings as PEFT had them at run time (to the last bit), and which modules the
/// config selects.
inline void check_adapters(const reference_case& c) {
  for (const auto& [name, modules] : c.about().at("scaling").items()) {
    const auto& file = c.adapters<float>().at(name);
    CHECK(file.size() == modules.size());
    for (const auto& [module, s] : modules.items()) {
      INFO(name << " " << module);
      REQUIRE(file.contains(module));
      CHECK(file.at(module).factors().scaling() == s.template get<double>());
      if (c.about().contains("ranks"))
        CHECK(file.at(module).factors().rank() ==
              c.about().at("ranks").at(name).at(module).template get<lora::index_t>());
    }
    for (const auto& t : c.base()) {
      const auto end = t.name.rfind(".weight");
      if (end == std::string::npos) continue;
      const auto module = t.name.substr(0, end);
      INFO(name << " " << module);
      CHECK(lora::peft::matches_target(file.config(), module) == file.contains(module));
    }
  }
}

/// merge(W, entries...) or unmerge, with W as the base stores it.
template <class T, class Verb>
void on_entries(const reference_case& c, const std::string& module, const scenario& active,
                const Verb& verb) {
  std::vector<lora::peft::scaled_entry<T>> found;
  for (const auto& [name, factor] : active) {
    const auto& file = c.adapters<T>().at(name);
    if (file.contains(module)) found.push_back(lora::scaled(factor, file.at(module)));
  }
  if (found.size() == 1) return verb(found[0]);
  if (found.size() == 2) return verb(found[0], found[1]);
  throw std::runtime_error("this runner merges one or two adapters of a module, not " +
                           std::to_string(found.size()));
}

/// Our weight in T after merging, by the entries and by a layer, against the float64 sum and PEFT's
/// weight.
template <class T>
void check_merged_in(const reference_case& c, const json& entry, const std::string& name) {
  const scenario active = c.scenario_of(entry.at("scenario"));
  const std::string module = name.substr(0, name.rfind(".weight")),
                    stem = entry.at("scenario").get<std::string>() + "." + name;
  const auto parts = c.parts_of(module, active).mixed;
  const MatrixXd W = c.weight(module);
  const formats f = all_in<T>();
  const MatrixXd ours = agreement::merge_bound(W, parts, f), peft = one_by_one_bound(W, parts, f);

  auto stored = tensor<T>(c.base(), name);
  on_entries<T>(c, module, active,
                [&](const auto&... l) { CHECK(lora::merge(stored, l...).became_nonfinite == 0); });
  const MatrixXd by_entries = c.turned(stored.template cast<double>());
  const MatrixXd in_layer =
      agreement::in_double(c.layer<T>(module, active, (1u << active.size()) - 1).weight());
  const MatrixXd want = c.io().contains("merged64." + stem)
                            ? c.turned(tensor<double>(c.io(), "merged64." + stem))
                            : exact_sum(W, parts);
  for (const MatrixXd* got : {&by_entries, &in_layer}) {
    INFO((got == &by_entries ? "merge" : "linear"));
    if constexpr (std::is_same_v<T, double>) {
      CHECK(share(*got, want, ours + peft) <= 1);
    } else {
      const MatrixXd theirs = c.turned(tensor<double>(c.io(), "merged." + stem));
      CHECK(share(*got, want, ours) <= 1);
      CHECK(share(*got, theirs, ours + peft) <= 1);
      CHECK(share(*got, theirs, entry) <= 1);
    }
  }
}

/// merged.<scenario>.<base tensor>
inline void check_merged(const reference_case& c, const json& entry) {
  const std::string prefix = "merged." + entry.at("scenario").get<std::string>() + ".";
  const std::string tensor_name = entry.at("tensor");
  REQUIRE(tensor_name.substr(0, prefix.size()) == prefix);
  check_merged_in<float>(c, entry, tensor_name.substr(prefix.size()));
  check_merged_in<double>(c, entry, tensor_name.substr(prefix.size()));
}

/// unmerged.<adapters>.<base tensor>: a layer gives the base back bit for bit; the subtraction
/// rounds, PEFT's and ours.
inline void check_unmerged(const reference_case& c, const json& entry) {
  const std::string all =
      entry.at("tensor").get<std::string>().substr(std::string("unmerged.").size());
  const auto dot = all.find('.');
  const std::string name = all.substr(dot + 1), module = name.substr(0, name.rfind(".weight"));
  const scenario active = c.scenario_of(all.substr(0, dot));
  auto parts = c.parts_of(module, active).mixed;
  const MatrixXd W = c.weight(module);
  const formats f = all_in<float>();

  const auto pristine = tensor<float>(c.base(), name);
  auto stored = pristine;
  on_entries<float>(c, module, active, [&](const auto&... l) {
    lora::merge(stored, l...);
    lora::unmerge(stored, l...);
  });
  const MatrixXd merge = agreement::merge_bound(W, parts, f),
                 d = magnitude(parts, W.rows(), W.cols());
  const MatrixXd ours = merge + agreement::merge_bound(W.cwiseAbs() + d + merge, parts, f);
  const auto count = parts.size();
  for (std::size_t k = 0; k < count; ++k) parts.push_back(parts[count - 1 - k]);
  const MatrixXd got = c.turned(stored.cast<double>()),
                 theirs = c.turned(tensor<double>(c.io(), entry.at("tensor")));
  CHECK(share(got, W, ours) <= 1);
  CHECK(share(got, theirs, ours + one_by_one_bound(W, parts, f)) <= 1);
  CHECK(share(got, theirs, entry) <= 1);

  auto layer = c.layer<float>(module, active, (1u << active.size()) - 1);
  layer.unmerge();
  CHECK(test::same_bits(layer.weight(), lora::linear<float>(W.cast<float>().eval()).weight()));
}

/// An output: in every state of merging ours is PEFT's function, up to what both round.
inline void check_output(const reference_case& c, const json& entry) {
  const std::string name = entry.at("tensor"), of = entry.at("scenario");
  const scenario active = c.scenario_of(of);
  const auto states = 1u << active.size();
  const auto ours = [](const auto&... a) -> MatrixXd { return agreement::error_bound(a...); };
  const auto theirs = [](const auto&... a) -> MatrixXd { return peft_bound(a...); };
  // Which state PEFT's output or the float64 one was computed in, the name tells only a reader.
  const auto in_any_state = [&](const formats& f) {
    MatrixXd largest = c.output_bound(active, 0, f, theirs);
    for (unsigned merged = 1; merged < states; ++merged)
      largest = largest.cwiseMax(c.output_bound(active, merged, f, theirs));
    return largest;
  };
  const MatrixXd exact = tensor<double>(c.io(), "y64_" + of).transpose(),
                 peft = tensor<double>(c.io(), name).transpose();
  const MatrixXd peft_float = in_any_state(all_in<float>()),
                 peft_double = in_any_state(all_in<double>());

  for (unsigned merged = 0; merged < states; ++merged) {
    INFO("merged: " << merged << " of " << states);
    const MatrixXd got = c.output<float>(active, merged);
    const MatrixXd bound = c.output_bound(active, merged, all_in<float>(), ours);
    CHECK(share(c.output<double>(active, merged), exact,
                c.output_bound(active, merged, all_in<double>(), ours) + peft_double) <= 1);
    CHECK(share(got, exact, bound) <= 1);
    CHECK(share(got, exact, entry) <= 1);
    if (entry.value("wrong_in_peft", false)) {
      CHECK(share(got, peft, entry) > 1);
    } else {
      CHECK(share(got, peft, bound + peft_float) <= 1);
      CHECK(share(got, peft, entry) <= 1);
    }
  }
  // What PEFT computed instead, where the case knows.
  if (entry.contains("equals"))
    for (const json& other : c.about().at("expected"))
      if (other.at("tensor") == entry.at("equals"))
        CHECK(share(c.output<float>(c.scenario_of(other.at("scenario")), 0), peft, entry) <= 1);
}

/// Everything that case.json lists, outputs by `output`.
template <class Output>
void check_expected(const reference_case& c, const Output& output) {
  check_adapters(c);
  for (const json& entry : c.about().at("expected")) {
    const std::string name = entry.at("tensor");
    INFO(name);
    if (name.starts_with("merged."))
      check_merged(c, entry);
    else if (name.starts_with("unmerged."))
      check_unmerged(c, entry);
    else
      output(c, entry);
  }
}

/// A case with a graph, wholly.
inline void check_case(const fs::path& folder) {
  INFO(folder.string());
  check_expected(reference_case(folder), check_output);
}

/// The adapters and the weights of a case, without its outputs.
inline void check_weights(const reference_case& c) {
  check_expected(c, [](const reference_case&, const json&) {});
}

}  // namespace golden
