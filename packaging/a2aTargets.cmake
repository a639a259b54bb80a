# What a CMake project links, of an installed liba2a (a2aConfig.cmake) or of one that the project builds (../CMakeLists.txt):
#   a2a::a2a         the shared library
#   a2a::a2a_static  the static library, and the system's libraries that it needs
# Both carry the directory of a2a.h and a2a.hpp.

# a2a_define_target(name SHARED|STATIC file INCLUDE directory [SONAME name] [NEEDS library...] [GLOBAL])
function(a2a_define_target name type file)
  cmake_parse_arguments(PARSE_ARGV 3 arg "GLOBAL" "INCLUDE;SONAME" "NEEDS")
  if(TARGET ${name})
    return()
  endif()
  if(arg_GLOBAL)
    add_library(${name} ${type} IMPORTED GLOBAL)
  else()
    add_library(${name} ${type} IMPORTED)
  endif()
  set_target_properties(${name} PROPERTIES
    IMPORTED_LOCATION "${file}"
    INTERFACE_INCLUDE_DIRECTORIES "${arg_INCLUDE}")
  if(arg_SONAME)
    set_target_properties(${name} PROPERTIES IMPORTED_SONAME "${arg_SONAME}")
  endif()
  if(arg_NEEDS)
    set_target_properties(${name} PROPERTIES INTERFACE_LINK_LIBRARIES "${arg_NEEDS}")
  endif()
endfunction()
