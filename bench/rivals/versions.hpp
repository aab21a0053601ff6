// SPDX-License-Identifier: Apache-2.0
//
// Which rivals this build has: Eigen always, OpenBLAS and oneDNN when CMake found them.
#pragma once

#include <Eigen/Core>
#include <string>

#if defined(LORA_BENCH_OPENBLAS)
#include <cblas.h>
#endif
#if defined(LORA_BENCH_ONEDNN)
#include <dnnl.hpp>
#endif

namespace lora_bench {

inline std::string eigen_version() {
  return std::to_string(EIGEN_WORLD_VERSION) + "." + std::to_string(EIGEN_MAJOR_VERSION) + "." +
         std::to_string(EIGEN_MINOR_VERSION);
}

inline std::string openblas_version() {
#if defined(LORA_BENCH_OPENBLAS)
  return openblas_get_config();
#else
  return "absent";
#endif
}

inline std::string onednn_version() {
#if defined(LORA_BENCH_ONEDNN)
  const dnnl_version_t& v = *dnnl_version();
  return std::to_string(v.major) + "." + std::to_string(v.minor) + "." + std::to_string(v.patch);
#else
  return "absent";
#endif
}

}  // namespace lora_bench
