# SPDX-License-Identifier: Apache-2.0
cmake_minimum_required(VERSION 3.24)
execute_process(COMMAND ${COMPILE} -stdlib=libc++ -std=c++20 -O0 -Wall -Wextra -Wconversion -Wshadow -Werror -I${INCLUDE}
  -isystem ${EIGEN} ${SOURCE} -o ${PROGRAM} COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${PROGRAM} ${DATA} COMMAND_ERROR_IS_FATAL ANY)
