#!/bin/sh
# `make install` puts the library, its two names, the header and the benchmark where PREFIX and DESTDIR say, and a program finds
# them there.
# Usage: install_test.sh EMPTY_DIRECTORY VERSION, from the root of the repository.
set -eu
root=$1 version=$2
rm -rf "$root"
${MAKE:-make} --no-print-directory install DESTDIR="$root" PREFIX=/usr
lib=$root/usr/lib

test -f "$root/usr/include/a2a.h"
test -f "$lib/liba2a.so.$version" && test ! -L "$lib/liba2a.so.$version"
test "$(readlink "$lib/liba2a.so.${version%%.*}")" = "liba2a.so.$version"
test "$(readlink "$lib/liba2a.so")" = "liba2a.so.${version%%.*}"
test -x "$root/usr/bin/a2a-perf"
test "$(find "$root" ! -type d | wc -l)" -eq 5
echo "files and links ok"

# Compiled against the installed header, linked against the installed name, run by the SONAME.
cat >"$root/uses.c" <<'C'
#include <a2a.h>
#include <string.h>
int main(void)
{
    return strcmp(a2a_version(), A2A_VERSION) == 0 ? 0 : 1;
}
C
${CC:-cc} -I"$root/usr/include" "$root/uses.c" -o "$root/uses" -L"$lib" -la2a
LD_LIBRARY_PATH=$lib "$root/uses"
echo "a program that uses it ok"
echo "2 passed, 0 failed"
