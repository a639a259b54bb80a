#!/bin/sh
# Builds the MPI peer: target/peers/mpi_alltoallv, and beside it `mpirun`, the launcher that belongs to it.
#
# Takes Open MPI's mpicc and mpirun from PATH; where they are not, fetches Debian's packages and unpacks them into
# target/openmpi: nothing is installed, root is not needed. Exit code 3: neither is possible here, and a sentence why.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
target=${CARGO_TARGET_DIR:-$here/../../target}
mkdir -p "$target/peers"
target=$(cd "$target" && pwd)
peers=$target/peers
tree=$target/openmpi

cannot() {
    echo "build.sh: cannot build the MPI peer: $1" >&2
    exit 3
}

# ------------------------------------------------------------------------------------------- Debian's own, unpacked

# $@: options that say which package lists to use. Only what this machine lacks is fetched.
download() {
    missing=$(apt-get "$@" -s --no-install-recommends install openmpi-bin | awk '$1 == "Inst" { print $2 }') || return 1
    # These even if installed: the compiler wrapper expects them in one tree. libopenmpi carries a number in its name.
    library=$(apt-cache "$@" depends libopenmpi-dev | awk '$2 ~ /^libopenmpi[0-9]/ { print $2; exit }')
    [ -n "$library" ] || return 1
    names=$(printf '%s\n' $missing openmpi-bin openmpi-common libopenmpi-dev "$library" | sort -u)
    (cd "$tree/packages" && rm -f ./*.deb && apt-get "$@" download $names)
}

reason() {
    grep -m 1 'Failed to fetch' "$log" || grep '^E:' "$log" | tail -n 1
}

fetch() {
    command -v apt-get >/dev/null && command -v dpkg >/dev/null ||
        cannot "Open MPI's mpicc and mpi.h are not here, and this is not Debian. Install Open MPI with its headers."
    log=$tree/log
    rm -rf "$tree"
    mkdir -p "$tree/packages" "$tree/lists/partial" "$tree/cache/archives/partial"
    echo "fetching Debian's Open MPI into $tree"
    ours="-o Dir::State::lists=$tree/lists -o Dir::Cache=$tree/cache"
    # The machine's package lists may be missing or old; then lists of our own.
    set -- -q -o Debug::NoLocking=1 -o APT::Sandbox::User=root
    download "$@" >"$log" 2>&1 ||
        { apt-get "$@" $ours update && download "$@" $ours; } >>"$log" 2>&1 ||
        cannot "Open MPI's mpicc and mpi.h are not here, and Debian's packages could not be fetched: $(reason) ($log)"
    for package in "$tree"/packages/*.deb; do
        dpkg -x "$package" "$tree"
    done
    rm -rf "$tree/packages" "$tree/lists" "$tree/cache"
    touch "$tree/ready"
}

# Where a relocated Open MPI finds itself: OPAL_PREFIX for what it was configured with, PMIx's plugins by their path.
# Kept as a file beside the launcher, which sources it; paths are relative to target, so that target can be moved.
relocated() {
    cat <<'EOF'
tree=$target/openmpi
for lib in "$tree"/usr/lib/*/openmpi; do lib=${lib%/openmpi}; done
export OPAL_PREFIX="$tree/usr"
export LD_LIBRARY_PATH="$lib:$tree/lib/${lib##*/}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
if [ -d "$lib/pmix2/lib/pmix" ]; then
    export PMIX_MCA_mca_base_component_path="$lib/pmix2/lib/pmix"
fi
EOF
}

# ---------------------------------------------------------------------------------------------------- building it

# Debian has the wrapper without the header where only the launcher was installed; other MPIs have other options.
usable() {
    command -v mpirun >/dev/null && mpicc --showme:version 2>/dev/null | grep -q 'Open MPI' &&
        echo '#include <mpi.h>' | mpicc -x c -fsyntax-only - 2>/dev/null
}

if usable; then
    mpicc=mpicc
    indirect=
    printf '#!/bin/sh\nexec %s "$@"\n' "$(command -v mpirun)" >"$peers/mpirun"
else
    [ -e "$tree/ready" ] || fetch
    eval "$(relocated)"
    mpicc=$tree/usr/bin/mpicc.openmpi
    # libmpi names libraries of the same tree that the linker would look for in /usr/lib.
    indirect=-Wl,-rpath-link,$lib
    {
        printf '#!/bin/sh\ntarget=$(cd "$(dirname "$0")/.." && pwd)\n'
        relocated
        printf 'exec "$tree/usr/bin/mpirun.openmpi" "$@"\n'
    } >"$peers/mpirun"
fi
chmod +x "$peers/mpirun"
"$mpicc" -std=c11 -O3 -march=native -Wall -Wextra "$here/mpi_alltoallv.c" -o "$peers/mpi_alltoallv" $indirect

# A launcher that does not launch would only be found out in the middle of a measurement: two ranks, one token each.
printf '\0\0\0\0\1\0\0\0' >"$peers/two_ids"
if ! said=$("$peers/mpirun" --allow-run-as-root --oversubscribe --bind-to none -np 2 \
    "$peers/mpi_alltoallv" "$peers/two_ids" 1 64 1 2 0 1 0 2>&1); then
    rm -f "$peers/mpi_alltoallv"
    printf '%s\n' "$said" >&2
    echo "build.sh: the MPI peer was built, but does not run here" >&2
    exit 1
fi
rm -f "$peers/two_ids"
echo "built $peers/mpi_alltoallv with $("$mpicc" --showme:version 2>&1)"
