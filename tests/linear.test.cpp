// SPDX-License-Identifier: Apache-2.0
//
// linear<T> against a model that keeps only what the calls said. On whole numbers every bit of the weight and of the
// output is known by plain loops; on numbers that use all bits the output must lie within the bound of docs/numerics.md.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "lora/linear.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/refused.hpp"

using lora::index_t;
using lora::scaling_rule;
using test::mentions;
using test::refusal;
using test::same_bits;

namespace {

using Eigen::MatrixXf;

using any_adapter =
    std::variant<lora::adapter<float>, lora::adapter<double>, lora::adapter<lora::float16>, lora::adapter<lora::bfloat16>>;

struct entry {
  any_adapter adapter;
  double weight;
  bool active = true, merged = false;

  bool inside() const { return active && merged; }
  bool beside() const { return active && !merged; }
};

/// What the calls said, and nothing else.
template <class T>
struct model {
  test::matrix<T> W;
  Eigen::VectorXf bias;  ///< empty: none
  std::map<std::string, entry> all = {};

  lora::linear<T> layer(typename lora::linear<T>::reload_function reload = nullptr) const {
    return bias.size() == 0 ? lora::linear<T>(W, reload) : lora::linear<T>(lora::with_bias(W, bias), reload);
  }
  /// Writes W again.
  auto reload() const {
    return [W = W](std::span<T> to) { std::copy_n(W.data(), W.size(), to.data()); };
  }
  std::vector<std::string> names() const {
    std::vector<std::string> result;
    for (const auto& [name, one] : all) result.push_back(name);
    return result;
  }
  bool holds_double(bool inside) const {
    return std::any_of(all.begin(), all.end(), [&](const auto& named) {
      const entry& one = named.second;
      return (inside ? one.inside() : one.beside()) && std::holds_alternative<lora::adapter<double>>(one.adapter);
    });
  }
};

template <class T>
void attach(lora::linear<T>& q, const std::string& name, const entry& one, double weight) {
  std::visit([&](const auto& l) { q.attach(name, lora::scaled(weight, l)); }, one.adapter);
}

std::vector<std::string> shuffled(std::vector<std::string> names, test::random& g) {
  for (std::size_t n = names.size(); n > 1; --n)
    std::swap(names[n - 1], names[static_cast<std::size_t>(g.integer(0, static_cast<index_t>(n) - 1))]);
  return names;
}

/// A new layer in the model's state, by calls in a random order.
template <class T>
lora::linear<T> brought_to(const model<T>& m, test::random& g) {
  auto q = m.layer();
  for (const auto& name : shuffled(m.names(), g)) {
    const entry& one = m.all.at(name);
    attach(q, name, one, g.one_in(2) ? one.weight : 0.5);
    if (g.one_in(2)) q.merge(name);
    if (g.one_in(3)) q.deactivate(name);
  }
  for (const auto& name : shuffled(m.names(), g)) {
    const entry& one = m.all.at(name);
    if (g.one_in(2)) q.set_weight(name, one.weight);
    one.merged ? q.merge(name) : q.unmerge(name);
    one.active ? q.activate(name) : q.deactivate(name);
    q.set_weight(name, one.weight);
  }
  return q;
}

/// Everything that can be asked of a layer, to compare two layers or two times.
struct snapshot {
  std::vector<std::string> names;
  std::vector<std::array<double, 5>> attached;
  std::vector<unsigned char> weight, output;
  bool operator==(const snapshot&) const = default;
};
template <class T>
snapshot look(const lora::linear<T>& q) {
  snapshot s{q.names(), {}, test::bytes(q.weight()), {}};
  for (const auto& name : s.names) {
    const auto [weight, scaling, rank, active, merged] = q.at(name);
    s.attached.push_back({weight, scaling, static_cast<double>(rank), double(active), double(merged)});
  }
  test::random g(5);
  const auto x = g.reals<float>(q.in_features(), 3, 2);
  test::matrix<float> y(q.out_features(), 3);
  q.forward(x, y);
  s.output = test::bytes(y);
  return s;
}

/// One random layer and the same walk on it with and without a reload function.
template <class T, bool whole_numbers>
class walk {
 public:
  explicit walk(test::random& g) : g_(g), m_(new_model(g)), copied_(m_.layer()), reloaded_(m_.layer(m_.reload())) {}

  void run(int steps) {
    for (int step = 0; step < steps; ++step) {
      const std::string what = one_call();
      CAPTURE(step, what, m_.W.rows(), m_.W.cols(), m_.all.size());
      if (!check_state()) return;
      if constexpr (whole_numbers) {
        if (!check_whole_numbers<T>() || !check_whole_numbers<float>()) return;
      } else {
        if (!check_bound<T, T>() || !check_bound<float, float>() || !check_bound<T, double>()) return;
      }
    }
    copied_.unmerge();
    reloaded_.unmerge();
    CHECK(same_bits(copied_.weight(), m_.W));
    CHECK(same_bits(reloaded_.weight(), m_.W));
    if constexpr (!whole_numbers) CHECK(std::sqrt(squared_difference_) <= std::sqrt(squared_expected_));
  }

 private:
  static model<T> new_model(test::random& g) {
    const index_t out = g.integer(1, 20), in = g.integer(1, 24);
    const auto bias = g.one_in(2) ? out : 0;
    if constexpr (whole_numbers) return {g.integers<T>(out, in, 200), g.integers<float>(bias, 1, 50)};
    return {g.reals<T>(out, in, 0.5), g.reals<float>(bias, 1, 0.5)};
  }
  template <class F>
  lora::adapter<F> new_adapter_of(index_t rank) {
    const index_t out = m_.W.rows(), in = m_.W.cols();
    if constexpr (whole_numbers)
      return {g_.integers<F>(rank, in, 2),
              g_.integers<F>(out, rank, 2),
              {.alpha = 0.25 * static_cast<double>(g_.integer(-9, 9)), .rule = scaling_rule::fixed}};
    return {g_.reals<F>(rank, in, 0.4), g_.reals<F>(out, rank, 0.4), {.alpha = g_.uniform(-3, 3)}};
  }
  any_adapter new_adapter() {
    const index_t rank = g_.integer(1, g_.one_in(4) ? 30 : 5);
    switch (g_.integer(0, 3)) {
      case 0: return new_adapter_of<float>(rank);
      case 1: return new_adapter_of<double>(rank);
      case 2: return new_adapter_of<lora::float16>(rank);
      default: return new_adapter_of<lora::bfloat16>(rank);
    }
  }
  double new_weight() { return whole_numbers ? 0.25 * static_cast<double>(g_.integer(-8, 8)) : g_.uniform(-2, 2); }

  template <class Call>
  void on_both(const Call& call) {
    call(copied_);
    call(reloaded_);
  }

  std::string one_call() {
    const auto attached = shuffled(m_.names(), g_);
    const int choice = attached.empty() ? 0 : static_cast<int>(g_.integer(0, 11));
    const std::string name = attached.empty() ? "" : attached.front();
    if (choice == 0 || (choice == 1 && attached.size() < 4)) {
      const std::string fresh = std::string(1, static_cast<char>('a' + g_.integer(0, 5)));
      if (m_.all.count(fresh) != 0) {
        on_both([&](auto& q) { CHECK_THROWS_AS(attach(q, fresh, m_.all.at(fresh), 0.5), lora::value_error); });
        return "attach twice";
      }
      entry one{new_adapter(), new_weight()};
      on_both([&](auto& q) { attach(q, fresh, one, one.weight); });
      m_.all.emplace(fresh, one);
      return "attach " + fresh;
    }
    entry& one = m_.all.at(name);
    switch (choice) {
      case 1:
        on_both([&](auto& q) { q.detach(name); });
        m_.all.erase(name);
        return "detach " + name;
      case 2:
      case 3:
        one.weight = new_weight();
        on_both([&](auto& q) { q.set_weight(name, one.weight); });
        return "set_weight " + name;
      case 4:
        one.active = true;
        on_both([&](auto& q) { q.activate(name); });
        return "activate " + name;
      case 5:
        one.active = false;
        on_both([&](auto& q) { q.deactivate(name); });
        return "deactivate " + name;
      case 6:
        for (auto& [other, e] : m_.all) e.merged = e.merged || e.active;
        on_both([](auto& q) { q.merge(); });
        return "merge";
      case 7:
        one.merged = true;
        on_both([&](auto& q) { q.merge(name); });
        return "merge " + name;
      case 8:
        one.merged = m_.all.at(attached.back()).merged = true;
        on_both([&](auto& q) { q.merge(name, attached.back()); });
        return "merge " + name + " and " + attached.back();
      case 9:
        for (auto& [other, e] : m_.all) e.merged = false;
        on_both([](auto& q) { q.unmerge(); });
        return "unmerge";
      case 10:
        one.merged = m_.all.at(attached.back()).merged = false;
        on_both([&](auto& q) { q.unmerge(name, attached.back()); });
        return "unmerge " + name + " and " + attached.back();
      default:
        one.merged = false;
        on_both([&](auto& q) { q.unmerge(name); });
        return "unmerge " + name;
    }
  }

  bool check_state() {
    bool as_said = copied_.names() == m_.names();
    for (const auto& [name, one] : m_.all) {
      const auto is = copied_.at(name);
      as_said = as_said && copied_.contains(name) && is.weight == one.weight && is.active == one.active &&
                is.merged == one.merged;
    }
    const bool any_inside = std::any_of(m_.all.begin(), m_.all.end(), [](const auto& n) { return n.second.inside(); });
    const auto other_way = brought_to(m_, g_);
    const bool good = as_said && look(copied_) == look(reloaded_) && look(copied_) == look(other_way) &&
                      (any_inside || same_bits(copied_.weight(), m_.W));
    CHECK(as_said);
    CHECK(look(copied_) == look(reloaded_));
    CHECK(look(copied_) == look(other_way));
    if (!any_inside) CHECK(same_bits(copied_.weight(), m_.W));
    return good;
  }

  /// The weight is the exact sum, rounded once; the output the exact product with it, rounded once.
  template <class Y>
  bool check_whole_numbers() {
    test::exact_matrix weight = test::exact(m_.W), beside = test::exact_matrix::Zero(m_.W.rows(), m_.W.cols());
    for (const auto& [name, one] : m_.all)
      std::visit(
          [&](const auto& l) {
            const test::exact_matrix delta = static_cast<long double>(one.weight) * test::exact_delta(l);
            if (one.inside()) weight += delta;
            if (one.beside()) beside += delta;
          },
          one.adapter);
    const auto stored = test::rounded<T>(weight);
    const bool weight_good = same_bits(copied_.weight(), stored);
    CHECK(weight_good);
    const auto x = g_.integers<T>(m_.W.cols(), g_.integer(1, 5), 3);
    test::exact_matrix exact = test::times(test::exact(stored) + beside, test::exact(x));
    if (m_.bias.size() != 0) exact.colwise() += m_.bias.cast<long double>();
    test::matrix<Y> y(m_.W.rows(), x.cols());
    copied_.forward(x, y);
    const bool output_good = test::exact(y) == test::exact(test::rounded<Y>(exact));
    CHECK(output_good);
    return weight_good && output_good;
  }

  template <class X, class Y>
  bool check_bound() {
    const index_t tokens = g_.integer(1, 4);
    // Both inside larger matrices, x by columns and y by rows.
    const test::col_matrix<X> large_x = g_.reals<X>(m_.W.cols() + 3, tokens + 1, 1.5);
    test::matrix<Y> large_y = g_.reals<Y>(m_.W.rows() + 1, tokens + 2, 1);
    const auto around = large_y;
    const auto x = large_x.bottomRightCorner(m_.W.cols(), tokens);
    copied_.forward(x, large_y.topLeftCorner(m_.W.rows(), tokens));

    agreement::state where;
    std::vector<agreement::part> all;
    for (const auto& [name, one] : m_.all) {
      const agreement::part part =
          std::visit([&](const auto& l) { return agreement::part_of(lora::scaled(one.weight, l)); }, one.adapter);
      if (one.inside()) where.merged.push_back(part);
      if (one.beside()) where.mixed.push_back(part);
      if (one.active) all.push_back(part);
    }
    const auto in_double = agreement::in_double(m_.W), xs = agreement::in_double(x);
    const Eigen::VectorXd bias = m_.bias.template cast<double>();
    const auto exact = layers::reference(in_double, bias, all, xs);
    using plain = lora::accumulator_t<T, X, Y>;
    const auto single = agreement::formats_of<T, Y, plain>();
    const auto merge = m_.holds_double(true) ? agreement::formats_of<T, Y, double>()
                                             : agreement::formats_of<T, Y, lora::accumulator_t<T>>();
    const auto product = m_.holds_double(false) ? agreement::formats_of<T, Y, double>() : single;
    const Eigen::MatrixXd bound = agreement::error_bound(in_double, bias, where, xs, product, merge);
    const auto y = agreement::in_double(large_y.topLeftCorner(m_.W.rows(), tokens));
    const Eigen::MatrixXd difference =
        (y.template cast<long double>() - exact).cwiseAbs().template cast<double>();
    const bool within = (difference.array() <= bound.array()).all();
    CHECK(within);
    // The second test of support/oracle.hpp, over the whole walk.
    const auto coarse = agreement::formats_of<T, Y, lora::accumulator_t<T>>();
    squared_difference_ += difference.squaredNorm();
    squared_expected_ += oracle::expected(in_double, bias, where, xs, coarse).squaredNorm();
    const bool outside_kept = same_bits(large_y.rightCols(2), around.rightCols(2)) &&
                              same_bits(large_y.bottomRows(1), around.bottomRows(1));
    CHECK(outside_kept);
    return within && outside_kept;
  }

  test::random& g_;
  model<T> m_;
  lora::linear<T> copied_, reloaded_;
  double squared_difference_ = 0, squared_expected_ = 0;
};

}  // namespace

TEMPLATE_TEST_CASE("random walks on whole numbers: every bit is known", "[linear]", float, double, lora::bfloat16,
                   lora::float16) {
  test::random g(901);
  CAPTURE(g.seed());
  for (int trial = 0; trial < 40 / std::min(layers::thinning, 4); ++trial) {
    CAPTURE(trial);
    walk<TestType, true>(g).run(40);
  }
}

TEMPLATE_TEST_CASE("random walks on reals: the same function within the bound", "[linear]", float, double, lora::bfloat16,
                   lora::float16) {
  test::random g(902);
  CAPTURE(g.seed());
  for (int trial = 0; trial < 40 / std::min(layers::thinning, 4); ++trial) {
    CAPTURE(trial);
    walk<TestType, false>(g).run(40);
  }
}
