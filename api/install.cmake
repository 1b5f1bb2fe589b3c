# What an installation holds: the command, libkiln, the LLVM generator beside it, the header, a CMake package and a pkg-config file.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

# The parts of an installation find each other wherever it is moved to; those of the build tree lie the same way.
file(RELATIVE_PATH bin_to_lib /${CMAKE_INSTALL_BINDIR} /${CMAKE_INSTALL_LIBDIR})
set_target_properties(kiln_cli PROPERTIES BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH $ORIGIN/${bin_to_lib})
set_target_properties(kiln PROPERTIES BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH $ORIGIN)
if(TARGET kiln_llvm)
  set_target_properties(kiln_llvm PROPERTIES BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH $ORIGIN)
  # Opened at run time, so the linker does not know: a generator of an older build is refused.
  add_dependencies(kiln kiln_llvm)
  add_dependencies(kiln_cli kiln_llvm)
endif()

# A host has a C++ runtime of its own or none: Kiln neither picks nor needs one.
if(NOT KILN_SANITIZE)
  foreach(target kiln kiln_cli)
    target_link_options(${target} PRIVATE -static-libstdc++ -static-libgcc -Wl,--as-needed -Wl,-z,defs)
  endforeach()
endif()

target_include_directories(kiln INTERFACE $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
install(TARGETS kiln EXPORT kiln RUNTIME LIBRARY ARCHIVE)
install(TARGETS kiln_cli RUNTIME)
if(TARGET kiln_llvm)
  install(TARGETS kiln_llvm LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
endif()
install(FILES kiln.h kiln_int4pack.h kiln_int4pack_adapter.hpp TYPE INCLUDE)
install(FILES ${PROJECT_SOURCE_DIR}/README.md TYPE DOC)
install(DIRECTORY doc/ TYPE DOC FILES_MATCHING PATTERN *.md)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/kiln)
install(EXPORT kiln NAMESPACE kiln:: FILE kilnConfig.cmake DESTINATION ${package_dir})
write_basic_package_version_file(kilnConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/kilnConfigVersion.cmake DESTINATION ${package_dir})

file(RELATIVE_PATH pkgconfig_to_prefix /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
configure_file(kiln.pc.in kiln.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/kiln.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
