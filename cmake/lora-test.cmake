# SPDX-License-Identifier: Apache-2.0
# lora_add_test(merge) builds tests/merge.test.cpp and runs it as the test "merge".
find_package(Catch2 REQUIRED)
if(TARGET Catch2::Catch2WithMain)
  set(lora_catch Catch2::Catch2WithMain)
else()
  # Catch2 2 installed without its library: main is compiled here, once.
  file(WRITE "${PROJECT_BINARY_DIR}/catch_main.cpp" "#define CATCH_CONFIG_MAIN\n#include <catch2/catch.hpp>\n")
  add_library(lora_catch STATIC "${PROJECT_BINARY_DIR}/catch_main.cpp")
  target_link_libraries(lora_catch PUBLIC Catch2::Catch2)
  set(lora_catch lora_catch)
endif()

# Adapters and models of other projects, for those who have them. Tests that need them are skipped, and listed as
# skipped, where they are not.
set(LORA_OUTSIDE_DIR "" CACHE PATH "a folder with reference files of other projects (golden/, adapters/ ...)")
set(lora_outside "${LORA_OUTSIDE_DIR}")
if(NOT lora_outside AND EXISTS "${PROJECT_SOURCE_DIR}/../shared/outside/golden")
  cmake_path(SET lora_outside NORMALIZE "${PROJECT_SOURCE_DIR}/../shared/outside")
endif()

# lora_test_plain: for variants that choose their own instruction set.
add_library(lora_test_plain INTERFACE)
target_link_libraries(lora_test_plain INTERFACE lora_developer_plain ${lora_catch})
target_include_directories(lora_test_plain INTERFACE "${PROJECT_SOURCE_DIR}/tests" "${PROJECT_SOURCE_DIR}/examples")
target_compile_definitions(lora_test_plain INTERFACE
  LORA_SOURCE_DIR="${PROJECT_SOURCE_DIR}"
  LORA_EXAMPLE_DATA="${PROJECT_SOURCE_DIR}/examples/data"
  LORA_OUTSIDE_DIR="${lora_outside}")
add_library(lora_test INTERFACE)
target_link_libraries(lora_test INTERFACE lora_test_plain lora_developer)

# The seed is fixed and Catch prints it; --warn NoAssertions makes a test without an assertion fail.
function(lora_run_test name target)
  cmake_parse_arguments(PARSE_ARGV 2 arg "OUTSIDE" "" "")
  if(arg_OUTSIDE AND NOT lora_outside)
    add_test(NAME ${name} COMMAND ${CMAKE_COMMAND} -E echo "skipped: needs LORA_OUTSIDE_DIR")
    set_tests_properties(${name} PROPERTIES SKIP_REGULAR_EXPRESSION "skipped: needs LORA_OUTSIDE_DIR")
    return()
  endif()
  add_test(NAME ${name} COMMAND ${target} --rng-seed 20 --warn NoAssertions)
  # Two tests run at once: more threads than cores would only make each wait for the other.
  set_tests_properties(${name} PROPERTIES TIMEOUT 1200
    ENVIRONMENT "OMP_WAIT_POLICY=passive;LSAN_OPTIONS=suppressions=${PROJECT_SOURCE_DIR}/tests/support/leaks.txt")
endfunction()

# OUTSIDE: needs the reference files. OPTIMIZED: as the build says. MULTIPLIES: -O1, because it computes enough for that to pay.
# The others are compiled without optimization, which takes half the time (what full optimization does to the kernels is tested
# by packed, float16 and laws/agreement, and their variants in flags).
function(lora_add_test name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "OUTSIDE;OPTIMIZED;MULTIPLIES" "" "LIBRARIES")
  string(REPLACE "/" "_" target "test_${name}")
  add_executable(${target} "${name}.test.cpp")
  target_link_libraries(${target} PRIVATE lora_test ${arg_LIBRARIES})
  if(NOT arg_OPTIMIZED AND NOT CMAKE_BUILD_TYPE STREQUAL "Debug")
    target_compile_options(${target} PRIVATE $<IF:$<BOOL:${arg_MULTIPLIES}>,-O1,-O0>)
  endif()
  if(arg_OUTSIDE)
    lora_run_test(${name} ${target} OUTSIDE)
  else()
    lora_run_test(${name} ${target})
  endif()
endfunction()
