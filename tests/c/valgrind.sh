#!/bin/sh
# Runs a program under valgrind's memcheck: the exit status is the program's, or 99 if it read or wrote what it must not, or
# lost memory for good. Where there is no valgrind Debian's package is unpacked into a directory, which takes no rights; if
# that cannot be had either the reason is printed and the exit status is 77.
#   valgrind.sh DIRECTORY PROGRAM [ARGUMENT...]
set -u
home=$1
shift

works() {
    "$@" -q /bin/true 2>/dev/null
}

fetch() {
    command -v apt-get >/dev/null && command -v dpkg >/dev/null || { echo 'there is no apt-get'; return 1; }
    rm -rf "$home" && mkdir -p "$home/packages" "$home/symbols/usr/lib"
    (cd "$home/packages" && timeout 120 apt-get download valgrind libc6-dbg >log 2>&1) ||
        { echo "apt-get download: $(tail -n 1 "$home/packages/log")"; return 1; }
    for package in "$home"/packages/*.deb; do
        dpkg -x "$package" "$home" || return 1
    done
    # memcheck needs the loader's symbols. It looks for them by the library's directory and the file's name.
    triple=$(basename "$(dirname "$(find /usr/lib -name 'libc.so.6' | head -n 1)")")
    mkdir "$home/symbols/usr/lib/$triple"
    ln -s usr/lib "$home/symbols/lib"
    find "$home/usr/lib/debug" -name '*.debug' -exec ln -s {} "$home/symbols/usr/lib/$triple/" \;
}

if works valgrind; then
    set -- valgrind -- "$@"
else
    home=$(mkdir -p "$home" && cd "$home" && pwd)
    unpacked() {
        VALGRIND_LIB="$home/usr/libexec/valgrind" works "$home/usr/bin/valgrind.bin" "--extra-debuginfo-path=$home/symbols"
    }
    if ! unpacked; then
        why=$(fetch) || { echo "skipped: no valgrind, and none to be had: $why"; exit 77; }
        unpacked || { echo "skipped: no valgrind, and Debian's does not run here"; exit 77; }
    fi
    export VALGRIND_LIB="$home/usr/libexec/valgrind"
    set -- "$home/usr/bin/valgrind.bin" "--extra-debuginfo-path=$home/symbols" -- "$@"
fi

checker=$1
shift
symbols=
while [ "$1" != -- ]; do
    symbols=$1
    shift
done
shift
log=$(mktemp)
"$checker" $symbols -q --log-file="$log" --error-exitcode=99 --leak-check=full --show-leak-kinds=definite \
    --errors-for-leak-kinds=definite "$@"
status=$?
# Of system calls that it does not know it says five lines each; pidfd_open may be missing, the library does without.
[ $status -eq 0 ] || grep -v '^--' "$log"
rm -f "$log"
exit $status
