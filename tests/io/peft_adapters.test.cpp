// SPDX-License-Identifier: Apache-2.0
//
// Directories of every kind as an adapter_set: in the format that is stored, every tensor used or
// named, what PEFT refuses refused, and written again bit for bit.
#include "lora/io/peft_adapters.hpp"

#include <cstddef>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "io/build.hpp"
#include "lora/apply.hpp"
#include "lora/forward.hpp"
#include "lora/io/peft_write_adapters.hpp"
#include "lora/linear.hpp"
#include "support/bits.hpp"
#include "support/catch.hpp"
#include "support/refused.hpp"

namespace {

namespace peft = lora::peft;
using build::refused;
using lora::index_t;
const std::string prefix = "base_model.model.";

/// A directory with these two files.
struct adapter {
  build::directory dir;
  adapter(const std::string& config, const build::file& tensors) {
    dir.write("adapter_config.json", config);
    dir.write("adapter_model.safetensors", tensors.text());
  }
  lora::adapter_set read(const peft::read_options& options = {}) const {
    return peft::adapters(dir.path(), options);
  }
};
lora::adapter_set read(const std::string& config, const build::file& tensors,
                       const peft::read_options& options = {}) {
  return adapter(config, tensors).read(options);
}
void file_refused(const std::string& config, const build::file& tensors,
                  std::initializer_list<std::string_view> parts) {
  const adapter a(config, tensors);
  refused([&] { (void)a.read(); }, parts);
}
std::string config(const std::string& type, const std::string& more = "") {
  return R"({"peft_type":")" + type + R"(","target_modules":["m","n"])" +
         (more.empty() ? "" : "," + more) + "}";
}
const std::string ranked = R"("r":2,"alpha":3)";
const std::string adalora = R"("init_r":4,"lora_alpha":9,"total_step":10)";
const std::string oft = R"("oft_block_size":3,"peft_version":"0.21.2")";

/// Of a 6 x 4 layer.
build::file loha(const std::string& module = "m", build::file into = {}) {
  const std::string m = prefix + module;
  return into.add(m + ".hada_w1_a", {6, 2}, 0.5F)
      .add(m + ".hada_w1_b", {2, 4}, 0.25F)
      .add(m + ".hada_w2_a", {6, 2}, 0.125F)
      .add(m + ".hada_w2_b", {2, 4});
}
build::file lokr(const std::string& module = "m", build::file into = {}) {
  const std::string m = prefix + module;
  return into.add(m + ".lokr_w1", {2, 2})
      .add(m + ".lokr_w2_a", {3, 2}, 0.5F)
      .add(m + ".lokr_w2_b", {2, 2});
}
build::file svd(int rank, const std::string& module = "m", build::file into = {}) {
  const std::string m = prefix + module;
  return into.add(m + ".lora_A", {rank, 4})
      .add(m + ".lora_B", {6, rank}, 0.5F)
      .add(m + ".lora_E", {rank, 1}, 0.25F);
}
build::file blocks(int count, int packed = 3) {
  return build::file().add(prefix + "m.oft_R.weight", {count, packed}, 0.01F);
}

template <class T>
build::file in_format(const std::string& dtype) {
  const auto values = [](std::size_t n) { return std::vector<T>(n, T(1.5F)); };
  build::file f;
  f.add(prefix + "m.hada_w1_a", dtype, {6, 2}, values(12))
      .add(prefix + "m.hada_w1_b", dtype, {2, 4}, values(8));
  f.add(prefix + "m.hada_w2_a", dtype, {6, 2}, values(12))
      .add(prefix + "m.hada_w2_b", dtype, {2, 4}, values(8));
  return f;
}
template <class T>
void check_format(const std::string& dtype) {
  INFO(dtype);
  const lora::adapter_set set = read(config("LOHA", ranked), in_format<T>(dtype));
  CHECK(set.at("m").expert(0).get_if<lora::loha_adapter<T>>() != nullptr);
  CHECK(set.at("m").holds_double() == std::is_same_v<T, double>);
  const auto f = [&](int rows, int cols, T value) {
    return std::vector<T>(static_cast<std::size_t>(rows * cols), value);
  };
  build::file lora;
  lora.add(prefix + "m.lora_A.weight", dtype, {2, 4}, f(2, 4, T(1.5F)));
  lora.add(prefix + "m.lora_B.weight", dtype, {3, 2}, f(3, 2, T(2.0F)));
  const lora::adapter_set of_lora = read(config("LORA", R"("r":2,"lora_alpha":3)"), lora);
  CHECK(of_lora.at("m").expert(0).get_if<peft::entry<T>>() != nullptr);
}

test::matrix<float> merged(const lora::module_adapter& l, index_t rows = 6, index_t cols = 4) {
  test::matrix<float> W = test::matrix<float>::Constant(rows, cols, 0.5F);
  lora::merge(W, l);
  return W;
}

}  // namespace

TEST_CASE("every module has its kind, target and origin") {
  const adapter a(config("LOHA", ranked), loha("m", loha("n")));
  const auto set = a.read();
  REQUIRE(set.size() == 2);
  const auto& m = set.at("m");
  CHECK(m.kind() == "LOHA");
  CHECK(m.target().module == "m");
  CHECK(m.target().weight == "m.weight");
  CHECK(m.target().bias == "m.bias");
  CHECK(m.origin() ==
        (a.dir.path() / "adapter_model.safetensors").string() + ": base_model.model.m");
  CHECK(m.out_features() == 6);
  CHECK(m.in_features() == 4);
  CHECK(set.replaced().empty());
}

TEST_CASE("values stay in the format that is stored") {
  check_format<float>("F32");
  check_format<double>("F64");
  check_format<lora::float16>("F16");
  check_format<lora::bfloat16>("BF16");
  // Of several formats, the one that holds all.
  auto mixed = in_format<lora::bfloat16>("BF16");
  mixed.add(prefix + "n.hada_w1_a", "BF16", {1, 2},
            std::vector<lora::bfloat16>(2, lora::bfloat16(1.0F)));
  mixed.add(prefix + "n.hada_w1_b", "F16", {2, 1},
            std::vector<lora::float16>(2, lora::float16(1.0F)));
  mixed.add(prefix + "n.hada_w2_a", {1, 2}).add(prefix + "n.hada_w2_b", {2, 1});
  const auto set = read(config("LOHA", ranked), mixed);
  CHECK(set.at("m").expert(0).get_if<lora::loha_adapter<lora::bfloat16>>() != nullptr);
  CHECK(set.at("n").expert(0).get_if<lora::loha_adapter<float>>() != nullptr);
}

TEST_CASE("a LORA shares its factors, and says what is a DORA") {
  build::file f;
  f.add(prefix + "m.lora_A.weight", {2, 4}).add(prefix + "m.lora_B.weight", {3, 2});
  const auto set = read(config("LORA", R"("r":2,"lora_alpha":3)"), f);
  const auto* e = set.at("m").expert(0).get_if<peft::entry<float>>();
  REQUIRE(e != nullptr);
  const auto steps = set.at("m").steps<float>({.operation = "merge"});
  REQUIRE(steps.size() == 1);
  std::get<lora::low_rank_step>(steps[0]).factors.visit([&](const auto& l) {
    CHECK(static_cast<const void*>(l.lora_A().data()) ==
          static_cast<const void*>(e->factors().lora_A().data()));
  });
  f.add(prefix + "m.lora_magnitude_vector", {3});
  CHECK(read(config("LORA", R"("r":2,"lora_alpha":3,"use_dora":true)"), f).at("m").kind() ==
        "DORA");
}

TEST_CASE("experts of a stack keep their factors once") {
  build::file f;
  f.add(prefix + "x.lora_A.weight", {4, 3}).add(prefix + "x.lora_B.weight", {5, 4}, 0.25F);
  const auto set = read(
      R"({"peft_type":"LORA","r":2,"lora_alpha":3,"target_parameters":["x.w"],"peft_version":"0.21.2"})",
      f);
  const auto& l = set.at("x.w");
  CHECK(l.experts() == 2);
  CHECK(l.target().weight == "x.w");
  std::vector<float> values(2 * 5 * 3, 0.5F), by_entry = values;
  const build::directory dir;
  lora::merge(lora::tensor_view<float, 3>(values, {2, 5, 3}), l);
  const auto content = build::to_bytes(f.text());
  const auto file = peft::assemble(
      peft::parse_config(
          R"({"peft_type":"LORA","r":2,"lora_alpha":3,"target_parameters":["x.w"],"peft_version":"0.21.2"})",
          "c"),
      lora::safetensors::parse(content, "t"));
  lora::merge(lora::tensor_view<float, 3>(by_entry, {2, 5, 3}), file.at("x.w"));
  CHECK(values == by_entry);
}

TEST_CASE("r and alpha of a module are those of the patterns") {
  const auto set = read(
      config("LOHA", R"("r":8,"alpha":3,"rank_pattern":{"m":2},"alpha_pattern":{"m":5})"), loha());
  CHECK(set.at("m").expert(0).get_if<lora::loha_adapter<float>>()->scaling() == 2.5);
  file_refused(config("LOHA", R"("r":8,"alpha":3)"), loha(),
               {"hada_w1_b", "rank", "8", "F32 [2, 4]"});
}

TEST_CASE("a tensor that is unknown, missing or misshapen is named") {
  const auto c = config("LOHA", ranked);
  file_refused(c, loha().add(prefix + "m.hada_w3_a", {2, 2}),
               {"m.hada_w3_a", "LOHA", ".hada_w1_a"});
  file_refused(c, loha().add(prefix + "m.hada_t1", {2, 2, 3, 3}), {"hada_t1", "both"});
  file_refused(
      c, build::file().add(prefix + "m.hada_w1_a", {6, 2}).add(prefix + "m.hada_w1_b", {2, 4}),
      {"m.hada_w1_a", "m.hada_w2_", "incomplete"});
  build::file other;
  other.add(prefix + "m.hada_w1_a", {6, 2}).add(prefix + "m.hada_w1_b", {2, 4});
  other.add(prefix + "m.hada_w2_a", {5, 2}).add(prefix + "m.hada_w2_b", {2, 4});
  file_refused(c, other, {"hada_w2_a", "the same outputs"});
  file_refused(c, build::file(), {"LOHA", "no tensor at all"});
  file_refused(c, lokr(), {"lokr_w1", "LOHA"});
  file_refused(c, loha("x"), {"target_modules", "selects none"});
  file_refused(c, loha("x", loha()), {"x.hada_w1_a", "lenient"});
  CHECK(read(c, loha("x", loha()), {.lenient = true}).notes().size() == 1);
  CHECK(read(c, loha("x", loha()), {.select_by_tensors = true}).size() == 2);
  file_refused(c, loha("m", build::file().add("n.hada_w1_a", {6, 2})),
               {"prefix base_model.model."});
  file_refused(c, loha("_orig_mod.m"), {"_orig_mod", "torch.compile", "wrapper_names::strip"});
  CHECK(read(c, loha("_orig_mod.m"), {.wrappers = peft::wrapper_names::strip}).contains("m"));
  file_refused(c, build::file().add(prefix + "m.hada_w1_a", "I32", {6, 2}, std::vector<int>(12)),
               {"hada_", "incomplete"});
  build::file integers = lokr();
  integers.add(prefix + "n.lokr_w1", "I32", {1, 1}, std::vector<int>(1))
      .add(prefix + "n.lokr_w2", {1, 1});
  file_refused(config("LOKR", ranked), integers, {"n.lokr_w1", "F64, F32, F16 or BF16"});
}

TEST_CASE("a wrong config is refused by its key") {
  file_refused(config("LOHA", R"("r":0,"alpha":3)"), loha(), {"\"r\"", "above 0"});
  file_refused(config("LOHA", R"("r":2,"alpha":"x")"), loha(), {"\"alpha\"", "finite"});
  file_refused(config("LOHA", R"("r":2,"alpha":3,"strange":1)"), loha(),
               {"strange", "ignore_keys"});
  file_refused(config("BOFT"), loha(), {"peft_type", "BOFT", "LOHA", "LORA"});
  file_refused(config("IA3", R"("feedforward_modules":1)"),
               build::file().add(prefix + "m.ia3_l", {6, 1}), {"feedforward_modules"});
  refused([] { (void)peft::parse_config(config("LOHA"), "c"); },
          {"peft_type", "LOHA", "lora::peft::adapters"});
}

TEST_CASE("LoKr in its forms") {
  const auto c = config("LOKR", ranked);
  CHECK(read(c, lokr()).at("m").out_features() == 6);
  build::file both;
  both.add(prefix + "m.lokr_w1_a", {3, 2})
      .add(prefix + "m.lokr_w1_b", {2, 2})
      .add(prefix + "m.lokr_w2", {2, 2, 3, 3});
  const auto set = read(c, both);
  CHECK(set.at("m").out_features() == 6);
  CHECK(set.at("m").in_features() == 2 * 2 * 9);
  file_refused(c, lokr().add(prefix + "m.lokr_w2", {3, 2}),
               {"lokr_w2_a", "or its factors", "both"});
  file_refused(c,
               build::file().add(prefix + "m.lokr_w1", {2, 2}).add(prefix + "m.lokr_w2", {3, 2, 5}),
               {"lokr_w2", "Conv1d", "Kronecker"});
  file_refused(c, build::file().add(prefix + "m.lokr_w1", {2, 2}), {"lokr_w2_a", "incomplete"});
}

TEST_CASE("(IA)^3 multiplies outputs or inputs, of a layer of any other size") {
  const auto outputs = read(config("IA3", R"("feedforward_modules":["n"])"),
                            build::file().add(prefix + "m.ia3_l", {6, 1}));
  const auto& m = outputs.at("m");
  CHECK(m.out_features() == 6);
  CHECK(m.in_features() == 0);
  for (const index_t in : {index_t{4}, index_t{9}}) CHECK(merged(m, 6, in)(2, 1) == 1.5F);
  CHECK(test::mentions(test::refusal<lora::shape_error>([&] { (void)merged(m, 5, 4); }),
                       {"6 outputs", "has 5"}));
  const test::matrix<float> W = test::matrix<float>::Constant(6, 4, 0.5F);
  lora::linear<float> layer(W);
  layer.attach("a", m);
  layer.merge("a");
  CHECK(lora::merged(W, m)(5, 0) == 3.0F);

  const auto ff = config("IA3", R"("feedforward_modules":["m"])");
  const auto inputs = read(ff, build::file().add(prefix + "m.ia3_l", {1, 4}));
  CHECK(merged(inputs.at("m"), 7, 4)(6, 2) == 1.5F);
  const auto turned =
      read(ff, build::file().add(prefix + "m.ia3_l", {1, 4}), {.fan_in_fan_out = true});
  CHECK(merged(turned.at("m"), 4, 7)(2, 6) == 1.5F);
  CHECK(read(config("IA3"), build::file().add(prefix + "m.ia3_l", {1, 4})).size() == 1);
  CHECK(read(config("IA3", R"("feedforward_modules":"m|n")"),
             build::file().add(prefix + "m.ia3_l", {1, 4}))
            .size() == 1);

  file_refused(ff, build::file().add(prefix + "m.ia3_l", {4, 1}),
               {"m.ia3_l", "[1, in]", "feedforward_modules"});
  file_refused(config("IA3", R"("feedforward_modules":[])"),
               build::file().add(prefix + "m.ia3_l", {1, 4}), {"m.ia3_l", "[out, 1]"});
  file_refused(config("IA3"), build::file().add(prefix + "m.ia3_l", {1, 1}),
               {"feedforward_modules", "null"});
  file_refused(config("IA3"), build::file().add(prefix + "m.ia3_l", {4}), {"m.ia3_l", "F32 [4]"});
  file_refused(ff, build::file().add(prefix + "m.ia3_l", {1, 4, 1, 1}), {"convolution"});
  const auto conv = read(config("IA3", R"("feedforward_modules":[])"),
                         build::file().add(prefix + "m.ia3_l", {1, 6, 1, 1}));
  CHECK(merged(conv.at("m"), 6, 27)(5, 26) == 3.0F);
}

TEST_CASE("AdaLoRA divides by init_r, whatever rank is left") {
  const auto whole = read(config("ADALORA", adalora), svd(4));
  const auto* l = whole.at("m").expert(0).get_if<lora::adalora_adapter<float>>();
  REQUIRE(l != nullptr);
  CHECK(l->factors().scaling() == 9 / (4 + 1e-5));
  const std::string mask =
      R"(,"rank_pattern":{"m.lora_E":[true,false,true,false],"n.lora_E":[false,false,false,false]})";
  build::file pruned = svd(2);
  pruned.add(prefix + "n.lora_A", {0, 4})
      .add(prefix + "n.lora_B", {6, 0})
      .add(prefix + "n.lora_E", {0, 1});
  const auto set = read(config("ADALORA", adalora + mask), pruned);
  l = set.at("m").expert(0).get_if<lora::adalora_adapter<float>>();
  REQUIRE(l != nullptr);
  CHECK(l->rank() == 2);
  CHECK(l->factors().scaling() == 9 / (4 + 1e-5));
  CHECK(merged(set.at("n")) == test::matrix<float>::Constant(6, 4, 0.5F));
  const auto turned = read(config("ADALORA", adalora), svd(4), {.fan_in_fan_out = true});
  CHECK(merged(turned.at("m"), 4, 6) == merged(whole.at("m")).transpose());

  file_refused(config("ADALORA", adalora), svd(2), {"m.lora_A", "4", "init_r"});
  file_refused(config("ADALORA", adalora + R"(,"rank_pattern":{"m.lora_E":[true,false]})"), svd(1),
               {"rank_pattern", "4 values", "2 values"});
  file_refused(config("ADALORA", adalora + R"(,"rank_pattern":{"m.lora_E":[1,0,0,0]})"), svd(1),
               {"rank_pattern"});
  file_refused(config("ADALORA", adalora + R"(,"use_dora":true)"), svd(4),
               {"use_dora", "PEFT refuses it"});
  build::file conv;
  conv.add(prefix + "m.lora_A", {4, 4, 3, 3})
      .add(prefix + "m.lora_B", {6, 4})
      .add(prefix + "m.lora_E", {4, 1});
  file_refused(config("ADALORA", adalora), conv, {"m.lora_A", "convolution"});
}

TEST_CASE("OFT by blocks, by one shared block, and what PEFT refuses") {
  const auto two = read(config("OFT", oft), blocks(2));
  CHECK(two.at("m").in_features() == 6);
  CHECK(two.at("m").out_features() == 0);
  CHECK(merged(two.at("m"), 5, 6).rows() == 5);
  CHECK(test::mentions(test::refusal<lora::shape_error>([&] { (void)merged(two.at("m"), 5, 9); }),
                       {"6 inputs", "has 9"}));
  const auto cayley =
      read(config("OFT", oft + R"(,"use_cayley_neumann":false,"coft":true,"eps":0.5)"), blocks(2));
  const auto* open = cayley.at("m").expert(0).get_if<peft::open_kind<lora::oft_adapter<float>>>();
  REQUIRE(open != nullptr);
  CHECK(open->kind().settings().rotation == lora::oft_rotation::cayley);
  CHECK(open->kind().settings().coft_eps == 0.5);

  const auto shared = read(config("OFT", oft + R"(,"block_share":true)"), blocks(1));
  for (const index_t in : {index_t{3}, index_t{9}}) {
    const auto W = merged(shared.at("m"), 2, in);
    for (index_t j = 3; j < in; ++j) CHECK(W(0, j) == W(0, j - 3));
    CHECK(W(0, 0) != 0.5F);
    test::col_matrix<float> x = test::col_matrix<float>::Ones(in, 1), y(2, 1);
    lora::forward(test::matrix<float>::Constant(2, in, 0.5F).eval(), x, y, shared.at("m"));
    CHECK(std::abs(y(0, 0) - W.row(0).sum()) < 1e-5F);
  }
  CHECK(
      test::mentions(test::refusal<lora::shape_error>([&] { (void)merged(shared.at("m"), 2, 4); }),
                     {"do not divide"}));

  const std::string other = R"("peft_version":"0.21.2")";
  file_refused(config("OFT", R"("r":2)"), blocks(2), {"oft_block_size", "0.14"});
  file_refused(config("OFT", oft + R"(,"r":2)"), blocks(2), {"oft_block_size", "r 2"});
  file_refused(config("OFT", R"("oft_block_size":3,"peft_version":"0.17.1")"), blocks(2),
               {"use_cayley_neumann", "0.17.1"});
  file_refused(config("OFT", oft + R"(,"num_cayley_neumann_terms":0)"), blocks(2),
               {"num_cayley_neumann_terms"});
  file_refused(config("OFT", oft + R"(,"fan_in_fan_out":true)"), blocks(2), {"fan_in_fan_out"});
  file_refused(config("OFT", oft), blocks(2, 4), {"oft_R.weight", "b (b - 1) / 2"});
  file_refused(config("OFT", R"("oft_block_size":2,"peft_version":"0.21.2")"), blocks(2),
               {"oft_block_size = 2", "2 blocks of 3"});
  file_refused(config("OFT", oft + R"(,"block_share":true)"), blocks(2),
               {"oft_R.weight", "block_share"});
  // PEFT takes the nearest size that divides the inputs.
  CHECK(read(config("OFT", R"("oft_block_size":4,"peft_version":"0.21.2")"), blocks(2)).size() ==
        1);
  CHECK(read(config("OFT", R"("oft_block_size":0,"r":2,"peft_version":"0.21.2")"), blocks(2))
            .size() == 1);
}

TEST_CASE("VeRA by two matrices that all modules share") {
  const auto tensors = [](const std::string& module = "m") {
    build::file f;
    f.add(prefix + "n.vera_lambda_b", {3}).add(prefix + "n.vera_lambda_d", {2}, 0.5F);
    f.add(prefix + module + ".vera_lambda_b", {6})
        .add(prefix + module + ".vera_lambda_d", {2}, 0.5F);
    return f.add("base_model.vera_A", {2, 5}, 0.25F).add("base_model.vera_B", {6, 2}, 0.125F);
  };
  const auto set = read(config("VERA", R"("r":2)"), tensors());
  const auto vera = [&](const std::string& name) {
    return set.at(name).expert(0).get_if<peft::open_vera<float>>()->widest();
  };
  CHECK(vera("m").A() == vera("n").A());
  CHECK(vera("m").B() == vera("n").B());
  CHECK(merged(set.at("n"), 3, 4)(0, 0) == 0.5F + 0.125F * (0.5F * 0.25F) + 0.25F * (1.0F * 1.5F));
  CHECK(test::mentions(test::refusal<lora::shape_error>([&] { (void)merged(set.at("n"), 3, 6); }),
                       {"3x6", "at most 5"}));
  const build::directory dir;
  peft::write_adapters(dir.path(), set);
  CHECK(merged(peft::adapters(dir.path()).at("m"), 6, 4) == merged(set.at("m"), 6, 4));

  build::file alone;
  alone.add(prefix + "m.vera_lambda_b", {6}).add(prefix + "m.vera_lambda_d", {2});
  file_refused(config("VERA", R"("r":2)"), alone, {"base_model.vera_A", "random numbers"});
  file_refused(config("VERA", R"("r":2,"save_projection":false)"), tensors(),
               {"save_projection", "random numbers"});
  file_refused(config("VERA", R"("r":3)"), tensors(), {"vera_A", "r", "3"});
}

TEST_CASE("what replaces tensors of the base is in the set, and not left out in silence") {
  auto f = loha();
  f.add(prefix + "head.weight", "BF16", {2, 2},
        std::vector<lora::bfloat16>(4, lora::bfloat16(3.0F)));
  file_refused(config("LOHA", ranked), f, {"head.weight", "lenient"});
  const auto set = read(config("LOHA", ranked + R"(,"modules_to_save":["head"])"), f);
  REQUIRE(set.replaced().size() == 1);
  const auto& t = set.replaced().front();
  CHECK(t.name == "head.weight");
  CHECK(t.shape == std::vector<index_t>{2, 2});
  REQUIRE(std::holds_alternative<std::vector<lora::bfloat16>>(t.values));
  CHECK(static_cast<float>(std::get<std::vector<lora::bfloat16>>(t.values)[3]) == 3.0F);
  std::map<std::string, test::matrix<float>> weights{{"m.weight", test::matrix<float>::Zero(6, 4)}};
  CHECK(test::mentions(test::refusal<lora::value_error>([&] { lora::merge(weights, set); }),
                       {"head.weight", "replaced()", "adapters_alone()"}));
  lora::merge(weights, set.adapters_alone());
  CHECK(weights.at("m.weight").norm() > 0);
  CHECK(read(config("LOHA", ranked + R"(,"modules_to_save":["head"])"), f,
             {.leave_out_saved_modules = true})
            .notes()
            .size() == 1);
  CHECK(set.renamed([](const std::string& name) { return "x." + name; }).replaced().front().name ==
        "x.head.weight");

  auto biases = blocks(2);
  biases.add(prefix + "m.base_layer.bias", {5});
  const auto with_bias = read(config("OFT", oft + R"(,"bias":"oft_only")"), biases);
  REQUIRE(with_bias.replaced().size() == 1);
  CHECK(with_bias.replaced().front().name == "m.bias");
  file_refused(config("OFT", oft), biases, {"m.base_layer.bias"});

  build::file lora;
  lora.add(prefix + "m.lora_A.weight", {2, 4}).add(prefix + "m.lora_B.weight", {3, 2});
  lora.add(prefix + "head.weight", {2, 2})
      .add(prefix + "e.token_adapter.trainable_tokens_delta", {1, 3});
  const auto of_lora = read(
      config(
          "LORA",
          R"("r":2,"lora_alpha":3,"modules_to_save":["head"],"trainable_token_indices":{"e":[7]})"),
      lora);
  CHECK(of_lora.replaced().size() == 1);
  REQUIRE(of_lora.rows().size() == 1);
  CHECK(of_lora.rows().front().embedding == "e");
  CHECK(of_lora.rows().front().ids == std::vector<index_t>{7});
  CHECK(of_lora.rows().front().features == 3);
}

TEST_CASE("a set is written and read again bit for bit") {
  auto cores = build::file();
  const std::string m = prefix + "m";
  cores.add(m + ".hada_w1_a", {2, 6})
      .add(m + ".hada_w1_b", {2, 3})
      .add(m + ".hada_t1", {2, 2, 3, 1});
  cores.add(m + ".hada_w2_a", {2, 6})
      .add(m + ".hada_w2_b", {2, 3})
      .add(m + ".hada_t2", {2, 2, 3, 1});
  build::file patterns = loha();
  patterns.add(prefix + "n.hada_w1_a", {6, 1}).add(prefix + "n.hada_w1_b", {1, 4});
  patterns.add(prefix + "n.hada_w2_a", {6, 1}).add(prefix + "n.hada_w2_b", {1, 4});
  build::file factors;
  factors.add(m + ".ia3_l", {6, 1}).add(prefix + "n.ia3_l", {1, 4});
  const std::vector<std::pair<std::string, build::file>> all{
      {config("LOHA", ranked), loha("m", loha("n"))},
      {config("LOHA", ranked + R"(,"rank_pattern":{"n":1},"alpha_pattern":{"n":0.1})"), patterns},
      {config("LOHA", ranked), cores},
      {config("LOHA", ranked), in_format<lora::bfloat16>("BF16")},
      {config("LOKR", ranked), lokr("m", lokr("n"))},
      {config("IA3", R"("feedforward_modules":["n"])"), factors},
      {config("IA3", R"("feedforward_modules":["n"],"fan_in_fan_out":true)"), factors},
      {config("OFT", oft), blocks(2)},
      {config("OFT", oft + R"(,"block_share":true,"coft":true,"eps":0.1)"), blocks(1)},
      {config("OFT", oft + R"(,"use_cayley_neumann":false)"), blocks(2)},
      {config("ADALORA", adalora), svd(4, "m", svd(4, "n"))},
  };
  for (const auto& [text, tensors] : all) {
    INFO(text);
    const adapter first(text, tensors);
    const auto set = first.read();
    const build::directory dir, again;
    peft::write_adapters(dir.path(), set);
    const auto read = peft::adapters(dir.path());
    REQUIRE(read.size() == set.size());
    for (const auto& [name, l] : set) {
      const auto a = peft::adapters_detail::encoded(l),
                 b = peft::adapters_detail::encoded(read.at(name));
      CHECK(peft::adapters_detail::same_parts(a.parts, b.parts));
      CHECK(read.at(name).kind() == l.kind());
    }
    peft::write_adapters(again.path(), read);
    for (const char* name : {"adapter_config.json", "adapter_model.safetensors"})
      CHECK(build::slurp(dir.path() / name) == build::slurp(again.path() / name));
    // Each tensor of the file is there with its bytes.
    const auto before = lora::safetensors::read(first.dir.path() / "adapter_model.safetensors");
    const auto after = lora::safetensors::read(dir.path() / "adapter_model.safetensors");
    CHECK(before.size() == after.size());
    for (const auto& t : before) {
      CHECK(after.at(t.name).shape == t.shape);
      CHECK(std::equal(t.bytes.begin(), t.bytes.end(), after.at(t.name).bytes.begin(),
                       after.at(t.name).bytes.end()));
    }
  }
}

TEST_CASE("what a config cannot say of a set is not written") {
  const build::directory dir;
  const auto refusal = [&](const lora::adapter_set& set) {
    return test::refusal<lora::value_error>([&] { peft::write_adapters(dir.path() / "out", set); });
  };
  CHECK(test::mentions(refusal({}), {"no adapter"}));
  build::file f;
  f.add(prefix + "m.lora_A.weight", {2, 4}).add(prefix + "m.lora_B.weight", {3, 2});
  CHECK(test::mentions(refusal(read(config("LORA", R"("r":2,"lora_alpha":3)"), f)),
                       {"\"m\"", "LORA", "peft::write"}));
  const auto one = read(config("LOHA", ranked), loha()),
             other = read(config("LOKR", ranked), lokr("n"));
  lora::adapter_set both;
  both.add(one.at("m"));
  both.add(other.at("n"));
  CHECK(test::mentions(refusal(both), {"\"n\"", "another kind"}));
  const auto cayley = read(config("OFT", oft + R"(,"use_cayley_neumann":false)"), blocks(2));
  lora::adapter_set rotations;
  rotations.add(cayley.at("m"));
  rotations.add(read(config("OFT", oft), blocks(2)).at("m").moved_to({"n"}));
  CHECK(test::mentions(refusal(rotations), {"\"n\"", "use_cayley_neumann", "one for all"}));
  // feedforward_modules are ends of names, also in the middle of a word.
  lora::adapter_set ends;
  const auto feedforward = config("IA3", R"("feedforward_modules":["m"])");
  ends.add(read(feedforward, build::file().add(prefix + "m.ia3_l", {1, 4})).at("m"));
  ends.add(read(config("IA3", R"("feedforward_modules":["x"])"),
                build::file().add(prefix + "n.ia3_l", {6, 1}))
               .at("n")
               .moved_to({"xm"}));
  CHECK(!refusal(ends).empty());
  lora::adapter_set saved = one;
  saved.add(lora::replaced_tensor{"head.weight", "", {1}, std::vector<float>{1}});
  CHECK(test::mentions(refusal(saved), {"head.weight", "adapters_alone"}));
  CHECK_FALSE(std::filesystem::exists(dir.path() / "out"));
}
