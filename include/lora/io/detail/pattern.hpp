// SPDX-License-Identifier: Apache-2.0
//
// Regular expressions as Python's re reads them, for the patterns in adapter configs. A pattern
// comes from a stranger's file, so matching is a walk over a set of states: time is at most (cost
// of the pattern) x (length of the name), nothing recurses on the text, and what is not supported
// is refused with its name instead of being guessed.
//
// Supported: characters, . \. \d \D \w \W \s \S \b \B \A \Z, classes with ranges, groups ( ) (?: )
// (?P<n> ), |, ^ $, and the repetitions * + ? {m} {m,} {m,n}, also lazy (whether a text matches
// does not depend on it). Not supported: lookaround, references to groups, inline flags, possessive
// and atomic forms, numeric escapes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora/version.hpp"

namespace lora::inline LORA_DETAIL_ABI::io_detail {

/// The code points of UTF-8 that was checked before; a byte that is none stands for itself.
inline std::u32string code_points(std::string_view utf8) {
  std::u32string result;
  for (std::size_t k = 0; k < utf8.size();) {
    const auto first = static_cast<unsigned char>(utf8[k]);
    const std::size_t length = first < 0xC0 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    if (length == 1 || k + length > utf8.size()) {
      result += static_cast<char32_t>(first);
      ++k;
      continue;
    }
    char32_t point = first & (0x7Fu >> length);
    for (std::size_t j = 1; j < length; ++j)
      point = point << 6 | (static_cast<unsigned char>(utf8[k + j]) & 0x3Fu);
    result += point;
    k += length;
  }
  return result;
}

/// \d, \w and \s of ASCII.
inline bool in_ascii_class(char letter, char32_t c) {
  const bool digit = c >= '0' && c <= '9';
  if (letter == 'd') return digit;
  if (letter == 's') return c == ' ' || (c >= 9 && c <= 13) || (c >= 28 && c <= 31);
  return digit || c == '_' || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

/// A set of characters: single ones and ranges, and the letters of escapes like \d (in lower case,
/// with their sense).
struct character_class {
  std::vector<std::pair<char32_t, char32_t>> ranges;
  std::vector<std::pair<char, bool>> escapes;  // second: as written, or its complement
  bool complement = false;

  std::size_t size() const { return ranges.size() + escapes.size(); }
  bool holds(char32_t c) const {
    const bool listed = std::any_of(ranges.begin(), ranges.end(),
                                    [c](const auto& r) { return c >= r.first && c <= r.second; }) ||
                        std::any_of(escapes.begin(), escapes.end(), [c](const auto& e) {
                          return in_ascii_class(e.first, c) == e.second;
                        });
    return listed != complement;
  }
};

/// One step of a compiled pattern.
struct pattern_step {
  enum class kind {
    character,
    any,
    one_of,
    fork,
    jump,
    begin,
    end,
    end_of_text,
    boundary,
    no_boundary,
    accept
  };
  kind what = kind::accept;
  char32_t character = 0;
  std::uint32_t first = 0,
                second =
                    0;  // where to go on (fork: both; jump: first), or the class (one_of: first)
};

/// A syntax tree of indices, so that it is freed without recursion.
struct pattern_node {
  enum class kind { empty, step, sequence, choice, repeat };
  kind what = kind::empty;
  pattern_step step = {};
  std::vector<std::uint32_t> parts = {};
  std::uint32_t least = 0, most = 0;  // repeat; most 0xFFFFFFFF: no limit
};

/// Text to tree. fault() is empty when the pattern is understood.
class pattern_parser {
 public:
  explicit pattern_parser(std::u32string text) : text_(std::move(text)) {}

  std::uint32_t parse() {
    if (text_.size() > longest)
      return refuse("it is longer than " + std::to_string(longest) + " characters");
    const std::uint32_t root = choice();
    if (!failed() && at_ < text_.size()) return refuse("')' without '('");
    return root;
  }
  const std::string& fault() const { return fault_; }

  std::vector<pattern_node> nodes;
  std::vector<character_class> classes;
  bool uses_escapes = false;  // \d and its like, whose meaning beyond ASCII is not known here

 private:
  using step_kind = pattern_step::kind;
  static constexpr std::size_t longest = 4096;
  static constexpr int deepest = 32;
  static constexpr std::uint32_t unlimited = 0xFFFFFFFFu;

  bool failed() const { return !fault_.empty(); }
  std::uint32_t refuse(std::string why) {
    if (!failed()) fault_ = std::move(why);
    at_ = text_.size();
    return 0;
  }
  bool has(char32_t c) const { return at_ < text_.size() && text_[at_] == c; }
  bool take(char32_t c) {
    if (!has(c)) return false;
    ++at_;
    return true;
  }
  std::uint32_t add(pattern_node node) {
    nodes.push_back(std::move(node));
    return static_cast<std::uint32_t>(nodes.size() - 1);
  }
  std::uint32_t add(step_kind kind, char32_t c = 0, std::uint32_t set = 0) {
    return add(
        {.what = pattern_node::kind::step, .step = {.what = kind, .character = c, .first = set}});
  }

  std::uint32_t choice() {
    pattern_node node{.what = pattern_node::kind::choice};
    do node.parts.push_back(sequence());
    while (!failed() && take('|'));
    return add(std::move(node));
  }

  std::uint32_t sequence() {
    pattern_node node{.what = pattern_node::kind::sequence};
    while (!failed() && at_ < text_.size() && !has('|') && !has(')'))
      node.parts.push_back(repeated());
    return add(std::move(node));
  }

  std::uint32_t repeated() {
    const std::uint32_t what = single();
    std::uint32_t least = 0, most = 0;
    if (failed() || !repetition(least, most)) return what;
    if (take('+')) return refuse("a possessive repetition");
    take('?');  // lazy: the same texts match
    std::uint32_t again_least = 0, again_most = 0;
    if (repetition(again_least, again_most)) return refuse("a repetition of a repetition");
    if (nodes[what].what == pattern_node::kind::step && is_position(nodes[what].step.what))
      return refuse("a repetition of a position");
    return add({.what = pattern_node::kind::repeat, .parts = {what}, .least = least, .most = most});
  }

  static bool is_position(step_kind kind) {
    return kind == step_kind::begin || kind == step_kind::end || kind == step_kind::end_of_text ||
           kind == step_kind::boundary || kind == step_kind::no_boundary;
  }

  /// * + ? {m} {m,} {,n} {m,n}; a brace that is none of these is a character, as in Python.
  bool repetition(std::uint32_t& least, std::uint32_t& most) {
    least = has('+') ? 1 : 0;
    most = has('?') ? 1 : unlimited;
    if (take('*') || take('+') || take('?')) return true;
    const std::size_t start = at_;
    if (!take('{')) return false;
    const bool has_least = number(least), comma = take(',');
    if (!comma) most = least;
    if (comma && !number(most)) most = unlimited;
    if (!(has_least || comma) || !take('}')) {
      at_ = start;
      return false;
    }
    if (most < least) refuse("a repetition {m,n} with n below m");
    return true;
  }
  bool number(std::uint32_t& value) {
    const std::size_t start = at_;
    for (value = 0; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_)
      value = std::min<std::uint32_t>(value * 10 + static_cast<std::uint32_t>(text_[at_] - '0'),
                                      100'000);
    return at_ > start;
  }

  std::uint32_t single() {
    const char32_t c = text_[at_++];
    switch (c) {
      case '.': return add(step_kind::any);
      case '^': return add(step_kind::begin);
      case '$': return add(step_kind::end);
      case '(': return group();
      case '[': return bracket();
      case '\\': return escape();
      case '*':
      case '+':
      case '?': return refuse("a repetition of nothing");
      case '{': return brace();
      default: return add(step_kind::character, c);
    }
  }

  std::uint32_t brace() {
    --at_;
    std::uint32_t least = 0, most = 0;
    if (repetition(least, most)) return refuse("a repetition of nothing");
    ++at_;
    return add(step_kind::character, U'{');
  }

  std::uint32_t group() {
    if (++depth_ > deepest)
      return refuse("groups nested more than " + std::to_string(deepest) + " deep");
    if (take('?') && !take(':')) {
      if (!take('P') || !take('<'))
        return refuse("a group that begins with \"(?\" and is neither (?: nor (?P<name>");
      while (at_ < text_.size() && !has('>')) ++at_;
      if (!take('>')) return refuse("a group name without end");
    }
    const std::uint32_t inside = choice();
    if (!failed() && !take(')')) return refuse("'(' without ')'");
    --depth_;
    return inside;
  }

  std::uint32_t escape() {
    if (at_ == text_.size()) return refuse("a backslash at the end");
    const char32_t c = text_[at_++];
    if (c == 'A') return add(step_kind::begin);
    if (c == 'Z') return add(step_kind::end_of_text);
    if (c == 'b' || c == 'B') {
      uses_escapes = true;
      return add(c == 'b' ? step_kind::boundary : step_kind::no_boundary);
    }
    character_class set;
    if (class_escape(c, set)) {
      classes.push_back(std::move(set));
      return add(step_kind::one_of, 0, static_cast<std::uint32_t>(classes.size() - 1));
    }
    char32_t meant = 0;
    if (!plain_escape(c, meant)) return refuse(escape_text(c));
    return add(step_kind::character, meant);
  }
  bool class_escape(char32_t c, character_class& set) {
    const std::string_view letters = "dwsDWS";
    const auto found = c < 128 ? letters.find(static_cast<char>(c)) : std::string_view::npos;
    if (found == std::string_view::npos) return false;
    set.escapes.emplace_back(letters[found % 3], found < 3);
    uses_escapes = true;
    return true;
  }
  /// Punctuation stands for itself; letters and digits mean something, of which the control
  /// characters are known.
  static bool plain_escape(char32_t c, char32_t& meant) {
    meant = c == 'n'   ? U'\n'
            : c == 't' ? U'\t'
            : c == 'r' ? U'\r'
            : c == 'f' ? U'\f'
            : c == 'v' ? U'\v'
            : c == 'a' ? U'\a'
                       : c;
    return meant != c || !(in_ascii_class('w', c) && c != '_');
  }
  static std::string escape_text(char32_t c) {
    return c >= '0' && c <= '9' ? "a reference to a group, or a numeric escape"
                                : "the escape \\" + std::string(1, static_cast<char>(c));
  }

  std::uint32_t bracket() {
    character_class set;
    set.complement = take('^');
    for (bool first = true; first || !has(']'); first = false) {
      char32_t low = 0;
      if (!bracket_item(low, set)) {
        if (failed()) return 0;
        continue;  // \d and its like
      }
      char32_t high = low;
      if (has('-') && at_ + 1 < text_.size() && text_[at_ + 1] != ']') {
        ++at_;
        character_class unused;
        if (!bracket_item(high, unused)) return refuse("a range that ends in a class");
        if (high < low) return refuse("a range that ends before it begins");
      }
      set.ranges.emplace_back(low, high);
    }
    ++at_;
    classes.push_back(std::move(set));
    return add(step_kind::one_of, 0, static_cast<std::uint32_t>(classes.size() - 1));
  }
  /// One character of a bracket, or (false) an escape that adds to the set; false with a fault at
  /// the end of the text.
  bool bracket_item(char32_t& c, character_class& set) {
    if (at_ < text_.size() && text_[at_] != '\\') {
      c = text_[at_++];
      return true;
    }
    if (at_ + 1 >= text_.size()) {
      refuse("'[' without ']'");
      return false;
    }
    c = text_[at_ + 1];
    at_ += 2;
    if (class_escape(c, set)) return false;
    char32_t meant = U'\b';
    if (c != 'b' && !plain_escape(c, meant)) {
      refuse(escape_text(c));
      return false;
    }
    c = meant;
    return true;
  }

  std::u32string text_;
  std::size_t at_ = 0;
  int depth_ = 0;
  std::string fault_;
};

/// A compiled pattern.
class pattern {
 public:
  enum class verdict { no, yes, not_ascii };

  /// fault() says what is wrong with a pattern that is not supported; it then matches nothing.
  explicit pattern(std::string_view text) : pattern(text, false) {}
  /// (.*\.)?(TEXT)$, for a text that is a pattern by itself: parentheses that only fit together
  /// with ours would be another expression than the writer's.
  static pattern at_end_of_path(std::string_view text) { return {text, true}; }

  const std::string& fault() const { return fault_; }
  /// The steps and the parts of their classes: a match takes at most this number times the length
  /// of the text, and memory is in proportion to it.
  std::size_t cost() const { return cost_; }

  /// As re.match: from the beginning of the text, to anywhere.
  verdict matches_beginning(const std::u32string& text) const { return run(text, false); }
  /// As re.fullmatch.
  verdict matches_all(const std::u32string& text) const { return run(text, true); }

 private:
  using kind = pattern_step::kind;
  using places = std::vector<std::uint32_t>;
  static constexpr std::size_t most_steps = 20'000;

  pattern(std::string_view text, bool behind_path) {
    pattern_parser parser(code_points(text));
    const std::uint32_t root = parser.parse();
    fault_ = parser.fault();
    if (!fault_.empty()) return;
    classes_ = std::move(parser.classes);
    uses_escapes_ = parser.uses_escapes;
    if (behind_path) emit_path();
    emit(parser.nodes, root);
    if (behind_path) push(kind::end);
    push(kind::accept);
    if (budget_ == 0) {
      fault_ = "repetitions that multiply to more than " + std::to_string(most_steps) + " steps";
      return;
    }
    steps_.shrink_to_fit();
    cost_ = steps_.size();
    for (const auto& step : steps_)
      if (step.what == kind::one_of) cost_ += classes_[step.first].size();
    for (const auto& each : classes_) cost_ += 1 + each.size();
  }

  /// (.*\.)? at the beginning.
  void emit_path() {
    steps_ = {{.what = kind::fork, .first = 1, .second = 5},
              {.what = kind::fork, .first = 2, .second = 4},
              {.what = kind::any},
              {.what = kind::jump, .first = 1},
              {.what = kind::character, .character = U'.'}};
  }

  std::uint32_t here() const { return static_cast<std::uint32_t>(steps_.size()); }
  std::uint32_t push(kind what) {
    steps_.push_back({.what = what});
    return here() - 1;
  }

  // Depth of recursion: groups of the pattern, which the parser limits.
  void emit(const std::vector<pattern_node>& nodes, std::uint32_t index) {
    if (budget_ == 0 || --budget_ == 0) return;
    const pattern_node& node = nodes[index];
    if (node.what == pattern_node::kind::step) {
      steps_.push_back(node.step);
    } else if (node.what == pattern_node::kind::sequence) {
      for (const auto part : node.parts) emit(nodes, part);
    } else if (node.what == pattern_node::kind::choice) {
      emit_choice(nodes, node);
    } else if (node.what == pattern_node::kind::repeat) {
      emit_repeat(nodes, node);
    }
  }
  void emit_choice(const std::vector<pattern_node>& nodes, const pattern_node& node) {
    places ends;
    for (std::size_t k = 0; k + 1 < node.parts.size(); ++k) {
      const auto fork = push(kind::fork);
      steps_[fork].first = here();
      emit(nodes, node.parts[k]);
      ends.push_back(push(kind::jump));
      steps_[fork].second = here();
    }
    emit(nodes, node.parts.back());
    for (const auto end : ends) steps_[end].first = here();
  }
  void emit_repeat(const std::vector<pattern_node>& nodes, const pattern_node& node) {
    for (std::uint32_t k = 0; k < node.least && budget_ != 0; ++k) emit(nodes, node.parts[0]);
    if (node.most == 0xFFFFFFFFu) {
      const auto fork = push(kind::fork);
      steps_[fork].first = here();
      emit(nodes, node.parts[0]);
      steps_[push(kind::jump)].first = fork;
      steps_[fork].second = here();
      return;
    }
    places forks;
    for (std::uint32_t k = node.least; k < node.most && budget_ != 0; ++k) {
      forks.push_back(push(kind::fork));
      steps_[forks.back()].first = here();
      emit(nodes, node.parts[0]);
    }
    for (const auto fork : forks) steps_[fork].second = here();
  }

  verdict run(const std::u32string& text, bool whole) const {
    if (!fault_.empty()) return verdict::no;
    if (uses_escapes_ && std::any_of(text.begin(), text.end(), [](char32_t c) { return c > 127; }))
      return verdict::not_ascii;
    places now, next;
    std::vector<std::size_t> reached(steps_.size(),
                                     0);  // the position + 1 at which a step was added last
    bool accepted = add(now, reached, 0, text, 0) && (!whole || text.empty());
    for (std::size_t at = 0; at < text.size() && !accepted && !now.empty(); ++at) {
      next.clear();
      for (const auto k : now)
        if (consumes(steps_[k], text[at]))
          accepted =
              (add(next, reached, k + 1, text, at + 1) && (!whole || at + 1 == text.size())) ||
              accepted;
      std::swap(now, next);
    }
    return accepted ? verdict::yes : verdict::no;
  }

  bool consumes(const pattern_step& step, char32_t c) const {
    if (step.what == kind::character) return step.character == c;
    if (step.what == kind::any) return c != '\n';
    return step.what == kind::one_of && classes_[step.first].holds(c);
  }

  /// Adds the step and all that is reached from it without a character; true when that includes
  /// accept.
  bool add(places& states, std::vector<std::size_t>& reached, std::uint32_t from,
           const std::u32string& text, std::size_t at) const {
    bool accepted = false;
    places open{from};
    while (!open.empty()) {
      const auto k = open.back();
      open.pop_back();
      if (std::exchange(reached[k], at + 1) == at + 1) continue;
      const auto& step = steps_[k];
      if (step.what == kind::accept) accepted = true;
      if (step.what == kind::fork) open.push_back(step.second);
      if (step.what == kind::fork || step.what == kind::jump) open.push_back(step.first);
      if (position_holds(step.what, text, at)) open.push_back(k + 1);
      if (step.what == kind::character || step.what == kind::any || step.what == kind::one_of)
        states.push_back(k);
    }
    return accepted;
  }

  static bool position_holds(kind what, const std::u32string& text, std::size_t at) {
    const bool at_end = at == text.size();
    if (what == kind::begin) return at == 0;
    if (what == kind::end_of_text) return at_end;
    if (what == kind::end) return at_end || (at + 1 == text.size() && text[at] == '\n');
    // Python's \B does not hold in an empty text.
    if ((what != kind::boundary && what != kind::no_boundary) || text.empty()) return false;
    const bool before = at > 0 && in_ascii_class('w', text[at - 1]);
    const bool after = !at_end && in_ascii_class('w', text[at]);
    return (before != after) == (what == kind::boundary);
  }

  std::vector<pattern_step> steps_;
  std::vector<character_class> classes_;
  std::string fault_;
  std::size_t budget_ = most_steps, cost_ = 0;
  bool uses_escapes_ = false;
};

}  // namespace lora::inline LORA_DETAIL_ABI::io_detail
