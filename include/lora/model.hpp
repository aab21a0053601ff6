// SPDX-License-Identifier: Apache-2.0
//
// model<T>: the layers of a model by name, and adapters attached to all of their modules or to
// none.
//
//   lora::model<lora::bfloat16> net;
//   net.add("model.layers.0.self_attn.q_proj", lora::linear<lora::bfloat16>(W));   // ...
//   net.attach("style", set, 0.7);   // every module of the set, or nothing and an error
//   net.merge("style");                       // in every layer that has it
//   net.at("model.layers.0.self_attn.q_proj").forward(x, y);
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora/detail/name_match.hpp"
#include "lora/error.hpp"
#include "lora/linear.hpp"
#include "lora/merge_report.hpp"

namespace lora::inline LORA_DETAIL_ABI {

/// Layers by module name. Owns them. add and attach change nothing when they throw; the others go
/// from layer to layer, and where one throws (an order that linear refuses, a reload function),
/// those before it are changed. As thread-safe as its layers.
template <class T>
class model {
 public:
  using map = std::map<std::string, linear<T>, std::less<>>;

  /// Throws value_error when the name is taken.
  void add(std::string name, linear<T> layer) {
    if (contains(name))
      detail::raise_value("model::add", "a layer named \"" + name + "\" is there already");
    layers_.emplace(std::move(name), std::move(layer));
  }
  bool contains(std::string_view module) const { return layers_.find(module) != layers_.end(); }
  std::size_t size() const { return layers_.size(); }
  auto begin() const { return layers_.begin(); }
  auto end() const { return layers_.end(); }
  /// Throws value_error naming what is near.
  const linear<T>& at(std::string_view module) const { return *find("model::at", module); }
  linear<T>& at(std::string_view module) {
    return const_cast<linear<T>&>(std::as_const(*this).at(module));
  }

  /// Attaches adapters under one name: a range of pairs (module, adapter of any kind), as
  /// adapter_set is and a file of PEFT. Every module must be a layer of this model: value_error
  /// names the first that is not, and what is near. A set must not replace tensors too
  /// (adapter_set::adapters_alone).
  template <class Adapters>
  void attach(const std::string& name, const Adapters& adapters, double strength = 1) {
    if constexpr (requires { adapters.check_adapters_alone("model::attach"); })
      adapters.check_adapters_alone("model::attach");
    for (const auto& each : adapters) find("model::attach", each.first);
    std::vector<linear<T>*> done;
    done.reserve(layers_.size());
    const auto attach_all = [&] {
      for (const auto& each : adapters) {
        linear<T>& layer = at(each.first);
        layer.attach(name, scaled(strength, each.second));
        done.push_back(&layer);
      }
    };
#if defined(__cpp_exceptions)
    try {
      attach_all();
    } catch (...) {
      for (linear<T>* const layer : done) layer->detach(name);
      throw;
    }
#else
    attach_all();
#endif
  }

  // As the members of linear, in every layer that has the adapter. Throws value_error when none has
  // it.
  void detach(const std::string& name) {
    each("model::detach", name, [&](linear<T>& one) { one.detach(name); });
  }
  void set_strength(const std::string& name, double strength) {
    each("model::set_strength", name, [&](linear<T>& one) { one.set_strength(name, strength); });
  }
  void activate(const std::string& name) {
    each("model::activate", name, [&](linear<T>& one) { one.activate(name); });
  }
  void deactivate(const std::string& name) {
    each("model::deactivate", name, [&](linear<T>& one) { one.deactivate(name); });
  }
  /// Reports of all layers, added up.
  merge_report merge(const std::string& name) {
    merge_report report;
    each("model::merge", name, [&](linear<T>& one) { report += one.merge(name); });
    return report;
  }
  merge_report unmerge(const std::string& name) {
    merge_report report;
    each("model::unmerge", name, [&](linear<T>& one) { report += one.unmerge(name); });
    return report;
  }

 private:
  const linear<T>* find(const char* operation, std::string_view module) const {
    const auto found = layers_.find(module);
    if (found != layers_.end()) return &found->second;
    std::vector<std::string> names;
    for (const auto& one : layers_) names.push_back(one.first);
    std::string near;
    for (const auto& other : detail::nearest_names(module, names))
      near += (near.empty() ? "; near: " : ", ") + other;
    detail::raise_value(operation, "the model has no layer \"" + std::string(module) + "\"" + near);
  }
  template <class Visit>
  void each(const char* operation, const std::string& name, const Visit& visit) {
    bool any = false;
    for (auto& entry : layers_) {
      if (!entry.second.contains(name)) continue;
      any = true;
      visit(entry.second);
    }
    if (!any) detail::raise_value(operation, "no layer has an adapter named \"" + name + "\"");
  }

  map layers_;
};

}  // namespace lora::inline LORA_DETAIL_ABI
