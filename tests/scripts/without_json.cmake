# SPDX-License-Identifier: Apache-2.0
# A machine without nlohmann-json configures the library and the benchmarks; tests and examples are
# refused with a sentence: cmake -DROOT=... -DSCRATCH=... -DCXX=... -P without_json.cmake
cmake_minimum_required(VERSION 3.24)
set(work "${SCRATCH}/without_json")
function(configure tests examples bench expected)
  file(REMOVE_RECURSE "${work}")
  execute_process(COMMAND ${CMAKE_COMMAND} -S "${ROOT}" -B "${work}" -DCMAKE_CXX_COMPILER=${CXX}
      -DCMAKE_DISABLE_FIND_PACKAGE_nlohmann_json=ON -DLORA_BUILD_TESTS=${tests} -DLORA_BUILD_EXAMPLES=${examples}
      -DLORA_BUILD_BENCH=${bench}
    RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  string(REGEX REPLACE "[ \n]+" " " output "${output}")
  if(expected STREQUAL "configures" AND NOT status EQUAL 0)
    message(FATAL_ERROR "tests ${tests}, examples ${examples}, benchmarks ${bench} do not configure: ${output}")
  elseif(expected STREQUAL "refused" AND (status EQUAL 0 OR NOT output MATCHES "tests and examples of lora read JSON: install nlohmann-json"))
    message(FATAL_ERROR "tests ${tests}, examples ${examples} are not refused with a sentence: ${status}, ${output}")
  endif()
endfunction()
configure(OFF OFF OFF configures)
configure(OFF OFF ON configures)
configure(OFF ON OFF refused)
configure(ON OFF OFF refused)
file(REMOVE_RECURSE "${work}")
