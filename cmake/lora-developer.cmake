# SPDX-License-Identifier: Apache-2.0
# What this project's own programs are compiled with; users of lora::lora get none of it. lora_developer is
# lora_developer_plain (io, warnings, OpenMP, sanitizers) for this machine's CPU.

# nlohmann-json reads the tiny model of the examples and the cases of tests/golden. The library and
# the benchmarks do not need it.
if(LORA_BUILD_TESTS OR LORA_BUILD_EXAMPLES)
  find_package(nlohmann_json 3.10 QUIET)
  if(NOT nlohmann_json_FOUND)
    message(FATAL_ERROR "The tests and examples of lora read JSON: install nlohmann-json 3.10 (Debian: nlohmann-json3-dev), "
      "or configure with -DLORA_BUILD_TESTS=OFF -DLORA_BUILD_EXAMPLES=OFF. The library and the benchmarks do not need it.")
  endif()
endif()
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()

add_library(lora_warnings INTERFACE)
target_compile_options(lora_warnings INTERFACE -Wall -Wextra -Wconversion -Wshadow -Werror)
# Tests make objects of [[nodiscard]] classes to see that their constructors throw; clang warns of that, gcc does not.
target_compile_options(lora_warnings INTERFACE $<$<CXX_COMPILER_ID:Clang>:-Wno-unused-value>)

add_library(lora_developer_plain INTERFACE)
target_link_libraries(lora_developer_plain INTERFACE lora_io lora_warnings)
if(nlohmann_json_FOUND)
  target_link_libraries(lora_developer_plain INTERFACE nlohmann_json::nlohmann_json)
endif()
if(LORA_OPENMP)
  find_package(OpenMP COMPONENTS CXX)
  if(OpenMP_CXX_FOUND)
    target_link_libraries(lora_developer_plain INTERFACE OpenMP::OpenMP_CXX)
  else()
    message(STATUS "lora: no OpenMP for ${CMAKE_CXX_COMPILER}: serial programs")
  endif()
endif()
if(LORA_SANITIZE)
  set(lora_sanitizers -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_compile_options(lora_developer_plain INTERFACE ${lora_sanitizers})
  target_link_options(lora_developer_plain INTERFACE ${lora_sanitizers})
endif()

add_library(lora_developer INTERFACE)
target_link_libraries(lora_developer INTERFACE lora_developer_plain)
if(LORA_NATIVE)
  target_compile_options(lora_developer INTERFACE -march=native)
endif()

# Each header compiles alone: the target all_verify_interface_header_sets.
set_property(TARGET lora_lora lora_io PROPERTY VERIFY_INTERFACE_HEADER_SETS ${LORA_BUILD_TESTS})
