#!/bin/sh
# include/a2a.h compiles alone, and included twice, in every dialect it promises, without a warning.
# Run from the root of the repository; CC and CXX may be set.
set -eu
passed=0

# -Wpadded: no struct has a hole, so every byte of it has a name.

check() { # compiler, language, standard, further options
    printf '#include "a2a.h"\n' | "$@" -Wall -Wextra -Wpedantic -Werror -Iinclude -fsyntax-only -
    printf '#include "a2a.h"\n#include "a2a.h"\nint main(void) { return A2A_SUCCESS; }\n' |
        "$@" -Wall -Wextra -Wpedantic -Werror -Iinclude -fsyntax-only -
    echo "$* ok"
    passed=$((passed + 1))
}

for std in c99 c11 c17; do
    check ${CC:-cc} -x c -std=$std -Wstrict-prototypes -Wmissing-prototypes -Wpadded
done
for std in c++11 c++17 c++20; do
    check ${CXX:-c++} -x c++ -std=$std -Wold-style-cast -Wpadded
done
echo "$passed passed, 0 failed"
