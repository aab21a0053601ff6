# SPDX-License-Identifier: Apache-2.0
# scripts/need-cmake with a cmake that only says its version: cmake -DROOT=... -DSCRATCH=... -P
# need_cmake.cmake
cmake_minimum_required(VERSION 3.24)
set(work "${SCRATCH}/need_cmake")
file(REMOVE_RECURSE "${work}")
file(MAKE_DIRECTORY "${work}")
foreach(case "3.24.4:refused" "3.22.1:refused" "2.8.12:refused" "3.25.0:taken" "3.25.1:taken" "3.31.6-rc1:taken" "4.0.2:taken")
  string(REGEX MATCH "^([^:]+):(.*)$" matched "${case}")
  set(version "${CMAKE_MATCH_1}")
  set(expected "${CMAKE_MATCH_2}")
  file(WRITE "${work}/cmake" "#!/bin/sh\necho 'cmake version ${version}'\necho 'CMake suite maintained by Kitware'\n")
  file(CHMOD "${work}/cmake" PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE)
  execute_process(COMMAND ${CMAKE_COMMAND} -E env "PATH=${work}:$ENV{PATH}" "${ROOT}/scripts/need-cmake"
    RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(expected STREQUAL "taken" AND NOT status EQUAL 0)
    message(FATAL_ERROR "CMake ${version} was refused: ${output}")
  elseif(expected STREQUAL "refused" AND (status EQUAL 0 OR NOT output MATCHES "need CMake 3.25 .*found CMake ${version}"))
    message(FATAL_ERROR "CMake ${version} was not refused with a sentence that names both versions: ${status}, ${output}")
  endif()
endforeach()

# Every script that starts a workflow asks first.
file(GLOB scripts "${ROOT}/scripts/*")
foreach(script IN LISTS scripts)
  file(READ "${script}" text)
  string(FIND "${text}" "\nscripts/need-cmake\n" asks)
  get_filename_component(name "${script}" NAME)
  if(NOT name STREQUAL "need-cmake" AND text MATCHES "\n[^#\n]*cmake --workflow" AND asks EQUAL -1)
    message(FATAL_ERROR "${script} starts a workflow and does not ask scripts/need-cmake first")
  endif()
endforeach()
file(REMOVE_RECURSE "${work}")
