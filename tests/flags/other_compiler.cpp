// SPDX-License-Identifier: Apache-2.0
//
// What a compiler without GNU extensions meets on a system without POSIX: vectors of one element,
// no attributes, no huge pages, files written through streams. The standard library and Eigen are
// included before the names of compiler and system go.
#include <Eigen/Core>
#include <Eigen/SVD>
#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cmath>
#include <complex>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <initializer_list>
#include <ios>
#include <iostream>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#undef __GNUC__
#undef __clang__
#undef __linux__
#undef __unix__
#undef __SSE2__

#include "lora/dora.hpp"
#include "lora/embed.hpp"
#include "lora/io/peft.hpp"
#include "lora/io/peft_inventory.hpp"
#include "lora/io/peft_write.hpp"
#include "lora/lora.hpp"
#include "lora/residual.hpp"
#include "lora/rounding.hpp"
#include "lora/through.hpp"

static_assert(lora::detail::simd<float>::width == 1 && !LORA_IO_DETAIL_POSIX);

int main(int count, char** arguments) {
  const Eigen::MatrixXf A{{1, 2, 0}, {0, 1, 1}}, B{{3, 1}, {-1, 2}},
      X{{1, 0, 4, 2, 1}, {2, 1, 0, 1, 3}, {3, 5, 1, 0, 1}};
  const lora::adapter<float> l{A, B, {.alpha = 4}};  // whole numbers: nothing rounds
  Eigen::MatrixXf W{{1, 1, 1}, {2, 2, 2}}, mixed(2, 5), merged(2, 5), layered(2, 5);
  lora::forward(W, X, mixed, l);
  lora::linear<lora::bfloat16> q{W.cast<lora::bfloat16>().eval()};
  q.attach("l", l);
  q.merge();
  q.forward(X, layered);
  lora::merge(W, l);
  lora::forward(W, X, merged);
  if (mixed != merged || mixed != layered || mixed != W * X) return 1;
  if (count < 2) return 0;
  const auto read = lora::peft::read(arguments[1]);
  return read.size() == 0;
}
