// SPDX-License-Identifier: Apache-2.0
//
// A model that writes numbers as words, and two adapters that PEFT trained for it: one writes in
// capitals, one in German. Switched, mixed and merged while the program runs, and in the middle of
// a text.
#include <iostream>

#include "llama.hpp"

int main(int count, char** arguments) {
  const std::filesystem::path data = count > 1 ? arguments[1] : "examples/data";
  const llama::vocabulary words(data / "base/vocabulary.json");
  auto model = llama::read<float>(data / "base");
  const auto answer = [&](const std::string& question) {
    return words.decode(model.greedy(words.encode(question + " = "), 48, words.end()));
  };

  std::cout << "base               42 = " << answer("42") << '\n';

  model.attach("capitals", lora::peft::read(data / "adapters/capitals"));
  std::cout << "capitals           42 = " << answer("42") << '\n';

  model.attach("german", lora::peft::read(data / "adapters/german"));
  std::cout << "both               42 = " << answer("42") << '\n';

  model.merge("capitals");  // into the weights; german stays mixed
  std::cout << "capitals merged    42 = " << answer("42") << '\n';

  model.set_strength("german", 0.5);
  std::cout << "german at 0.5      42 = " << answer("42") << '\n';

  model.deactivate("capitals");  // leaves the weights, although it is merged
  model.set_strength("german", 0.4);
  std::cout << "german at 0.4      42 = " << answer("42") << '\n';

  model.set_strength("german", 1);
  std::cout << "german             42 = " << answer("42") << '\n';

  // In the middle of a text: capitals comes back after eight letters.
  auto ids = words.encode("7895 = ");
  const std::size_t prompt = ids.size();
  while (ids.back() != words.end() && ids.size() < 60) {
    if (ids.size() == prompt + 8) model.activate("capitals");
    ids.push_back(model.next(ids));
  }
  std::cout << "capitals half way  " << words.decode(ids) << '\n';
}
