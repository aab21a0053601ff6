# SPDX-License-Identifier: Apache-2.0
# scripts/test-times with a log of four tests: cmake -DROOT=... -DSCRATCH=... -P test_times.cmake
cmake_minimum_required(VERSION 3.24)
set(work "${SCRATCH}/test_times")
file(REMOVE_RECURSE "${work}")
execute_process(COMMAND "${ROOT}/scripts/test-times" "${work}" RESULT_VARIABLE status ERROR_VARIABLE output)
if(status EQUAL 0 OR NOT output MATCHES "LastTest.log: there is no such file")
  message(FATAL_ERROR "a run that was not made is not refused with a sentence: ${status}, ${output}")
endif()
file(WRITE "${work}/Testing/Temporary/LastTest.log" "Start testing
3/4 Testing: io/peft
Test time =   2.50 sec
1/4 Testing: compile_fail/one
Test time =   4.00 sec
2/4 Testing: compile_fail/two
Test time =   3.25 sec
4/4 Testing: scaling
Test time =   0.25 sec
")
execute_process(COMMAND "${ROOT}/scripts/test-times" "${work}" RESULT_VARIABLE status OUTPUT_VARIABLE output)
if(NOT status EQUAL 0 OR NOT output STREQUAL "| test | tests | seconds | share |
|---|---|---|---|
| compile_fail | 2 | 7.2 | 72 % |
| io/peft | 1 | 2.5 | 25 % |
| all that take less than a second | 1 | 0.2 | 2 % |
| **the suite** | **4** | **10** | |
")
  message(FATAL_ERROR "another table: ${status}, ${output}")
endif()
file(REMOVE_RECURSE "${work}")
