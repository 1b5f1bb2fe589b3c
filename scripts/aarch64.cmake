# CMake toolchain file: builds for 64-bit Arm Linux on another machine, and runs there what it built under qemu.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)

cmake_path(SET kiln_default_sysroot NORMALIZE ${CMAKE_CURRENT_LIST_DIR}/../.cache/aarch64-sysroot)
set(KILN_AARCH64_SYSROOT ${kiln_default_sysroot} CACHE PATH "arm64 libraries and headers; scripts/aarch64-sysroot makes it (to run with another: AARCH64_SYSROOT in the environment)")
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES KILN_AARCH64_SYSROOT)
if(NOT EXISTS ${KILN_AARCH64_SYSROOT}/usr/include)
  message(FATAL_ERROR "There is no sysroot in ${KILN_AARCH64_SYSROOT}: run scripts/aarch64-sysroot, or give -DKILN_AARCH64_SYSROOT=DIR")
endif()

set(CMAKE_SYSROOT ${KILN_AARCH64_SYSROOT})
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH ${CMAKE_SYSROOT} ${CMAKE_SYSROOT}/usr/lib/llvm-19)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
set(ENV{PKG_CONFIG_SYSROOT_DIR} ${CMAKE_SYSROOT})
set(ENV{PKG_CONFIG_LIBDIR} ${CMAKE_SYSROOT}/usr/lib/aarch64-linux-gnu/pkgconfig:${CMAKE_SYSROOT}/usr/share/pkgconfig)

set(CMAKE_CROSSCOMPILING_EMULATOR ${CMAKE_CURRENT_LIST_DIR}/aarch64-run)
