// SPDX-License-Identifier: Apache-2.0
//
// A view names exactly the elements of what it looks at: address by address, for every storage
// order and every kind of argument, with the constness of the data and not of the handle.
#include <array>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

#include "lora/matrix_view.hpp"
#include "support/catch.hpp"
#include "support/mdspan.hpp"
#include "support/refused.hpp"

namespace {

using lora::index_t;
using lora::storage_order;
using test::mentions;
using test::refusal;
namespace md = test::md;

template <class View>
constexpr bool is_row_major = View::order == storage_order::row_major;
template <class View>
constexpr bool writes =
    !std::is_const_v<std::remove_pointer_t<decltype(std::declval<View>().data())>>;

/// The element itself of an Eigen object, const or not.
template <class M>
const void* address(M& m, index_t i, index_t j) {
  return &m.coeffRef(i, j);
}

/// Whether the view of m has its shape, the given order and constness, and names m's elements.
template <storage_order Order, bool Writes, class M>
bool names(M&& m) {
  const auto view = lora::as_matrix(m);
  using type = std::remove_const_t<decltype(view)>;
  static_assert(type::order == Order);
  static_assert(writes<type> == Writes);
  bool same = view.rows() == m.rows() && view.cols() == m.cols() && view.size() == m.size();
  for (index_t i = 0; i < m.rows(); ++i)
    for (index_t j = 0; j < m.cols(); ++j)
      same = same && static_cast<const void*>(&view(i, j)) == address(m, i, j);
  // The rows (columns) that the kernels walk along.
  for (index_t k = 0; k < view.outer_size(); ++k)
    for (index_t l = 0; l < view.inner_size(); ++l)
      same = same && view.outer(k) + l == (is_row_major<type> ? &view(k, l) : &view(l, k));
  return same;
}

constexpr auto row = storage_order::row_major;
constexpr auto col = storage_order::col_major;
using row_matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Eigen::MatrixXf;

template <class V>
bool counts_up(const V& view, std::initializer_list<float> by_rows) {
  auto next = by_rows.begin();
  for (index_t i = 0; i < view.rows(); ++i)
    for (index_t j = 0; j < view.cols(); ++j)
      if (next == by_rows.end() || view(i, j) != *next++) return false;
  return next == by_rows.end();
}

}  // namespace

TEST_CASE("row_major and col_major say how the memory is read", "[matrix_view]") {
  std::vector<float> v{0, 1, 2, 3, 4, 5};
  CHECK(counts_up(lora::row_major(v, 2, 3), {0, 1, 2, 3, 4, 5}));
  CHECK(counts_up(lora::col_major(v, 2, 3), {0, 2, 4, 1, 3, 5}));
  CHECK(counts_up(lora::row_major(v.data(), 2, 2, 3), {0, 1, 3, 4}));
  CHECK(counts_up(lora::col_major(v.data(), 2, 2, 3), {0, 3, 1, 4}));
  CHECK(counts_up(lora::row_major(v.data(), 3, 2), {0, 1, 2, 3, 4, 5}));
  CHECK(counts_up(lora::col_major(v.data(), 3, 2), {0, 3, 1, 4, 2, 5}));
  // A row-major PyTorch activation [tokens, features] is features x tokens, column-major.
  CHECK(lora::col_major(v, 3, 2)(2, 1) == 5);

  lora::row_major(v, 2, 3)(1, 0) = 33;
  CHECK(v[3] == 33);
}

TEST_CASE("vectors, arrays and spans of every constness", "[matrix_view]") {
  std::array<double, 4> a{1, 2, 3, 4};
  const std::array<double, 4> const_a = a;
  const std::vector<lora::bfloat16> const_v(6, lora::bfloat16(1));
  int k = 0;
  float c[6] = {};
  for (auto& each : c) each = static_cast<float>(k++);
  auto from_a = lora::row_major(a, 2, 2);
  static_assert(std::is_same_v<decltype(from_a), lora::matrix_view<double, row>>);
  static_assert(std::is_same_v<decltype(lora::col_major(const_a, 2, 2)),
                               lora::matrix_view<const double, col>>);
  static_assert(std::is_same_v<decltype(lora::row_major(const_v, 2, 2)),
                               lora::matrix_view<const lora::bfloat16, row>>);
  static_assert(std::is_same_v<decltype(lora::row_major(std::span<const double, 4>(a), 2, 2)),
                               lora::matrix_view<const double, row>>);
  static_assert(std::is_same_v<decltype(lora::col_major(std::span<double>(a), 2, 2)),
                               lora::matrix_view<double, col>>);
  CHECK(from_a(1, 0) == 3);
  CHECK(lora::col_major(const_a, 2, 2)(1, 0) == 2);
  CHECK(lora::row_major(std::span<const double, 4>(a), 2, 2).data() == a.data());
  CHECK(lora::row_major(c, 2, 3)(1, 2) == 5);
  CHECK(lora::row_major(std::span(c).subspan(1), 2, 2)(1, 1) == 4);
}

TEST_CASE("a span that is longer is fine, one that is too short is not", "[matrix_view]") {
  std::vector<float> v(6);
  CHECK(lora::row_major(v, 2, 2).size() == 4);
  CHECK(lora::row_major(v, 3, 2).size() == 6);
  const auto short_row = refusal<lora::shape_error>([&] { lora::row_major(v, 7, 1); });
  CHECK(mentions(short_row, {"row_major", "7x1", "6"}));
  const auto short_col = refusal<lora::shape_error>([&] { lora::col_major(v, 2, 4); });
  CHECK(mentions(short_col, {"col_major", "2x4", "6"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::row_major(v, -1, 2); }),
                 {"row_major", "-1x2"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::row_major(v, 2, -1); }), {"2x-1"}));
  // rows * cols overflows: it must not wrap round to something that fits.
  constexpr index_t half = index_t{1} << 32, huge = std::numeric_limits<index_t>::max();
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::row_major(v, half, half); }),
                 {"4294967296x4294967296"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::col_major(v, huge, 2); }), {"col_major"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::row_major(v, 2, huge); }), {"row_major"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::row_major(std::span<float>(), 1, 1); }),
                 {"1x1", "0"}));
}

TEST_CASE("sizes and strides that name an element twice, or none, are refused", "[matrix_view]") {
  float v[12] = {};
  CHECK(lora::row_major(v, 3, 4, 4).outer_stride() == 4);
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::row_major(v + 0, 3, 4, 3); }),
                 {"matrix_view", "3x4", "stride of 3"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::col_major(v + 0, 4, 3, 3); }),
                 {"4x3", "stride of 3"}));
  CHECK(lora::col_major(v + 0, 3, 4, 3).outer_stride() == 3);
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::row_major(v + 0, 3, 4, -4); }), {"-4"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::row_major(v + 0, -3, 4); }), {"-3x4"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::col_major(v + 0, 3, -4); }), {"3x-4"}));
}

TEST_CASE("empty views hold no element and touch none", "[matrix_view]") {
  std::vector<float> none;
  for (const auto& [rows, cols] : {std::pair<index_t, index_t>{0, 0}, {0, 5}, {5, 0}}) {
    const auto view = lora::row_major(none, rows, cols);
    CHECK(view.size() == 0);
    CHECK((view.rows() == rows && view.cols() == cols));
    CHECK((view.transpose().rows() == cols && view.transpose().cols() == rows));
    const auto other = lora::col_major(static_cast<const double*>(nullptr), rows, cols);
    CHECK(other.size() == 0);
    const MatrixXf m(rows, cols);
    CHECK(names<col, false>(m));
    CHECK(names<row, false>(m.transpose()));
  }
  const MatrixXf m = MatrixXf::Zero(4, 5);
  const auto view = lora::as_matrix(m);
  CHECK(view.block(4, 5, 0, 0).size() == 0);
  CHECK(view.block(4, 0, 0, 5).cols() == 5);
  CHECK(names<col, false>(m.block(1, 1, 0, 3)));
}

TEST_CASE("blocks lie where they say, and inside", "[matrix_view]") {
  MatrixXf m = MatrixXf::Zero(5, 7);
  const row_matrix r = row_matrix::Zero(5, 7);
  const auto by_cols = lora::as_matrix(m);
  const auto by_rows = lora::as_matrix(r);
  CHECK(&by_cols.block(1, 2, 3, 4)(2, 3) == &m(3, 5));
  CHECK(&by_rows.block(1, 2, 3, 4)(2, 3) == &r(3, 5));
  CHECK(&by_cols.middle_rows(2, 3)(0, 6) == &m(2, 6));
  CHECK(&by_rows.middle_cols(3, 4)(4, 0) == &r(4, 3));
  CHECK(&by_rows.block(1, 2, 3, 4).block(1, 1, 2, 2)(0, 1) == &r(2, 4));
  CHECK(&by_rows.transpose().block(2, 1, 4, 3)(3, 2) == &r(3, 5));
  by_cols.block(1, 1, 1, 1)(0, 0) = 9;
  CHECK(m(1, 1) == 9);
  constexpr index_t huge = std::numeric_limits<index_t>::max();
  for (const auto& [i, j, rows, cols] : {std::array<index_t, 4>{-1, 0, 1, 1},
                                         {0, -1, 1, 1},
                                         {0, 0, -1, 1},
                                         {0, 0, 1, -1},
                                         {3, 0, 3, 1},
                                         {0, 4, 1, 4},
                                         {6, 0, 0, 0},
                                         {0, 8, 0, 0},
                                         {huge, 0, 1, 1},
                                         {1, 0, huge, 1},
                                         {0, 1, 1, huge}}) {
    CAPTURE(i, j, rows, cols);
    CHECK(mentions(refusal<lora::shape_error>([&, i = i, j = j, rows = rows, cols = cols] {
                     by_cols.block(i, j, rows, cols);
                   }),
                   {"matrix_view::block", "5x7"}));
  }
  CHECK(mentions(refusal<lora::shape_error>([&] { by_rows.middle_rows(3, 3); }), {"3x7", "5x7"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { by_rows.middle_cols(7, 1); }), {"5x1", "5x7"}));
}

TEST_CASE("a transpose is the same memory", "[matrix_view]") {
  std::vector<float> v{0, 1, 2, 3, 4, 5, 6, 7};
  const auto view = lora::row_major(v.data(), 2, 3, 4);
  const auto turned = view.transpose();
  static_assert(std::is_same_v<decltype(turned.transpose()), lora::matrix_view<float, row>>);
  static_assert(turned.order == col);
  CHECK((turned.rows() == 3 && turned.cols() == 2 && turned.outer_stride() == 4));
  for (index_t i = 0; i < 2; ++i)
    for (index_t j = 0; j < 3; ++j) CHECK(&turned(j, i) == &view(i, j));
}

TEST_CASE("constness is that of the data", "[matrix_view]") {
  std::vector<float> v(4);
  const auto view = lora::row_major(v, 2, 2);
  view(0, 1) = 5;  // shallow, as std::span
  CHECK(v[1] == 5);
  const lora::matrix_view<const float, row> reading = view;
  CHECK(&reading(0, 1) == v.data() + 1);
  static_assert(
      !std::is_convertible_v<lora::matrix_view<const float, row>, lora::matrix_view<float, row>>);
  static_assert(
      !std::is_convertible_v<lora::matrix_view<float, row>, lora::matrix_view<float, col>>);
}

TEST_CASE("Eigen matrices, owners", "[matrix_view]") {
  MatrixXf c(4, 3);
  row_matrix r(4, 3);
  Eigen::Matrix<float, 3, 5> fixed;
  Eigen::Matrix<double, 3, 5, Eigen::RowMajor> fixed_rows;
  Eigen::Matrix<float, 1, 1> one;
  CHECK(names<col, true>(c));
  CHECK(names<row, true>(r));
  CHECK(names<col, true>(fixed));
  CHECK(names<row, true>(fixed_rows));
  CHECK(names<col, true>(one));
  CHECK(names<col, false>(std::as_const(c)));
  CHECK(names<row, false>(std::as_const(fixed_rows)));
  Eigen::Matrix<lora::bfloat16, Eigen::Dynamic, Eigen::Dynamic> ours(3, 2);
  Eigen::Matrix<Eigen::half, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> theirs(3, 2);
  CHECK(names<col, true>(ours));
  CHECK(names<row, true>(theirs));
  Eigen::VectorXf v(5);
  Eigen::RowVectorXf h(5);
  CHECK(names<col, true>(v));
  CHECK(names<row, true>(h));
}

TEST_CASE("Eigen maps", "[matrix_view]") {
  float data[40] = {};
  using stride = Eigen::OuterStride<>;
  CHECK(names<col, true>(Eigen::Map<MatrixXf>(data, 3, 4)));
  CHECK(names<row, true>(Eigen::Map<row_matrix>(data, 3, 4)));
  CHECK(names<col, false>(Eigen::Map<const MatrixXf>(data, 3, 4)));
  CHECK(names<col, true>(Eigen::Map<MatrixXf, 0, stride>(data, 3, 4, stride(7))));
  CHECK(names<row, true>(Eigen::Map<row_matrix, 0, stride>(data, 4, 3, stride(9))));
  CHECK(names<row, false>(Eigen::Map<const row_matrix, 0, stride>(data, 4, 3, stride(9))));
  CHECK(lora::as_matrix(Eigen::Map<row_matrix, 0, stride>(data, 4, 3, stride(9))).outer_stride() ==
        9);
  const Eigen::Map<MatrixXf> shallow(data, 3, 4);
  CHECK(names<col, true>(shallow));
  // Vectors with a stride: matrices in the other order.
  using inner = Eigen::InnerStride<>;
  CHECK(names<row, true>(Eigen::Map<Eigen::VectorXf, 0, inner>(data, 5, inner(3))));
  CHECK(names<col, true>(Eigen::Map<Eigen::RowVectorXf, 0, inner>(data, 5, inner(3))));
  CHECK(names<row, true>(Eigen::Map<Eigen::VectorXf, 0, Eigen::InnerStride<2>>(data, 5)));
  CHECK(names<row, true>(Eigen::Map<Eigen::VectorXf, 0, inner>(data, 1, inner(0))));
  CHECK(mentions(refusal<lora::shape_error>([&] {
                   lora::as_matrix(Eigen::Map<Eigen::VectorXf, 0, inner>(data, 5, inner(0)));
                 }),
                 {"matrix_view", "5x1", "stride of 0"}));
  CHECK(mentions(refusal<lora::shape_error>([&] {
                   lora::as_matrix(Eigen::Map<MatrixXf, 0, stride>(data, 3, 4, stride(2)));
                 }),
                 {"3x4", "stride of 2"}));
}

TEST_CASE("Eigen blocks, rows, columns and segments", "[matrix_view]") {
  MatrixXf c(6, 8);
  row_matrix r(6, 8);
  CHECK(names<col, true>(c.block(1, 2, 3, 4)));
  CHECK(names<row, true>(r.block(1, 2, 3, 4)));
  CHECK(names<row, true>(r.middleRows(2, 3)));
  CHECK(names<col, true>(c.middleRows(2, 3)));
  CHECK(names<row, true>(r.rightCols(5)));
  CHECK(names<col, true>(c.block<2, 3>(1, 1)));
  CHECK(names<col, true>(c.block(1, 2, 4, 5).block(1, 1, 2, 2)));
  CHECK(names<col, false>(std::as_const(c).topRows(2)));
  const auto kept = r.topRows(2);
  CHECK(names<row, true>(kept));  // a const Block of mutable data
  // A single row or column of a block, where Eigen may report any stride.
  CHECK(names<col, true>(c.block(1, 2, 3, 1)));
  CHECK(names<row, true>(r.block(1, 2, 1, 3)));
  CHECK(names<col, true>(c.block(1, 2, 1, 3)));
  CHECK(names<row, true>(r.block(1, 2, 3, 1)));
  // Along the storage order elements are adjacent; across it they lie a stride apart.
  CHECK(names<col, true>(c.col(3)));
  CHECK(names<col, true>(c.row(3)));
  CHECK(names<row, true>(r.row(3)));
  CHECK(names<row, true>(r.col(3)));
  CHECK(names<col, true>(c.row(3).segment(2, 4)));
  CHECK(names<row, true>(r.col(3).segment(2, 4)));
  CHECK(names<col, false>(std::as_const(c).row(3)));
  CHECK(names<col, true>(c.col(3).segment(2, 4)));
  CHECK(lora::as_matrix(c.row(3)).outer_stride() == 6);
  Eigen::VectorXf v(9);
  CHECK(names<col, true>(v.head(4)));
  CHECK(names<col, true>(v.tail<3>()));
  CHECK(names<col, false>(std::as_const(v).segment(2, 5)));
}

namespace {
/// Eigen's manual shows how to derive from Matrix.
class named_matrix : public MatrixXf {
 public:
  using MatrixXf::MatrixXf;
};
}  // namespace

TEST_CASE("a class derived from an Eigen matrix is that matrix", "[matrix_view]") {
  named_matrix m(3, 4);
  CHECK(names<col, true>(m));
  CHECK(names<col, false>(std::as_const(m)));
  CHECK(names<row, true>(m.transpose()));
}

TEST_CASE("Eigen transposes and refs", "[matrix_view]") {
  MatrixXf c(6, 8);
  row_matrix r(6, 8);
  CHECK(names<row, true>(c.transpose()));
  CHECK(names<col, true>(r.transpose()));
  CHECK(names<row, true>(c.block(1, 2, 3, 4).transpose()));
  CHECK(names<col, true>(r.transpose().block(1, 2, 3, 4)));
  CHECK(names<row, false>(std::as_const(c).transpose()));
  CHECK(names<row, true>(c.row(2).transpose()));
  CHECK(names<col, true>(r.col(2).transpose()));
  Eigen::Ref<MatrixXf> ref(c);
  Eigen::Ref<MatrixXf> part(c.block(1, 1, 3, 3));
  Eigen::Ref<row_matrix> rows(r.rightCols(4));
  const Eigen::Ref<const MatrixXf> reading(c.leftCols(3));
  CHECK(names<col, true>(ref));
  CHECK(names<col, true>(part));
  CHECK(names<row, true>(rows));
  CHECK(names<col, false>(reading));
  CHECK(&lora::as_matrix(part)(0, 0) == &c(1, 1));
}

static_assert(lora::matrix_like<test::md::mdspan<float, test::md::dextents<>>>);
static_assert(!lora::matrix_like<test::md::doubled_mdspan<float, test::md::dextents<>>>,
              "what an accessor makes of the elements must not be passed over");

TEST_CASE("mdspan of layout_right and layout_left", "[matrix_view]") {
  std::vector<float> v(20);
  const auto check = [&](auto span, auto order) {
    const auto view = lora::as_matrix(span);
    static_assert(decltype(view)::order == order());
    bool same = view.rows() == static_cast<index_t>(span.extent(0)) &&
                view.cols() == static_cast<index_t>(span.extent(1));
    for (index_t i = 0; i < view.rows(); ++i)
      for (index_t j = 0; j < view.cols(); ++j)
        same = same &&
               &view(i, j) == &span.at(static_cast<std::size_t>(i), static_cast<std::size_t>(j));
    return same;
  };
  using in_rows = std::integral_constant<storage_order, row>;
  using in_cols = std::integral_constant<storage_order, col>;
  using dynamic = md::dextents<>;
  CHECK(check(md::mdspan<float, dynamic>(v.data(), dynamic(4, 5)), in_rows{}));
  CHECK(check(md::mdspan<const float, dynamic>(v.data(), dynamic(4, 5)), in_rows{}));
  CHECK(check(md::mdspan<float, dynamic, md::layout_left>(v.data(), dynamic(4, 5)), in_cols{}));
  CHECK(check(md::mdspan<float, md::dextents<int>>(v.data(), md::dextents<int>(4, 5)), in_rows{}));
  using fixed = md::extents<std::size_t, 4, 5>;
  CHECK(check(md::mdspan<float, fixed>(v.data(), fixed{}), in_rows{}));
  CHECK(check(md::mdspan<float, fixed, md::layout_left>(v.data(), fixed{}), in_cols{}));
  using tall = md::extents<std::size_t, md::dynamic, 5>;
  using wide = md::extents<std::size_t, 4, md::dynamic>;
  CHECK(check(md::mdspan<float, tall>(v.data(), tall(4)), in_rows{}));
  CHECK(check(md::mdspan<float, tall, md::layout_left>(v.data(), tall(4)), in_cols{}));
  CHECK(check(md::mdspan<float, wide>(v.data(), wide(5)), in_rows{}));
  CHECK(check(md::mdspan<float, wide, md::layout_left>(v.data(), wide(5)), in_cols{}));
  // One row or one column is the same memory either way.
  CHECK(check(md::mdspan<float, dynamic, md::layout_left>(v.data(), dynamic(1, 5)), in_cols{}));
  CHECK(check(md::mdspan<float, dynamic>(v.data(), dynamic(5, 1)), in_rows{}));
  CHECK(check(md::mdspan<float, dynamic>(v.data(), dynamic(0, 5)), in_rows{}));

  static_assert(lora::matrix_like<md::mdspan<lora::float16, dynamic>>);
  static_assert(!lora::matrix_like<md::mdspan<int, dynamic>>);
  static_assert(
      std::is_same_v<decltype(lora::as_matrix(std::declval<md::mdspan<const float, dynamic>>())),
                     lora::matrix_view<const float, row>>);
}

TEST_CASE("mdspan of layout_stride, whose order the caller names", "[matrix_view]") {
  std::vector<float> v(60);
  using extents = md::dextents<>;
  using span = md::mdspan<float, extents, md::layout_stride>;
  using mapping = span::mapping_type;
  const span rows(v.data(), mapping(extents(3, 4), {7, 1}));
  const auto view = lora::row_major(rows);
  CHECK(view.outer_stride() == 7);
  CHECK(&view(2, 3) == &rows.at(2, 3));
  const span cols(v.data(), mapping(extents(3, 4), {1, 9}));
  CHECK(lora::col_major(cols).outer_stride() == 9);
  CHECK(&lora::col_major(cols)(2, 3) == &cols.at(2, 3));
  const auto wrong = refusal<lora::shape_error>([&] { lora::row_major(cols); });
  CHECK(mentions(wrong, {"row_major", "dimension 1", "9", "not 1"}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::col_major(rows); }),
                 {"col_major", "dimension 0", "7"}));
  const span both(v.data(), mapping(extents(3, 4), {10, 2}));
  CHECK(mentions(refusal<lora::shape_error>([&] { lora::row_major(both); }), {"2, not 1"}));
  // With one row the stride between rows says nothing, with one element in a row the stride inside
  // it neither.
  CHECK(lora::row_major(span(v.data(), mapping(extents(1, 4), {0, 1}))).cols() == 4);
  const span column(v.data(), mapping(extents(3, 1), {5, 2}));
  CHECK(&lora::row_major(column)(2, 0) == &column.at(2, 0));
  // More rows than an index counts.
  const extents endless(std::size_t{1} << 63, 4);
  CHECK(mentions(refusal<lora::shape_error>(
                     [&] { lora::as_matrix(md::mdspan<float, extents>(v.data(), endless)); }),
                 {"matrix_view", "x4", "must not be negative"}));
  // Rows closer than they are long share elements.
  CHECK(mentions(refusal<lora::shape_error>([&] {
                   lora::row_major(span(v.data(), mapping(extents(3, 4), {2, 1})));
                 }),
                 {"3x4", "stride of 2"}));
}

TEST_CASE("what is a matrix and what is not", "[matrix_view]") {
  static_assert(lora::matrix_like<MatrixXf> && lora::matrix_like<const MatrixXf&>);
  static_assert(lora::matrix_like<lora::matrix_view<const lora::float16, row>>);
  static_assert(lora::matrix_like<decltype(MatrixXf() + MatrixXf())>,
                "refused by a sentence, not by the concept");
  static_assert(!lora::matrix_like<Eigen::MatrixXi> && !lora::matrix_like<Eigen::MatrixXcf>);
  static_assert(!lora::matrix_like<Eigen::ArrayXXf> && !lora::matrix_like<std::vector<float>>);
  static_assert(!lora::matrix_like<float> && !lora::matrix_like<float*>);
  static_assert(lora::activations<std::vector<float>> &&
                lora::activations<std::span<const lora::bfloat16>>);
  static_assert(lora::activations<std::array<double, 3>> && lora::activations<MatrixXf>);
  static_assert(!lora::activations<std::vector<int>> &&
                !lora::activations<std::vector<std::vector<float>>>);
  static_assert(lora::scalar<float> && lora::scalar<Eigen::bfloat16> && !lora::scalar<int> &&
                !lora::scalar<long double>);
  static_assert(std::is_same_v<lora::accumulator_t<float, lora::bfloat16>, float>);
  static_assert(std::is_same_v<lora::accumulator_t<MatrixXf, Eigen::MatrixXd>, double>);
  static_assert(std::is_same_v<lora::accumulator_t<lora::bfloat16, std::vector<double>>, double>);
  static_assert(std::is_same_v<lora::accumulator_t<Eigen::Matrix<Eigen::half, 2, 2>>, float>);
  // A view is small and copied freely.
  static_assert(std::is_trivially_copyable_v<lora::matrix_view<float, row>>);
  CHECK(sizeof(lora::matrix_view<float, row>) == 4 * sizeof(void*));
}
