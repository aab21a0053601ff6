# SPDX-License-Identifier: Apache-2.0
# Headers, a CMake package and a pkg-config file.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(lora_package_dir "${CMAKE_INSTALL_DATADIR}/cmake/lora")

install(TARGETS lora_lora EXPORT lora-core FILE_SET HEADERS)
install(EXPORT lora-core NAMESPACE lora:: FILE lora-core.cmake DESTINATION "${lora_package_dir}")
install(TARGETS lora_io EXPORT lora-io FILE_SET HEADERS)
install(EXPORT lora-io NAMESPACE lora:: FILE lora-io.cmake DESTINATION "${lora_package_dir}")

configure_package_config_file(cmake/lora-config.cmake.in "${PROJECT_BINARY_DIR}/lora-config.cmake"
  INSTALL_DESTINATION "${lora_package_dir}")
# Before 1.0 every minor version may change the interface.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/lora-config-version.cmake"
  COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES "${PROJECT_BINARY_DIR}/lora-config.cmake" "${PROJECT_BINARY_DIR}/lora-config-version.cmake"
  DESTINATION "${lora_package_dir}")

# The prefix is found from where the .pc file lies, so that an installed tree can be moved.
file(RELATIVE_PATH lora_pc_prefix "/${CMAKE_INSTALL_DATADIR}/pkgconfig" "/")
configure_file(cmake/lora.pc.in "${PROJECT_BINARY_DIR}/lora.pc" @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/lora.pc" DESTINATION "${CMAKE_INSTALL_DATADIR}/pkgconfig")
install(FILES LICENSE README.md CHANGELOG.md DESTINATION "${CMAKE_INSTALL_DOCDIR}")
