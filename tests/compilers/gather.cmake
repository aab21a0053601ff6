# SPDX-License-Identifier: Apache-2.0
# Writes the examples, writes.cpp and README's snippets into one source, each in a namespace, so that what they share is
# compiled once: cmake -DROOT=... -DOUTPUT=... -P gather.cmake
cmake_minimum_required(VERSION 3.24)
set(snippets "${OUTPUT}.snippets.cpp")
execute_process(COMMAND ${CMAKE_COMMAND} -DREADME=${ROOT}/README.md -DOUTPUT=${snippets}
  -P "${ROOT}/tests/readme/extract.cmake" COMMAND_ERROR_IS_FATAL ANY)
file(GLOB programs "${ROOT}/examples/*.cpp")
list(APPEND programs "${ROOT}/tests/compilers/writes.cpp")
set(source "// Made from the examples and README.md.\n")
foreach(program IN LISTS programs)
  file(STRINGS "${program}" includes REGEX "^#include ")
  list(APPEND all_includes ${includes})
endforeach()
list(REMOVE_DUPLICATES all_includes)
list(JOIN all_includes "\n" all_includes)
string(APPEND source "${all_includes}\n")
foreach(program IN LISTS programs)
  cmake_path(GET program STEM name)
  # Their includes find everything done: #pragma once, and the standard library's guards.
  string(APPEND source "namespace part_${name} {\n#include \"${program}\"\n}\n")
endforeach()
string(APPEND source "namespace readme {\n#include \"${snippets}\"\n}\n")
file(WRITE "${OUTPUT}" "#include \"context.hpp\"\n${source}")
