// SPDX-License-Identifier: Apache-2.0
//
// linear<T> against a model that keeps only what the calls said. On whole numbers every bit of the
// weight and of the output is known by plain loops; on numbers that use all bits the output must
// lie within the bound of docs/numerics.md.
#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
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

using any_adapter = std::variant<lora::adapter<float>, lora::adapter<double>,
                                 lora::adapter<lora::float16>, lora::adapter<lora::bfloat16>>;

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
    return bias.size() == 0 ? lora::linear<T>(W, reload)
                            : lora::linear<T>(lora::with_bias(W, bias), reload);
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
      return (inside ? one.inside() : one.beside()) &&
             std::holds_alternative<lora::adapter<double>>(one.adapter);
    });
  }
};

template <class T>
void attach(lora::linear<T>& q, const std::string& name, const entry& one, double weight) {
  std::visit([&](const auto& l) { q.attach(name, lora::scaled(weight, l)); }, one.adapter);
}

std::vector<std::string> shuffled(std::vector<std::string> names, test::random& g) {
  for (std::size_t n = names.size(); n > 1; --n)
    std::swap(names[n - 1],
              names[static_cast<std::size_t>(g.integer(0, static_cast<index_t>(n) - 1))]);
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
    if (g.one_in(2)) q.set_strength(name, one.weight);
    one.merged ? q.merge(name) : q.unmerge(name);
    one.active ? q.activate(name) : q.deactivate(name);
    q.set_strength(name, one.weight);
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
    const auto [weight, scaling, rank, active, merged, additive] = q.at(name);
    s.attached.push_back(
        {weight, scaling, static_cast<double>(rank), double(active), double(merged)});
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
  explicit walk(test::random& g)
      : g_(g), m_(new_model(g)), copied_(m_.layer()), reloaded_(m_.layer(m_.reload())) {}

  void run(int steps) {
    for (int step = 0; step < steps; ++step) {
      const std::string what = one_call();
      CAPTURE(step, what, m_.W.rows(), m_.W.cols(), m_.all.size());
      if (!check_state()) return;
      if constexpr (whole_numbers) {
        if (!check_whole_numbers<T>() || !check_whole_numbers<float>()) return;
      } else {
        if (!check_bound<T, T>() || !check_bound<float, float>() || !check_bound<T, double>())
          return;
      }
    }
    copied_.unmerge();
    reloaded_.unmerge();
    CHECK(same_bits(copied_.weight(), m_.W));
    CHECK(same_bits(reloaded_.weight(), m_.W));
    if constexpr (!whole_numbers)
      CHECK(std::sqrt(squared_difference_) <= std::sqrt(squared_expected_));
  }

 private:
  static model<T> new_model(test::random& g) {
    const index_t out = g.integer(1, 20), in = g.integer(1, 24);
    const auto bias = g.one_in(2) ? out : 0;
    if constexpr (whole_numbers)
      return {g.integers<T>(out, in, 200), g.integers<float>(bias, 1, 50)};
    return {g.reals<T>(out, in, 0.5), g.reals<float>(bias, 1, 0.5)};
  }
  template <class F>
  lora::adapter<F> new_adapter_of(index_t rank) {
    const index_t out = m_.W.rows(), in = m_.W.cols();
    if constexpr (whole_numbers)
      return {
          g_.integers<F>(rank, in, 2),
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
  double new_weight() {
    return whole_numbers ? 0.25 * static_cast<double>(g_.integer(-8, 8)) : g_.uniform(-2, 2);
  }

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
        on_both([&](auto& q) {
          CHECK_THROWS_AS(attach(q, fresh, m_.all.at(fresh), 0.5), lora::value_error);
        });
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
        on_both([&](auto& q) { q.set_strength(name, one.weight); });
        return "set_strength " + name;
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
      as_said = as_said && copied_.contains(name) && is.strength == one.weight &&
                is.active == one.active && is.merged == one.merged;
    }
    const bool any_inside =
        std::any_of(m_.all.begin(), m_.all.end(), [](const auto& n) { return n.second.inside(); });
    const auto other_way = brought_to(m_, g_);
    const bool good = as_said && look(copied_) == look(reloaded_) &&
                      look(copied_) == look(other_way) &&
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
    test::exact_matrix weight = test::exact(m_.W),
                       beside = test::exact_matrix::Zero(m_.W.rows(), m_.W.cols());
    for (const auto& named : m_.all) {
      const entry& one = named.second;  // clang 14 captures no part of a structured binding
      std::visit(
          [&](const auto& l) {
            const test::exact_matrix delta =
                static_cast<long double>(one.weight) * test::exact_delta(l);
            if (one.inside()) weight += delta;
            if (one.beside()) beside += delta;
          },
          one.adapter);
    }
    const auto stored = test::rounded<T>(weight);
    const bool weight_good = same_bits(copied_.weight(), stored);
    CHECK(weight_good);
    const auto x = g_.integers<T>(m_.W.cols(), g_.integer(1, 5), 3);
    test::exact_matrix exact = test::times(test::exact(stored) + beside, test::exact(x));
    if (m_.bias.size() != 0) exact.colwise() += m_.bias.template cast<long double>();
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
    for (const auto& named : m_.all) {
      const entry& one = named.second;
      const agreement::part part =
          std::visit([&](const auto& l) { return agreement::part_of(lora::scaled(one.weight, l)); },
                     one.adapter);
      if (one.inside()) where.merged.push_back(part);
      if (one.beside()) where.mixed.push_back(part);
      if (one.active) all.push_back(part);
    }
    const auto in_double = agreement::in_double(m_.W), xs = agreement::in_double(x);
    const Eigen::VectorXd bias = m_.bias.template cast<double>();
    const auto exact = layers::reference(in_double, bias, all, xs);
    using plain = lora::accumulator_t<T, X, Y>;
    const auto single = agreement::formats_of<T, Y, plain>();
    const auto merge = m_.holds_double(true)
                           ? agreement::formats_of<T, Y, double>()
                           : agreement::formats_of<T, Y, lora::accumulator_t<T>>();
    const auto product = m_.holds_double(false) ? agreement::formats_of<T, Y, double>() : single;
    const Eigen::MatrixXd bound =
        agreement::error_bound(in_double, bias, where, xs, product, merge);
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

TEMPLATE_TEST_CASE("random walks on whole numbers: every bit is known", "[linear]", float, double,
                   lora::bfloat16, lora::float16) {
  test::random g(901);
  CAPTURE(g.seed());
  for (int trial = 0; trial < 40 / std::min(layers::thinning, 4); ++trial) {
    CAPTURE(trial);
    walk<TestType, true>(g).run(40);
  }
}

TEMPLATE_TEST_CASE("random walks on reals: the same function within the bound", "[linear]", float,
                   double, lora::bfloat16, lora::float16) {
  test::random g(902);
  CAPTURE(g.seed());
  for (int trial = 0; trial < 40 / std::min(layers::thinning, 4); ++trial) {
    CAPTURE(trial);
    walk<TestType, false>(g).run(40);
  }
}

namespace {

lora::adapter<float> rank_one(const MatrixXf& b, const MatrixXf& a, double s = 0.5) {
  return {a, b / static_cast<float>(s), {.alpha = s, .rule = scaling_rule::fixed}};
}
MatrixXf constant(index_t rows, index_t cols, double v) {
  return MatrixXf::Constant(rows, cols, static_cast<float>(v));
}

}  // namespace

TEST_CASE("two adapters, one merged and one active, are both computed", "[linear]") {
  // W x = 1 * 2 + 2 * 3 = 8; "in": 4 * (1 * 2 + 1 * 3) = 20; "beside" at -1/2: -3 * (1 * 2 - 1 * 3)
  // = 3.
  const MatrixXf W{{1, 2}}, x{{2}, {3}};
  const auto beside = rank_one(constant(1, 1, 6), MatrixXf{{1, -1}});
  lora::linear<float> q{W};
  q.attach("in", rank_one(constant(1, 1, 4), MatrixXf{{1, 1}}));
  q.attach("beside", lora::scaled(-0.5, beside));
  const auto result = [&] {
    MatrixXf y = constant(1, 1, -99);
    q.forward(x, y);
    return y(0, 0);
  };
  CHECK(result() == 31);
  q.merge("in");
  CHECK(q.weight()(0, 0) == 5);
  CHECK(result() == 31);
  q.unmerge("in");
  q.merge("beside");
  CHECK(q.weight()(0, 0) == -2);
  CHECK(result() == 31);
  q.merge();
  CHECK(result() == 31);
  // Deactivated, it leaves the weight, is still marked as merged, and returns.
  q.deactivate("in");
  CHECK((q.at("in").merged && !q.at("in").active));
  CHECK(q.weight()(0, 0) == -2);
  CHECK(result() == 11);
  q.merge();
  q.activate("in");
  CHECK(q.weight()(0, 0) == 2);
  CHECK(result() == 31);
  q.detach("beside");
  CHECK(result() == 28);
  // merge() without names takes the active ones only.
  q.unmerge();
  q.deactivate("in");
  q.merge();
  CHECK_FALSE(q.at("in").merged);
  q.activate("in");
  CHECK(q.weight()(0, 0) == 1);
}

TEMPLATE_TEST_CASE("forward is lora::forward with what is not merged", "[linear]", float, double,
                   lora::bfloat16, lora::float16) {
  test::random g(903);
  CAPTURE(g.seed());
  const auto W = g.reals<TestType>(37, 53, 0.4);
  const auto bias = g.reals<double>(1, 37, 1);
  const Eigen::RowVectorXf float_bias = bias.template cast<float>();
  lora::linear<TestType> q{lora::with_bias(W, float_bias)};
  CHECK((q.has_bias() && q.out_features() == 37 && q.in_features() == 53));
  const lora::adapter<lora::bfloat16> narrow{
      g.reals<lora::bfloat16>(61, 53, 0.2), g.reals<lora::bfloat16>(37, 61, 0.2), {.alpha = 3}};
  const lora::adapter<double> wide{
      g.reals<double>(5, 53, 0.2), g.reals<double>(37, 5, 0.2), {.alpha = -4}};
  q.attach("wide", lora::scaled(0.3, wide));
  q.attach("narrow", narrow);
  const test::col_matrix<float> x = g.reals<float>(53, 9, 1);
  const auto same = [&](const auto&... beside) {
    test::matrix<TestType> y(37, 9), expected(37, 9);
    q.forward(x, y);
    lora::forward(lora::with_bias(q.weight(), float_bias), x, expected, beside...);
    return same_bits(y, expected);
  };
  CHECK(same(narrow, lora::scaled(0.3, wide)));
  q.merge("narrow");
  CHECK(same(lora::scaled(0.3, wide)));
  q.set_strength("wide", 0);
  CHECK(same());  // at strength 0 a double adapter does not turn the product to double
  q.set_strength("wide", 0.3);
  q.merge();
  CHECK(same());
  CHECK(same_bits(q.weight(), lora::merged(W, narrow, lora::scaled(0.3, wide))));
}

TEST_CASE("what linear is made of", "[linear]") {
  test::random g(904);
  CAPTURE(g.seed());
  const auto by_rows = g.reals<lora::bfloat16>(5, 7, 1);
  const test::col_matrix<lora::bfloat16> by_cols = by_rows;
  CHECK(same_bits(lora::linear<lora::bfloat16>{by_cols}.weight(), by_rows));
  CHECK(same_bits(lora::linear<lora::bfloat16>{by_rows.transpose()}.weight(),
                  test::matrix<lora::bfloat16>(by_rows.transpose())));
  CHECK(same_bits(lora::linear<lora::bfloat16>{by_cols.block(1, 2, 3, 4)}.weight(),
                  by_rows.block(1, 2, 3, 4)));
  CHECK(same_bits(lora::linear<lora::bfloat16>{lora::as_matrix(by_rows).block(1, 2, 3, 4)}.weight(),
                  by_rows.block(1, 2, 3, 4)));
  // A narrower base, widened exactly; Eigen's types are stored as ours.
  CHECK(test::exact(lora::linear<float>{by_rows}.weight()) == test::exact(by_rows));
  CHECK(test::exact(lora::linear<double>{by_rows}.weight()) == test::exact(by_rows));
  const auto half = g.reals<Eigen::half>(4, 3, 1);
  const lora::linear q{half};
  static_assert(std::is_same_v<decltype(q), const lora::linear<lora::float16>>);
  CHECK(test::exact(q.weight()) == test::exact(half));
  CHECK((!q.has_bias() && q.names().empty() && q.out_features() == 4 && q.in_features() == 3));
  const lora::linear biased{lora::with_bias(half, std::vector<float>{1, 2, 3, 4})};
  static_assert(std::is_same_v<decltype(biased), const lora::linear<lora::float16>>);
  std::vector<float> y(4);
  biased.forward(std::vector<float>(3, 0), y);
  CHECK(y == std::vector<float>{1, 2, 3, 4});
  // It owns its copy.
  MatrixXf mine = constant(2, 3, 1);
  const lora::linear<float> owner{mine};
  mine.setZero();
  CHECK(owner.weight()(1, 2) == 1);
  // Nothing to multiply: only the bias is left, or no output at all.
  std::vector<float> two(2, 9);
  lora::linear<float>{lora::with_bias(MatrixXf(2, 0), std::vector<float>{3, 4})}.forward(
      std::vector<float>(), two);
  CHECK(two == std::vector<float>{3, 4});
  std::vector<float> none;
  lora::linear<float>{MatrixXf(0, 3)}.forward(std::vector<float>(3), none);
  CHECK(none.empty());
}

TEMPLATE_TEST_CASE("the base keeps every bit, NaN and -0 too", "[linear]", float, double,
                   lora::float16, lora::bfloat16) {
  using bits =
      std::conditional_t<sizeof(TestType) == 2, std::uint16_t,
                         std::conditional_t<sizeof(TestType) == 4, std::uint32_t, std::uint64_t>>;
  const bits top = bits(bits(1) << (8 * sizeof(bits) - 1));
  const auto infinite =
      std::bit_cast<bits>(test::stored<TestType>(std::numeric_limits<double>::infinity()));
  const bits patterns[] = {top,           infinite, bits(infinite | 3), bits(infinite | top | 9),
                           bits(top | 1), bits(1)};
  test::matrix<TestType> W(3, 6);
  for (index_t j = 0; j < 6; ++j)
    W(0, j) = W(1, j) = W(2, j) = std::bit_cast<TestType>(patterns[j]);
  const auto check = [&](lora::linear<TestType> q) {
    CHECK(same_bits(q.weight(), W));
    q.attach("one", rank_one(Eigen::Vector3f(0, 1, 0), constant(1, 6, 1)));
    q.merge();
    CHECK(test::bytes(q.weight().row(0)) == test::bytes(W.row(0)));
    CHECK(test::value(q.weight()(1, 0)) == 1);
    CHECK(test::bytes(q.weight().row(2)) == test::bytes(W.row(2)));
    q.unmerge();
    CHECK(same_bits(q.weight(), W));
  };
  check(lora::linear<TestType>{W});
  check(lora::linear<TestType>{test::col_matrix<TestType>(W)});
  check(lora::linear<TestType>{
      W, [&](std::span<TestType> to) { std::copy_n(W.data(), W.size(), to.data()); }});
}

TEST_CASE("an adapter of any kind is attached, and copied", "[linear]") {
  test::random g(905);
  CAPTURE(g.seed());
  const auto W = g.integers<float>(4, 6, 50);
  const auto A = g.integers<float>(3, 6, 3), B = g.integers<float>(4, 3, 3);
  const lora::adapter<float> plain{A, B, {.alpha = 6}};  // s = 2
  const auto merged_bits = [&](const auto& l) {
    lora::linear<float> q{W};
    q.attach("l", l);
    q.merge();
    CHECK(q.at("l").rank == 3);
    return test::bytes(q.weight());
  };
  const test::exact_matrix delta = 2.0L * test::times(test::exact(B), test::exact(A));
  const auto expected = test::bytes(test::rounded<float>(test::exact(W) + delta));
  CHECK(merged_bits(plain) == expected);
  CHECK(merged_bits(lora::adapter_view<float>(plain)) == expected);
  CHECK(merged_bits(lora::adapter<double>(plain)) == expected);
  CHECK(merged_bits(lora::basic_adapter(test::col_matrix<float>(A),
                                        test::col_matrix<double>(B.cast<double>()),
                                        lora::scaling{.alpha = 6})) == expected);
  const auto A16 = test::rounded<lora::float16>(test::exact(A));
  const auto B16 = test::rounded<Eigen::bfloat16>(test::exact(B));
  CHECK(merged_bits(lora::basic_adapter(A16, B16, lora::scaling{.alpha = 6})) == expected);
  CHECK(merged_bits(lora::scaled(-0.5, lora::scaled(-2, plain))) == expected);
  // scaled is kept as the weight, and may be set again.
  lora::linear<float> q{W};
  q.attach("l", lora::scaled(4, lora::scaled(-0.25, plain)));
  CHECK((q.at("l").strength == -1 && q.at("l").scaling == 2 && q.at("l").active &&
         !q.at("l").merged));
  q.set_strength("l", 1);
  q.merge("l");
  CHECK(test::bytes(q.weight()) == expected);
  // The factors are its own.
  auto own_A = A;
  lora::linear<float> r{W};
  r.attach("l",
           lora::adapter_view<float>(lora::as_matrix(own_A), lora::as_matrix(B), {.alpha = 6}));
  own_A.setZero();
  r.merge();
  CHECK(test::bytes(r.weight()) == expected);
  // Rank 0 and strength 0 change nothing, and are not read.
  const auto poison = rank_one(constant(4, 1, NAN), constant(1, 6, INFINITY));
  lora::linear<float> s{W};
  s.attach("empty", lora::adapter<float>{
                        MatrixXf(0, 6), MatrixXf(4, 0), {.alpha = 3, .rule = scaling_rule::fixed}});
  s.attach("off", lora::scaled(0, poison));
  MatrixXf y(4, 1);
  s.forward(constant(6, 1, 0), y);
  CHECK(y.isZero(0));
  CHECK(s.merge().became_nonfinite == 0);
  CHECK(same_bits(s.weight(), W));
}

TEST_CASE("a layer is copied and moved with its state", "[linear]") {
  test::random g(906);
  CAPTURE(g.seed());
  const auto W = g.integers<float>(4, 6, 50);
  lora::linear<float> q{W};
  q.attach("l", rank_one(g.integers<float>(4, 1, 3), g.integers<float>(1, 6, 3)));
  q.merge();
  const auto before = look(q);
  auto copy = q.clone();
  CHECK(look(copy) == before);
  q.unmerge();
  q.set_strength("l", 7);
  CHECK(look(copy) == before);
  auto moved = std::move(copy);
  CHECK(look(moved) == before);
  moved.unmerge();
  CHECK(same_bits(moved.weight(), W));
}

TEST_CASE("the report counts against the pristine base", "[linear]") {
  // 60000 + 6000 overflows float16, 60000 + 6000 - 6000 does not.
  test::matrix<lora::float16> W = test::matrix<lora::float16>::Constant(2, 3, lora::float16(60000));
  W(0, 0) = std::numeric_limits<lora::float16>::infinity();
  for (const bool reload : {false, true}) {
    CAPTURE(reload);
    const auto again = [&](std::span<lora::float16> to) {
      std::copy_n(W.data(), W.size(), to.data());
    };
    auto q = reload ? lora::linear<lora::float16>{W, again} : lora::linear<lora::float16>{W};
    q.attach("up", rank_one(constant(2, 1, 6000), constant(1, 3, 1)));
    q.attach("down", rank_one(constant(2, 1, -6000), constant(1, 3, 1)));
    CHECK(q.merge("up").became_nonfinite == 5);
    CHECK(q.merge("up").became_nonfinite == 5);  // merging what is merged: the weight as it is
    CHECK(q.merge("down").became_nonfinite == 0);
    CHECK(test::value(q.weight()(1, 2)) == 60000);
    CHECK(q.unmerge("down").became_nonfinite == 5);
    CHECK(q.unmerge().became_nonfinite == 0);
    CHECK(q.unmerge().became_nonfinite == 0);
    CHECK(same_bits(q.weight(), W));
  }
}

TEST_CASE("with a reload function the base is read again only when the weight changes",
          "[linear]") {
  const MatrixXf W{{1, 2, 3}, {4, 5, 6}};
  int calls = 0;
  lora::linear<float> q{W, [&](std::span<float> to) {
                          ++calls;
                          for (std::size_t k = 0; k < 6; ++k) to[k] = static_cast<float>(k + 1);
                        }};
  q.attach("a", rank_one(constant(2, 1, 2), constant(1, 3, 1)));
  q.attach("b", rank_one(constant(2, 1, 3), constant(1, 3, 1)));
  q.set_strength("a", 1);
  q.deactivate("b");
  q.activate("b");
  q.unmerge();
  MatrixXf y(2, 1);
  q.forward(constant(3, 1, 1), y);
  q.merge("a");
  CHECK(calls == 0);  // the pristine weight was there to merge into
  q.merge("a");
  q.forward(constant(3, 1, 1), y);
  CHECK(y == MatrixXf{{6 + 6 + 9}, {15 + 6 + 9}});
  q.set_strength("b", 2);
  q.unmerge("b");
  CHECK(calls == 0);  // nothing that is merged changed
  q.merge("b");
  CHECK(calls == 1);
  CHECK(q.weight()(0, 0) == 1 + 2 + 6);
  q.set_strength("a", -1);
  q.deactivate("b");
  CHECK(calls == 3);
  CHECK(q.weight()(1, 2) == 6 - 2);
  q.detach("a");
  CHECK(calls == 4);
  CHECK(same_bits(q.weight(), test::matrix<float>(W)));
  q.activate("b");
  CHECK(calls == 4);  // from the pristine weight again
  CHECK(q.weight()(1, 2) == 6 + 6);
}

TEST_CASE("a reload function that throws or gives other bits changes nothing", "[linear]") {
  const MatrixXf W{{1, 2, 3}, {4, 5, 6}};
  enum { right, throws, partly, other_bits, other_zero } does = right;
  lora::linear<float> q{MatrixXf{{1, 2, 0}, {4, 5, 6}}, [&](std::span<float> to) {
                          const float values[] = {1, 2, 0, 4, 5, 6};
                          if (does == throws) throw std::runtime_error("the disk is gone");
                          std::copy_n(values, 6, to.data());
                          to[0] = does == partly ? 9.0F : 1.0F;
                          if (does == partly) throw std::runtime_error("the disk is gone");
                          if (does == other_bits) to[5] = 7;
                          if (does == other_zero) to[2] = -0.0F;
                        }};
  q.attach("a", rank_one(constant(2, 1, 2), constant(1, 3, 1)));
  q.attach("b", rank_one(constant(2, 1, 3), constant(1, 3, 1)));
  q.merge("a");
  const auto before = look(q);
  for (const auto how : {throws, partly, other_bits, other_zero}) {
    does = how;
    const auto refused = [&](const auto& call) {
      if (how == throws || how == partly) {
        CHECK_THROWS_AS(call(), std::runtime_error);
      } else {
        CHECK(mentions(refusal<lora::value_error>(call), {"lora::linear", "reload", "other bits"}));
      }
      CHECK(look(q) == before);
    };
    refused([&] { q.merge("b"); });
    refused([&] { q.merge(); });
    refused([&] { q.unmerge(); });
    refused([&] { q.unmerge("a"); });
    refused([&] { q.deactivate("a"); });
    refused([&] { q.set_strength("a", 3); });
    refused([&] { q.detach("a"); });
  }
  does = right;
  q.unmerge();
  CHECK(q.weight()(1, 2) == 6);
}

TEMPLATE_TEST_CASE("an allocation that fails changes nothing", "[linear]", float, double,
                   lora::bfloat16, lora::float16) {
  test::random g(907);
  CAPTURE(g.seed());
  const index_t out = 19, in = 27;
  model<TestType> m{g.reals<TestType>(out, in, 1), g.reals<float>(out, 1, 1)};
  const lora::adapter<float> a{g.reals<float>(3, in, 1), g.reals<float>(out, 3, 1), {.alpha = 2}};
  const lora::adapter<double> b{
      g.reals<double>(40, in, 1), g.reals<double>(out, 40, 1), {.alpha = -3}};
  const lora::adapter<lora::float16> c{
      g.reals<lora::float16>(2, in, 1), g.reals<lora::float16>(out, 2, 1), {.alpha = 5}};
  const std::size_t weight_bytes = static_cast<std::size_t>(out * in) * sizeof(TestType);
  using layer = lora::linear<TestType>;
  const std::vector<std::pair<const char*, void (*)(layer&, const lora::adapter<lora::float16>&)>>
      calls{
          {"attach",
           [](layer& q, const auto& l) {
             q.attach("a name too long for the string itself", lora::scaled(0.5, l));
           }},
          {"detach a", [](layer& q, const auto&) { q.detach("a"); }},
          {"detach b", [](layer& q, const auto&) { q.detach("b"); }},
          {"set_strength a", [](layer& q, const auto&) { q.set_strength("a", 0.25); }},
          {"set_strength b", [](layer& q, const auto&) { q.set_strength("b", 0.25); }},
          {"activate", [](layer& q, const auto&) { q.activate("idle"); }},
          {"deactivate", [](layer& q, const auto&) { q.deactivate("a"); }},
          {"merge", [](layer& q, const auto&) { q.merge(); }},
          {"merge b", [](layer& q, const auto&) { q.merge("b"); }},
          {"unmerge", [](layer& q, const auto&) { q.unmerge(); }},
          {"unmerge a", [](layer& q, const auto&) { q.unmerge("a"); }},
      };
  for (const bool reload : {false, true})
    for (const int merged : {0, 1, 2})
      for (const auto& [what, call] : calls) {
        CAPTURE(reload, merged, what);
        auto q = reload ? m.layer(m.reload()) : m.layer();
        q.attach("a", a);
        q.attach("b", b);
        q.attach("idle", c);
        q.merge("idle");
        q.deactivate("idle");
        if (merged > 0) q.merge("a");
        if (merged > 1) q.merge();
        const auto before = look(q);
        auto undisturbed = q.clone();
        call(undisturbed, c);
        const auto after = look(undisturbed);
        long n = 0;
        for (bool failed = true; failed; ++n) {
          test::allocations::start(weight_bytes);
          failed = test::allocations::fails_at(n, [&, call = call] { call(q, c); });
          test::allocations::stop();
          if (failed && (look(q) != before || test::allocations::now.live_large != 0)) {
            CAPTURE(n);
            CHECK(look(q) == before);
            CHECK(test::allocations::now.live_large == 0);  // nor is memory kept
            return;
          }
        }
        CHECK(n > 1);  // at least one allocation was made to fail, and then none
        CHECK(look(q) == after);
      }
  // A product that cannot have its scratch writes nothing.
  auto q = m.layer();
  q.attach("a", a);
  const auto x = g.reals<float>(in, 4, 1);
  const MatrixXf y_before = g.reals<float>(out, 4, 1);
  MatrixXf y = y_before;
  long n = 0;
  while (test::allocations::fails_at(n, [&] { q.forward(x, y); })) {
    REQUIRE(same_bits(y, y_before));
    ++n;
  }
  CHECK(n == 1);  // one block for everything
  CHECK_FALSE(same_bits(y, y_before));
}

TEST_CASE("const calls at the same time give the same bits", "[linear]") {
  test::random g(908);
  CAPTURE(g.seed());
  lora::linear<lora::bfloat16> q{g.reals<lora::bfloat16>(67, 131, 0.5)};
  q.attach("a", lora::adapter<float>{
                    g.reals<float>(7, 131, 0.2), g.reals<float>(67, 7, 0.2), {.alpha = 3}});
  q.attach("b", lora::adapter<double>{
                    g.reals<double>(2, 131, 0.2), g.reals<double>(67, 2, 0.2), {.alpha = 5}});
  q.merge("a");
  const auto& shared = q;
  const auto before = look(shared);
  std::array<snapshot, 4> seen;
  std::vector<std::thread> threads;
  for (auto& mine : seen)
    threads.emplace_back([&] {
      for (int k = 0; k < 30; ++k) {
        mine = look(shared);
        if (mine != before) return;
      }
    });
  for (auto& thread : threads) thread.join();
  for (const auto& mine : seen) CHECK(mine == before);
}

TEST_CASE("what does not fit a layer is refused by name, and changes nothing", "[linear]") {
  test::random g(909);
  CAPTURE(g.seed());
  const auto W = g.integers<float>(4, 6, 50);
  const lora::adapter<float> l{
      g.integers<float>(3, 6, 3), g.integers<float>(4, 3, 3), {.alpha = 6}},
      turned{g.integers<float>(3, 4, 3), g.integers<float>(6, 3, 3), {.alpha = 6}};
  for (const bool reload : {false, true}) {
    CAPTURE(reload);
    const model<float> m{W, Eigen::VectorXf::Constant(4, 0.5F)};
    auto q = reload ? m.layer(m.reload()) : m.layer();
    q.attach("a", l);
    q.attach("b", lora::scaled(0.5, l));
    q.merge("a");
    const auto before = look(q);
    const auto refuses_shape = [&](const auto& call, std::initializer_list<const char*> words) {
      const std::string text = refusal<lora::shape_error>(call);
      CAPTURE(text);
      CHECK(mentions(text, words));
      CHECK(look(q) == before);
    };
    const auto refuses = [&](const auto& call, std::initializer_list<const char*> words) {
      const std::string text = refusal<lora::value_error>(call);
      CAPTURE(text);
      CHECK(mentions(text, words));
      CHECK(look(q) == before);
    };
    // Adapters.
    refuses([&] { q.attach("", l); }, {"lora::linear::attach:", "name is empty"});
    refuses([&] { q.attach("a", l); }, {"lora::linear::attach:", "\"a\" is attached already"});
    refuses_shape([&] { q.attach("c", turned); },
                  {"lora::linear::attach:", "6x4", "4x6", "transpose"});
    refuses_shape([&] { q.attach("c", lora::scaled(0, turned)); },
                  {"lora::linear::attach:", "6x4", "4x6"});
    refuses([&] { q.attach("c", lora::scaled(1e308, l)); },
            {"lora::linear::attach:", "not finite"});
    // 1e200 * 1e200 is no strength, though times 1e-300 it is a scaling.
    const lora::adapter<float> faint{
        l.lora_A(), l.lora_B(), {.alpha = 1e-300, .rule = scaling_rule::fixed}};
    refuses([&] { q.attach("c", lora::scaled(1e200, lora::scaled(1e200, faint))); },
            {"lora::linear::attach:", "strength of \"c\"", "not finite"});
    // Strengths.
    for (const double weight : {double{NAN}, double{INFINITY}, -double{INFINITY}, 1e308})
      for (const char* name : {"a", "b"})
        refuses([&] { q.set_strength(name, weight); },
                {"lora::linear::set_strength:", name, "not finite"});
    // Names: each call says what is attached. Of several names none takes effect.
    const auto unknown = [&](const char* operation, const auto& call) {
      refuses(call, {operation, "no adapter named \"z\"", "attached: \"a\", \"b\""});
    };
    unknown("lora::linear::detach:", [&] { q.detach("z"); });
    unknown("lora::linear::set_strength:", [&] { q.set_strength("z", 0.5); });
    unknown("lora::linear::activate:", [&] { q.activate("z"); });
    unknown("lora::linear::deactivate:", [&] { q.deactivate("z"); });
    unknown("lora::linear::merge:", [&] { q.merge("z"); });
    unknown("lora::linear::merge:", [&] { q.merge("b", std::string("z")); });
    unknown("lora::linear::unmerge:", [&] { q.unmerge("z"); });
    unknown("lora::linear::unmerge:", [&] { q.unmerge("a", "z"); });
    unknown("lora::linear::at:", [&] { q.at("z"); });
    refuses([&] { q.detach(""); }, {"no adapter named \"\""});
    CHECK_FALSE((q.contains("z") || q.contains("")));
    const lora::linear<float> bare{W};
    CHECK(mentions(refusal<lora::value_error>([&] { bare.at("z"); }),
                   {"lora::linear::at:", "attached: none"}));
    // Panels of a format that does not hold a factor.
    lora::linear<float> layer{W};
    const lora::adapter<float> large{
        MatrixXf::Constant(1, W.cols(), 1e5F), MatrixXf::Constant(W.rows(), 1, 1), {.alpha = 1}};
    CHECK_THROWS_AS(layer.attach<lora::float16>("large", large), lora::value_error);
    CHECK(layer.names().empty());
  }
}

TEST_CASE("activations that do not fit a layer are refused, and y keeps its bits", "[linear]") {
  const MatrixXf W = constant(4, 3, 1);
  lora::linear<float> q{lora::with_bias(W, std::vector<float>(4, 5))};
  q.attach("a", rank_one(constant(4, 1, 2), constant(1, 3, 1)));
  for (const bool merged : {false, true}) {
    CAPTURE(merged);
    merged ? q.merge() : q.unmerge();
    const auto refuses = [&](index_t in, index_t x_tokens, index_t out, index_t y_tokens,
                             std::initializer_list<const char*> words) {
      const MatrixXf x = constant(in, x_tokens, 1), before = constant(out, y_tokens, 7);
      MatrixXf y = before;
      const std::string text = refusal<lora::shape_error>([&] { q.forward(x, y); });
      CAPTURE(text);
      CHECK(mentions(text, {"lora::linear::forward:"}));
      CHECK(mentions(text, words));
      CHECK(same_bits(y, before));
    };
    refuses(4, 2, 4, 2, {"W is 4x3", "x is 4x2", "y is 4x2"});
    refuses(3, 2, 3, 2, {"W is 4x3", "x is 3x2", "y is 3x2"});
    refuses(0, 2, 4, 2, {"W is 4x3", "x is 0x2"});
    refuses(3, 2, 0, 2, {"W is 4x3", "y is 0x2"});
    refuses(3, 2, 4, 3, {"x is 3x2", "y is 4x3", "one column for each token"});
    std::vector<float> y(4, 7);
    CHECK(mentions(refusal<lora::shape_error>([&] { q.forward(std::span<const float>(), y); }),
                   {"linear::forward", "x is 0x1"}));
    CHECK(mentions(
        refusal<lora::shape_error>([&] { q.forward(std::vector<float>(3), std::span<float>()); }),
        {"y is 0x1"}));
    // In place, and one element shared.
    CHECK(mentions(refusal<lora::shape_error>([&] { q.forward(std::span(y).first(3), y); }),
                   {"lora::linear::forward:", "y is written and overlaps x"}));
    std::vector<float> buffer(7, 7);
    CHECK(mentions(refusal<lora::shape_error>([&] {
                     q.forward(std::span(buffer).subspan(3, 3), std::span(buffer).first(4));
                   }),
                   {"overlaps x"}));
    CHECK((y == std::vector<float>(4, 7) && buffer == std::vector<float>(7, 7)));
    q.forward(std::span(buffer).subspan(4, 3), std::span(buffer).first(4));  // side by side
    CHECK(buffer == std::vector<float>{68, 68, 68, 68, 7, 7, 7});
  }
}
