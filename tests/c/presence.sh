#!/bin/sh
# Shows that a checker is there: the program must fail, and say what is looked for.
#   presence.sh WORDS PROGRAM [ARGUMENT...]
set -u
words=$1
shift
if output=$("$@" 2>&1); then
    printf 'FAIL: %s ended well, there is no checker\n%s\n' "$*" "$output"
    exit 1
fi
if ! printf '%s\n' "$output" | tr '\n' ' ' | grep -q "$words"; then
    printf 'FAIL: %s ended without "%s"\n%s\n' "$*" "$words" "$output"
    exit 1
fi
printf 'reported, as it must be: %s (%s)\n' "$words" "$*"
