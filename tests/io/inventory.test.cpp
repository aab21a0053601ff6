// SPDX-License-Identifier: Apache-2.0
//
// The norms of an inventory are those of the dense delta, whatever the shape: a lora_B of as many
// outputs as ranks is square, and its Gram matrix of columns is not that of its rows. And what an
// inventory says of values that are not finite.
#include "lora/io/peft_inventory.hpp"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "lora/io/peft_write.hpp"
#include "support/catch.hpp"

namespace {

namespace peft = lora::peft;

peft::inventory inventory_of(const lora::adapter<double>& l) {
  std::vector<peft::entry<double>> entries;
  entries.emplace_back("m", l, false);
  return peft::inventory_of(peft::make_file<double>(std::move(entries)));
}

}  // namespace

TEST_CASE("norms are those of the dense delta, for every shape and rank", "[peft][inventory]") {
  std::srand(20);
  for (int out = 1; out <= 9; ++out)
    for (int in = 1; in <= 9; ++in)
      for (int rank = 1; rank <= 12; ++rank) {
        const Eigen::MatrixXd A = Eigen::MatrixXd::Random(rank, in),
                              B = Eigen::MatrixXd::Random(out, rank);
        const double s = -0.75 * rank;
        const double dense = std::abs(s) * (B * A).norm();
        // Each of the sums has at most rank (out + in) products of magnitudes up to |B| |A|, in
        // double.
        const double bound =
            std::abs(s) * B.norm() * A.norm() * std::sqrt(4.0 * rank * (out + in) * 0x1p-53);
        const auto found = inventory_of({A, B, {.alpha = s, .rule = lora::scaling_rule::fixed}});
        INFO(out << " x " << in << " of rank " << rank << ": " << found.norm << " and dense "
                 << dense);
        CHECK(std::abs(found.norm * found.norm - dense * dense) <= bound * bound);
        CHECK(found.modules.at(0).norm == found.norm);
      }
}

TEST_CASE("an inventory says how many values are not finite", "[peft][inventory]") {
  Eigen::MatrixXd A = Eigen::MatrixXd::Ones(2, 4), B = Eigen::MatrixXd::Ones(3, 2);
  CHECK(inventory_of({A, B, {.alpha = 3}}).notes.empty());
  A(1, 2) = std::numeric_limits<double>::quiet_NaN();
  B(0, 0) = std::numeric_limits<double>::infinity();
  const auto found = inventory_of({A, B, {.alpha = 3}});
  CHECK(found.notes == std::vector<std::string>{"m: 2 of 14 values are not finite"});
  CHECK_THAT(found.text(), Catch::Contains("note      m: 2 of 14 values are not finite\n"));
}
