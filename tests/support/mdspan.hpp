// SPDX-License-Identifier: Apache-2.0
//
// As much of std::mdspan (C++23) as a view of rank 2 needs, member for member, for compilers that
// do not have it: extents with static and dynamic sizes, the three layouts, layout_stride's mapping
// not constructible from extents alone.
#pragma once

#include <array>
#include <cstddef>
#include <type_traits>

namespace test::md {

inline constexpr std::size_t dynamic = static_cast<std::size_t>(-1);

template <class Index, std::size_t E0, std::size_t E1>
class extents {
 public:
  using index_type = Index;
  static constexpr std::size_t rank() { return 2; }
  static constexpr std::size_t rank_dynamic() { return (E0 == dynamic) + (E1 == dynamic); }
  constexpr extents() = default;
  /// The dynamic sizes in order, or all sizes.
  template <class... I>
    requires(sizeof...(I) > 0 && (sizeof...(I) == rank_dynamic() || sizeof...(I) == 2))
  constexpr explicit extents(I... sizes) {
    const std::array<Index, sizeof...(I)> given{static_cast<Index>(sizes)...};
    if constexpr (sizeof...(I) == 2)
      sizes_ = given;
    else
      sizes_[E0 == dynamic ? 0 : 1] = given[0];
  }
  constexpr Index extent(std::size_t k) const { return sizes_[k]; }

 private:
  std::array<Index, 2> sizes_{static_cast<Index>(E0 == dynamic ? 0 : E0),
                              static_cast<Index>(E1 == dynamic ? 0 : E1)};
};

struct layout_right {
  template <class E>
  class mapping {
   public:
    constexpr explicit mapping(const E& e) : extents_(e) {}
    constexpr const E& extents() const { return extents_; }
    constexpr auto stride(std::size_t k) const {
      return k == 1 ? typename E::index_type{1} : extents_.extent(1);
    }

   private:
    E extents_;
  };
};
struct layout_left {
  template <class E>
  class mapping {
   public:
    constexpr explicit mapping(const E& e) : extents_(e) {}
    constexpr const E& extents() const { return extents_; }
    constexpr auto stride(std::size_t k) const {
      return k == 0 ? typename E::index_type{1} : extents_.extent(0);
    }

   private:
    E extents_;
  };
};
struct layout_stride {
  template <class E>
  class mapping {
   public:
    constexpr mapping(const E& e, std::array<typename E::index_type, 2> strides)
        : extents_(e), strides_(strides) {}
    constexpr const E& extents() const { return extents_; }
    constexpr auto stride(std::size_t k) const { return strides_[k]; }

   private:
    E extents_;
    std::array<typename E::index_type, 2> strides_;
  };
};

template <class T, class E, class Layout = layout_right>
class mdspan {
 public:
  using element_type = T;
  using value_type = std::remove_cv_t<T>;
  using extents_type = E;
  using layout_type = Layout;
  using mapping_type = typename Layout::template mapping<E>;
  using index_type = typename E::index_type;
  using reference = T&;
  static constexpr std::size_t rank() { return 2; }

  constexpr mdspan(T* data, const mapping_type& mapping) : data_(data), mapping_(mapping) {}
  constexpr mdspan(T* data, const E& e)
    requires std::is_constructible_v<mapping_type, E>
      : data_(data), mapping_(e) {}

  constexpr T* data_handle() const { return data_; }
  constexpr index_type extent(std::size_t k) const { return mapping_.extents().extent(k); }
  constexpr index_type stride(std::size_t k) const { return mapping_.stride(k); }
  constexpr T& at(std::size_t i, std::size_t j) const {
    return data_[i * static_cast<std::size_t>(stride(0)) + j * static_cast<std::size_t>(stride(1))];
  }

 private:
  T* data_;
  mapping_type mapping_;
};

/// As what std::linalg::scaled gives: its accessor makes twice each element.
template <class T, class E, class Layout = layout_right>
class doubled_mdspan : public mdspan<T, E, Layout> {
 public:
  using mdspan<T, E, Layout>::mdspan;
  using reference = T;
};

template <class Index = std::size_t>
using dextents = extents<Index, dynamic, dynamic>;

}  // namespace test::md
