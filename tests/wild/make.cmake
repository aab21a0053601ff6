# SPDX-License-Identifier: Apache-2.0
# Runs every FROM/*/make.py and puts its output under TO.
cmake_minimum_required(VERSION 3.24)
file(GLOB scripts "${FROM}/*/make.py")
foreach(script IN LISTS scripts)
  cmake_path(GET script PARENT_PATH folder)
  cmake_path(GET folder FILENAME name)
  file(REMOVE_RECURSE "${TO}/${name}")
  execute_process(COMMAND ${CMAKE_COMMAND} -E env PYTHONDONTWRITEBYTECODE=1 "${PYTHON}" "${script}" "${TO}/${name}"
    COMMAND_ERROR_IS_FATAL ANY)
endforeach()
