#!/bin/sh
# What `make install`, `make uninstall` and `make dist` promise: the files that are said, where PREFIX, LIBDIR, INCLUDEDIR and DESTDIR
# say; an installation that was moved is found by CMake and by pkg-config, and programs in C11, C++17 and C++20 build against it without
# a warning and run, shared and static.
# Usage: install_test.sh EMPTY_DIRECTORY VERSION VENV, from the root of the repository. VENV has cmake and pkgconf. CC, CXX, MAKE.
set -eu
root=$1 version=$2 venv=$3
major=${version%%.*}
run_make() { MAKEFLAGS='' ${MAKE:-make} --no-print-directory "$@"; }
passed=0
ok() { echo "$* ok" && passed=$((passed + 1)); }
rm -rf "$root"
mkdir -p "$root"

# Programs that use an installation.
use_by_cmake() { # name, prefix
    "$venv/bin/cmake" --fresh -S tests/install -B "$root/build/$1" -DCMAKE_PREFIX_PATH="$2" -DVERSION="$version" >"$root/build/$1.log"
    if grep -i warning "$root/build/$1.log"; then return 1; fi
    MAKEFLAGS='' "$venv/bin/cmake" --build "$root/build/$1" --parallel 2 >>"$root/build/$1.log" || { cat "$root/build/$1.log"; return 1; }
    "$venv/bin/ctest" --test-dir "$root/build/$1" --output-on-failure
}
use_by_pkg_config() { # name, library directory, dialects
    mkdir -p "$root/build/$1"
    PKG_CONFIG_PATH=$2/pkgconfig run_make -s -C tests/install OUT="$root/build/$1" DIALECTS="$3" CC="${CC:-cc}" CXX="${CXX:-c++}" \
        PKG_CONFIG="$venv/bin/pkgconf" run
}
is_linked() { # program, whether to the shared library
    readelf -d "$1" | grep -q 'NEEDED.*liba2a\.so' && found=yes || found=no
    test "$found" = "$2" || { echo "$1: linked to the shared library: $found" && return 1; }
}
mkdir "$root/build"

# As a distribution packs it: staged, then where users have it. The staged tree is gone when it is used. What has been built is
# installed without Rust, as by a root who has none.
run_make all
mkdir "$root/no-rust"
for tool in cargo rustc; do
    printf '#!/bin/sh\necho "%s is called" >&2; exit 1\n' $tool >"$root/no-rust/$tool" && chmod +x "$root/no-rust/$tool"
done
PATH=$root/no-rust:$PATH run_make install DESTDIR="$root/staged" PREFIX=/usr
sort >"$root/wanted" <<LIST
bin/a2a-perf
include/a2a.h
include/a2a.hpp
lib/cmake/a2a/a2aConfig.cmake
lib/cmake/a2a/a2aConfigVersion.cmake
lib/cmake/a2a/a2aTargets.cmake
lib/liba2a.a
lib/liba2a.so -> liba2a.so.$major
lib/liba2a.so.$major -> liba2a.so.$version
lib/liba2a.so.$version
lib/pkgconfig/a2a.pc
LIST
(cd "$root/staged/usr" && find . ! -type d -printf '%P' \( -type l -printf ' -> %l\n' -o -printf '\n' \)) | sort | diff "$root/wanted" -
ok "files and links"
if grep -r -e '@' -e "$root" -e /usr --include='*.cmake' --include='*.pc' "$root/staged"; then exit 1; fi
ok "no word is left to fill in, and no place is named"

moved=$root/moved\ here/a2a
mkdir -p "$root/moved here"
mv "$root/staged/usr" "$moved"
rm -r "$root/staged"
test "$("$moved/bin/a2a-perf" --version)" = "a2a-perf $version"
ok "a2a-perf"
use_by_cmake moved "$moved"
for dialect in c11 cpp17 cpp20; do
    is_linked "$root/build/moved/a2a_$dialect" yes
    is_linked "$root/build/moved/a2a_static_$dialect" no
done
ok "CMake, moved, a blank in its place"

# Under other names, as Debian has them; pkg-config and make do not go well with blanks.
run_make install PREFIX="$root/a" LIBDIR="$root/a/lib/triple" INCLUDEDIR="$root/a/include/series" >"$root/build/a.log"
mv "$root/a" "$root/b"
use_by_pkg_config b "$root/b/lib/triple" 'c11 c++17 c++20'
for dialect in c11 c++17 c++20; do
    is_linked "$root/build/b/shared_$dialect" yes
    is_linked "$root/build/b/static_$dialect" no
done
ok "pkg-config, moved, with directories of its own"
"$venv/bin/cmake" --fresh -S tests/install -B "$root/build/b-cmake" -DCMAKE_PREFIX_PATH="$root/b/lib/triple/cmake/a2a" \
    -DVERSION="$version" >"$root/build/b-cmake.log"
"$venv/bin/cmake" --build "$root/build/b-cmake" --target a2a_c11 >>"$root/build/b-cmake.log"
"$root/build/b-cmake/a2a_c11"
ok "CMake, the same"

# Half an installation says what it lacks.
rm "$moved/lib/liba2a.a"
if "$venv/bin/cmake" --fresh -S tests/install -B "$root/build/half" -DCMAKE_PREFIX_PATH="$moved" -DVERSION="$version" \
    >"$root/build/half.log" 2>&1; then
    echo "a static library that is not there was found" && exit 1
fi
tr -s ' \n' ' ' <"$root/build/half.log" | grep -q 'component static is not installed: there is no .*liba2a.a'
ok "half an installation"

mv "$root/b" "$root/a"
run_make uninstall PREFIX="$root/a" LIBDIR="$root/a/lib/triple" INCLUDEDIR="$root/a/include/series" >"$root/build/uninstall.log"
test "$(find "$root/a" ! -type d | wc -l)" -eq 0 && test ! -e "$root/a/lib/triple/cmake/a2a"
ok "uninstall"

# The same bytes again, although built at another time and by another umask; complete, and as good as an installation.
run_make dist SOURCE_DATE_EPOCH=1700000000 >"$root/build/dist.log"
mkdir "$root/dist"
mv target/dist/*.tar.gz target/dist/*.sha256 "$root/dist"
(umask 077 && run_make dist SOURCE_DATE_EPOCH=1700000000 >"$root/build/dist-again.log")
(cd target/dist && sha256sum -c "$root"/dist/*.sha256)
(cd "$root/dist" && sha256sum -c ./*.sha256 && tar -xzf ./*.tar.gz)
tree=$(echo "$root"/dist/*/)
ln -s "$tree" "$root/unpacked"
test -f "$tree/README.md" && test -f "$tree/LICENSE" && test -f "$tree/CHANGELOG.md"
use_by_pkg_config dist "$tree/lib" c++17
ok "dist"

echo "$passed passed, 0 failed"
