// SPDX-License-Identifier: Apache-2.0
//
// any_kind: an adapter of a kind that is known at run time. Every verb takes it where it takes an
// adapter.
#pragma once

#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "lora/adapter.hpp"
#include "lora/steps.hpp"

namespace lora::inline LORA_DETAIL_ABI {

namespace detail {
/// A kind with its strength, kept by value.
template <adapter_kind K>
class strong_kind {
 public:
  using value_type = typename K::value_type;
  explicit strong_kind(const scaled_kind<K>& l) : strength_(l.strength()), of_(l.of()) {}
  index_t out_features() const { return of_.out_features(); }
  index_t in_features() const { return of_.in_features(); }
  bool holds_double() const { return holds_double_now(of_); }
  bool stored_in_out() const { return is_stored_in_out(of_); }
  void check_fits(const char* operation, index_t out, index_t in) const {
    check_kind(operation, of_, out, in);
  }
  template <class Acc>
  std::vector<step<Acc>> steps(step_request<Acc> request) const {
    request.strength *= strength_;
    return of_.template steps<Acc>(request);
  }

 private:
  double strength_;
  K of_;
};
}  // namespace detail

/// An adapter of any kind in the format that it came in. Immutable, never empty; copies share what
/// they hold. holds_double() says whether its numbers are double: verbs then accumulate in double.
class [[nodiscard]] any_kind {
 public:
  using value_type = float;

  /// Copies a low-rank adapter, or keeps a kind (kinds share what they hold).
  template <class K>
    requires((low_rank<K> || adapter_kind<K>) && !std::is_same_v<K, any_kind>)
  any_kind(const K& kind)  // NOLINT(google-explicit-constructor): it is the same adapter
      : held_(std::make_shared<const model<K>>(kind)) {}
  any_kind(const any_kind&) = default;
  any_kind& operator=(const any_kind&) = default;
  ~any_kind() = default;

  index_t out_features() const { return held_->out_features(); }
  index_t in_features() const { return held_->in_features(); }
  bool holds_double() const { return held_->holds_double(); }
  bool stored_in_out() const { return held_->stored_in_out(); }
  void check_fits(const char* operation, index_t out_features, index_t in_features) const {
    held_->check_fits(operation, out_features, in_features);
  }
  template <class Acc>
  std::vector<step<Acc>> steps(const step_request<Acc>& request) const {
    return held_->steps(request);
  }
  /// The kind inside, or null where it is another. A low-rank adapter is none: its steps have it.
  template <class K>
    requires(adapter_kind<K> && !low_rank<K>)
  const K* get_if() const {
    return held_->type() == &type_of<K> ? &static_cast<const model<K>*>(held_.get())->kind()
                                        : nullptr;
  }
  /// Whether both are one adapter in memory.
  friend bool operator==(const any_kind& a, const any_kind& b) { return a.held_ == b.held_; }

 private:
  /// Its address tells a type from others, without run-time type information.
  template <class K>
  static inline const char type_of = 0;

  class concept_of {
   public:
    virtual ~concept_of() = default;
    virtual const void* type() const = 0;
    virtual index_t out_features() const = 0;
    virtual index_t in_features() const = 0;
    virtual bool holds_double() const = 0;
    virtual bool stored_in_out() const = 0;
    virtual void check_fits(const char* operation, index_t out_features,
                            index_t in_features) const = 0;
    virtual std::vector<step<float>> steps(const step_request<float>& request) const = 0;
    virtual std::vector<step<double>> steps(const step_request<double>& request) const = 0;
  };

  /// A low-rank adapter of a user's type is copied into one that owns row-major factors.
  template <class K>
  static auto kept(const K& kind) {
    if constexpr (low_rank<K>)
      return any_factors::copy_of(kind);
    else if constexpr (detail::is_scaled_kind<K>)
      return detail::strong_kind<std::remove_cvref_t<decltype(kind.of())>>(
          kind);  // kind looks at an adapter
    else
      return kind;
  }

  template <class K>
  class model final : public concept_of {
   public:
    explicit model(const K& kind) : kind_(kept(kind)) {}
    const auto& kind() const { return kind_; }
    const void* type() const override { return &type_of<K>; }
    index_t out_features() const override { return kind_.out_features(); }
    index_t in_features() const override { return kind_.in_features(); }
    bool holds_double() const override { return detail::holds_double_now(kind_); }
    bool stored_in_out() const override { return detail::is_stored_in_out(kind_); }
    void check_fits(const char* operation, index_t out_features,
                    index_t in_features) const override {
      detail::check_kind(operation, kind_, out_features, in_features);
    }
    std::vector<step<float>> steps(const step_request<float>& request) const override {
      return of(request);
    }
    std::vector<step<double>> steps(const step_request<double>& request) const override {
      return of(request);
    }

   private:
    template <class Acc>
    std::vector<step<Acc>> of(const step_request<Acc>& request) const {
      if constexpr (low_rank<K>) {
        const double strength = request.strength;
        if (detail::is_zero(strength * kind_.scaling())) return {};
        return {low_rank_step{kind_, strength}};
      } else {
        return kind_.template steps<Acc>(request);
      }
    }
    decltype(kept(std::declval<const K&>())) kind_;
  };

  std::shared_ptr<const concept_of> held_;
};
static_assert(adapter_kind<any_kind>);

}  // namespace lora::inline LORA_DETAIL_ABI
