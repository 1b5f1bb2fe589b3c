# kiln_generator_id(target NAME VERSION files…)
# Makes NAME_generator_id.h for `target`: the digest of the generator's sources and of its library's version, part of every kernel's key.
# Made at build time, so that an edited source never serves kernels of the old one. The files are digested by content and relative name:
# equal on every architecture and machine.
function(kiln_generator_id target name version)
  if(version STREQUAL "")
    message(FATAL_ERROR "the generator id of ${name} needs its library's version")
  endif()
  set(script ${CMAKE_CURRENT_FUNCTION_LIST_FILE})
  # What every kernel depends on beside its generator: the interface between driver and kernel.
  file(GLOB interface CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/jit/ops/*.h ${PROJECT_SOURCE_DIR}/jit/code_object.h
       ${PROJECT_SOURCE_DIR}/jit/cuda/launch_plan.h)
  set(header ${CMAKE_CURRENT_BINARY_DIR}/${name}_generator_id.h)
  add_custom_command(
    OUTPUT ${header}
    COMMAND ${CMAKE_COMMAND} -DNAME=${name} "-DVERSION=${version}" -DROOT=${PROJECT_SOURCE_DIR} "-DFILES=${ARGN};${interface}" -DHEADER=${header}
            -P ${script}
    DEPENDS ${ARGN} ${interface} ${script}
    COMMENT "Generator id of ${name}"
    VERBATIM)
  target_sources(${target} PRIVATE ${header})
  target_include_directories(${target} PRIVATE ${CMAKE_CURRENT_BINARY_DIR})
endfunction()

if(CMAKE_SCRIPT_MODE_FILE)
  set(text "version ${VERSION}\n")
  list(SORT FILES)
  foreach(path IN LISTS FILES)
    file(SHA256 ${path} digest)
    file(RELATIVE_PATH relative ${ROOT} ${path})
    string(APPEND text "${relative} ${digest}\n")
  endforeach()
  string(SHA256 digest "${text}")
  file(WRITE ${HEADER} "#pragma once\n#include <string_view>\n\nnamespace kiln {\ninline constexpr std::string_view k_${NAME}_generator_digest = \"${digest}\";\n}\n")
endif()
