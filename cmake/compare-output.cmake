# SPDX-License-Identifier: Apache-2.0
# cmake -DPROGRAM=... -DARGUMENTS=... -DEXPECTED=<file> -P compare-output.cmake: fails unless the program ends well and prints
# the file. Numbers like 8e-07 are what rounding left: they differ between instruction sets, so only their place is compared.
execute_process(COMMAND "${PROGRAM}" ${ARGUMENTS} OUTPUT_VARIABLE output RESULT_VARIABLE status)
file(READ "${EXPECTED}" expected)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "${PROGRAM} ended with ${status}:\n${output}")
endif()
set(rounding "[0-9.]+e-[0-9]+")
string(REGEX REPLACE "${rounding}" "<rounding>" output_compared "${output}")
string(REGEX REPLACE "${rounding}" "<rounding>" expected_compared "${expected}")
if(NOT output_compared STREQUAL expected_compared)
  message(FATAL_ERROR "${PROGRAM} printed\n${output}\nexpected (${EXPECTED})\n${expected}")
endif()
message("${output}")
