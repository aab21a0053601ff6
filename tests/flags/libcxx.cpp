// SPDX-License-Identifier: Apache-2.0
//
// Built with libc++, which may have no std::from_chars for double: a PEFT directory is read, listed
// and written as anywhere. Exit status: the number of checks that fail.
#include <cstdio>
#include <string>

#include "lora/io/peft_inventory.hpp"
#include "lora/io/peft_write.hpp"

namespace {

int failed = 0;
void check(bool holds, const char* what) {
  if (holds) return;
  ++failed;
  std::puts(what);
}
bool reads(const char* text, double want) {
  double value = 0;
  return lora::io_detail::read_double(text, value) && value == want;
}
bool refuses(const char* text) {
  double value = 0;
  return !lora::io_detail::read_double(text, value);
}

}  // namespace

int main(int, char** arguments) {
  check(reads("0.1", 0.1) && reads("-2.5e-3", -2.5e-3) && reads("1e22", 1e22), "numbers");
  check(reads("2.2250738585072014e-308", 2.2250738585072014e-308) &&
            reads("9007199254740993", 9007199254740992.0),
        "rounding");
  check(reads("1e-310", 1e-310) && reads("0", 0) && reads("-0", 0), "small numbers");
  for (const char* text :
       {"1e999", "1x", "1 ", " 1", "", "x", "nan", "inf", "+1", "0x10", "-", "."})
    check(refuses(text), text);
  const auto file = lora::peft::read(arguments[1]);
  check(file.size() > 0 && file.begin()->second.scaling() == 2.5, "scaling");
  check(!lora::peft::inventory_of(file).text().empty(), "inventory");
  check(!lora::peft::tensor_bytes(file).empty() && !lora::peft::config_text(file).empty(),
        "writing");
  return failed;
}
