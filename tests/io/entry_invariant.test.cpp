// SPDX-License-Identifier: Apache-2.0
//
// Parts that do not belong together become no entry. Before the constructor looked at them, one
// line of a caller's code could make a verb write behind its memory: a bias longer than the outputs
// (apply, merge with a bias), a dtype of 8 bits (write), experts of different shapes (merge of a
// stack, half-way), a diagonal shorter than the rank (converted).
#include <cstddef>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "lora/io/peft_convert.hpp"
#include "lora/io/peft_write.hpp"
#include "support/catch.hpp"
#include "support/refused.hpp"

namespace {

namespace peft = lora::peft;
using parts = peft::entry_parts<float>;
using kind = peft::entry_kind;
using dtype = lora::safetensors::dtype;

lora::adapter<float> factors(lora::index_t rank, lora::index_t out, lora::index_t in,
                             double alpha = 3) {
  return {Eigen::MatrixXf::Random(rank, in), Eigen::MatrixXf::Random(out, rank), {.alpha = alpha}};
}
parts linear() {
  parts p;
  p.name = "m.q";
  p.experts = {factors(2, 3, 5)};
  return p;
}
parts stack(std::size_t experts) {
  parts p = linear();
  p.kind = kind::parameter;
  p.experts.assign(experts, factors(2, 3, 5));
  return p;
}
parts convolution() {
  parts p;
  p.name = "m.c";
  p.kind = kind::convolution;
  p.experts = {factors(2, 4, 3 * 2 * 2)};
  p.in_channels = 3;
  p.kernel = {2, 2};
  p.groups = 2;
  return p;
}

/// What an entry of these parts is refused with: a value_error, or a shape_error where it is about
/// sizes.
std::string refusal(parts p, const std::function<void(parts&)>& change) {
  change(p);
  return test::refusal<lora::value_error>([&] { (void)peft::entry<float>(p); });
}
std::string size_refusal(parts p, const std::function<void(parts&)>& change) {
  change(p);
  return test::refusal<lora::shape_error>([&] { (void)peft::entry<float>(p); });
}

}  // namespace

TEST_CASE("parts that belong together are an entry", "[peft][entry]") {
  CHECK_NOTHROW(peft::entry<float>(linear()));
  CHECK_NOTHROW(peft::entry<float>(stack(3)));
  CHECK_NOTHROW(peft::entry<float>(convolution()));
  parts all = linear();
  all.bias = all.magnitude = {1, 2, 3};
  all.diagonal = {1, 2};
  all.dtype_A = dtype::bf16;
  all.dtype_B = dtype::f16;
  all.dtype_bias = dtype::f64;
  CHECK_NOTHROW(peft::entry<float>(all));
}

TEST_CASE("values for another number of outputs or ranks are refused", "[peft][entry]") {
  for (const std::size_t count : {1U, 2U, 4U, 100U}) {
    const std::vector<float> values(count, 1.0F);
    INFO(count << " values");
    CHECK(test::mentions(size_refusal(linear(), [&](parts& p) { p.bias = values; }),
                         {"m.q", "in the bias", "3 outputs"}));
    CHECK(test::mentions(size_refusal(linear(), [&](parts& p) { p.magnitude = values; }),
                         {"m.q", "magnitudes", "3 outputs"}));
    if (count != 2)
      CHECK(test::mentions(size_refusal(linear(), [&](parts& p) { p.diagonal = values; }),
                           {"m.q", "diagonal", "2 ranks"}));
  }
}

TEST_CASE("experts of one stack have one shape and one scaling", "[peft][entry]") {
  const auto with_last = [](lora::adapter<float> last) {
    return [last](parts& p) { p.experts.back() = last; };
  };
  CHECK(test::mentions(size_refusal(stack(3), with_last(factors(2, 4, 5))),
                       {"expert 2", "4x5", "3x5", "one shape"}));
  CHECK(test::mentions(size_refusal(stack(3), with_last(factors(2, 3, 6))),
                       {"expert 2", "one shape"}));
  CHECK(test::mentions(size_refusal(stack(3), with_last(factors(3, 3, 5))),
                       {"expert 2", "rank 3", "one shape"}));
  CHECK(test::mentions(refusal(stack(3), with_last(factors(2, 3, 5, 4))), {"different scalings"}));
  CHECK(test::mentions(refusal(linear(), [](parts& p) { p.experts.push_back(p.experts.front()); }),
                       {"linear", "only a parameter is a stack"}));
  CHECK(
      test::mentions(refusal(linear(), [](parts& p) { p.experts.clear(); }), {"needs an adapter"}));
}

TEST_CASE("a dtype that holds no factor is refused", "[peft][entry]") {
  for (const auto type :
       {dtype::boolean, dtype::i8, dtype::u8, dtype::i16, dtype::f8_e4m3, dtype::i64, dtype::f4}) {
    const std::string name(lora::safetensors::name_of(type));
    INFO(name);
    for (const auto where : {&parts::dtype_A, &parts::dtype_B, &parts::dtype_bias,
                             &parts::dtype_magnitude, &parts::dtype_diagonal})
      CHECK(test::mentions(refusal(linear(), [&](parts& p) { p.*where = type; }),
                           {"dtype", name.c_str(), "F64, F32, F16 and BF16"}));
  }
}

TEST_CASE("a kernel, groups and blocks fit the factors", "[peft][entry]") {
  const auto huge = std::numeric_limits<lora::index_t>::max();
  CHECK(test::mentions(size_refusal(convolution(),
                                    [](parts& p) {
                                      p.kernel = {3, 2};
                                    }),
                       {"18 inputs", "12 columns"}));
  CHECK(test::mentions(size_refusal(convolution(), [](parts& p) { p.in_channels = 4; }),
                       {"16 inputs", "12 columns"}));
  CHECK(test::mentions(size_refusal(convolution(), [](parts& p) { p.kernel = {}; }),
                       {"one to three extents"}));
  CHECK(test::mentions(size_refusal(convolution(),
                                    [&](parts& p) {
                                      p.kernel = {huge, 4};
                                    }),
                       {"extents of its kernel"}));
  CHECK(test::mentions(size_refusal(convolution(),
                                    [](parts& p) {
                                      p.kernel = {-2, -2};
                                    }),
                       {"extents of its kernel"}));
  CHECK(test::mentions(size_refusal(convolution(), [](parts& p) { p.groups = 3; }),
                       {"3 groups do not divide"}));
  CHECK(test::mentions(size_refusal(convolution(), [](parts& p) { p.groups = 0; }),
                       {"0 groups do not divide"}));
  CHECK(test::mentions(refusal(linear(), [](parts& p) { p.kernel = {5}; }), {"for convolutions"}));
  CHECK(test::mentions(refusal(linear(), [](parts& p) { p.groups = 2; }), {"for convolutions"}));
  const auto packed = [](peft::packed_factor which, lora::index_t blocks) {
    return [=](parts& p) {
      p.packed = which;
      p.blocks = blocks;
    };
  };
  CHECK(test::mentions(size_refusal(linear(), packed(peft::packed_factor::A, 2)),
                       {"2 blocks do not divide 2 and 5"}));
  CHECK(test::mentions(size_refusal(linear(), packed(peft::packed_factor::B, 0)), {"0 blocks"}));
  CHECK(
      test::mentions(refusal(stack(1), packed(peft::packed_factor::A, 1)), {"for linear modules"}));
  CHECK(test::mentions(refusal(convolution(), [](parts& p) { p.fan_in_fan_out = true; }),
                       {"fan_in_fan_out"}));
}

TEST_CASE("a stack that does not fit, or whose scaling overflows, is not touched",
          "[peft][entry]") {
  // Each strength is finite, and the product with the scaling is not.
  const peft::entry<float> e = [] {
    parts p = stack(3);
    for (auto& l : p.experts) l = factors(2, 3, 5, 1e300);
    return peft::entry<float>(std::move(p));
  }();
  std::vector<float> values(3 * 3 * 5, 0.5F);
  const lora::tensor_view<float, 3> W(values, {3, 3, 5});
  CHECK_THROWS_AS(lora::merge(W, lora::scaled(1e300, e)), lora::value_error);
  CHECK(values == std::vector<float>(45, 0.5F));
  const lora::tensor_view<float, 3> two(values, {2, 3, 5});
  CHECK_THROWS_AS(lora::merge(two, peft::entry<float>(stack(3))), lora::shape_error);
  CHECK(values == std::vector<float>(45, 0.5F));
}

TEST_CASE("an entry is never empty", "[peft][entry]") {
  peft::entry<float> from(linear());
  const peft::entry<float> to = std::move(from);
  CHECK(from.rank() == 2);  // NOLINT: moving copies
  CHECK(&from.parts() == &to.parts());
}

TEST_CASE("a change of the base is for linear modules", "[peft][entry]") {
  // converted() forms the part from W as it is stored, and would read another shape for these.
  parts embedding = linear();
  embedding.kind = kind::embedding;
  for (const auto& p : {embedding, stack(1), convolution()})
    for (const auto change :
         {peft::base_change::pissa, peft::base_change::olora, peft::base_change::kasa})
      CHECK(test::mentions(refusal(p, [&](parts& each) { each.change = change; }),
                           {"linear modules only"}));
}

TEST_CASE("marks of one kind are refused for others", "[peft][entry]") {
  CHECK(test::mentions(refusal(linear(), [](parts& p) { p.stored_transposed = true; }),
                       {"for parameters"}));
  CHECK(test::mentions(refusal(linear(), [](parts& p) { p.orientation_unsaid = true; }),
                       {"for parameters"}));
}

TEST_CASE("rows of trained tokens are stored in a format that holds them", "[peft][entry]") {
  peft::adapter_file<float>::rest more;
  more.token_rows.emplace("e", lora::replaced_rows<float>({1}, Eigen::MatrixXf::Ones(1, 3)));
  more.row_dtypes.emplace("e", dtype::i8);
  const peft::adapter_file<float> file(peft::config(), {}, more);
  CHECK(test::mentions(test::refusal<lora::value_error>([&] { (void)peft::tensor_bytes(file); }),
                       {"trainable_tokens", "I8"}));
}
