// SPDX-License-Identifier: Apache-2.0
//
// The table of docs/kinds.md, verbs by kinds, is computed here and compared with the page. A cell
// says "yes" where the call gives what the definition of the kind gives in long double, within a
// bound. Any other cell has the sentence of the refusal: what was thrown, or the words that a case
// of tests/compile_fail expects of the compiler.
//
// With LORA_TABLE=<file> the test writes the table there.
#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <regex>
#include <string>
#include <vector>

#include "lora/dora.hpp"
#include "lora/embed.hpp"
#include "lora/io/peft_entry.hpp"
#include "lora/kinds/adalora.hpp"
#include "lora/kinds/full.hpp"
#include "lora/kinds/ia3.hpp"
#include "lora/kinds/loha.hpp"
#include "lora/kinds/lokr.hpp"
#include "lora/kinds/oft.hpp"
#include "lora/kinds/vera.hpp"
#include "lora/lora.hpp"
#include "lora/mixed.hpp"
#include "lora/mixed_bounds.hpp"
#include "lora/module_adapter.hpp"
#include "lora/prepared_merge.hpp"
#include "lora/rounding.hpp"
#include "lora/through.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/within_bound.hpp"

namespace {

using lora::index_t;
using lora::detail::verb;
using test::exact_matrix;
using test::matrix;
using exact_column = Eigen::Matrix<long double, Eigen::Dynamic, 1>;
using values = std::vector<float>;

constexpr index_t out = 6, in = 8, tokens = 3;

/// One layer, its input, and what kinds are made of. The numbers of a gain are 0.5 to 1.5.
struct problem {
  test::random g{20261203};
  const matrix<float> W = g.reals<float>(out, in, 1), x = g.reals<float>(in, tokens, 1);
  const values bias = list(out, -1, 1);
  const std::vector<index_t> ids{7, 0, 7};

  values list(index_t count, double low, double high) {
    values result;
    for (index_t k = 0; k < count; ++k) result.push_back(static_cast<float>(g.uniform(low, high)));
    return result;
  }
  lora::adapter<float> factors(index_t rank) {
    return {g.reals<float>(rank, in, 1), g.reals<float>(out, rank, 1), {.alpha = 1.4}};
  }
};

exact_column column(const values& v) {
  exact_column result(static_cast<index_t>(v.size()));
  for (std::size_t i = 0; i < v.size(); ++i)
    result(static_cast<index_t>(i)) = static_cast<long double>(v[i]);
  return result;
}

/// A layer with an adapter, by the kind's definition: W x + h b + c. size: the magnitudes that are
/// added up in an element of W.
struct changed {
  exact_matrix W, size;
  exact_column h = exact_column::Ones(out), c = exact_column::Zero(out);
};
/// The definition at a strength.
using definition = std::function<changed(double)>;

/// W + s D
definition sum(const exact_matrix& W, double s, const exact_matrix& D, const exact_matrix& size) {
  return [=](double w) -> changed {
    const long double f = static_cast<long double>(w) * static_cast<long double>(s);
    return {W + f * D, W.cwiseAbs() + std::abs(f) * size};
  };
}
definition sum_of_factors(const exact_matrix& W, double s, const exact_matrix& B,
                          const exact_matrix& A) {
  return sum(W, s, test::times(B, A), test::times(B.cwiseAbs(), A.cwiseAbs()));
}

/// Names a call and, for the files of tests/compile_fail, what its cases begin with.
struct verb_name {
  const char* call;
  const char* file = "";
};
constexpr verb_name verbs[] = {
    {"merge(W, l)", "merge"},
    {"merge(W, scaled(0.6, l))", "merge"},
    {"merge(W, b, l)", "merge"},
    {"merge(packed_weight, l)", "merge"},
    {"merged(W, l)", "merged"},
    {"merge_checked(W, l)", "merge_checked"},
    {"merge(rounding::as_peft, W, l)", "merge_as_peft"},
    {"prepared_merge(out, in, l)", "prepared_merge"},
    {"prepared_merge(rows of W, l)", "prepared_merge"},
    {"unmerge(W, l)", "unmerge"},
    {"unmerge(W, b, l)", "unmerge"},
    {"unmerge(W, mixed(W, l))", "mixed"},
    {"delta_weight(l)", "delta_weight"},
    {"forward(W, x, y, l)"},
    {"forward(with_bias(W, b), x, y, mixed(W, l))", "mixed"},
    {"forward(packed_weight, x, y, l)"},
    {"apply(x, y, l)"},
    {"apply(x, y, mixed(W, l))", "mixed"},
    {"embed(W, ids, y, l)", "embed"},
    {"embed(W, ids, y, mixed(W, l))", "mixed"},
    {"apply_through(down, y, l)", "apply_through"},
    {"apply_through(down, y, mixed(W, l))", "mixed"},
    {"packed_adapter{l}", "packed_adapter"},
    {"batch", "mixed"},
    {"linear, mixed", "attach"},
    {"linear, merged and unmerged", "attach"},
    {"merge_bound"},
    {"forward_bound"},
};

class table {
 public:
  void add_column(const char* kind) { kinds_.emplace_back(kind); }
  void add(const std::string& call, std::string cell) {
    const auto known = [&](const verb_name& v) { return v.call == call; };
    REQUIRE(std::any_of(std::begin(verbs), std::end(verbs), known));
    cells_[call].push_back(std::move(cell));
  }
  std::string text() const {
    std::string result = "| call |", rule = "|---|", notes;
    for (const auto& kind : kinds_) {
      result += " " + kind + " |";
      rule += "---|";
    }
    result += "\n" + rule + "\n";
    std::vector<std::string> known;
    for (const verb_name& v : verbs) {
      result += "| `" + std::string(v.call) + "` |";
      REQUIRE(cells_.at(v.call).size() == kinds_.size());
      for (const auto& cell : cells_.at(v.call)) {
        if (cell == "yes") {
          result += " yes |";
          continue;
        }
        auto found = std::find(known.begin(), known.end(), cell);
        if (found == known.end()) {
          found = known.insert(known.end(), cell);
          notes += std::to_string(known.size()) + ". " + cell + "\n";
        }
        result += " (" + std::to_string(found - known.begin() + 1) + ") |";
      }
      result += "\n";
    }
    return result + "\n" + notes;
  }

 private:
  std::vector<std::string> kinds_;
  std::map<std::string, std::vector<std::string>> cells_;
};

/// A sentence without the verb before it.
std::string note(const std::string& message) {
  return std::regex_replace(message, std::regex("^lora::[a-z_:]+: "), "");
}

/// What the compiler says of a call, by the case of tests/compile_fail that tests it.
std::string refused_by_compiler(const std::string& file) {
  std::ifstream stream(std::filesystem::path(LORA_SOURCE_DIR) / "tests/compile_fail" /
                       (file + ".cpp"));
  INFO("tests/compile_fail/" << file << ".cpp");
  REQUIRE(stream.good());
  std::string line;
  while (std::getline(stream, line) && !line.starts_with("// expect: ")) {
  }
  line = line.substr(std::string("// expect: ").size());
  line = std::regex_replace(line, std::regex(R"( \.\*)"), " ...");
  return "Does not compile: " + note(std::regex_replace(line, std::regex(R"(\\)"), ""));
}

/// The rows of a matrix, for a kind that looks at W.
class matrix_rows final : public lora::weight_rows<float> {
 public:
  explicit matrix_rows(const matrix<float>& W) : W_(W) {}
  index_t out_features() const override { return W_.rows(); }
  index_t in_features() const override { return W_.cols(); }
  void read(index_t first, index_t count, index_t col, index_t cols, float* to,
            index_t stride) const override {
    for (index_t i = 0; i < count; ++i)
      for (index_t k = 0; k < cols; ++k) to[i * stride + k] = W_(first + i, col + k);
  }

 private:
  const matrix<float>& W_;
};

// An element is a chain of in + R multiply-adds, at most 12 here, of what was rounded a few times
// before (a gain, a turn, a product of factors): fewer than 64 roundings together. unmerge divides
// by gains of at least 0.2 and turns back: at most 8 times that.
constexpr long double u = 0x1p-24L, gamma_64 = 64 * u / (1 - 64 * u);
bool near(const exact_matrix& got, const exact_matrix& want, const exact_matrix& size,
          long double more = 1) {
  return ((got - want).cwiseAbs().array() <= more * gamma_64 * size.array()).all();
}

/// The column of one kind.
template <class K>
class column_of {
 public:
  column_of(table& to, const char* name, const problem& p, const K& kind, definition is)
      : to_(to), name_(name), p_(p), kind_(kind), is_(std::move(is)), one_(is_(1)) {
    to_.add_column(name);
    // Far more than what roundings could hide.
    CHECK((one_.W - test::exact(p.W)).cwiseAbs().maxCoeff() >
          1000 * gamma_64 * one_.size.maxCoeff());
    merging();
    mixing();
    keeping();
  }

 private:
  static constexpr bool packed = lora::detail::packed_adapter_like<K>, low_rank = lora::low_rank<K>;
  template <verb V>
  static constexpr bool takes = lora::detail::takes_adapter<V, K>;

  template <bool Takes = true, class Call>
  void cell(const char* call, const Call& run) {
    INFO(call << ", " << name_);
    std::string result;
    if constexpr (Takes) {
      try {
        const bool right = run(kind_);
        CHECK(right);
        result = right ? "yes" : "WRONG";
      } catch (const lora::value_error& e) {
        result = note(e.what());
      } catch (const lora::shape_error& e) {
        result = note(e.what());
      }
    } else {
      const auto* const v =
          std::find_if(std::begin(verbs), std::end(verbs),
                       [&](const verb_name& one) { return std::string(one.call) == call; });
      result = refused_by_compiler(case_of(v->file));
    }
    to_.add(call, result);
  }
  static std::string case_of(const std::string& call) {
    if (packed) return call + "_of_a_packed_adapter";
    if (lora::detail::entry_like<K>) return call + "_of_an_entry";
    if (lora::detail::dora_like<K> && call == "delta_weight") return "dora_in_delta_weight";
    return call + "_of_another_kind";
  }

  exact_matrix x() const { return test::exact(p_.x); }
  bool weight(const exact_matrix& got, const changed& want) const {
    return near(got, want.W, want.size);
  }
  /// y for W x + more, with the bias of the layer or without.
  bool output(const matrix<float>& y, bool biased) const {
    const exact_column b = biased ? column(p_.bias) : exact_column::Zero(out).eval();
    exact_matrix want = test::times(one_.W, x()), size = test::times(one_.size, x().cwiseAbs());
    want.colwise() += one_.h.cwiseProduct(b) + one_.c;
    size.colwise() += one_.h.cwiseProduct(b).cwiseAbs() + one_.c.cwiseAbs();
    return near(test::exact(y), want, size);
  }
  bool bias(const values& got) const {
    const exact_column b = column(p_.bias), want = one_.h.cwiseProduct(b) + one_.c;
    return near(column(got), want, one_.h.cwiseProduct(b).cwiseAbs() + one_.c.cwiseAbs());
  }
  matrix<float> empty(index_t rows = out) const { return matrix<float>::Zero(rows, tokens); }
  matrix<float> product() const {
    auto y = empty();
    lora::forward(p_.W, p_.x, y);
    return y;
  }

  void merging() {
    cell<takes<verb::merge>>("merge(W, l)", [&](const auto& l) {
      auto W = p_.W;
      lora::merge(W, l);
      return weight(test::exact(W), one_);
    });
    cell<takes<verb::merge>>("merge(W, scaled(0.6, l))", [&](const auto& l) {
      auto W = p_.W;
      const auto some = lora::scaled(0.6, l);
      lora::merge(W, some);
      return weight(test::exact(W), is_(0.6));
    });
    cell<takes<verb::merge>>("merge(W, b, l)", [&](const auto& l) {
      auto W = p_.W;
      auto b = p_.bias;
      lora::merge(W, b, l);
      return weight(test::exact(W), one_) && bias(b);
    });
    cell<takes<verb::merge>>("merge(packed_weight, l)", [&](const auto& l) {
      lora::packed_weight<float> W(p_.W);
      lora::merge(W, l);
      auto copy = p_.W;
      W.copy_to(copy);
      return weight(test::exact(copy), one_);
    });
    cell<takes<verb::merged>>("merged(W, l)", [&](const auto& l) {
      return weight(test::exact(lora::merged(p_.W, l)), one_);
    });
    cell<takes<verb::merge_checked>>("merge_checked(W, l)", [&](const auto& l) {
      auto W = p_.W;
      lora::merge_checked(W, l);
      return weight(test::exact(W), one_);
    });
    cell<takes<verb::merge>>("merge(rounding::as_peft, W, l)", [&](const auto& l) {
      auto W = p_.W;
      lora::merge(lora::rounding::as_peft, W, l);
      return weight(test::exact(W), one_);
    });
    const auto in_blocks = [&](const lora::prepared_merge<float>& all) {
      auto W = p_.W;
      auto first = W.topRows(4), last = W.bottomRows(2);
      all.rows(4, last);
      all.rows(0, first);
      return weight(test::exact(W), one_);
    };
    cell<takes<verb::merge>>("prepared_merge(out, in, l)", [&](const auto& l) {
      return in_blocks(lora::prepared_merge<float>(out, in, l));
    });
    cell<takes<verb::merge>>("prepared_merge(rows of W, l)", [&](const auto& l) {
      return in_blocks(lora::prepared_merge<float>(matrix_rows(p_.W), l));
    });
    const auto restored = [&](const matrix<float>& W) {
      return near(test::exact(W), test::exact(p_.W), one_.size, 8);
    };
    cell<takes<verb::unmerge>>("unmerge(W, l)", [&](const auto& l) {
      matrix<float> W = test::rounded<float>(one_.W);
      lora::unmerge(W, l);
      return restored(W);
    });
    cell<takes<verb::unmerge>>("unmerge(W, b, l)", [&](const auto& l) {
      auto W = p_.W;
      auto b = p_.bias;
      lora::merge(W, b, l);
      lora::unmerge(W, b, l);
      return restored(W) && near(column(b), column(p_.bias),
                                 (column(p_.bias) + one_.c).cwiseAbs() + one_.c.cwiseAbs(), 8);
    });
    cell<takes<verb::mixed>>("unmerge(W, mixed(W, l))", [&](const auto& l) {
      matrix<float> W = test::rounded<float>(one_.W);
      lora::unmerge(W, lora::mixed(p_.W, l));
      return restored(W);
    });
    cell<takes<verb::delta_weight>>("delta_weight(l)", [&](const auto& l) {
      return near(test::exact(lora::delta_weight(l)), one_.W - test::exact(p_.W), one_.size);
    });
  }

  void mixing() {
    cell<takes<verb::forward>>("forward(W, x, y, l)", [&](const auto& l) {
      auto y = empty();
      lora::forward(p_.W, p_.x, y, l);
      return output(y, false);
    });
    cell<takes<verb::mixed>>("forward(with_bias(W, b), x, y, mixed(W, l))", [&](const auto& l) {
      auto y = empty();
      lora::forward(lora::with_bias(p_.W, p_.bias), p_.x, y, lora::mixed(p_.W, l));
      return output(y, true);
    });
    cell<takes<verb::forward>>("forward(packed_weight, x, y, l)", [&](const auto& l) {
      auto y = empty();
      lora::forward(lora::packed_weight<float>(p_.W), p_.x, y, l);
      return output(y, false);
    });
    cell<takes<verb::apply>>("apply(x, y, l)", [&](const auto& l) {
      auto y = product();
      lora::apply(p_.x, y, l);
      return output(y, false);
    });
    cell<takes<verb::mixed>>("apply(x, y, mixed(W, l))", [&](const auto& l) {
      auto y = product();
      lora::apply(p_.x, y, lora::mixed(p_.W, l));
      return output(y, false);
    });
    // The weight of an embedding is vocabulary x features, the transpose of W here.
    const matrix<float> embedding = p_.W.transpose();
    const auto found = [&](const matrix<float>& y) {
      exact_matrix want(out, tokens), size(out, tokens);
      for (index_t t = 0; t < tokens; ++t) {
        want.col(t) = one_.W.col(p_.ids[static_cast<std::size_t>(t)]) + one_.c;
        size.col(t) = one_.size.col(p_.ids[static_cast<std::size_t>(t)]) + one_.c.cwiseAbs();
      }
      return near(test::exact(y), want, size);
    };
    cell<takes<verb::embed>>("embed(W, ids, y, l)", [&](const auto& l) {
      auto y = empty();
      lora::embed(embedding, p_.ids, y, l);
      return found(y);
    });
    cell<takes<verb::mixed>>("embed(W, ids, y, mixed(W, l))", [&](const auto& l) {
      auto y = empty();
      lora::embed(embedding, p_.ids, y, lora::mixed(p_.W, l));
      return found(y);
    });
    // A convolution with a kernel of 1: lora_A times x.
    const auto down = [&](const auto& lora_A) {
      auto U = empty(lora_A.rows());
      lora::forward(lora_A, p_.x, U);
      return U;
    };
    cell<takes<verb::apply_through>>("apply_through(down, y, l)", [&](const auto& l) {
      auto y = product();
      lora::apply_through(down, y, l);
      return output(y, false);
    });
    cell<takes<verb::mixed>>("apply_through(down, y, mixed(W, l))", [&](const auto& l) {
      auto y = product();
      lora::apply_through(down, y, lora::mixed(p_.W, l));
      return output(y, false);
    });
    cell<low_rank || packed>("packed_adapter{l}", [&](const auto& l) {
      auto y = empty();
      lora::forward(p_.W, p_.x, y, lora::packed_adapter<float>(l));
      return output(y, false);
    });
    cell("batch", [&](const auto& l) {
      const auto run = [&](const auto& list) {
        lora::batch who{list};
        who.add({{0}});
        who.add();
        who.add({{0}});
        auto y = empty();
        lora::forward(lora::packed_weight<float>(p_.W), p_.x, y, who);
        const bool alone = test::same_bits(y.col(1).eval(), product().col(1).eval());
        // The second token has no adapter: its output is replaced by one that has.
        auto single = empty();
        lora::batch all{list};
        all.add_each(std::vector<index_t>{0, 0, 0});
        lora::forward(p_.W, p_.x, single, all);
        y.col(1) = single.col(1);
        return alone && output(y, false);
      };
      if constexpr (packed || low_rank)
        return run(std::vector{lora::packed_adapter<float>(l)});
      else
        return run(std::vector{lora::mixed(p_.W, l)});
    });
  }

  void keeping() {
    const auto layer_of = [&](const auto& l) {
      lora::linear<float> layer(lora::with_bias(p_.W, p_.bias));
      layer.attach("l", l);
      return layer;
    };
    cell<takes<verb::linear>>("linear, mixed", [&](const auto& l) {
      const auto layer = layer_of(l);
      auto y = empty();
      layer.forward(p_.x, y);
      return output(y, true);
    });
    cell<takes<verb::linear>>("linear, merged and unmerged", [&](const auto& l) {
      auto layer = layer_of(l);
      layer.merge("l");
      auto y = empty();
      layer.forward(p_.x, y);
      layer.unmerge("l");
      return output(y, true) && test::same_bits(layer.weight(), p_.W);
    });
    if constexpr (packed)
      to_.add("merge_bound", "Does not compile: a packed adapter has no merge.");
    else
      cell("merge_bound", [&](const auto& l) {
        auto W = p_.W;
        auto b = p_.bias;
        lora::merge(W, b, l);
        if constexpr (low_rank)
          return test::within(W, one_.W, lora::merge_bound(p_.W, l));
        else
          return test::within(W, one_.W, lora::merge_bound(p_.W, lora::mixed_bound(p_.W, l)));
      });
    cell("forward_bound", [&](const auto& l) {
      auto y = empty();
      lora::forward(p_.W, p_.x, y, l);
      exact_matrix want = test::times(one_.W, x());
      want.colwise() += one_.c;
      if constexpr (packed || low_rank)
        return test::within(y, want, lora::forward_bound(p_.W, p_.x, y, l));
      else
        return test::within(y, want,
                            lora::forward_bound(p_.W, p_.x, y, lora::mixed_bound(p_.W, l)));
    });
  }

  table& to_;
  const char* name_;
  const problem& p_;
  const K& kind_;
  definition is_;
  changed one_;
};

// --- The kinds, with their definitions. ---

template <class K>
void add(table& to, const char* name, const problem& p, const K& kind, definition is) {
  const column_of<K> made(to, name, p, kind, std::move(is));
  static_cast<void>(made);
}

void add_low_rank(table& to, problem& p) {
  const exact_matrix W = test::exact(p.W);
  const auto l = p.factors(3);
  const definition plain =
      sum_of_factors(W, l.scaling(), test::exact(l.lora_B()), test::exact(l.lora_A()));
  add(to, "adapter", p, l, plain);
  add(to, "scaled(0.7, adapter)", p, lora::scaled(0.7, l),
      [&](double w) { return plain(0.7 * w); });
  add(to, "packed_adapter", p, lora::packed_adapter<float>(l), plain);
  add(to, "module_adapter", p, lora::module_adapter({"m.q"}, lora::any_kind(l)), plain);

  // PEFT's lora_bias: s (B (A x) + c)
  lora::peft::entry_parts<float> parts;
  parts.name = "m.q";
  parts.experts.push_back(l);
  add(to, "peft::entry", p, lora::peft::entry<float>(parts), plain);
  parts.bias = p.list(out, -1, 1);
  add(to, "entry with lora_bias", p, lora::peft::entry<float>(parts), [&](double w) {
    changed result = plain(w);
    result.c = static_cast<long double>(w * l.scaling()) * column(parts.bias);
    return result;
  });
}

void add_dora(table& to, problem& p) {
  const auto l = p.factors(2);
  const values m = p.list(out, 1, 2);
  const lora::dora_adapter<float> dora(l, m);
  const definition before = sum_of_factors(test::exact(p.W), l.scaling(), test::exact(l.lora_B()),
                                           test::exact(l.lora_A()));
  // diag(m / n) (W + s B A). An error of the row before it reaches all of the row by its norm n.
  add(to, "dora", p, dora, [&](double w) {
    changed result = before(w);
    for (index_t i = 0; i < out; ++i) {
      const long double n = result.W.row(i).norm(), gain = column(m)(i) / n;
      result.size.row(i) =
          gain * (result.size.row(i) + result.W.row(i).cwiseAbs() * (result.size.row(i).norm() / n))
                     .eval();
      result.W.row(i) *= gain;
    }
    return result;
  });
}

void add_deltas(table& to, problem& p) {
  const exact_matrix W = test::exact(p.W);
  const auto reals = [&](index_t rows, index_t cols) { return p.g.reals<float>(rows, cols, 1); };
  const auto B1 = reals(out, 2), A1 = reals(2, in), B2 = reals(out, 2), A2 = reals(2, in);
  const exact_matrix first = test::times(test::exact(B1), test::exact(A1)),
                     second = test::times(test::exact(B2), test::exact(A2)),
                     first_size =
                         test::times(test::exact(B1).cwiseAbs(), test::exact(A1).cwiseAbs()),
                     second_size =
                         test::times(test::exact(B2).cwiseAbs(), test::exact(A2).cwiseAbs());
  const lora::loha_adapter<float> loha({B1, A1}, {B2, A2}, {.alpha = 1.4});
  const definition hadamard =
      sum(W, loha.scaling(), first.cwiseProduct(second), first_size.cwiseProduct(second_size));
  add(to, "loha", p, loha, hadamard);
  add(to, "any_kind", p, lora::any_kind(loha), hadamard);

  const auto C1 = reals(2, 4), C2 = reals(3, 2);
  const lora::lokr_adapter<float> lokr({C1}, {C2}, 2, {.alpha = 1.4});
  exact_matrix kron(out, in);
  for (index_t i = 0; i < out; ++i)
    for (index_t j = 0; j < in; ++j)
      kron(i, j) = test::exact(C1)(i / 3, j / 2) * test::exact(C2)(i % 3, j % 2);
  add(to, "lokr", p, lokr, sum(W, lokr.scaling(), kron, kron.cwiseAbs()));

  const auto D = reals(out, in);
  add(to, "full_difference", p, lora::full_difference<float>(D),
      sum(W, 1, test::exact(D), test::exact(D).cwiseAbs()));
}

void add_scaled_factors(table& to, problem& p) {
  const exact_matrix W = test::exact(p.W);
  const auto l = p.factors(3);
  const exact_matrix A = test::exact(l.lora_A()), B = test::exact(l.lora_B());
  // diag(E) between B and A; s = alpha / (init_r + 1e-5)
  const values E = p.list(3, -1, 1);
  const lora::adalora_adapter<float> adalora(l.lora_A(), l.lora_B(), E,
                                             {.alpha = 5.6, .initial_rank = 4});
  add(to, "adalora", p, adalora,
      sum_of_factors(W, 5.6 / (4 + 1e-5), B, column(E).asDiagonal() * A));

  using shared = lora::detail::row_major_matrix<float>;
  const values b = p.list(out, -1, 1), d = p.list(3, -1, 1);
  const lora::vera_adapter<float> vera(std::make_shared<const shared>(l.lora_A()),
                                       std::make_shared<const shared>(l.lora_B()), b, d, in);
  add(to, "vera", p, vera,
      sum_of_factors(W, 1, column(b).asDiagonal() * B, column(d).asDiagonal() * A));
}

void add_factors_of_features(table& to, problem& p) {
  const exact_matrix W = test::exact(p.W);
  const auto at = [](const values& l, double w) {
    const long double strength = static_cast<long double>(w);
    return exact_column((strength * (column(l).array() - 1) + 1).matrix());
  };
  const values of_outputs = p.list(out, 0.5, 1.5), of_inputs = p.list(in, 0.5, 1.5);
  add(to, "ia3, outputs", p, lora::ia3_adapter<float>::of_outputs(of_outputs, in),
      [&](double w) -> changed {
        const exact_column l = at(of_outputs, w);
        return {l.asDiagonal() * W, l.asDiagonal() * W.cwiseAbs(), l};
      });
  add(to, "ia3, inputs", p, lora::ia3_adapter<float>::of_inputs(of_inputs, out),
      [&](double w) -> changed {
        const exact_column l = at(of_inputs, w);
        return {W * l.asDiagonal(), W.cwiseAbs() * l.asDiagonal()};
      });
  // A block [0 q; -q 0] makes R = (I - Q) (I + Q)^-1 = [c -s; s c], with c = (1 - q^2) / (1 + q^2)
  // and s = 2 q / (1 + q^2); W' = W R^T.
  const auto q = p.g.reals<float>(in / 2, 1, 0.8);
  exact_matrix R = exact_matrix::Zero(in, in);
  for (index_t k = 0; k < in / 2; ++k) {
    const long double v = test::exact(q)(k, 0), c = (1 - v * v) / (1 + v * v),
                      s = 2 * v / (1 + v * v);
    R.block(2 * k, 2 * k, 2, 2) << c, -s, s, c;
  }
  const lora::oft_adapter<float> oft(
      q, {.out_features = out, .in_features = in, .rotation = lora::oft_rotation::cayley});
  add(to, "oft", p, oft, [&](double) -> changed {
    return {W * R.transpose(), W.cwiseAbs() * R.transpose().cwiseAbs()};
  });
}

/// The lines of the page between its two comments.
std::string committed() {
  std::ifstream stream(std::filesystem::path(LORA_SOURCE_DIR) / "docs/kinds.md");
  std::string line, result;
  bool inside = false;
  while (std::getline(stream, line)) {
    if (line == "<!-- end of the table -->") inside = false;
    if (inside) result += line + "\n";
    if (line == "<!-- tests/kinds/table.test.cpp makes and checks this table -->") inside = true;
  }
  return result;
}

}  // namespace

TEST_CASE("every verb with every kind is right or refused, as docs/kinds.md says", "[kinds]") {
  problem p;
  CAPTURE(p.g.seed());
  table all;
  add_low_rank(all, p);
  add_dora(all, p);
  add_deltas(all, p);
  add_scaled_factors(all, p);
  add_factors_of_features(all, p);
  const std::string text = all.text();
  if (const char* path = std::getenv("LORA_TABLE"); path != nullptr) std::ofstream(path) << text;
  CHECK(committed() == text);
}
