#!/bin/sh
# include/a2a.h and include/a2a.hpp compile alone, and included twice, in every dialect they promise, without a warning; and a2a.hpp
# has every function of a2a.h.
# Run from the root of the repository; CC and CXX may be set. clang and clang++ look at them too, where they are.
set -eu
passed=0

# -Wpadded: no struct of a2a.h has a hole, so every byte of it has a name.

check() { # header, compiler, language, standard, further options
    header=$1
    shift
    printf '#include "%s"\n' "$header" | "$@" -Wall -Wextra -Wpedantic -Werror -Iinclude -fsyntax-only -
    printf '#include "%s"\n#include "%s"\nint main(void) { return A2A_SUCCESS; }\n' "$header" "$header" |
        "$@" -Wall -Wextra -Wpedantic -Werror -Iinclude -fsyntax-only -
    echo "$header: $* ok"
    passed=$((passed + 1))
}

check_c() { # compiler
    for std in c99 c11 c17; do
        check a2a.h "$@" -x c -std=$std -Wstrict-prototypes -Wmissing-prototypes -Wpadded
    done
}
check_cpp() { # compiler
    for std in c++11 c++17 c++20; do
        check a2a.h "$@" -x c++ -std=$std -Wold-style-cast -Wpadded
    done
    for std in c++17 c++20; do
        check a2a.hpp "$@" -x c++ -std=$std -Wold-style-cast -Wshadow -Wconversion
        check a2a.hpp "$@" -x c++ -std=$std -Wold-style-cast -Wshadow -Wconversion -fno-exceptions -fno-rtti
        check a2a.hpp "$@" -x c++ -std=$std -Wold-style-cast -Wshadow -Wconversion -fno-rtti
    done
    echo '#include "a2a.hpp"' | "$@" -x c++ -std=c++14 -Iinclude -fsyntax-only - 2>&1 | grep -q 'a2a.hpp needs C++17'
    echo "a2a.hpp: $*: refuses C++14 ok"
    passed=$((passed + 1))
}

check_c ${CC:-cc}
check_cpp ${CXX:-c++}
if command -v clang >/dev/null && command -v clang++ >/dev/null; then
    check_c clang
    check_cpp clang++
else
    echo "skipped: clang and clang++: they are not here"
fi

# A call or a declaration is a name directly before its parenthesis; comments do not count.
functions() { grep -oE '\ba2a_[a-z0-9_]+ *\(' | tr -d ' (' | sort -u; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
${CC:-cc} -E -P include/a2a.h | functions >"$work/declared"
sed -e 's|//.*||' -e 's|/\*.*\*/||' -e '\|/\*|,\|\*/|d' include/a2a.hpp | functions >"$work/used"
test "$(wc -l <"$work/declared")" -ge 20
if ! comm -23 "$work/declared" "$work/used" | { ! grep .; }; then
    echo "a2a.hpp lacks these functions of a2a.h" && exit 1
fi
echo "a2a.hpp has every function of a2a.h ok"
passed=$((passed + 1))
echo "$passed passed, 0 failed"
