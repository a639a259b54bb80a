#!/bin/sh
# The shared library exports what include/a2a.h declares and nothing else, needs only the C library, carries its SONAME,
# and has no fault in it that tests inject. The static library gives a program no other C names either.
# Usage: symbols_test.sh LIBRARY STATIC_LIBRARY MAJOR, from the root of the repository.
set -eu
library=$1 static=$2 soname=liba2a.so.$3
failed=0 passed=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

verdict() { # name, whether it holds ("" = yes, else what is wrong)
    if [ -z "$2" ]; then
        echo "$1 ok" && passed=$((passed + 1))
    else
        echo "$1 FAIL: $2" && failed=$((failed + 1))
    fi
}

# The preprocessor takes the comments out; a declaration is a name directly before its parenthesis.
${CC:-cc} -E -P include/a2a.h | grep -oE '\ba2a_[a-z0-9_]+ *\(' | tr -d ' (' | sort -u >"$work/declared"
nm -D --defined-only "$library" | awk '{print $NF}' | sed 's/@.*//' | sort -u >"$work/exported"
# Beside them Rust's own: mangled names, and those of its run-time library, which are weak or hidden.
nm -g --defined-only "$static" 2>/dev/null | awk 'NF == 3 && $2 !~ /[VWu]/ {print $3}' |
    grep -vE '^(_ZN|_R|__|rust_|anon\.)' | sort -u >"$work/given"
readelf -d "$library" >"$work/dynamic"
sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' "$work/dynamic" >"$work/needed"
sed -n 's/^    [A-Z][A-Za-z]* = "\([a-z_]*\/[a-z_]*\)",$/\1/p' src/fault.rs >"$work/faults"

verdict "declared functions are found" \
    "$([ "$(wc -l <"$work/declared")" -ge 20 ] || echo "only $(tr '\n' ' ' <"$work/declared")")"
verdict "declared is exported" "$(comm -23 "$work/declared" "$work/exported" | tr '\n' ' ')"
verdict "exported is declared" "$(comm -13 "$work/declared" "$work/exported" | tr '\n' ' ')"
verdict "declared is in the static library" "$(comm -23 "$work/declared" "$work/given" | tr '\n' ' ')"
verdict "the static library has no other C name" "$(comm -13 "$work/declared" "$work/given" | tr '\n' ' ')"
verdict "needs only the C library" \
    "$(grep -vxE 'libc\.so\.6|libgcc_s\.so\.1|ld-linux[-a-z0-9_]*\.so\.[0-9]' "$work/needed" | tr '\n' ' ')"
verdict "asks the loader for nothing of CUDA's" \
    "$(nm -D --undefined-only "$library" | awk '{print $NF}' | grep -E '^(cu|nv|nccl)[A-Za-z]' | tr '\n' ' ')"
verdict "SONAME is $soname" \
    "$(grep -q "(SONAME).*\[$soname\]" "$work/dynamic" || grep SONAME "$work/dynamic" || echo none)"
verdict "named faults are found" "$([ "$(wc -l <"$work/faults")" -ge 50 ] || echo "only $(tr '\n' ' ' <"$work/faults")")"
verdict "no faults inside" "$(grep -aoF -f "$work/faults" "$library" | sort -u | tr '\n' ' ')"
verdict "no search path inside" "$(grep -E 'RPATH|RUNPATH|TEXTREL' "$work/dynamic" || true)"

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
