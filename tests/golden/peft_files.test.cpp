// SPDX-License-Identifier: Apache-2.0
//
// Files of PEFT and of others, as files: every adapter of golden/peft-0.21 and 0.6.1 is read and written back byte for byte;
// transformers with what their files hold; real adapters, and those that are refused.
#include "golden/peft_case.hpp"
#include "io/build.hpp"
#include "lora/io/peft_inventory.hpp"
#include "lora/io/peft_write.hpp"

namespace {

using namespace golden;  // NOLINT: a test
namespace fs = std::filesystem;
using build::slurp;

bool of_family(const std::string& id) {
  return !id.starts_with("other_") && !id.starts_with("combine_") && !id.starts_with("mixed_kinds_");
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

/// The same function: factors bit for bit and the same scaling.
template <class T>
void check_same(const peft::adapter_file<T>& a, const peft::adapter_file<T>& b) {
  REQUIRE(a.names() == b.names());
  for (const auto& [name, e] : a) {
    INFO(name);
    const auto& other = b.at(name);
    REQUIRE(e.experts() == other.experts());
    for (index_t k = 0; k < e.experts(); ++k) {
      CHECK(e.expert(k).lora_A() == other.expert(k).lora_A());
      CHECK(e.expert(k).lora_B() == other.expert(k).lora_B());
      CHECK(e.expert(k).scaling() == other.expert(k).scaling());
    }
    CHECK(same(e.lora_bias(), other.lora_bias()));
    CHECK(same(e.magnitude(), other.magnitude()));
    CHECK(same(e.parts().diagonal, other.parts().diagonal));
    CHECK(e.kind() == other.kind());
    CHECK(e.groups() == other.groups());
    CHECK(e.change() == other.change());
    CHECK(e.fan_in_fan_out() == other.fan_in_fan_out());
  }
  REQUIRE(a.replacements().size() == b.replacements().size());
  for (std::size_t k = 0; k < a.replacements().size(); ++k) {
    CHECK(a.replacements()[k].key == b.replacements()[k].key);
    CHECK(a.replacements()[k].bytes == b.replacements()[k].bytes);
  }
  REQUIRE(a.token_rows().size() == b.token_rows().size());
  for (const auto& [name, rows] : a.token_rows()) {
    CHECK(rows.ids() == b.token_rows().at(name).ids());
    CHECK(rows.values() == b.token_rows().at(name).values());
  }
}

/// Whether the tensors come out as PEFT wrote them, and the second writing is as the first.
template <class T>
void round_trip(const fs::path& from, const peft::read_options& options, bool from_peft = true) {
  const build::directory out;
  const auto file = peft::read<T>(from, options);
  peft::write(out.path(), file, {.durability = st::durability::process});
  // For peft_reload.py, which loads them into PEFT.
  if (const char* kept = std::getenv("LORA_WRITTEN"); kept != nullptr && from_peft)
    peft::write(fs::path(kept) / from.parent_path().filename() / from.filename(), file,
                {.durability = st::durability::process});
  const bool same_bytes = slurp(out.path() / "adapter_model.safetensors") == slurp(from / "adapter_model.safetensors");
  CHECK((same_bytes || !from_peft));
  auto plain = options;
  plain.fan_in_fan_out.reset();  // is in what was written
  const auto again = peft::read<T>(out.path(), plain);
  check_same(file, again);
  const build::directory twice;
  peft::write(twice.path(), again, {.durability = st::durability::process});
  for (const char* name : {"adapter_model.safetensors", "adapter_config.json"})
    CHECK((slurp(out.path() / name) == slurp(twice.path() / name)));
}

}  // namespace

TEST_CASE("golden: every adapter of PEFT is written back as it was read", "[golden][peft][write]") {
  std::size_t adapters = 0;
  for (const auto& folder : fs::directory_iterator(root())) {
    const std::string id = folder.path().filename();
    if (!folder.is_directory() || !of_family(id)) continue;
    const auto options = description(id).options();
    for (const auto& adapter : fs::directory_iterator(folder)) {
      if (!fs::exists(adapter.path() / "adapter_model.safetensors")) continue;
      INFO(adapter.path());
      if (id == "init_pissa_niter_8" && adapter.path().filename() == "unconverted") continue;  // refused, see peft_lora
      round_trip<float>(adapter.path(), options);
      round_trip<double>(adapter.path(), options);
      ++adapters;
    }
  }
  CHECK(adapters == 135);
}

TEST_CASE("what was left out is not lost in writing", "[peft][write]") {
  const build::directory out;
  const auto from = root() / "modules_to_save/a";
  CHECK_THROWS_AS(peft::write(out.path() / "new", peft::read(from, {.leave_out_saved_modules = true})), lora::value_error);
  CHECK_FALSE(fs::exists(out.path() / "new"));
  // A converted entry is plain; its file's config is not.
  const auto pissa = peft::read<double>(root() / "init_pissa/unconverted");
  const auto base = load_all<double>(root() / "init_pissa/base.safetensors");
  std::vector<peft::entry<double>> plain;
  peft::adapter_file<double>::entry_map map;
  for (const auto& [name, e] : pissa) {
    plain.push_back(plain_entry(base.at(e.weight_name()), e));
    map.emplace(name, plain.back());
  }
  CHECK_THROWS_AS(peft::write(out.path() / "new", peft::adapter_file<double>(pissa.config(), map)), lora::value_error);
  peft::write(out.path() / "new", peft::make_file<double>(plain));
  const auto again = peft::read<double>(out.path() / "new");
  CHECK(again.at("l0").scaling() == pissa.at("l0").scaling());
  CHECK(again.at("l0").rank() == 2 * pissa.at("l0").rank());
}

TEST_CASE("an inventory names everything that a file holds", "[peft][inventory]") {
  const auto sift = peft::inventory_of(peft::read(fs::path(LORA_OUTSIDE_DIR) / "adapters/sift-opf-zh"));
  REQUIRE(sift.modules.size() == 32);
  CHECK(sift.norm == Approx(6.63313578).epsilon(1e-8));
  CHECK(sift.replaced == std::vector<std::string>{"score.bias", "score.weight"});
  CHECK(sift.not_used.empty());
  const auto& q = *std::find_if(sift.modules.begin(), sift.modules.end(), [](const auto& row) {
    return row.module.find("layers.0") != std::string::npos && row.module.ends_with("q_proj");
  });
  CHECK(q.norm == Approx(0.984632082).epsilon(1e-8));
  CHECK(q.rank == 16);
  CHECK(q.scaling == 2.0);
  CHECK(q.dtype == "F32");
  CHECK(q.kind == peft::entry_kind::linear);
  CHECK(build::has(sift.text(), "replaces  score.bias"));
  const auto biases = peft::inventory_of(peft::read(root() / "modules_to_save_bias_all/a"));
  CHECK(biases.replaced == std::vector<std::string>{"lin0.bias", "lin1.bias", "score.bias", "score.weight"});
  CHECK(biases.not_used.size() == 2);
  const auto left = peft::inventory_of(peft::read(root() / "modules_to_save/a", {.leave_out_saved_modules = true}));
  CHECK(left.not_used.size() == 2);
  const auto tokens = peft::inventory_of(peft::read(root() / "trainable_tokens/a"));
  CHECK(tokens.replaced == std::vector<std::string>{"embed.weight, 3 rows"});
}

// ---- other projects' files

TEST_CASE("outside: every adapter of adapters/ is read or refused for its reason", "[outside][peft]") {
  const fs::path folder = fs::path(LORA_OUTSIDE_DIR) / "adapters";
  CHECK(peft::read(folder / "sift-opf-zh").replacements().size() == 2);
  const auto gradience = peft::inventory_of(peft::read(folder / "gradience-tiny-lora", {.fan_in_fan_out = true}));
  CHECK(gradience.norm == Approx(212.209005).epsilon(1e-8));
  const auto refused = [](const fs::path& tensors, std::initializer_list<std::string_view> parts) {
    const auto config = peft::parse_config(R"({"peft_type":"LORA","r":4,"lora_alpha":4})", "adapter_config.json");
    build::refused([&] { (void)peft::assemble(config, st::read(tensors)); }, parts);
  };
  std::size_t files = 0;
  for (const auto& each : fs::recursive_directory_iterator(folder)) {
    if (each.path().extension() != ".safetensors") continue;
    ++files;
    const std::string name = each.path().parent_path().filename();
    if (name == "lycoris-lokr") refused(each.path(), {"lokr_", "LoKr"});
    if (name == "diffusers-sd-pokemon") refused(each.path(), {".lora.", "diffusers"});
    if (name == "mlx-lm-dpo") refused(each.path(), {"lora_a", "MLX"});
    if (name == "sam-lora") refused(each.path(), {"w_a_000", "not a file that PEFT wrote"});
    if (name == "cloneofsimo-lora") refused(each.path(), {"<s1>", "not a file that PEFT wrote"});
  }
  CHECK(files == 8);
  build::refused([&] { (void)peft::read(folder / "mlx-lm-dpo"); }, {"adapter_config.json"});
}

TEST_CASE("outside: PEFT's configs parse, other kinds are refused by their type", "[outside][peft]") {
  const fs::path configs = fs::path(LORA_OUTSIDE_DIR) / "configs";
  const auto dora = peft::read_config(configs / "llama-3.2-3B-rank32-dora/adapter_config.json");
  CHECK(dora.use_dora);
  CHECK(peft::read_config(configs / "llama-3.2-3B-rank64-rslora/adapter_config.json").rule ==
        lora::scaling_rule::rank_stabilized);
  const auto bd = peft::read_config(configs / "llama-3.2-3B-rank14-target-mlp-bdlora/adapter_config.json");
  REQUIRE(bd.bd);
  CHECK(bd.bd->blocks == 2);
  CHECK(peft::read_config(configs / "llama-3.2-3B-rank10-target-mlp/adapter_config.json").r == 10);
  for (const char* name : {"ia3_mlp", "ia3_conv2d"})
    build::refused([&] { (void)peft::read(fs::path(LORA_OUTSIDE_DIR) / "refuse" / name); }, {"peft_type", "IA3", "LORA"});
}

TEST_CASE("golden: PEFT 0.6.1 outputs", "[golden][peft]") {
  const fs::path folder = fs::path(LORA_OUTSIDE_DIR) / "golden/peft-0.6.1";
  const auto check = [&](const std::string& id, const json& graph, double tolerance, bool image) {
    INFO(id);
    const auto io = st::read(folder / id / "golden_io.safetensors");
    description about(root() / "linear_mlp");
    about.text["graph"] = graph;
    const auto file = peft::read<double>(folder / id);
    auto x = load<double>(io, "input");
    if (image) x.shape = {2, 5, 3, 3};
    const auto want = load<double>(io, "output");
    for (const auto how : {way::mixed, way::merged}) {
      model<double> m(about, load_all<double>(folder / id / "base.safetensors"), {{&file, 1.0}}, how);
      auto y = m.run(x);
      for (index_t j = 0; j < y.columns().cols(); ++j) {
        auto column = y.columns().col(j);
        const double top = column.maxCoeff();
        column.array() -= top + std::log((column.array() - top).exp().sum());
      }
      CHECK(within(y, want, tolerance, 0));
    }
    round_trip<float>(folder / id, {}, false);
  };
  const auto linear = [](const char* module) { return json{{"op", "linear"}, {"module", module}}; };
  const json relu{{"op", "relu"}};
  const json mlp = json::array({linear("lin0"), relu, linear("lin1")});
  check("lora_mlp", mlp, 1e-5, false);
  check("lora_mlp_modules_to_save", mlp, 1e-5, false);
  check("lora_emb_conv1d",
        json::array({json{{"op", "embedding"}, {"module", "emb"}}, json{{"op", "conv1d_t"}, {"module", "conv1d"}}, relu,
                     json{{"op", "flatten"}}, linear("lin0")}),
        1e-6, false);
  check("lora_conv2d",
        json::array(
            {json{{"op", "conv2d"}, {"module", "conv2d"}, {"kernel", 3}}, relu, json{{"op", "flatten"}}, linear("lin0")}),
        2e-5, true);
  build::refused([&] { (void)peft::read(folder / "adalora_mlp"); }, {"peft_type", "ADALORA"});
}
