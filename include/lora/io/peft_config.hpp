// SPDX-License-Identifier: Apache-2.0
//
// adapter_config.json of Hugging Face PEFT: what it says about the arithmetic of a LoRA adapter, and which modules it
// names. Every key is handled, known to have no effect, or refused by name; docs/formats.md has the table.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "lora/io/detail/input_file.hpp"
#include "lora/io/detail/json_tree.hpp"
#include "lora/io/detail/module_path.hpp"
#include "lora/io/detail/module_pattern.hpp"
#include "lora/io/detail/name_tables.hpp"
#include "lora/io/format_error.hpp"
#include "lora/io/peft_patterns.hpp"
#include "lora/scaling.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {

/// target_modules or exclude_modules: nothing, one regular expression for the whole name, or names and ends of names.
struct module_selection {
  std::optional<std::string> expression = {};
  std::optional<std::vector<std::string>> names = {};

  /// As it stands in a message; long lists are shortened.
  std::string text() const {
    if (expression) return io_detail::in_quotes(*expression);
    return names ? "[" + io_detail::listed(*names) + "]" : "null";
  }
};

/// Which of the base's biases the adapter's file holds.
enum class trained_biases { none, all, lora_only };

/// What PEFT does to the base's weight when it loads the adapter. Only `none` leaves the stored factors the whole adapter;
/// the others are made plain with converted() (lora/io/peft_convert.hpp).
enum class base_change {
  none,
  pissa,  ///< its principal part is subtracted
  olora,  ///< the part of its first columns is subtracted
  kasa,   ///< its smallest components are dropped
};

/// BD-LoRA: the modules whose A or B is block-diagonal and stored as its blocks. Entries are parts of a module's last name.
struct block_diagonal {
  std::uint64_t blocks = 1;
  std::vector<std::string> in_A, in_B;
  bool strict = true;  ///< a module in neither list is an error
};

/// The order of lora_B's columns in a stack of E experts of rank r.
enum class expert_columns {
  rank_major,         ///< PEFT's: column k E + e
  grouped_by_expert,  ///< another writer's, said in lora_B_layout: column e r + k
};

/// What a config says of the stacks of one parameter.
struct expert_layout {
  std::optional<expert_columns> lora_B = {};
  std::optional<std::uint64_t> experts = {};
};

/// The config, with PEFT's defaults for keys that are absent.
struct config {
  std::string path;  ///< for messages
  /// Of a config in metadata that is one of several models': names of the file's tensors begin with it and a dot. Names of
  /// modules, patterns and targets are those behind it.
  std::string component = {};
  index_t r = 8;
  double lora_alpha = 8;
  scaling_rule rule = scaling_rule::standard;
  pattern_table<index_t> rank_pattern;
  pattern_table<double> alpha_pattern;
  bool fan_in_fan_out = false;
  module_selection target_modules, exclude_modules;
  std::vector<std::uint64_t> layers_to_transform;
  std::vector<std::string> layers_pattern;
  std::vector<std::string> modules_to_save;
  std::vector<std::string> target_parameters;
  trained_biases bias = trained_biases::none;
  bool use_dora = false, lora_bias = false, ensure_weight_tying = false;
  base_change change = base_change::none;
  std::optional<block_diagonal> bd;
  /// lora_B_layout and unsloth_fused_expert_lora, by the parameter's name or its last segments; under "" for all stacks.
  std::map<std::string, expert_layout, std::less<>> expert_layouts;
  /// [begin, end) of the base's layers, one behind the other.
  std::vector<std::pair<std::uint64_t, std::uint64_t>> layer_replication;
  /// Rows of embeddings by the module's name, or under "" for the input embedding.
  std::map<std::string, std::vector<index_t>> trainable_tokens;
  std::string task_type, base_model_name_or_path, revision, peft_version;
  std::string init_lora_weights = "true";
  /// Unknown keys that were ignored: their value is null, false or empty, or the caller listed them in ignore_keys.
  std::vector<std::string> ignored_keys;
  /// The keys as they were read, for writing them back; null for a config that was not read.
  std::shared_ptr<const io_detail::json_node> source;

  /// The rank and the scaling (alpha with its rule) of one module.
  index_t rank_of(std::string_view module) const { return rank_pattern.find(module).value_or(r); }
  lora::scaling scaling_of(std::string_view module) const {
    return {.alpha = alpha_pattern.find(module).value_or(lora_alpha), .rule = rule};
  }
  /// The modules that PEFT does not adapt because it saves them whole. The heads of SEQ_CLS are among them; those of other
  /// tasks PEFT adds after it has chosen what to adapt.
  std::vector<std::string> excluded_by_saving() const { return task_type == "SEQ_CLS" ? saved_modules() : modules_to_save; }
  /// The modules that PEFT saves whole: modules_to_save, and the heads that it adds for task_type.
  std::vector<std::string> saved_modules() const {
    auto result = modules_to_save;
    if (task_type == "SEQ_CLS" || task_type == "TOKEN_CLS") result.insert(result.end(), {"classifier", "score"});
    if (task_type == "QUESTION_ANS") result.emplace_back("qa_outputs");
    return result;
  }
};

/// How to read names that a training wrapper changed (_orig_mod., module., _fsdp_wrapped_module. ...).
enum class wrapper_names {
  refuse,  ///< an error that names the wrapper; with read_options::lenient as `strip`
  strip,   ///< read under the names without them
  keep,    ///< a base whose own modules are called so
};

/// What a caller knows beyond the files, and how strict to be.
struct read_options {
  /// Whether the base stores its weights as [in, out] (GPT-2's Conv1D). PEFT corrects this word of the config when it sees
  /// the base; a reader of files cannot, and a square weight takes a wrong one without a word.
  std::optional<bool> fan_in_fan_out = {};
  /// Config keys that this version does not know and the caller vouches for: they do not change the arithmetic.
  std::vector<std::string> ignore_keys = {};
  /// Read the adapters of a file that also holds whole modules (modules_to_save), and leave those out. They are listed by
  /// adapter_file::left_out(); without them the model is not the one that was trained.
  bool leave_out_saved_modules = false;
  /// Follow PEFT where it passes over things: unknown config keys, tensors that it would not use, a missing lora_B (which is
  /// zero then). adapter_file::ignored_keys() lists the keys and passed_over() the rest. A tensor under a base tensor's own
  /// name is none of these: PEFT loads it, and replacements() has it as `unasked`. What PEFT refuses, and what would be random,
  /// stays an error.
  bool lenient = false;
  /// Take every module that the file has an adapter for, whatever target_modules says. vLLM, diffusers and ComfyUI do so; PEFT
  /// adapts the modules of target_modules alone.
  bool select_by_tensors = false;
  wrapper_names wrappers = wrapper_names::refuse;
  /// target_parameters: the names of a module's parameters in the order in which the module registers them, for modules
  /// with more than one adapted parameter. Their names are not in the file, only their nesting, which follows that order. Where
  /// the file has fewer adapters than target_parameters names, list those that it has.
  std::vector<std::string> parameter_order = {};
  /// target_parameters: whether each slice of a stack takes the transpose of B A. It follows from the base and the writer:
  ///   written by PEFT      base [expert, out, in]    base [expert, in, out] (is_transposed)
  ///   0.19.1 and later     false                     true
  ///   0.19.0               true                      false
  ///   0.17, 0.18           true                      true
  /// Not said: false, as PEFT 0.21 reads every file; a square stack of a file before 0.19.1, or of no stated version, is refused.
  /// docs/formats.md says what expert(k) then is for mixing.
  std::optional<bool> parameters_in_out = {};
  /// target_parameters: whether the columns of a stack's lora_B are grouped by expert, for a file without lora_B_layout.
  std::optional<bool> experts_grouped_b = {};
  /// PEFT up to 0.21 adds the delta of an attention's out_proj twice, also while it trains. True: the same function, W + 2 D.
  bool attention_out_proj_twice = false;
};

/// Whether the config selects a module by name, as PEFT 0.21 decides it: not excluded, not in modules_to_save, named by
/// target_modules, and in one of layers_to_transform. Throws value_error where a name does not tell (target_modules null
/// without target_parameters, or "all-linear"), or a pattern is not supported. Compiles the config's patterns on each call.
bool matches_target(const config& c, std::string_view module);

namespace config_detail {

using io_detail::any_on_the_way;
using io_detail::in_quotes;
using io_detail::is_number;
using io_detail::json_kind;
using io_detail::json_node;

enum class meaning { handled, no_effect, refused, refused_also_empty };
struct known_key {
  std::string_view name;
  meaning what;
};
/// Keys of PEFT's LoraConfig up to 0.21, and three of its first versions and neighbours.
inline constexpr std::array known_keys = std::to_array<known_key>({
    {"peft_type", meaning::handled},
    {"r", meaning::handled},
    {"lora_alpha", meaning::handled},
    {"alpha", meaning::handled},
    {"use_rslora", meaning::handled},
    {"rank_pattern", meaning::handled},
    {"alpha_pattern", meaning::handled},
    {"fan_in_fan_out", meaning::handled},
    {"target_modules", meaning::handled},
    {"exclude_modules", meaning::handled},
    {"layers_to_transform", meaning::handled},
    {"layers_pattern", meaning::handled},
    {"modules_to_save", meaning::handled},
    {"bias", meaning::handled},
    {"init_lora_weights", meaning::handled},
    {"task_type", meaning::handled},
    {"base_model_name_or_path", meaning::handled},
    {"revision", meaning::handled},
    {"peft_version", meaning::handled},
    {"auto_mapping", meaning::no_effect},
    {"inference_mode", meaning::no_effect},
    {"lora_dropout", meaning::no_effect},
    {"megatron_config", meaning::no_effect},
    {"megatron_core", meaning::no_effect},
    {"loftq_config", meaning::no_effect},
    {"eva_config", meaning::no_effect},
    {"corda_config", meaning::no_effect},
    {"lora_ga_config", meaning::no_effect},
    {"velora_config", meaning::no_effect},
    {"monteclora_config", meaning::no_effect},
    {"qalora_group_size", meaning::no_effect},
    {"runtime_config", meaning::no_effect},
    {"merge_weights", meaning::no_effect},
    {"use_dora", meaning::handled},
    {"lora_bias", meaning::handled},
    {"use_qalora", meaning::refused},
    {"alora_invocation_tokens", meaning::refused},
    {"layer_replication", meaning::handled},
    {"target_parameters", meaning::handled},
    {"trainable_token_indices", meaning::handled},
    {"ensure_weight_tying", meaning::handled},
    {"enable_lora", meaning::refused},
    {"use_bdlora", meaning::handled},
    {"kasa_config", meaning::handled},
    {"lora_B_layout", meaning::handled},
    {"unsloth_fused_expert_lora", meaning::handled},
    {"arrow_config", meaning::refused_also_empty},
});

/// Why a variant is refused.
inline std::string reason_of(std::string_view key) {
  if (key == "alora_invocation_tokens")
    return "the adapter applies only from its invocation tokens on, so it is no change of a weight";
  if (key == "use_qalora")
    return "its lora_A takes means of groups of inputs beside a quantized base, which is not supported";
  if (key == "arrow_config") return "each token is routed over several adapters, so it is no change of a weight";
  return "this variant of LoRA is not supported";
}

/// Initializations that leave the base as it is, so that the stored factors are the whole adapter. pissa and olora change the
/// base in a way that can be computed again; the others depend on random numbers or data.
inline constexpr std::array<std::string_view, 6> harmless_inits{"true", "false", "gaussian", "eva", "orthogonal", "mica"};
inline constexpr std::array<std::string_view, 2> flag_inits{"true", "false"};
inline constexpr std::array<std::string_view, 2> computable_inits{"pissa", "olora"};
inline constexpr std::array<std::string_view, 3> random_inits{"corda", "loftq", "lora_ga"};
/// Those that PEFT compares in lower case.
inline constexpr std::array<std::string_view, 3> caseless_inits{"gaussian", "olora", "mica"};

inline std::string lower_case(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](char x) { return x >= 'A' && x <= 'Z' ? static_cast<char>(x - 'A' + 'a') : x; });
  return text;
}
template <class List>
bool is_in(const List& list, std::string_view name) {
  return std::find(list.begin(), list.end(), name) != list.end();
}

inline constexpr std::array<std::string_view, 6> task_types{"SEQ_CLS",   "SEQ_2_SEQ_LM", "CAUSAL_LM",
                                                            "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"};

/// From the tree to the config.
class reader {
 public:
  reader(const std::shared_ptr<const json_node>& root, const std::string& path, const read_options& options)
      : root_(*root), options_(options) {
    result_.path = path;
    result_.source = root;
  }

  config read() {
    if (root_.kind != json_kind::object) refuse(root_, "", "a JSON object", io_detail::json_kind_name(root_.kind), "");
    check_type();
    for (const auto& item : root_.items) check_key(item.key, item);
    read_numbers();
    read_patterns();
    read_modules();
    read_variants();
    read_texts();
    return std::move(result_);
  }

 private:
  // ---- which keys there are
  void check_type() {
    const auto* type = value_of("peft_type");
    if (type == nullptr)
      refuse(root_, "peft_type", "\"LORA\"", "none",
             value_of("lora_parameters") != nullptr ? "this is an MLX config, which is not read yet"
                                                    : "this is not the config of a PEFT adapter");
    if (type->kind != json_kind::string || type->string != "LORA")
      refuse(*type, "peft_type", "LORA, the only kind that is supported", type->text(),
             "adapters of other kinds are not low-rank factors; PEFT can convert some of them to LORA");
  }

  void check_key(const std::string& key, const json_node& value) {
    const auto known = std::find_if(known_keys.begin(), known_keys.end(), [&](const auto& k) { return k.name == key; });
    if (known == known_keys.end()) return check_unknown(key, value);
    const bool off = is_off(value);
    if (known->what == meaning::refused && !value.asks_for_nothing())
      refuse(value, key, "null or false", value.text(), reason_of(key));
    if (known->what == meaning::refused_also_empty && !off)
      refuse(value, key, "null or false", value.text(), reason_of(key));
  }

  void check_unknown(const std::string& key, const json_node& value) {
    if (!may_ignore(key, value))
      refuse(value, key, "a key that this version knows", value.text(),
             "if it does not change the arithmetic, name it in read_options::ignore_keys");
    result_.ignored_keys.push_back(key);
  }
  bool may_ignore(const std::string& key, const json_node& value) const {
    const auto& vouched = options_.ignore_keys;
    return options_.lenient || value.asks_for_nothing() || std::find(vouched.begin(), vouched.end(), key) != vouched.end();
  }

  // ---- what they say
  void read_numbers() {
    if (const auto* r = value_of("r")) result_.r = positive(*r, "r");
    const auto* alpha = value_of("lora_alpha");
    if (alpha != nullptr) result_.lora_alpha = finite(*alpha, "lora_alpha");
    // Some writers add `alpha`. PEFT ignores it, so it must not say anything else.
    if (const auto* other = value_of("alpha"); other != nullptr && other->kind != json_kind::null) {
      if (alpha == nullptr) refuse(*other, "alpha", "lora_alpha, which PEFT reads", "alpha alone", "rename the key");
      if (finite(*other, "alpha") != result_.lora_alpha)
        refuse(*other, "alpha", "the value of lora_alpha, or no such key", other->text(),
               "PEFT reads lora_alpha and ignores alpha: remove the wrong one");
    }
    if (flag("use_rslora")) result_.rule = scaling_rule::rank_stabilized;
    result_.fan_in_fan_out = options_.fan_in_fan_out.value_or(flag("fan_in_fan_out"));
  }

  void read_patterns() {
    each_pattern("rank_pattern", [&](const std::string& key, const json_node& value) {
      return result_.rank_pattern.try_add(key, positive(value, "rank_pattern"));
    });
    each_pattern("alpha_pattern", [&](const std::string& key, const json_node& value) {
      return result_.alpha_pattern.try_add(key, finite(value, "alpha_pattern"));
    });
  }

  template <class Add>
  void each_pattern(const char* name, const Add& add) {
    const auto* table = value_of(name);
    if (table == nullptr || table->kind == json_kind::null) return;
    if (table->kind != json_kind::object)
      refuse(*table, name, "an object of patterns", io_detail::json_kind_name(table->kind), "");
    for (const auto& item : table->items) {
      const std::string fault = add(item.key, item);
      if (!fault.empty())
        refuse(item, name, "a pattern that this reader supports", in_quotes(item.key) + " with " + fault,
               "write the module's name instead; docs/formats.md lists the supported expressions");
    }
  }

  void read_modules() {
    result_.target_modules = selection("target_modules");
    result_.exclude_modules = selection("exclude_modules");
    result_.modules_to_save = plain_names("modules_to_save");
    result_.layers_pattern = plain_names("layers_pattern");
    read_layers();
    const auto* layers = value_of("layers_to_transform");
    const bool has_layers = layers != nullptr && layers->kind != json_kind::null;
    if (has_layers && result_.target_modules.expression)
      refuse(*layers, "layers_to_transform", "target_modules as a list", "target_modules as text",
             "PEFT refuses the two together: write the layers into the expression of target_modules");
    if (!result_.layers_pattern.empty() && !has_layers)
      refuse(*value_of("layers_pattern"), "layers_pattern", "layers_to_transform beside it", "none",
             "PEFT refuses it alone: remove it, or add layers_to_transform");
  }

  void read_layers() {
    const auto* layers = value_of("layers_to_transform");
    if (layers == nullptr || layers->kind == json_kind::null) return;
    const auto add = [&](const json_node& value) {
      if (value.kind != json_kind::unsigned_integer) refuse(value, "layers_to_transform", "layer numbers", value.text(), "");
      result_.layers_to_transform.push_back(value.unsigned_integer);
    };
    if (layers->kind != json_kind::array) return add(*layers);
    for (const auto& item : layers->items) add(item);
  }

  // ---- variants
  void read_variants() {
    result_.use_dora = flag("use_dora");
    result_.lora_bias = flag("lora_bias");
    result_.ensure_weight_tying = flag("ensure_weight_tying");
    if (const auto* value = value_of("target_parameters"); value != nullptr && value->kind == json_kind::string)
      refuse(*value, "target_parameters", "a list of names or null, as PEFT does", value->text(), "");
    result_.target_parameters = names("target_parameters");
    read_bias();
    read_init();
    read_block_diagonal();
    read_expert_layouts();
    read_layer_replication();
    read_tokens();
    if (result_.use_dora && result_.lora_bias)
      refuse(*value_of("lora_bias"), "lora_bias", "false beside use_dora", "true", "PEFT refuses the two together");
  }

  void read_bias() {
    const auto* bias = value_of("bias");
    if (bias == nullptr || bias->kind == json_kind::null) return;
    if (bias->kind == json_kind::string && bias->string == "none") return;
    const bool all = bias->kind == json_kind::string && bias->string == "all";
    if (!all && (bias->kind != json_kind::string || bias->string != "lora_only"))
      refuse(*bias, "bias", "\"none\", \"all\" or \"lora_only\"", bias->text(),
             "write \"none\" if the file has no tensor of a bias, else the one with which it was trained");
    result_.bias = all ? trained_biases::all : trained_biases::lora_only;
  }

  void read_init() {
    if (const auto* kasa = value_of("kasa_config"); kasa != nullptr && !is_off(*kasa)) result_.change = base_change::kasa;
    const auto* init = value_of("init_lora_weights");
    if (init == nullptr || init->kind == json_kind::null) return;
    result_.init_lora_weights = init->kind == json_kind::string ? init->string : init->text();
    std::string name = result_.init_lora_weights;
    if (is_in(caseless_inits, lower_case(name))) name = lower_case(name);
    const bool quoted_flag = init->kind == json_kind::string && is_in(flag_inits, lower_case(name));
    if (is_in(harmless_inits, name) && !quoted_flag) return;
    if (quoted_flag)
      refuse(*init, "init_lora_weights", "true or false, or the name of an initialization", init->text(),
             "PEFT knows no initialization of this name: write the word without quotes");
    if (!is_in(computable_inits, name)) refuse_init(*init, name);
    if (result_.change != base_change::none) refuse(*init, "init_lora_weights", "true beside kasa_config", init->text(), "");
    result_.change = name == "pissa" ? base_change::pissa : base_change::olora;
  }
  [[noreturn]] void refuse_init(const json_node& init, const std::string& name) const {
    const char* expected = "an initialization that leaves the base as it is, pissa or olora";
    const auto is_random = [](std::string_view text) {
      return is_in(random_inits, text) || text.starts_with("pissa_niter_");
    };
    if (is_random(name))
      refuse(init, "init_lora_weights", expected, init.text(),
             "PEFT also changes the base when it loads this adapter, in a way that the files do not determine (random "
             "numbers, data): convert it with path_initial_model_for_weight_conversion of save_pretrained");
    const auto lowered = lower_case(name);
    const bool known = is_in(harmless_inits, lowered) || is_in(computable_inits, lowered) || is_random(lowered);
    refuse(init, "init_lora_weights", expected, init.text(),
           known ? "PEFT knows " + in_quotes(lowered) +
                       " in lower case only, and refuses this spelling: write the one that is meant"
                 : "PEFT knows no such initialization: write true if the base was left as it is");
  }

  void read_block_diagonal() {
    const auto* bd = value_of("use_bdlora");
    if (bd == nullptr || is_off(*bd)) return;
    if (bd->kind != json_kind::object) refuse(*bd, "use_bdlora", "an object or null", bd->text(), "");
    block_diagonal result;
    for (const auto& item : bd->items) {
      if (item.key == "nblocks") {
        result.blocks = static_cast<std::uint64_t>(positive(item, "use_bdlora"));
      } else if (item.key == "match_strict") {
        if (item.kind != json_kind::boolean) refuse(item, "use_bdlora", "match_strict as true or false", item.text(), "");
        result.strict = item.boolean;
      } else if (item.key == "target_modules_bd_a" || item.key == "target_modules_bd_b") {
        if (item.kind == json_kind::null) continue;
        if (item.kind != json_kind::array) refuse(item, "use_bdlora", "module names", item.text(), "");
        (item.key.back() == 'a' ? result.in_A : result.in_B) = list(item, "use_bdlora");
      } else {
        const std::string key = "use_bdlora." + item.key;
        if (!may_ignore(key, item))
          refuse(item, "use_bdlora", "a key that this version knows", in_quotes(item.key),
                 "if it does not change the arithmetic, name it in read_options::ignore_keys as " + in_quotes(key));
        result_.ignored_keys.push_back(key);
      }
    }
    result_.bd = std::move(result);
  }

  // ---- the order of a stack's columns, which must be said alike in every place
  void read_expert_layouts() {
    if (const auto* all = value_of("lora_B_layout"); all != nullptr && all->kind != json_kind::null)
      result_.expert_layouts[""].lora_B = columns(*all);
    const char* key = "unsloth_fused_expert_lora";
    const auto* fused = value_of(key);
    if (fused == nullptr || is_off(*fused)) return;
    if (fused->kind != json_kind::object) refuse(*fused, key, "an object or null", fused->text(), "");
    for (const auto& item : fused->items) {
      if (item.key == "parameters") {
        if (item.kind != json_kind::object) refuse(item, key, "parameters as an object", item.text(), "");
        for (const auto& parameter : item.items) read_expert_layout(parameter, bare_parameter(parameter));
      } else if (!read_layout_key(item, result_.expert_layouts[""])) {
        check_unknown(std::string(key) + "." + item.key, item);
      }
    }
    const auto all = result_.expert_layouts[""];
    for (const auto& [name, layout] : result_.expert_layouts)
      if (all.lora_B && layout.lora_B && all.lora_B != layout.lora_B)
        refuse(*fused, key, "the lora_B_layout that the config says for all stacks", "another for " + in_quotes(name),
               one_layout);
      else if (all.experts && layout.experts && all.experts != layout.experts)
        refuse(*fused, key, "the num_experts that the config says for all stacks", "another for " + in_quotes(name), "");
  }
  /// The key of a parameter, as its entry is called. An empty one would be that of all stacks.
  std::string bare_parameter(const json_node& of) const {
    constexpr std::string_view prefix = "base_model.model.";
    if (of.key.empty()) refuse(of, "unsloth_fused_expert_lora", "the name of a parameter", "an empty one", "");
    return of.key.starts_with(prefix) ? of.key.substr(prefix.size()) : of.key;
  }
  static constexpr const char* one_layout = "find out in which order the columns were trained, and write it in both places";
  void read_expert_layout(const json_node& of, const std::string& name) {
    const char* key = "unsloth_fused_expert_lora";
    if (of.kind != json_kind::object) refuse(of, key, "an object for " + in_quotes(name), of.text(), "");
    auto& layout = result_.expert_layouts[name];
    for (const auto& item : of.items)
      if (!read_layout_key(item, layout)) check_unknown(std::string(key) + ".parameters." + name + "." + item.key, item);
  }
  /// Whether the key is one of a layout.
  bool read_layout_key(const json_node& item, expert_layout& layout) {
    const char* key = "unsloth_fused_expert_lora";
    if (item.kind == json_kind::null)
      return item.key == "lora_A_layout" || item.key == "lora_B_layout" || item.key == "num_experts";
    if (item.key == "lora_A_layout") {
      if (item.kind != json_kind::string || item.string != "grouped_by_expert")
        refuse(item, key, "lora_A_layout \"grouped_by_expert\", as PEFT has it", item.text(), "");
    } else if (item.key == "lora_B_layout") {
      const auto order = columns(item);
      if (layout.lora_B.value_or(order) != order)
        refuse(item, key, "the same lora_B_layout in every place", item.text(), one_layout);
      layout.lora_B = order;
    } else if (item.key == "num_experts") {
      layout.experts = static_cast<std::uint64_t>(positive(item, key, "a number of experts"));
    } else {
      return false;
    }
    return true;
  }
  expert_columns columns(const json_node& value) const {
    if (value.kind == json_kind::string && value.string == "rank_major") return expert_columns::rank_major;
    if (value.kind == json_kind::string && value.string == "grouped_by_expert") return expert_columns::grouped_by_expert;
    refuse(value, "lora_B_layout", "\"rank_major\" (PEFT's) or \"grouped_by_expert\"", value.text(),
           "it says in which order the columns of lora_B go over ranks and experts");
  }

  void read_layer_replication() {
    const auto* map = value_of("layer_replication");
    if (map == nullptr || map->asks_for_nothing()) return;
    const auto bad = [&](const json_node& at) {
      refuse(at, "layer_replication", "pairs [begin, end) of layer numbers", at.text(),
             "each pair names layers of the base, as in [[0, 16], [8, 24]]: begin below end, at most 1000000 layers in all");
    };
    if (map->kind != json_kind::array) bad(*map);
    std::uint64_t layers = 0;
    for (const auto& pair : map->items) {
      if (pair.kind != json_kind::array || pair.items.size() != 2) bad(pair);
      for (const auto& number : pair.items)
        if (number.kind != json_kind::unsigned_integer || number.unsigned_integer > 100'000) bad(number);
      const auto begin = pair.items[0].unsigned_integer, end = pair.items[1].unsigned_integer;
      if (end <= begin || (layers += end - begin) > 1'000'000) bad(pair);
      result_.layer_replication.emplace_back(begin, end);
    }
  }

  void read_tokens() {
    const auto* tokens = value_of("trainable_token_indices");
    if (tokens == nullptr || tokens->asks_for_nothing()) return;
    const auto ids = [&](const json_node& array) {
      std::vector<index_t> result;
      const char* hint = "write a list of token numbers, or an object with such a list for each embedding's name";
      if (array.kind != json_kind::array)
        refuse(array, "trainable_token_indices", "token numbers, or an object of them", array.text(), hint);
      for (const auto& id : array.items) {
        if (id.kind != json_kind::unsigned_integer || id.unsigned_integer > 0x7fffffffu)
          refuse(id, "trainable_token_indices", "token numbers", id.text(), hint);
        result.push_back(static_cast<index_t>(id.unsigned_integer));
      }
      return result;
    };
    if (tokens->kind != json_kind::object) {
      result_.trainable_tokens.emplace("", ids(*tokens));
    } else {
      for (const auto& item : tokens->items) result_.trainable_tokens.emplace(item.key, ids(item));
    }
  }

  static bool is_off(const json_node& value) {
    return value.kind == json_kind::null || (value.kind == json_kind::boolean && !value.boolean);
  }

  void read_texts() {
    result_.task_type = text("task_type");
    if (!result_.task_type.empty() && std::find(task_types.begin(), task_types.end(), result_.task_type) == task_types.end())
      refuse(*value_of("task_type"), "task_type", "one of PEFT's " + io_detail::listed(task_types),
             in_quotes(result_.task_type), "it does not change the arithmetic: write null, or the one that is meant");
    result_.base_model_name_or_path = text("base_model_name_or_path");
    result_.revision = text("revision");
    result_.peft_version = text("peft_version");
  }

  // ---- one value of a kind
  const json_node* value_of(std::string_view key) const {
    for (const auto& item : root_.items)
      if (item.key == key) return &item;
    return nullptr;
  }
  index_t positive(const json_node& value, const char* key, const char* what = "a rank") const {
    if (value.kind != json_kind::unsigned_integer || value.unsigned_integer == 0 || value.unsigned_integer > 0x7fffffffu)
      refuse(value, key, std::string(what) + " above 0, as an integer", value.text(), "");
    return static_cast<index_t>(value.unsigned_integer);
  }
  double finite(const json_node& value, const char* key) const {
    const bool number = value.kind == json_kind::unsigned_integer || value.kind == json_kind::negative_integer ||
                        value.kind == json_kind::real;
    if (!number || !lora::detail::is_finite(value.number)) refuse(value, key, "a finite number", value.text(), "");
    return value.number;
  }
  bool flag(const char* key) const {
    const auto* value = value_of(key);
    if (value == nullptr || value->kind == json_kind::null) return false;
    if (value->kind != json_kind::boolean) refuse(*value, key, "true or false", value->text(), "");
    return value->boolean;
  }
  std::string text(const char* key) const {
    const auto* value = value_of(key);
    if (value == nullptr || value->kind == json_kind::null) return {};
    if (value->kind != json_kind::string) refuse(*value, key, "text or null", value->text(), "");
    return value->string;
  }
  std::vector<std::string> list(const json_node& array, const char* key) const {
    std::vector<std::string> result;
    for (const auto& item : array.items) {
      if (item.kind != json_kind::string) refuse(item, key, "module names", item.text(), "");
      result.push_back(item.string);
    }
    return result;
  }
  /// Text (one name), an array of names, or null.
  std::vector<std::string> names(const char* key) const {
    const auto* value = value_of(key);
    if (value == nullptr || value->asks_for_nothing()) return {};
    if (value->kind == json_kind::string) return {value->string};
    if (value->kind != json_kind::array) refuse(*value, key, "module names or null", value->text(), "");
    return list(*value, key);
  }
  /// PEFT takes these for regular expressions in one place and for ends of names in another.
  std::vector<std::string> plain_names(const char* key) const {
    auto result = names(key);
    for (const auto& name : result)
      if (name.empty() || !io_detail::is_plain(name))
        refuse(*value_of(key), key, "plain names (letters, digits, _, - and dots)", in_quotes(name),
               "PEFT reads it as a regular expression, which is not supported here: list the modules' names");
    return result;
  }
  module_selection selection(const char* key) const {
    const auto* value = value_of(key);
    if (value == nullptr || value->kind == json_kind::null) return {};
    if (value->kind == json_kind::string) return {.expression = value->string};
    if (value->kind != json_kind::array) refuse(*value, key, "text, an array of names, or null", value->text(), "");
    return {.names = list(*value, key)};
  }

  [[noreturn]] void refuse(const json_node& at, std::string item, std::string expected, std::string found,
                           std::string hint) const {
    lora::detail::raise(format_error({.path = result_.path,
                                      .item = std::move(item),
                                      .offset = at.offset,
                                      .expected = std::move(expected),
                                      .found = std::move(found),
                                      .hint = std::move(hint)}));
  }

  const json_node& root_;
  const read_options& options_;
  config result_;
};

}  // namespace config_detail

/// Reads a config from its text; `path` names it in messages. Throws format_error.
inline config parse_config(std::string_view text, const std::string& path, const read_options& options = {}) {
  const auto root = std::make_shared<const io_detail::json_node>(io_detail::parse_json_tree({.text = text, .path = path}));
  return config_detail::reader(root, path, options).read();
}

/// Reads a config file of at most 16 MiB. Throws format_error.
inline config read_config(const std::filesystem::path& path, const read_options& options = {}) {
  const auto text = io_detail::read_text(path, 16u << 20);
  if (io_detail::is_git_lfs_pointer(text))
    lora::detail::raise(format_error({.path = path.string(),
                                      .offset = 0,
                                      .expected = "a JSON object",
                                      .found = "a Git LFS pointer",
                                      .hint = io_detail::git_lfs_hint}));
  return parse_config(text, path.string(), options);
}

namespace config_detail {

/// The number in a name, of any length: "007" is layer 7. Nothing beyond 64 bits.
inline std::optional<std::uint64_t> number_of(std::string_view digits) {
  std::uint64_t value = 0;
  const auto parsed = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  return parsed.ec == std::errc() ? std::optional(value) : std::nullopt;
}

using patterns = std::vector<io_detail::module_pattern>;
inline patterns compiled(const std::vector<std::string>& names) { return {names.begin(), names.end()}; }
inline bool any_matches(const patterns& all, std::string_view module) {
  return std::any_of(all.begin(), all.end(),
                     [&](const auto& each) { return each.match(module) == io_detail::pattern::verdict::yes; });
}

/// The layer number in a name: behind one of the containers, or without containers the first number that has two
/// segments before and one behind it. Empty when there is none.
inline std::string_view layer_number(std::string_view module, const patterns& containers) {
  const auto parts = io_detail::segments(module);
  const auto before = [&](std::size_t k) {  // without the dot
    return module.substr(0, static_cast<std::size_t>(parts[k].data() - module.data()) - 1);
  };
  if (containers.empty()) {
    for (std::size_t k = 2; k + 1 < parts.size(); ++k)
      if (is_number(parts[k])) return parts[k];
    return {};
  }
  for (const auto& container : containers)
    for (std::size_t k = 1; k + 1 < parts.size(); ++k)
      if (is_number(parts[k]) && container.match(before(k)) == io_detail::pattern::verdict::yes) return parts[k];
  return {};
}

/// What a config selects by name, compiled once for all names of a file. Looks at the config.
class target_rule {
 public:
  explicit target_rule(const config& c)
      : config_(c),
        target_(c.target_modules),
        exclude_(c.exclude_modules),
        saved_(compiled(c.excluded_by_saving())),
        containers_(compiled(c.layers_pattern)),
        layers_(c.layers_to_transform) {
    std::sort(layers_.begin(), layers_.end());
  }

  struct answer {
    std::optional<bool> selected;   ///< nothing: a name does not tell
    std::string why = {};           ///< it does not
    bool excluded_unicode = false;  ///< because exclude_modules asks for tables of Unicode
  };
  answer decide(std::string_view module) const {
    answer excluded = fits(config_.exclude_modules, exclude_, module, "exclude_modules");
    if (!excluded.selected) {
      excluded.excluded_unicode = exclude_.expression->fault().empty();
      return excluded;
    }
    const auto is_saved = [&](std::string_view path) { return any_matches(saved_, path); };
    if (*excluded.selected || any_on_the_way(module, is_saved)) return {false};
    const auto& target = config_.target_modules;
    if (!target.expression && !target.names) {
      // PEFT then adapts parameters only.
      if (!config_.target_parameters.empty()) return {false};
      return {{}, "target_modules is null: PEFT then chooses by the base's architecture"};
    }
    if (target.expression && lower_case(*target.expression) == "all-linear")
      return {{}, "target_modules is \"all-linear\": a name does not tell a module's type"};
    answer result = fits(target, target_, module, "target_modules");
    if (target.names && *result.selected) result.selected = target_.names.contains(module) || in_layers(module);
    return result;
  }

  /// An upper bound for the work of decide().
  double work(std::string_view module) const {
    const auto size = [](const auto& list) { return static_cast<double>(list.size()); };
    const auto of = [&](const compiled_selection& s) {
      return (s.expression ? static_cast<double>(s.expression->cost()) * size(module) : 0) + s.names.work(module);
    };
    const auto depth = 1 + static_cast<double>(std::count(module.begin(), module.end(), '.'));
    return of(target_) + of(exclude_) + size(module) * (depth * size(saved_) + size(containers_));
  }

 private:
  struct compiled_selection {
    std::optional<io_detail::pattern> expression;
    io_detail::path_endings names;

    explicit compiled_selection(const module_selection& s) : names(s.names.value_or(std::vector<std::string>{})) {
      if (s.expression && !s.expression->empty()) expression.emplace(*s.expression);
    }
  };
  static answer fits(const module_selection& selection, const compiled_selection& compiled, std::string_view module,
                     const char* key) {
    const auto& expression = compiled.expression;
    if (!expression) return {compiled.names.select(module)};
    if (!expression->fault().empty())
      return {{}, std::string(key) + " " + in_quotes(*selection.expression) + " is not supported: " + expression->fault()};
    const auto verdict = expression->matches_all(io_detail::code_points(module));
    if (verdict == io_detail::pattern::verdict::not_ascii)
      return {{}, io_detail::unicode_text(*selection.expression, module)};
    return {verdict == io_detail::pattern::verdict::yes};
  }
  bool in_layers(std::string_view module) const {
    if (config_.layers_to_transform.empty()) return true;
    const auto number = number_of(layer_number(module, containers_));
    return number && std::binary_search(layers_.begin(), layers_.end(), *number);
  }

  const config& config_;
  compiled_selection target_, exclude_;
  patterns saved_, containers_;
  std::vector<std::uint64_t> layers_;  // in rising order
};

}  // namespace config_detail

inline bool matches_target(const config& c, std::string_view module) {
  const auto answer = config_detail::target_rule(c).decide(module);
  if (!answer.selected) lora::detail::raise_value("peft::matches_target", answer.why);
  return *answer.selected;
}

}  // namespace lora::inline LORA_DETAIL_ABI::peft
