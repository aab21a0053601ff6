// SPDX-License-Identifier: Apache-2.0
//
// lora::peft::write(directory, file)      an adapter as a PEFT directory: adapter_config.json and
//                                         adapter_model.safetensors
// lora::peft::make_file(entries, ...)     the file that holds given entries, for adapters that were
//                                         made here
//
//   const auto file = lora::peft::make_file<float>({{"layers.0.self_attn.q_proj", both, false}});
//   lora::peft::write("adapters/both", file);
//
// PEFT loads what is written as the same function. Where the config's own r, lora_alpha and
// patterns give every entry its rank and alpha, they are written as they are. Otherwise each module
// that differs from r or lora_alpha is named in full (anchored, so that no key fits two modules and
// their order does not matter); an entry whose scaling has another rule than the file's gets the
// alpha that gives its scaling, bit for bit where a double does. Factors are written in the dtype
// in which they were read. fan_in_fan_out is written as it was read with. Other config keys that
// were read are kept; a file that was read whole and not changed gives the same tensors, byte for
// byte: except stacks whose columns were grouped by expert, which are written in PEFT's order, and
// names that lost a wrapper. Before anything is written, the bytes are read back as
// lora::peft::read would read them, and must hold the same entries. Only the read_options that no
// file can hold are taken over from the file, and whoever reads what was written needs them again:
// parameter_order, parameters_in_out, attention_out_proj_twice, ignore_keys, and wrappers = keep.
//   writes   both files are complete beside the old ones, flushed and closed, before either takes
//            its name, the weights first. A failure before that leaves the old adapter. Two names
//            cannot be given at once: when the second cannot be given (the error says so), or the
//            machine stops between the two, the new weights stand beside the old config.
//   throws   value_error for a file that was read with parts left out or passed over (they would be
//            lost), for entries made by converted() whose file's config says otherwise, and for
//            whatever a reader would refuse or take for something else (rank 0, no entry at all, a
//            scaling that no finite alpha gives, a name that reads as another tensor's, text that
//            is not UTF-8, a key that read_options::lenient let pass); format_error with the
//            system's reason.
//   costs    beside the adapter, in memory: twice the bytes of the file while they are laid out;
//            then those bytes once and the adapter as it is read back, in T.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "lora/io/detail/json_text.hpp"
#include "lora/io/peft.hpp"
#include "lora/io/safetensors_write.hpp"

namespace lora::inline LORA_DETAIL_ABI::peft {

namespace write_detail {

/// What a config made for entries cannot say of one, with what to do instead; empty when there is
/// nothing.
template <scalar T>
std::string not_expressed(const entry<T>& e) {
  const auto& p = e.parts();
  if (p.kind == entry_kind::parameter)
    return "is a bare parameter, whose name only target_parameters gives: write the file that it "
           "was read from";
  if (p.packed != packed_factor::none)
    return "has a block-diagonal factor (use_bdlora): write the file that it was read from, or an "
           "entry of its parts with "
           "packed_factor::none";
  if (p.twice)
    return "counts twice (attention_out_proj_twice), which only its reader was told: write the "
           "file that it was read from";
  if (p.change != base_change::none)
    return "was trained beside a changed base (" + std::string(entry<T>::change_name(p.change)) +
           "): make it plain with converted()";
  if (!p.shared_with.empty())
    return "adapts a weight that replicated layers share (layer_replication): write the file that "
           "it was read from";
  return {};
}

}  // namespace write_detail

/// A file of these entries, with the config that PEFT needs: linear layers (all with the same
/// fan_in_fan_out), embeddings, convolutions, and both parts of an attention; with lora_bias or
/// DoRA when all of them have it. Throws value_error for a name that is there twice and for an
/// entry of which such a config cannot say what it is: a parameter, a block-diagonal factor, a
/// delta that counts twice, a change of the base, a weight that replicated layers share.
template <scalar T>
adapter_file<T> make_file(std::vector<entry<T>> entries, std::string base_model = "",
                          std::string task_type = "") {
  const auto refuse = [](const std::string& name, const std::string& why) {
    lora::detail::raise_value("peft::make_file", io_detail::in_quotes(name) + " " + why);
  };
  config c;
  c.base_model_name_or_path = std::move(base_model);
  c.task_type = std::move(task_type);
  std::vector<std::string> names;
  typename adapter_file<T>::entry_map map;
  // Other kinds are stored in one way only.
  const auto first = std::find_if(entries.begin(), entries.end(),
                                  [](const auto& e) { return e.kind() == entry_kind::linear; });
  if (first != entries.end()) c.fan_in_fan_out = first->fan_in_fan_out();
  for (auto& e : entries) {
    if (const auto why = write_detail::not_expressed(e); !why.empty()) refuse(e.name(), why);
    if (e.kind() == entry_kind::linear && e.fan_in_fan_out() != c.fan_in_fan_out)
      refuse(e.name(),
             "and the first linear entry disagree on fan_in_fan_out, which a config says once for "
             "all: write them to two "
             "directories");
    names.push_back(e.name());
    if (!map.emplace(e.name(), std::move(e)).second)
      refuse(names.back(), "is the name of two entries: give one");
  }
  c.target_modules.names = std::move(names);
  return {std::move(c), std::move(map)};
}

namespace write_detail {

/// Owns the bytes of tensors until they are written.
class tensor_store {
 public:
  /// Values in one of the formats that hold them: they were widened from it, so this is exact.
  template <class T, class Get>
  void add(std::string name, safetensors::dtype dtype, std::vector<std::uint64_t> shape,
           const Get& get, std::size_t count) {
    auto& bytes = bytes_.emplace_back(count * (safetensors::bits_of(dtype) / 8));
    const auto put = [&]<class Stored>(Stored) {
      for (std::size_t k = 0; k < count; ++k) {
        const T value = get(k);
        Stored stored;
        if constexpr (std::is_same_v<lora::detail::storage_t<T>, Stored>)
          stored = std::bit_cast<Stored>(value);
        else
          stored = lora::detail::narrow<Stored>(lora::detail::widen<double>(value));
        std::memcpy(bytes.data() + k * sizeof(Stored), &stored, sizeof(Stored));
      }
    };
    switch (dtype) {
      case safetensors::dtype::f32: put(float()); break;
      case safetensors::dtype::f64: put(double()); break;
      case safetensors::dtype::f16: put(float16()); break;
      case safetensors::dtype::bf16: put(bfloat16()); break;
      default:
        lora::detail::raise_value("peft::write", io_detail::in_quotes(name) +
                                                     " is to be stored as " +
                                                     std::string(safetensors::name_of(dtype)) +
                                                     ", which holds no such values");
    }
    tensors_.push_back({std::move(name), dtype, std::move(shape), {}});
  }
  void add(std::string name, safetensors::dtype dtype, std::vector<std::uint64_t> shape,
           const std::vector<std::byte>& bytes) {
    bytes_.push_back(bytes);
    tensors_.push_back({std::move(name), dtype, std::move(shape), {}});
  }
  const std::vector<safetensors::tensor>& tensors() {
    for (std::size_t k = 0; k < tensors_.size(); ++k) tensors_[k].bytes = bytes_[k];
    return tensors_;
  }

 private:
  std::vector<safetensors::tensor> tensors_;
  std::vector<std::vector<std::byte>> bytes_;
};

using shape = std::vector<std::uint64_t>;
inline std::uint64_t extent(index_t n) { return static_cast<std::uint64_t>(n); }

/// The blocks on the diagonal of a matrix, below each other: how BD-LoRA and grouped convolutions
/// store it.
template <class M>
auto gathered(const M& m, index_t blocks) {
  const index_t rows = m.rows() / blocks, cols = m.cols() / blocks;
  lora::detail::row_major_matrix<typename M::Scalar> result(m.rows(), cols);
  for (index_t b = 0; b < blocks; ++b)
    result.middleRows(b * rows, rows) = m.block(b * rows, b * cols, rows, cols);
  return result;
}

/// The factors as the file stores them.
template <scalar T>
class entry_writer {
  using matrix = lora::detail::row_major_matrix<T>;

 public:
  entry_writer(tensor_store& store, const std::string& prefix, const entry<T>& e)
      : store_(store), p_(e.parts()), path_(prefix + p_.path) {}

  void run() {
    const matrix A = stored_A(), B = stored_B();
    const bool embedding = p_.kind == entry_kind::embedding;
    shape shape_A{extent(A.rows()), extent(A.cols())}, shape_B{extent(B.rows()), extent(B.cols())};
    if (p_.kind == entry_kind::convolution) {
      shape_A = {extent(A.rows()), extent(p_.in_channels)};
      for (const auto k : p_.kernel) {
        shape_A.push_back(extent(k));
        shape_B.push_back(1);
      }
    }
    add(embedding ? ".lora_embedding_A" : ".lora_A.weight", p_.dtype_A, std::move(shape_A),
        A.data(), A.size());
    add(embedding ? ".lora_embedding_B" : ".lora_B.weight", p_.dtype_B, shape_B, B.data(),
        B.size());
    add_vector(".lora_B.bias", p_.dtype_bias, p_.bias, {});
    // A convolution's magnitude is [1, out, 1...].
    shape magnitude;
    if (p_.kind == entry_kind::convolution) {
      magnitude.assign(p_.kernel.size() + 2, 1);
      magnitude[1] = p_.magnitude.size();
    }
    add_vector(".lora_magnitude_vector", p_.dtype_magnitude, p_.magnitude, magnitude);
    add_vector(".lora_diag", p_.dtype_diagonal, p_.diagonal, {});
  }

 private:
  matrix stored_A() const {
    if (p_.kind == entry_kind::parameter) return stored_ranks();
    const matrix& A = p_.experts.front().lora_A();
    return p_.packed == packed_factor::A ? gathered(A, p_.blocks) : A;
  }
  matrix stored_B() const {
    if (p_.kind == entry_kind::parameter) return stored_columns();
    const matrix& B = p_.experts.front().lora_B();
    if (p_.packed == packed_factor::B) return gathered(B, p_.blocks);
    return p_.groups > 1 ? gathered(B, p_.groups) : B;
  }
  /// The ranks of the experts of a stack, expert by expert.
  matrix stored_ranks() const {
    const auto& first = p_.experts.front();
    const index_t rank = first.rank();
    matrix A(rank * static_cast<index_t>(p_.experts.size()),
             p_.stored_transposed ? first.out_features() : first.in_features());
    for (std::size_t e = 0; e < p_.experts.size(); ++e) {
      auto rows = A.middleRows(static_cast<index_t>(e) * rank, rank);
      if (p_.stored_transposed)
        rows = p_.experts[e].lora_B().transpose();
      else
        rows = p_.experts[e].lora_A();
    }
    return A;
  }
  /// The experts of a stack, rank by rank.
  matrix stored_columns() const {
    const auto& first = p_.experts.front();
    const auto count = static_cast<index_t>(p_.experts.size());
    matrix B(p_.stored_transposed ? first.in_features() : first.out_features(),
             first.rank() * count);
    for (index_t e = 0; e < count; ++e) {
      const auto& l = p_.experts[static_cast<std::size_t>(e)];
      for (index_t k = 0; k < first.rank(); ++k) {
        if (p_.stored_transposed)
          B.col(k * count + e) = l.lora_A().row(k).transpose();
        else
          B.col(k * count + e) = l.lora_B().col(k);
      }
    }
    return B;
  }

  void add(const char* suffix, safetensors::dtype dtype, shape extents, const T* values,
           index_t count) {
    store_.add<T>(
        path_ + suffix, dtype, std::move(extents), [&](std::size_t k) { return values[k]; },
        static_cast<std::size_t>(count));
  }
  void add_vector(const char* suffix, safetensors::dtype dtype, const std::vector<T>& values,
                  const shape& extents) {
    if (!values.empty())
      add(suffix, dtype, extents.empty() ? shape{values.size()} : extents, values.data(),
          static_cast<index_t>(values.size()));
  }

  tensor_store& store_;
  const entry_parts<T>& p_;
  std::string path_;
};

// ---- the config

/// alpha with which PEFT computes exactly this scaling, where a double does; else the nearest.
inline double alpha_for(double scaling, scaling_rule rule, index_t rank) {
  const double by = rule == scaling_rule::rank_stabilized ? std::sqrt(static_cast<double>(rank))
                                                          : static_cast<double>(rank);
  const double guess = scaling * by;
  double below = guess, above = guess;
  for (int k = 0; k < 4; ++k) {
    if (below / by == scaling) return below;
    if (above / by == scaling) return above;
    below = std::nextafter(below, -HUGE_VAL);
    above = std::nextafter(above, HUGE_VAL);
  }
  return guess;
}

using json = io_detail::json_node;
inline json number(double value) {
  json node;
  const bool whole = value >= 0 && value < 9e15 && value == std::floor(value);
  node.kind = whole ? io_detail::json_kind::unsigned_integer : io_detail::json_kind::real;
  node.unsigned_integer = whole ? static_cast<std::uint64_t>(value) : 0;
  node.number = value;
  node.string = whole ? std::to_string(node.unsigned_integer) : io_detail::json_real(value);
  return node;
}
inline json boolean(bool value) {
  json node;
  node.kind = io_detail::json_kind::boolean;
  node.boolean = value;
  return node;
}
inline json text(std::string value) {
  json node;
  node.kind = io_detail::json_kind::string;
  node.string = std::move(value);
  return node;
}
inline json text_or_null(const std::string& value) { return value.empty() ? json{} : text(value); }
inline json list(const std::vector<std::string>& values) {
  json node;
  node.kind = io_detail::json_kind::array;
  for (const auto& value : values) node.items.push_back(text(value));
  return node;
}

/// A regular expression that fits this module and no other: PEFT matches (.*\.)?(KEY)$ from the
/// beginning of the name.
inline std::string exact_key(const std::string& module) {
  std::string key = "^";
  for (const char c : module) {
    if (std::string_view(".^$*+?{}[]\\|()").find(c) != std::string_view::npos) key += '\\';
    key += c;
  }
  return key;
}

/// The name under which PEFT looks up an entry's patterns.
template <scalar T>
std::string looked_up(const entry<T>& e) {
  return is_attention(e.kind()) ? std::string(io_detail::without_last_segment(e.name())) : e.name();
}

template <scalar T>
class config_writer {
 public:
  explicit config_writer(const adapter_file<T>& file) : file_(file), c_(file.config()) {}

  std::string run() {
    if (c_.source != nullptr)
      for (const auto& item : c_.source->items) keys_[item.key] = item;
    else
      defaults();
    resolve_ranks();
    resolve_targets();
    for (const char* key : {"lora_B_layout", "unsloth_fused_expert_lora"})
      if (const auto found = keys_.find(key); found != keys_.end())
        as_rank_major(found->second, key);
    keys_["fan_in_fan_out"] =
        boolean(c_.fan_in_fan_out);  // a reader's option may have said otherwise than the file
    keys_["peft_type"] = text(c_.peft_type);
    keys_["inference_mode"] = boolean(true);
    json root;
    root.kind = io_detail::json_kind::object;
    for (auto& [key, value] : keys_) {
      value.key = key;
      root.items.push_back(value);
    }
    return io_detail::json_text(root);
  }

 private:
  void defaults() {
    keys_["base_model_name_or_path"] = text_or_null(c_.base_model_name_or_path);
    keys_["task_type"] = text_or_null(c_.task_type);
    keys_["bias"] = text("none");
    keys_["init_lora_weights"] = boolean(true);
    keys_["lora_dropout"] = number(0);
    bool dora = false, bias = false;
    for (const auto& [name, e] : file_) {
      dora = dora || !e.magnitude().empty();
      bias = bias || !e.lora_bias().empty();
    }
    keys_["use_dora"] = boolean(dora);
    keys_["lora_bias"] = boolean(bias);
    keys_["target_modules"] = targets();
    if (file_.size() != 0) {
      const auto& first = file_.begin()->second;
      r_ = first.rank();
      alpha_ = alpha_for(first.scaling(), scaling_rule::standard, r_);
    }
  }

  json targets() const {
    std::set<std::string> names;
    for (const auto& [name, e] : file_)
      if (e.kind() != entry_kind::parameter || c_.source == nullptr) names.insert(looked_up(e));
    return list({names.begin(), names.end()});
  }
  /// Where the tensors chose the modules, or their names were changed, the config names what the
  /// file has.
  void resolve_targets() {
    if (!file_.options().select_by_tensors && !file_.names_changed()) return;
    keys_["target_modules"] = targets();
    for (const char* key : {"exclude_modules", "layers_to_transform", "layers_pattern"})
      keys_[key] = json{};
  }
  /// Stacks are written in PEFT's order of columns, whatever they were read in.
  static void as_rank_major(json& node, std::string_view key) {
    if (key == "lora_B_layout" && node.kind == io_detail::json_kind::string)
      node.string = "rank_major";
    for (auto& item : node.items) as_rank_major(item, item.key);
  }

  void resolve_ranks() {
    json ranks, alphas;
    ranks.kind = alphas.kind = io_detail::json_kind::object;
    std::map<std::string, std::pair<index_t, double>> modules;
    for (const auto& [name, e] : file_) modules[looked_up(e)] = {e.rank(), alpha_of(e)};
    const bool as_config = std::all_of(modules.begin(), modules.end(), [&](const auto& module) {
      return c_.rank_of(module.first) == module.second.first &&
             c_.scaling_of(module.first).alpha == module.second.second;
    });
    if (as_config) {
      // A short pattern may stand for thousands of modules, which one key for each would make too
      // many to look up.
      r_ = c_.r;
      alpha_ = c_.lora_alpha;
      for (const auto& row : c_.rank_pattern.rows())
        add(ranks, row.key, number(static_cast<double>(row.value)));
      for (const auto& row : c_.alpha_pattern.rows()) add(alphas, row.key, number(row.value));
    } else {
      for (const auto& [name, values] : modules) {
        if (values.first != r_)
          add(ranks, exact_key(name), number(static_cast<double>(values.first)));
        if (values.second != alpha_) add(alphas, exact_key(name), number(values.second));
      }
    }
    keys_["r"] = number(static_cast<double>(r_));
    keys_["lora_alpha"] = number(alpha_);
    keys_["use_rslora"] = boolean(c_.rule == scaling_rule::rank_stabilized);
    keys_["rank_pattern"] = ranks;
    keys_["alpha_pattern"] = alphas;
  }
  static void add(json& table, const std::string& key, json value) {
    value.key = key;
    table.items.push_back(std::move(value));
  }
  double alpha_of(const entry<T>& e) const {
    const auto& scale = e.parts().scale;
    if (scale.rule == c_.rule) return scale.alpha;
    return alpha_for(e.parts().twice ? e.scaling() / 2 : e.scaling(), c_.rule, e.rank());
  }

  const adapter_file<T>& file_;
  const config& c_;
  index_t r_ = file_.config().r;
  double alpha_ = file_.config().lora_alpha;
  std::map<std::string, json> keys_;
};

/// Throws value_error where something would be lost that reading back cannot tell.
template <scalar T>
void check(const adapter_file<T>& file) {
  if (!file.left_out().empty() || !file.passed_over().empty())
    lora::detail::raise_value(
        "peft::write", "the file was read without " +
                           io_detail::printable(file.left_out().empty() ? file.passed_over().front()
                                                                        : file.left_out().front()) +
                           ", which would be lost: read it strictly and whole");
  for (const auto& each : file.replacements())
    if (each.why == replacement::reason::unasked)
      lora::detail::raise_value(
          "peft::write",
          io_detail::in_quotes(each.key) +
              " is a tensor of the base that no key of the config asks for, so that a strict "
              "reader would refuse the file: copy the file as it is");
  for (const auto& [name, e] : file)
    if (e.change() != file.config().change && e.kind() == entry_kind::linear)
      lora::detail::raise_value(
          "peft::write", name +
                             " was converted, but the config still says that PEFT changes the base "
                             "(init_lora_weights, kasa_config): write it with make_file");
}

template <scalar T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}
template <class M>
bool same_bits(const M& a, const M& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() &&
         (a.size() == 0 ||
          std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * sizeof(*a.data())) ==
              0);
}

/// In what two entries differ; empty when they are the same function.
template <scalar T>
std::string difference(const entry<T>& given, const entry<T>& found) {
  const auto &a = given.parts(), &b = found.parts();
  if (a.kind != b.kind) return std::string("kind: ") + name_of(b.kind) + " for " + name_of(a.kind);
  if (a.experts.size() != b.experts.size()) return "number of experts";
  for (std::size_t k = 0; k < a.experts.size(); ++k) {
    const auto &x = a.experts[k], &y = b.experts[k];
    if (!same_bits(x.lora_A(), y.lora_A()) || !same_bits(x.lora_B(), y.lora_B())) return "factors";
    // alpha is the nearest double, whose quotient may be a neighbour of the scaling.
    if (std::abs(x.scaling() - y.scaling()) >
        2 * std::numeric_limits<double>::epsilon() * std::abs(x.scaling()))
      return "scaling";
  }
  if (!same_bits(a.bias, b.bias)) return "bias of lora_B";
  if (!same_bits(a.magnitude, b.magnitude)) return "magnitude";
  if (!same_bits(a.diagonal, b.diagonal)) return "diagonal";
  if (a.fan_in_fan_out != b.fan_in_fan_out) return "fan_in_fan_out";
  if (a.change != b.change) return "change of the base";
  if (a.kernel != b.kernel || a.groups != b.groups) return "kernel or groups";
  if (a.shared_with != b.shared_with) return "module whose weight it shares";
  if (a.stored_transposed != b.stored_transposed || a.orientation_unsaid != b.orientation_unsaid)
    return "orientation of slices";
  return {};
}

/// In what two tensors that replace one of the base differ; empty when in nothing.
inline std::string difference(const replacement& given, const replacement& found) {
  if (given.name != found.name || given.key != found.key) return "name";
  if (given.why != found.why) return "reason";
  if (given.dtype != found.dtype || given.shape != found.shape) return "dtype or shape";
  return given.bytes == found.bytes ? "" : "values";
}

/// Throws value_error when a reader would find something else than the file holds.
template <scalar T>
void compare(const adapter_file<T>& file, const adapter_file<T>& found) {
  const auto other = [](const std::string& what) {
    lora::detail::raise_value("peft::write", "read back, the adapter would be another: " + what);
  };
  for (const auto& [name, e] : file) {
    if (e.name() != name)
      other("the entry under " + io_detail::in_quotes(name) + " is called " +
            io_detail::in_quotes(e.name()));
    if (!found.contains(name)) other("it has no " + io_detail::in_quotes(name));
    if (const auto what = difference(e, found.at(name)); !what.empty())
      other("the " + what + " of " + io_detail::in_quotes(name));
  }
  if (found.size() != file.size()) other("it has more modules");
  if (found.replacements().size() != file.replacements().size())
    other("the number of tensors that replace the base's");
  for (std::size_t k = 0; k < file.replacements().size(); ++k) {
    const auto& given = file.replacements()[k];
    if (const auto what = difference(given, found.replacements()[k]); !what.empty())
      other("the " + what + " of " + io_detail::in_quotes(given.key) +
            ", which replaces a tensor of the base");
  }
  if (found.token_rows().size() != file.token_rows().size())
    other("the number of embeddings with trained rows");
  for (const auto& [name, rows] : file.token_rows()) {
    const auto there = found.token_rows().find(name);
    if (there == found.token_rows().end() || there->second.ids() != rows.ids() ||
        !same_bits(there->second.values(), rows.values()) ||
        found.row_dtype(name) != file.row_dtype(name))
      other("the trained rows of " + io_detail::in_quotes(name));
  }
}

template <scalar T>
void read_back(const adapter_file<T>& file, std::span<const std::byte> bytes,
               std::string_view text) {
  // As a reader would who knows no more than the files and what no file holds.
  const auto& given = file.options();
  const bool keeps = given.wrappers == wrapper_names::keep;
  const read_options options{.ignore_keys = given.ignore_keys,
                             .wrappers = keeps ? wrapper_names::keep : wrapper_names::refuse,
                             .parameter_order = given.parameter_order,
                             .parameters_in_out = given.parameters_in_out,
                             .attention_out_proj_twice = given.attention_out_proj_twice};
  const auto again = [&] {
    const auto tensors = safetensors::parse(bytes, "adapter_model.safetensors");
    return assemble<T>(parse_config(text, "adapter_config.json", options), tensors, options);
  };
#if defined(__cpp_exceptions)
  try {
    compare(file, again());
  } catch (const format_error& refused) {
    lora::detail::raise_value("peft::write",
                              std::string("a reader would refuse it: ") + refused.what());
  }
#else
  compare(file, again());
#endif
}

}  // namespace write_detail

/// The tensors of a file as bytes of adapter_model.safetensors. Not checked by reading them back:
/// only write() does that.
template <scalar T>
std::vector<std::byte> tensor_bytes(const adapter_file<T>& file) {
  write_detail::check(file);
  write_detail::tensor_store store;
  const std::string prefix(file.prefixed() ? io_detail::peft_keys::prefix : "");
  for (const auto& [name, e] : file) write_detail::entry_writer<T>(store, prefix, e).run();
  for (const auto& each : file.replacements())
    store.add(prefix + each.key, each.dtype, each.shape, each.bytes);
  for (const auto& [name, rows] : file.token_rows()) {
    const auto& values = rows.values();
    store.template add<T>(
        prefix + name + ".token_adapter.trainable_tokens_delta", file.row_dtype(name),
        {write_detail::extent(values.rows()), write_detail::extent(values.cols())},
        [&](std::size_t k) { return values.data()[k]; }, static_cast<std::size_t>(values.size()));
  }
  return safetensors::to_bytes(store.tensors(), {{"format", "pt"}});
}

/// The text of adapter_config.json. Not checked by reading it back: only write() does that.
template <scalar T>
std::string config_text(const adapter_file<T>& file) {
  write_detail::check(file);
  return write_detail::config_writer<T>(file).run();
}

/// Writes a directory; see the top of this file. It is created when it is not there.
template <scalar T>
void write(const std::filesystem::path& directory, const adapter_file<T>& file,
           const safetensors::write_options& options = {}) {
  const auto bytes = tensor_bytes(file);
  const auto text = config_text(file);
  write_detail::read_back<T>(file, bytes, text);
  std::error_code failure;
  std::filesystem::create_directories(directory, failure);
  if (failure)
    io_detail::refuse({.path = directory.string()}, "a directory to write", failure.message(),
                      "nothing was written");
  // Weights under another adapter's config would be scaled wrongly, so all that may fail is done
  // before either has its name.
  const auto weights_path = directory / "adapter_model.safetensors";
  io_detail::output_file weights(weights_path, bytes.size(), options.durability);
  weights.write(bytes);
  io_detail::output_file config(directory / "adapter_config.json", text.size(), options.durability);
  config.write(std::as_bytes(std::span(text)));
  weights.finish();
  config.finish();
  weights.publish();
  config.publish(
      "adapter_model.safetensors beside it is already the new one, and does not belong to this "
      "file: write both "
      "again before the adapter is read");
  io_detail::flush_folder(weights_path, options.durability);
}

}  // namespace lora::inline LORA_DETAIL_ABI::peft
