// SPDX-License-Identifier: Apache-2.0
//
// What the kinds of a PEFT file cannot have, what a verb cannot honour, and ranges that make adapters as they are walked: each
// is refused or right, nothing is dropped.
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "io/build.hpp"
#include "lora/delta.hpp"
#include "lora/io/peft.hpp"
#include "lora/rounding.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"

namespace {

namespace peft = lora::peft;

const std::string prefix = "base_model.model.";

std::string config(const std::string& more = "", const std::string& rank = "2") {
  return R"({"peft_type":"LORA","r":)" + rank + R"(,"lora_alpha":6)" + (more.empty() ? "" : "," + more) + "}";
}
peft::adapter_file<float> assemble(const std::string& json, const build::file& tensors,
                                   const peft::read_options& options = {}) {
  const auto bytes = build::to_bytes(tensors.text());
  return peft::assemble<float>(peft::parse_config(json, "adapter_config.json", options),
                               lora::safetensors::parse(bytes, "adapter_model.safetensors"), options);
}

build::file linear() {
  return build::file().add(prefix + "m.lora_A.weight", {2, 4}, 0.5F).add(prefix + "m.lora_B.weight", {3, 2}, 0.25F);
}
build::file embedding() {
  return build::file().add(prefix + "e.lora_embedding_A", {2, 5}).add(prefix + "e.lora_embedding_B", {3, 2});
}
/// `experts` of 4 x 3; one is a matrix.
build::file parameter(int experts) {
  return build::file()
      .add(prefix + "x.lora_A.weight", {2 * experts, 3})
      .add(prefix + "x.lora_B.weight", {4, 2 * experts}, 0.25F);
}
std::string of_parameter(const std::string& more = "") {
  return config(R"("target_parameters":["x.w"])" + (more.empty() ? "" : "," + more));
}

/// A plain entry with a bias and a magnitude of its own.
peft::entry<float> with_extras(peft::entry_parts<float> parts, std::vector<float> bias, std::vector<float> magnitude) {
  parts.bias = std::move(bias);
  parts.magnitude = std::move(magnitude);
  return peft::entry<float>(std::move(parts));
}

/// make(0), make(1), ..., each made when it is asked for, as a transformed view does.
template <class Make>
class made {
 public:
  made(std::size_t count, Make make) : make_(std::move(make)), count_(count) {}

  struct iterator {
    const Make* from;
    std::size_t k;
    auto operator*() const { return (*from)(k); }
    iterator& operator++() { return ++k, *this; }
    bool operator!=(const iterator& other) const { return k != other.k; }
  };
  iterator begin() const { return {&make_, 0}; }
  iterator end() const { return {&make_, count_}; }

 private:
  Make make_;
  std::size_t count_;
};

}  // namespace

// ---- ranges that make what they give

TEST_CASE("PEFT's unmerge takes a range that makes its adapters", "[peft][ranges]") {
  const test::matrix<float> A = test::matrix<float>::Random(2, 4), B = test::matrix<float>::Random(3, 2);
  const std::vector<lora::adapter<float>> owners{{A, B, {.alpha = 3}}, {2 * A, B, {.alpha = 1}}, {A, -B, {.alpha = 5}}};
  const test::matrix<lora::bfloat16> W =
      test::matrix<float>::Random(3, 4).unaryExpr([](float v) { return lora::bfloat16(v); });
  const made views(3, [&](std::size_t k) { return lora::scaled(0.7, owners[k]); });
  const made copies(3, [&](std::size_t k) { return lora::adapter<float>(lora::scaled(0.7, owners[k])); });
  test::matrix<lora::bfloat16> want = W, from_views = W, from_copies = W;
  for (const std::size_t k : {2, 1, 0}) lora::unmerge(lora::rounding::peft, want, lora::scaled(0.7, owners[k]));
  lora::unmerge(lora::rounding::peft, from_views, views);
  lora::unmerge(lora::rounding::peft, from_copies, copies);
  CHECK_FALSE(test::same_bits(want, W));
  CHECK(test::same_bits(from_views, want));
  CHECK(test::same_bits(from_copies, want));
}

TEST_CASE("a range may make scaled entries, and may be empty", "[peft][ranges]") {
  const auto file = assemble(config(), linear());
  const std::vector<double> weights{0.5, -0.25, 2};
  Eigen::MatrixXf W = Eigen::MatrixXf::Ones(3, 4), want = W;
  lora::merge(W, made(3, [&](std::size_t k) { return lora::scaled(weights[k], file.at("m")); }));
  lora::merge(want, lora::scaled(0.5, file.at("m")), lora::scaled(-0.25, file.at("m")), lora::scaled(2, file.at("m")));
  CHECK(W == want);
  const std::vector<peft::entry<float>> none;
  std::vector<float> values(12, 1.0F);
  const lora::tensor_view<float, 3> stack(values, {1, 3, 4});
  CHECK_THROWS_WITH(lora::merge(stack, none), Catch::Contains("no entry is given"));
  CHECK_THROWS_WITH(lora::merge(W, none), Catch::Contains("no entry is given"));
}

// ---- nothing is dropped

TEST_CASE("a stack takes no bias and no magnitude, rows no bias", "[peft][kinds]") {
  const auto parts = assemble(config(), linear()).at("m").parts();
  std::vector<float> values(12, 1.0F);
  const lora::tensor_view<float, 3> stack(values, {1, 3, 4});
  CHECK_THROWS_WITH(lora::merge(stack, with_extras(parts, {1, 2, 3}, {})), Catch::Contains("bias of its own"));
  CHECK_THROWS_WITH(lora::merge(stack, with_extras(parts, {}, {1, 2, 3})), Catch::Contains("norms are those of a matrix"));
  CHECK(values == std::vector<float>(12, 1.0F));
  lora::merge(stack, with_extras(parts, {}, {}));
  CHECK(values != std::vector<float>(12, 1.0F));

  const auto e = with_extras(assemble(config(), embedding()).at("e").parts(), {1, 2, 3}, {});
  const Eigen::MatrixXf W = Eigen::MatrixXf::Zero(5, 3);
  Eigen::MatrixXf y = Eigen::MatrixXf::Constant(3, 1, 7);
  CHECK_THROWS_WITH(lora::rows(W, std::vector<int>{4}, y, e), Catch::Contains("bias of its own"));
  CHECK(y == Eigen::MatrixXf::Constant(3, 1, 7));
}

// ---- how parameters are stored

TEST_CASE("parameters_in_out is for stacks, a matrix is out x in", "[peft][kinds]") {
  const peft::read_options in_out{.parameters_in_out = true};
  const auto plain = assemble(of_parameter(), parameter(1)), turned = assemble(of_parameter(), parameter(1), in_out);
  const auto& e = turned.at("x.w");
  const Eigen::MatrixXf delta = lora::delta_weight(plain.at("x.w").factors());
  Eigen::MatrixXf W = Eigen::MatrixXf::Zero(4, 3);
  lora::merge(W, e);
  CHECK(W == delta);
  Eigen::MatrixXf wrong = Eigen::MatrixXf::Zero(3, 4);
  CHECK_THROWS_WITH(lora::merge(wrong, e), Catch::Contains("slice of a stack"));
  CHECK_THROWS_WITH(e.plain(), Catch::Contains("parameters_in_out"));
  CHECK(plain.at("x.w").plain().rank() == 2);

  std::vector<float> values(12, 0.0F);
  lora::merge(lora::tensor_view<float, 3>(values, {1, 3, 4}), e);
  CHECK(Eigen::Map<const test::matrix<float>>(values.data(), 3, 4) == delta.transpose());
  const lora::tensor_view<float, 3> other(values, {1, 4, 3});
  CHECK_THROWS_WITH(lora::merge(other, e), Catch::Contains("parameters_in_out the other way"));
}
