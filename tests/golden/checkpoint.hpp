// SPDX-License-Identifier: Apache-2.0
//
// Whole checkpoints that PEFT's merge_and_unload wrote, against our merge of the same adapters.
#pragma once

#include <filesystem>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "lora/io/peft.hpp"
#include "support/golden.hpp"

namespace golden {

/// The files of a checkpoint, one or several.
class shards {
 public:
  explicit shards(const fs::path& folder) {
    for (const auto& each : fs::directory_iterator(folder))
      if (each.path().extension() == ".safetensors")
        files_.push_back(lora::safetensors::read(each.path()));
  }
  explicit shards(lora::safetensors::file one) : files_{std::move(one)} {}

  const std::vector<lora::safetensors::file>& files() const { return files_; }
  std::size_t size() const {
    std::size_t count = 0;
    for (const auto& each : files_) count += each.size();
    return count;
  }
  const lora::safetensors::file& with(const std::string& name) const {
    for (const auto& each : files_)
      if (each.contains(name)) return each;
    throw std::runtime_error("no shard has the tensor " + name);
  }

 private:
  std::vector<lora::safetensors::file> files_;
};

/// What a weight can become by adding deltas that are known up to an error: rounding to float and
/// to T is monotonic, so the
/// result lies between those of the ends. Where both are one number the bits are decided.
template <class T>
struct between {
  MatrixXd low, high;

  explicit between(const MatrixXd& W) : low(W), high(W) {}
  void add(const std::vector<part>& parts, double u) {
    const MatrixXd d = magnitude(parts, low.rows(), low.cols());
    const MatrixXd delta = exact_sum(MatrixXd::Zero(d.rows(), d.cols()), parts);
    const MatrixXd e = agreement::gamma(agreement::total_rank(parts) + 2, u) * d;
    const auto rounded = [](double v) { return static_cast<double>(T(static_cast<float>(v))); };
    low = (low + delta - e).unaryExpr(rounded);
    high = (high + delta + e).unaryExpr(rounded);
  }
  bool contains(const MatrixXd& m) const {
    return (m.array() >= low.array()).all() && (m.array() <= high.array()).all();
  }
  Eigen::Index decided() const { return (low.array() == high.array()).count(); }
};

/// A checkpoint of PEFT's merge_and_unload in T against the base that it started from (rounded to T
/// where that is wider) and adapters, in the order in which PEFT merged them. PEFT rounds once for
/// each adapter, we once for all.
template <class T>
void check_checkpoint(const shards& checkpoint, const shards& base,
                      const std::vector<const lora::peft::adapter_file<float>*>& adapters,
                      bool in_out = false) {
  const formats f = agreement::formats_of<T, float, float>();
  double our_error = 0, peft_error = 0;
  Eigen::Index merged = 0, decided = 0, same = 0;
  CHECK(checkpoint.size() == base.size());
  for (const auto& file : checkpoint.files())
    for (const auto& t : file) {
      const std::string name(t.name);
      INFO(name);
      CHECK(t.dtype == lora::safetensors::dtype_of<T>());
      const auto turned = [&](const MatrixXd& m) { return in_out ? MatrixXd(m.transpose()) : m; };
      const test::matrix<T> rounded =
          turned(tensor<double>(base.with(name), name)).template cast<T>();
      const MatrixXd W = agreement::in_double(rounded), theirs = turned(tensor<double>(file, name));
      const auto module = name.substr(0, name.rfind(".weight"));
      std::vector<const lora::adapter<float>*> here;
      for (const auto* each : adapters)
        if (each->contains(module)) here.push_back(&each->at(module).factors());
      if (here.empty()) {
        CHECK(W == theirs);
        continue;
      }
      std::vector<part> parts;
      std::vector<lora::adapter_view<float>> views;
      between<T> once(W), one_by_one(W);
      for (const auto* l : here) {
        parts.push_back(agreement::part_of(*l));
        views.emplace_back(*l);
        one_by_one.add({parts.back()}, f.accumulator.u);
      }
      once.add(parts, f.accumulator.u);
      const MatrixXd got = agreement::in_double(lora::merged(rounded, views)),
                     exact = exact_sum(W, parts);
      const MatrixXd ours = agreement::merge_bound(W, parts, f),
                     peft = one_by_one_bound(W, parts, f);
      CHECK(share(got, exact, ours) <= 1);
      CHECK(share(theirs, exact, peft) <= 1);
      CHECK(share(got, theirs, ours + peft) <= 1);
      CHECK(once.contains(got));
      CHECK(one_by_one.contains(theirs));
      our_error += (got - exact).squaredNorm();
      peft_error += (theirs - exact).squaredNorm();
      merged += got.size();
      decided += one_by_one.decided();
      same += (got.array() == theirs.array()).count();
    }
  INFO("of " << merged << " elements the bits of " << decided
             << " are decided; ours and PEFT's are the same in " << same);
  REQUIRE(merged > 0);
  CHECK(our_error <= peft_error);
  if (f.weight.u != 0) CHECK(static_cast<double>(decided) > 0.9 * static_cast<double>(merged));
}

}  // namespace golden
