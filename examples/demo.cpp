// SPDX-License-Identifier: Apache-2.0
//
// demo [data]: shows on the tiny model and its two PEFT adapters that merging, mixing and
// everything between agree, with each other within the rounding bound and with PEFT's own numbers.
// The exit status is 1 when anything disagrees.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <limits>

#include "llama.hpp"

namespace {

namespace fs = std::filesystem;
constexpr int prompts = 4;
const std::vector<std::string> names = {"capitals", "german"};

/// Collects what disagrees; anything that is not a number does.
class verdict {
 public:
  void expect(bool holds, const std::string& what) {
    ++checks_;
    if (!holds) wrong_.push_back(what);
  }
  int print() const {
    for (const auto& what : wrong_) std::printf("  wrong: %s\n", what.c_str());
    if (wrong_.empty())
      std::printf("VERDICT  all agree: %d checks, every difference is rounding\n", checks_);
    else
      std::printf("VERDICT  DISAGREE: %zu of %d checks\n", wrong_.size(), checks_);
    return wrong_.empty() ? 0 : 1;
  }

 private:
  int checks_ = 0;
  std::vector<std::string> wrong_;
};

/// One state of the two adapters: their weights, where 0 is "not attached".
struct mixture {
  const char* name;  ///< in golden.safetensors
  double capitals, german;
  double weight(std::size_t k) const { return k == 0 ? capitals : german; }
};
constexpr mixture mixtures[] = {{"base", 0, 0},
                                {"capitals", 1, 0},
                                {"german", 0, 1},
                                {"capitals+german", 1, 1},
                                {"0.7capitals+0.3german", 0.7, 0.3},
                                {"-0.5capitals", -0.5, 0}};

struct world {
  fs::path data;
  lora::safetensors::file golden;
  lora::peft::adapter_file<float> adapters[2];
  llama::vocabulary words;

  explicit world(const fs::path& d)
      : data(d),
        golden(lora::safetensors::read(d / "golden.safetensors")),
        adapters{lora::peft::read(d / "adapters/capitals"),
                 lora::peft::read(d / "adapters/german")},
        words(d / "base/vocabulary.json") {}

  template <class T>
  llama::model<T> model(const mixture& m) const {
    auto result = llama::read<T>(data / "base");
    for (std::size_t k = 0; k < 2; ++k)
      if (m.weight(k) != 0) result.attach(names[k], adapters[k], m.weight(k));
    return result;
  }
  llama::tokens ids(const std::string& tensor, int prompt) const {
    return golden.copy<std::int64_t>(tensor + "." + std::to_string(prompt));
  }
};

// --- What the adapters hold
// -------------------------------------------------------------------------------------------

void describe(const world& w, const llama::model<double>& base) {
  std::printf(
      "adapter    layers  rank   scaling s      |delta W| / |W|, delta W = s lora_B lora_A\n");
  for (std::size_t k = 0; k < 2; ++k) {
    struct range {
      double low = std::numeric_limits<double>::infinity(), high = 0;
      void add(double v) { low = std::min(low, v), high = std::max(high, v); }
    } rank, scaling, size;
    for (const auto& [module, entry] : w.adapters[k]) {
      const auto& l = entry.plain();
      rank.add(static_cast<double>(l.rank()));
      scaling.add(l.scaling());
      const auto W = base.layers().at(module).weight();
      size.add(lora::delta_weight(l).template cast<double>().norm() / W.norm());
    }
    std::printf("%-10s %4zu    %.0f-%.0f    %.3f-%.3f    %.2f-%.2f   %s\n", names[k].c_str(),
                w.adapters[k].size(), rank.low, rank.high, scaling.low, scaling.high, size.low,
                size.high,
                w.adapters[k].config().rule == lora::scaling_rule::rank_stabilized
                    ? "rank-stabilized, rank_pattern"
                    : "alpha / rank");
  }
}

// --- Each layer, three ways
// --------------------------------------------------------------------------------------------

/// What went into each layer during the prompts.
using inputs = std::map<std::string, Eigen::MatrixXf>;
inputs captured(const world& w) {
  const auto model = w.model<float>(mixtures[3]);
  inputs result;
  for (int p = 0; p < prompts; ++p)
    model.logits(w.ids("input_ids", p), [&](const std::string& layer, const Eigen::MatrixXf& x) {
      auto& all = result[layer];
      all.conservativeResize(x.rows(), all.cols() + x.cols());
      all.rightCols(x.cols()) = x;
    });
  return result;
}

/// Largest difference, and largest share of what rounding allows at the same place.
struct distance {
  double size = 0, share = 0;
  void take(const Eigen::ArrayXXd& difference, const Eigen::ArrayXXd& bound) {
    const Eigen::ArrayXXd shares =
        (difference == 0)
            .select(Eigen::ArrayXXd::Zero(bound.rows(), bound.cols()), difference / bound);
    const bool finite = difference.allFinite() && shares.allFinite();
    size =
        finite ? std::max(size, difference.maxCoeff()) : std::numeric_limits<double>::quiet_NaN();
    share = finite ? std::max(share, shares.maxCoeff()) : std::numeric_limits<double>::quiet_NaN();
  }
  bool is_rounding() const { return share <= 1; }
};

/// One layer's outputs by way 1 (capitals merged, german mixed), way 2 (both mixed) and way 3 (both
/// merged), compared.
struct comparison {
  distance one_two, one_merged, two_merged, exact;

  template <class T, class L>
  void add(lora::linear<T> layer, const L& capitals, const L& german, const Eigen::MatrixXf& x) {
    layer.unmerge();
    const auto W = layer.weight();
    Eigen::MatrixXf result(layer.out_features(), x.cols());
    const Eigen::ArrayXXd bound[3] = {
        lora::forward_bound(lora::with_merged(W, capitals), x, result, german).array(),
        lora::forward_bound(W, x, result, capitals, german).array(),
        lora::forward_bound(lora::with_merged(W, capitals, german), x, result).array(),
    };
    const Eigen::MatrixXd X = x.cast<double>();
    Eigen::MatrixXd truth = W.template cast<double>() * X;
    for (const L* l : {&capitals, &german}) truth += in_double(*l, X);
    Eigen::ArrayXXd y[3];
    for (int way = 0; way < 3; ++way) {
      layer.unmerge();
      if (way != 1) layer.merge(names[0]);
      if (way == 2) layer.merge(names[1]);
      layer.forward(x, result);
      y[way] = result.cast<double>().array();
      exact.take((y[way] - truth.array()).abs(), bound[way]);
    }
    one_two.take((y[0] - y[1]).abs(), bound[0] + bound[1]);
    one_merged.take((y[0] - y[2]).abs(), bound[0] + bound[2]);
    two_merged.take((y[1] - y[2]).abs(), bound[1] + bound[2]);
  }

  /// s B (A x)
  template <class L>
  static Eigen::MatrixXd in_double(const L& l, const Eigen::MatrixXd& x) {
    return l.scaling() * l.lora_B().template cast<double>() *
           (l.lora_A().template cast<double>() * x);
  }
};

/// The layers that both adapters change, by the kind of projection.
template <class T>
std::map<std::string, comparison> compare(const world& w, const inputs& seen) {
  const auto model = w.model<T>(mixtures[3]);
  std::map<std::string, comparison> kinds;
  for (const auto& [name, layer] : model.layers()) {
    if (!layer.contains(names[0]) || !layer.contains(names[1])) continue;
    kinds[name.substr(name.rfind('.') + 1)].add(layer.clone(), w.adapters[0].at(name).plain(),
                                                w.adapters[1].at(name).plain(), seen.at(name));
  }
  return kinds;
}

template <class T>
void show_ways(const char* format, const world& w, const inputs& seen, verdict& v) {
  const auto row = [](const distance& d) {
    std::printf("  %.1e (%4.1f %%)", d.size, 100 * d.share);
  };
  for (const auto& [kind, c] : compare<T>(w, seen)) {
    std::printf("%-9s %-10s", format, kind.c_str());
    for (const auto* d : {&c.one_two, &c.one_merged, &c.two_merged, &c.exact}) {
      row(*d);
      v.expect(d->is_rounding(),
               std::string(kind) + " in " + format + " differs by more than rounding");
    }
    std::printf("\n");
  }
}

// --- The whole model against PEFT
// ---------------------------------------------------------------------------------------

Eigen::MatrixXd golden_logits(const world& w, const char* kind, const mixture& m, int prompt) {
  const auto name = std::string(kind) + "." + m.name + "." + std::to_string(prompt);
  const auto values = w.golden.copy<double>(name);
  const auto& extents = w.golden.at(name).shape;
  return Eigen::Map<const Eigen::MatrixXd>(values.data(), static_cast<lora::index_t>(extents[1]),
                                           static_cast<lora::index_t>(extents[0]));
}

/// Largest difference of our logits from PEFT's in float64, with none, the first, the second or
/// both merged.
template <class T>
double farthest(const world& w, const mixture& m) {
  double worst = 0;
  for (unsigned merged = 0; merged < 4; ++merged) {
    auto model = w.model<T>(m);
    bool possible = true;
    for (unsigned k = 0; k < 2; ++k)
      if ((merged >> k & 1) != 0) {
        possible = possible && m.weight(k) != 0;
        if (possible) model.merge(names[k]);
      }
    if (!possible) continue;
    for (int p = 0; p < prompts; ++p) {
      const Eigen::MatrixXd ours = model.logits(w.ids("input_ids", p)).template cast<double>();
      const double difference = (ours - golden_logits(w, "logits64", m, p)).cwiseAbs().maxCoeff();
      worst = difference <= worst ? worst : difference;  // a NaN stays
    }
  }
  return worst;
}

void show_logits(const world& w, verdict& v) {
  std::printf(
      "\nlogits against PEFT in float64   ours in double     ours in float   allowed (4 x PEFT in "
      "float)   text\n");
  for (const mixture& m : mixtures) {
    double largest = 0, peft_float = 0;
    for (int p = 0; p < prompts; ++p) {
      const Eigen::MatrixXd exact = golden_logits(w, "logits64", m, p);
      largest = std::max(largest, exact.cwiseAbs().maxCoeff());
      peft_float =
          std::max(peft_float, (golden_logits(w, "logits", m, p) - exact).cwiseAbs().maxCoeff());
    }
    const double in_double = farthest<double>(w, m) / largest, in_float = farthest<float>(w, m);
    v.expect(in_double <= 1e-9, std::string(m.name) + ": logits in double differ from PEFT's");
    v.expect(in_float <= 4 * peft_float,
             std::string(m.name) + ": logits in float differ from PEFT's");

    const auto model = w.model<float>(m);
    const auto text = model.greedy(w.ids("prompt", 0), 48, w.words.end());
    for (int p = 0; p < prompts; ++p)
      v.expect(model.greedy(w.ids("prompt", p), 48, w.words.end()) ==
                   w.ids("greedy." + std::string(m.name), p),
               std::string(m.name) + ": the generated text differs from PEFT's");
    std::printf("%-32s %.1e relative   %.1e         %.1e                       42 = %s\n", m.name,
                in_double, in_float, 4 * peft_float, w.words.decode(text).c_str());
  }
}

// --- Latency
// ------------------------------------------------------------------------------------------------------------

/// Microseconds of one call, the best of some: the least disturbed.
template <class Call>
double microseconds(const Call& call) {
  using clock = std::chrono::steady_clock;
  double best = std::numeric_limits<double>::infinity();
  for (const auto end = clock::now() + std::chrono::milliseconds(60); clock::now() < end;) {
    const auto start = clock::now();
    call();
    best = std::min(best, std::chrono::duration<double, std::micro>(clock::now() - start).count());
  }
  return best;
}

/// The FLOPs of mixing both adapters over those of the layers' base products.
double added_work(const llama::model<float>& model, const world& w) {
  double base = 0, added = 0;
  for (const auto& [name, layer] : model.layers()) {
    base += static_cast<double>(layer.in_features()) * static_cast<double>(layer.out_features());
    for (std::size_t k = 0; k < 2; ++k)
      if (layer.contains(names[k]))
        added += static_cast<double>(w.adapters[k].at(name).plain().rank()) *
                 static_cast<double>(layer.in_features() + layer.out_features());
  }
  return added / base;
}

void show_latency(const world& w) {
  const auto ids = w.ids("input_ids", 3);
  auto model = w.model<float>(mixtures[3]);
  const auto run = [&] { return microseconds([&] { model.logits(ids); }); };
  const double mixed = run();
  model.merge("capitals");
  const double one = run();
  model.merge("german");
  const double merged = run();
  std::printf(
      "\nlatency of %zu tokens   both merged %.0f us   one merged, one mixed %.0f us (%+.0f %%)   "
      "both mixed %.0f us (%+.0f %%)\n"
      "These layers are %td wide, so mixing adds %.0f %% to their FLOPs; rank 16 adds 0.8 %% to a "
      "layer of 4096 x 4096.\n"
      "./scripts/bench measures what mixing costs in layers of usual size.\n",
      ids.size(), merged, one, 100 * (one / merged - 1), mixed, 100 * (mixed / merged - 1),
      model.shape().hidden, 100 * added_work(model, w));
}

int run(const fs::path& data) {
  const world w(data);
  const auto base = llama::read<double>(data / "base");
  std::printf(
      "lora %d.%d.%d on a tiny Llama: %td layers of hidden size %td; it writes numbers as "
      "words\n\n",
      LORA_VERSION_MAJOR, LORA_VERSION_MINOR, LORA_VERSION_PATCH, base.shape().layers,
      base.shape().hidden);
  describe(w, base);
  verdict v;
  std::printf(
      "\nAn adapter is merged (inside the weight) or mixed (computed beside it in the same call; "
      "PEFT: unmerged)."
      "\nway 1: capitals merged, german mixed. way 2: both mixed. way 3: both merged."
      "\nLargest difference between outputs of a layer, and in %% of the most that rounding can "
      "make of it there:\n"
      "weights   layers      way 1 - way 2     way 1 - way 3     way 2 - way 3     each - exact\n");
  const inputs seen = captured(w);
  show_ways<float>("float", w, seen, v);
  show_ways<lora::bfloat16>("bfloat16", w, seen, v);
  show_logits(w, v);
  show_latency(w);
  return v.print();
}

}  // namespace

int main(int count, char** arguments) try {
  return run(count > 1 ? arguments[1] : "examples/data");
} catch (const std::exception& e) {
  std::fprintf(stderr, "demo: %s\n", e.what());
  return 1;
}
