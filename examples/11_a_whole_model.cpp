// SPDX-License-Identifier: Apache-2.0
// A set of adapters of different kinds on a model's weights: matched by name first, then merged in
// one call or attached to layers that keep them apart. A name that does not fit is an error before
// anything is written.
#include <iostream>
#include <map>

#include "lora/adapter_set.hpp"
#include "lora/dora.hpp"
#include "lora/kinds/ia3.hpp"
#include "lora/kinds/loha.hpp"
#include "lora/lora.hpp"
#include "lora/model.hpp"

int main() {
  using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const matrix W{{2, 0, 1}, {0, 3, 4}}, A{{1, 0, 0}}, B{{1}, {0}}, all{{1, 1, 1}}, ones{{1}, {1}};

  lora::adapter_set style;  // lora::peft::read gives entries of a file; any kind goes in
  style.add({{"layers.0.q"}, lora::adapter<float>{A, B, {.alpha = 3}}, "LORA"});
  style.add({{"layers.0.k"}, lora::dora_adapter<float>{A, B, {.alpha = 1}, {10, 10}}, "DORA"});
  style.add({{"layers.1.q"}, lora::loha_adapter<float>{{B, A}, {ones, all}, {.alpha = 2}}, "LOHA"});
  style.add({{"layers.1.k"}, lora::ia3_adapter<float>::of_outputs({0.5F, 2}, 3), "IA3"});

  std::map<std::string, matrix> weights;
  for (const auto* name : {"model.layers.0.q.weight", "model.layers.0.k.weight",
                           "model.layers.1.q.weight", "model.layers.1.k.weight"})
    weights.emplace(name, W);
  try {
    lora::merge(weights, style);
  } catch (const lora::value_error& e) {
    std::cout << e.what() << "\n\n";
  }
  const auto fits = style.renamed(lora::moved_prefix{"", "model."});
  const auto report = lora::merge(weights, fits, 0.5);  // at half of their strength
  std::cout << "merged " << report.weights << " weights: " << report.changed << " of "
            << report.elements << " elements changed\n";

  lora::model<float> net;
  for (const auto& [name, l] : style) net.add(name, lora::linear<float>(W));
  net.attach("style", style, 0.5);
  const Eigen::Vector3f x(1, 2, 3);
  for (const auto& [name, l] : style) {
    Eigen::Vector2f mixed;
    net.at(name).forward(x, mixed);
    std::cout << name << "  " << l.kind() << "  mixed " << mixed.transpose() << "  merged "
              << (weights.at("model." + name + ".weight") * x).transpose() << "\n";
  }
}
