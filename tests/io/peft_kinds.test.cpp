// SPDX-License-Identifier: Apache-2.0
//
// What the kinds of a PEFT file cannot have, what a verb cannot honour, and ranges that make
// adapters as they are walked: each is refused or right, nothing is dropped.
#include <cstddef>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "io/peft_file.hpp"
#include "lora/delta.hpp"
#include "lora/io/peft.hpp"
#include "lora/rounding.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"

namespace {

namespace peft = lora::peft;
using build::assemble;
using build::config;
using build::file_refused;
using build::prefix;
using build::refused;

build::file linear() {
  return build::file()
      .add(prefix + "m.lora_A.weight", {2, 4}, 0.5F)
      .add(prefix + "m.lora_B.weight", {3, 2}, 0.25F);
}
build::file embedding() {
  return build::file()
      .add(prefix + "e.lora_embedding_A", {2, 5})
      .add(prefix + "e.lora_embedding_B", {3, 2});
}
build::file attention() {
  return build::file()
      .add(prefix + "a.lora_A.weight", {2, 3})
      .add(prefix + "a.lora_B.weight", {9, 2})
      .add(prefix + "a.base_layer.out_proj.lora_A.weight", {2, 3})
      .add(prefix + "a.base_layer.out_proj.lora_B.weight", {3, 2});
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
peft::entry<float> with_extras(peft::entry_parts<float> parts, std::vector<float> bias,
                               std::vector<float> magnitude) {
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
  const test::matrix<float> A = test::matrix<float>::Random(2, 4),
                            B = test::matrix<float>::Random(3, 2);
  const std::vector<lora::adapter<float>> owners{
      {A, B, {.alpha = 3}}, {2 * A, B, {.alpha = 1}}, {A, -B, {.alpha = 5}}};
  const test::matrix<lora::bfloat16> W =
      test::matrix<float>::Random(3, 4).unaryExpr([](float v) { return lora::bfloat16(v); });
  const made views(3, [&](std::size_t k) { return lora::scaled(0.7, owners[k]); });
  const made copies(
      3, [&](std::size_t k) { return lora::adapter<float>(lora::scaled(0.7, owners[k])); });
  test::matrix<lora::bfloat16> want = W, from_views = W, from_copies = W;
  for (const std::size_t k : {2U, 1U, 0U})
    lora::unmerge(lora::rounding::as_peft, want, lora::scaled(0.7, owners[k]));
  lora::unmerge(lora::rounding::as_peft, from_views, views);
  lora::unmerge(lora::rounding::as_peft, from_copies, copies);
  CHECK_FALSE(test::same_bits(want, W));
  CHECK(test::same_bits(from_views, want));
  CHECK(test::same_bits(from_copies, want));
}

TEST_CASE("a range may make scaled entries, and may be empty", "[peft][ranges]") {
  const auto file = assemble(config(), linear());
  const std::vector<double> weights{0.5, -0.25, 2};
  Eigen::MatrixXf W = Eigen::MatrixXf::Ones(3, 4), want = W;
  lora::merge(W, made(3, [&](std::size_t k) { return lora::scaled(weights[k], file.at("m")); }));
  lora::merge(want, lora::scaled(0.5, file.at("m")), lora::scaled(-0.25, file.at("m")),
              lora::scaled(2, file.at("m")));
  CHECK(W == want);
  const std::vector<peft::entry<float>> none;
  std::vector<float> values(12, 1.0F);
  const lora::tensor_view<float, 3> stack(values, {1, 3, 4});
  // Nothing to do is done, by every verb.
  const Eigen::MatrixXf before = W, x = Eigen::MatrixXf::Ones(4, 2);
  Eigen::MatrixXf y = Eigen::MatrixXf::Constant(3, 2, 7), looked_up(4, 1);
  Eigen::VectorXf bias = Eigen::VectorXf::Ones(3);
  CHECK(lora::merge(stack, none).became_nonfinite == 0);
  CHECK(lora::merge(W, none).became_nonfinite == 0);
  lora::unmerge(W, none);
  lora::merge(W, bias, none);
  lora::unmerge(W, bias, none);
  Eigen::MatrixXf block = Eigen::MatrixXf::Ones(3, 2);  // no bias, and there is nothing to say so
  lora::merge(W, block, none);
  lora::unmerge(W, block, none);
  lora::merge_checked(W, none);
  CHECK(lora::merged(W, none) == before);
  lora::apply(x, y, none);
  lora::embed(before, std::vector<int>{2}, looked_up, none);
  lora::apply_through([](const auto&) { return Eigen::MatrixXf(2, 2); }, y, none);
  lora::merge(W, lora::mixed(W, none));
  CHECK(W == before);
  CHECK(bias == Eigen::VectorXf::Ones(3));
  CHECK(y == Eigen::MatrixXf::Constant(3, 2, 7));
  CHECK(looked_up.transpose() == before.row(2));
  CHECK(values == std::vector<float>(12, 1.0F));
}

// ---- nothing is dropped

TEST_CASE("a stack takes no bias and no magnitude, rows no bias", "[peft][kinds]") {
  const auto parts = assemble(config(), linear()).at("m").parts();
  std::vector<float> values(12, 1.0F);
  const lora::tensor_view<float, 3> stack(values, {1, 3, 4});
  CHECK_THROWS_WITH(lora::merge(stack, with_extras(parts, {1, 2, 3}, {})),
                    Catch::Contains("bias of its own"));
  CHECK_THROWS_WITH(lora::merge(stack, with_extras(parts, {}, {1, 2, 3})),
                    Catch::Contains("norms are those of a matrix"));
  CHECK(values == std::vector<float>(12, 1.0F));
  lora::merge(stack, with_extras(parts, {}, {}));
  CHECK(values != std::vector<float>(12, 1.0F));

  const auto e = with_extras(assemble(config(), embedding()).at("e").parts(), {1, 2, 3}, {});
  const Eigen::MatrixXf W = Eigen::MatrixXf::Zero(5, 3);
  Eigen::MatrixXf y = Eigen::MatrixXf::Constant(3, 1, 7);
  CHECK_THROWS_WITH(lora::embed(W, std::vector<int>{4}, y, e), Catch::Contains("bias of its own"));
  CHECK(y == Eigen::MatrixXf::Constant(3, 1, 7));
}

TEST_CASE("biases of entries do not depend on the caller's floating-point mode", "[peft][kinds]") {
  using mode = lora::detail::control_register;
  const auto parts = assemble(config(), linear()).at("m").parts();
  const auto e = with_extras(parts, {0x1p-140F, 1, 0x1.000002p0F}, {});
  const auto run = [&] {
    Eigen::MatrixXf W = Eigen::MatrixXf::Ones(3, 4), x = Eigen::MatrixXf::Zero(4, 1),
                    y = Eigen::MatrixXf::Constant(3, 1, 0x1p-141F);
    Eigen::VectorXf b = Eigen::VectorXf::Constant(3, 0x1p-141F);
    lora::merge(W, b, e);
    lora::apply(x, y, e);
    return std::pair(b, Eigen::VectorXf(y));
  };
  const auto want = run();
  CHECK(want.first(0) == 0x1p-141F + 3 * 0x1p-140F);
  if (!mode::is_known) WARN("skipped: the floating-point mode of this processor is not known");
  const auto before = mode::read();
  mode::write(before | mode::mode);  // flush, and round toward zero
  const auto got = run();
  const bool kept = (mode::read() & mode::mode) == mode::mode;
  mode::write(before);
  CHECK(kept);
  CHECK(test::same_bits(got.first, want.first));
  CHECK(test::same_bits(got.second, want.second));
}

TEST_CASE("what PEFT refuses for a kind is refused by name", "[peft][kinds]") {
  const std::string dora = "\"use_dora\":true", bias = "\"lora_bias\":true",
                    kasa = "\"kasa_config\":{}";
  file_refused(config(dora), attention().add(prefix + "a.lora_magnitude_vector", {9}),
               {"use_dora", "attention in_proj \"a.in_proj\"", "PEFT has no DoRA"});
  file_refused(of_parameter(dora), parameter(1).add(prefix + "x.lora_magnitude_vector", {4}),
               {"use_dora", "parameter \"x.w\"", "PEFT has no DoRA"});
  file_refused(of_parameter(bias), parameter(1).add(prefix + "x.lora_B.bias", {4}),
               {"lora_bias", "parameter \"x.w\"", "PEFT has no such bias"});
  file_refused(config(bias), embedding().add(prefix + "e.lora_B.bias", {3}),
               {"lora_bias", "embedding \"e\"", "PEFT has no such bias"});
  file_refused(config(kasa), attention(), {"kasa_config", "attention in_proj", "PEFT has no KaSA"});
  file_refused(of_parameter(kasa), parameter(1),
               {"kasa_config", "parameter \"x.w\"", "PEFT has no KaSA"});
}

TEST_CASE("an initialization that changes the base is refused where it is not known",
          "[peft][kinds]") {
  for (const std::string name : {"pissa", "olora"}) {
    const std::string init = "\"init_lora_weights\":\"" + name + "\"";
    file_refused(config(init), attention(),
                 {"init_lora_weights", name, "attention in_proj \"a.in_proj\"", "converted()"});
    file_refused(of_parameter(init), parameter(1),
                 {"init_lora_weights", name, "parameter \"x.w\"", "converted()"});
    // PEFT leaves the weight of an embedding as it is.
    CHECK(assemble(config(init), embedding()).at("e").change() == peft::base_change::none);
    CHECK(assemble(config(init), linear()).at("m").change() != peft::base_change::none);
  }
}

// ---- how parameters are stored

TEST_CASE("parameters_in_out is for stacks, a matrix is out x in", "[peft][kinds]") {
  const peft::read_options in_out{.parameters_in_out = true};
  const auto plain = assemble(of_parameter(), parameter(1)),
             turned = assemble(of_parameter(), parameter(1), in_out);
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

// ---- rows of trained tokens

TEST_CASE("tokens of the config have rows", "[peft][tokens]") {
  const std::string rows = ".token_adapter.trainable_tokens_delta";
  const auto tokens = [](const std::string& value) {
    return config("\"trainable_token_indices\":" + value);
  };
  file_refused(tokens("{\"e\":[4,1]}"), linear(),
               {"trainable_token_indices", "e" + rows, "none", "incomplete"});
  file_refused(tokens("[4,1]"), linear(),
               {"trainable_token_indices", "input embedding", "incomplete"});
  file_refused(tokens("{\"e\":[4,1],\"f\":[4,2]}"), linear().add(prefix + "e" + rows, {2, 3}),
               {"f" + rows, "incomplete"});
  // PEFT saves the rows of tied embeddings once, and whether they are tied is not in the file.
  CHECK(assemble(tokens("{\"e\":[4,1],\"head\":[4,1]}"), linear().add(prefix + "e" + rows, {2, 3}))
            .token_rows()
            .size() == 1);
  CHECK(assemble(tokens("{\"e\":[]}"), linear()).token_rows().empty());
  const auto lenient = assemble(tokens("{\"e\":[4,1]}"), linear(), {.lenient = true});
  REQUIRE(lenient.passed_over().size() == 1);
  CHECK(build::has(lenient.passed_over()[0], "\"e\""));
}

TEST_CASE("keys of trained tokens that fit one embedding agree", "[peft][tokens]") {
  const auto tensors = linear().add(prefix + "a.e.token_adapter.trainable_tokens_delta", {2, 3});
  const auto tokens = [](const std::string& value) {
    return config("\"trainable_token_indices\":" + value);
  };
  file_refused(tokens("{\"a.e\":[4,1],\"e\":[1,4]}"), tensors,
               {"trainable_token_indices", "\"a.e\"", "\"e\""});
  CHECK(assemble(tokens("{\"a.e\":[4,1],\"e\":[4,1]}"), tensors).token_rows().at("a.e").ids() ==
        std::vector<lora::index_t>{4, 1});
}

// ---- memory

TEST_CASE("a small file does not ask for a large matrix", "[peft][limits]") {
  const auto grouped = [](int rank) {
    return build::file()
        .add(prefix + "c.lora_A.weight", {rank, 1, 1})
        .add(prefix + "c.lora_B.weight", {rank, 1, 1});
  };
  file_refused(config("", "8000"), grouped(8000),
               {"c.lora_B.weight", "64 MiB", "8000 blocks", "8000 x 1 * 8000"});
  CHECK(assemble(config("", "1024"), grouped(1024)).at("c").groups() == 1024);
  const auto blocks = build::file()
                          .add(prefix + "m.lora_A.weight", {8000, 1})
                          .add(prefix + "m.lora_B.weight", {1, 8000});
  file_refused(config(R"("use_bdlora":{"nblocks":8000,"target_modules_bd_a":["m"]})", "8000"),
               blocks, {"m.lora_A.weight", "64 MiB"});
}
