// SPDX-License-Identifier: Apache-2.0
//
// Whether files are read and written by POSIX calls, and their headers.
#pragma once

#if defined(__unix__) || defined(__APPLE__)
#define LORA_IO_DETAIL_POSIX 1
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#else
#define LORA_IO_DETAIL_POSIX 0
#endif
