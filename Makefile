# Builds, checks and installs liba2a.
#
#   make            the library, target/release/liba2a.so, and the benchmark: all that `make install` installs
#   make demo       a mixture-of-experts layer over 8 processes; needs Rust, a C compiler and make
#   make test       everything that is checked; fetches CMake, pkgconf, numpy, mlx, mypy and pytest into target/venv, and, if there are
#                   none, NCCL and NIXL into target/carriers, nvcc into target/cuda and valgrind into target/valgrind
#   make soak       a million checked steps, and 10,000 comms that come and go; `make test` has a tenth of the steps
#   make fuzz       ten million inputs for each fuzz target; `make test` has a minute of each
#   make incidents  what `make test` does of faults at named points, with 100 seeds a kind instead of 5
#   make wheel      the Python package with the library inside, into target/wheel
#   make perf       the benchmark, target/release/a2a-perf
#   make header     writes include/a2a.h from src/abi
#   make kernels    writes docs/kernels.md from what ptxas says of kernels/
#   make install    into $(DESTDIR)$(PREFIX): libraries, headers, a2a-perf, what CMake and pkg-config look for. Needs no Rust and writes
#                   nothing here if make has run before
#   make uninstall  what make install wrote with the same PREFIX and DESTDIR
#   make dist       target/dist/a2a-VERSION-HOST.tar.gz: an installation to unpack anywhere, and its checksum
#   make clean
#
# Everything built lies under target/.

PYTHON ?= python3
PREFIX ?= /usr/local
DESTDIR ?=
BINDIR ?= $(PREFIX)/bin
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
export CARGO_TARGET_DIR := target
# Builds that differ in what is not the kernels' share them (build.rs).
export A2A_KERNEL_CACHE := $(CURDIR)/target/kernels

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
MAJOR   := $(firstword $(subst ., ,$(VERSION)))
LIB     := target/release/liba2a.so

# What compiles the kernels: the environment's nvcc (A2A_NVCC, CUDA_HOME or PATH, where build.rs looks), else the one that
# `make test` installs, which every later make uses. With none of them, or A2A_NVCC=none, there is no device code.
NVCC_HERE := $(CURDIR)/target/cuda/toolkit/bin/nvcc
ifeq ($(A2A_NVCC)$(wildcard $(CUDA_HOME)/bin/nvcc)$(shell command -v nvcc),)
  ifneq ($(filter Linux-x86_64 Linux-aarch64,$(shell uname -s)-$(shell uname -m)),)
    NVCC_READY := target/cuda/ready
    ifneq ($(wildcard $(NVCC_READY)),)
      export A2A_NVCC := $(NVCC_HERE)
    endif
  else
    NO_NVCC := there is no nvcc here, and no wheel of it for $(shell uname -s -m)
  endif
else ifeq ($(A2A_NVCC),none)
  NO_NVCC := A2A_NVCC is none
endif

# Programs here find the library beside them; -Werror is for our own machines, not for a user's newer compiler.
CFLAGS_DEMO := -std=c11 -O2 -Wall -Wextra -Iinclude
CFLAGS_TEST := -g -O1 -Wall -Wextra -Wpedantic -Werror -Iinclude -pthread
LINK        := -Ltarget/release -la2a -Wl,-rpath,'$$ORIGIN/../release'

.PHONY: all lib demo wheel perf test soak fuzz fuzz-targets incidents header kernels install uninstall dist clean

# What `make install` takes: built together, and last, as the stamp of it all, what a program needs beside liba2a.a, which is what
# Rust's own library needs; everything else is opened at run time.
READY := target/static-libs
all: PACKAGES = $(BOTH)
all: lib perf
	rustc --crate-type staticlib --print native-static-libs -o target/empty.a - 2>&1 </dev/null | \
	  sed -n 's/.*native-static-libs: //p' >$(READY)
	@test -s $(READY) || { rm $(READY); echo 'rustc does not say what liba2a.a needs' >&2; exit 1; }

# Only if it is not there, or older than a source, is anything built.
$(READY): $(shell find Cargo.toml Cargo.lock build.rs src kernels late-library nccl-sys nixl-sys perf -type f)
	$(MAKE) --no-print-directory all

# What building and testing take, named here because what fails without it names something else.
RUST := $(shell sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
define lacks
{ printf 'liba2a needs %s, and %s: %s\n' $(1) $(2) $(3) >&2; exit 1; }
endef

.PHONY: tools cxx python
tools:
	@test "$$(uname -s)" = Linux || $(call lacks,Linux,"this is $$(uname -s)",'memory is shared and peers are watched as Linux does it')
	@command -v cargo >/dev/null && command -v rustc >/dev/null || \
	  $(call lacks,'Rust $(RUST) or newer','there is no cargo or no rustc in PATH','https://rustup.rs installs them')
	@have=$$(rustc --version | cut -d ' ' -f 2); printf '%s\n' '$(RUST)' "$$have" | sort -VC || \
	  $(call lacks,'Rust $(RUST) or newer',"rustc is $$have",'rustup update stable installs the newest')
	@command -v $(firstword $(CC)) >/dev/null || \
	  $(call lacks,'a C compiler','there is no $(firstword $(CC)) in PATH','install gcc or clang with your system or name one by CC=')

cxx:
	@command -v $(firstword $(CXX)) >/dev/null || \
	  $(call lacks,'a C++17 compiler for its tests','there is no $(firstword $(CXX)) in PATH','install g++ or clang with your system or name one by CXX=')

python:
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  $(call lacks,'Python 3.11 or newer with venv for its tests','$(PYTHON) is none','install python3-venv with your system or name another by PYTHON=')

# Cargo builds the library once more where other packages are built with it, for they want more of what it depends on: where both
# are wanted, they are built together.
BOTH := --package a2a --package a2a-perf

lib: tools
	cargo build --release $(PACKAGES)
	ln -sf liba2a.so $(LIB).$(MAJOR)

demo: target/demo/moe_layer
	target/demo/moe_layer tests/data

target/demo/moe_layer: examples/c/moe_layer.c include/a2a.h | lib
	@mkdir -p $(@D)
	$(CC) $(CFLAGS_DEMO) $< -o $@ $(LINK) -lm

# hatchling, which builds it, is in the environment of the tests; nothing is fetched.
wheel: target/venv/ready | lib
	rm -rf target/wheel
	A2A_LIBRARY= target/venv/bin/pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir target/wheel examples/python

perf: tools
	cargo build --release $(or $(PACKAGES),--package a2a-perf)

header:
	A2A_BLESS=1 cargo test --package a2a-header

kernels test-kernels: $(NVCC_READY)
ifdef NVCC_READY
kernels test-kernels: export A2A_NVCC := $(NVCC_HERE)
endif

kernels:
	$(PYTHON) tests/kernels_table.py

# An installation finds its own parts by where they lie beside each other: it may be moved.
relative     = $(shell realpath -sm --relative-to='$(1)' '$(2)')
STATIC_LIBS  = $(shell cat $(READY))
STATIC_NEEDS = $(patsubst -l%,%,$(STATIC_LIBS))
HOST         = $(shell rustc -vV | sed -n 's/^host: //p')

install uninstall: bin     = $(DESTDIR)$(BINDIR)
install uninstall: lib     = $(DESTDIR)$(LIBDIR)
install uninstall: include = $(DESTDIR)$(INCLUDEDIR)
install: $(READY)
	install -d '$(bin)' '$(include)' '$(lib)/pkgconfig' '$(lib)/cmake/a2a'
	install -m 755 target/release/a2a-perf '$(bin)/a2a-perf'
	install -m 644 include/a2a.h include/a2a.hpp '$(include)'
	install -m 755 $(LIB) '$(lib)/liba2a.so.$(VERSION)'
	ln -sf liba2a.so.$(VERSION) '$(lib)/liba2a.so.$(MAJOR)'
	ln -sf liba2a.so.$(MAJOR) '$(lib)/liba2a.so'
	install -m 644 target/release/liba2a.a '$(lib)/liba2a.a'
	$(call fill,a2a.pc,pkgconfig/a2a.pc)
	$(call fill,a2aConfig.cmake,cmake/a2a/a2aConfig.cmake)
	$(call fill,a2aConfigVersion.cmake,cmake/a2a/a2aConfigVersion.cmake)
	install -m 644 packaging/a2aTargets.cmake '$(lib)/cmake/a2a/a2aTargets.cmake'

# packaging/$(1).in with this installation's words in it, to $(2) below $(lib).
define fill
	sed -e 's|@VERSION@|$(VERSION)|g; s|@MAJOR@|$(MAJOR)|g' \
	  -e 's|@PREFIX_FROM_LIB@|$(call relative,$(LIBDIR),$(PREFIX))|g; s|@LIB_FROM_PREFIX@|$(call relative,$(PREFIX),$(LIBDIR))|g' \
	  -e 's|@INCLUDE_FROM_PREFIX@|$(call relative,$(PREFIX),$(INCLUDEDIR))|g' \
	  -e 's|@STATIC_LIBS@|$(STATIC_LIBS)|g; s|@STATIC_NEEDS@|$(STATIC_NEEDS)|g' packaging/$(1).in >'$(lib)/$(2)'
	chmod 644 '$(lib)/$(2)'
endef

uninstall:
	rm -f '$(bin)/a2a-perf' '$(include)/a2a.h' '$(include)/a2a.hpp' '$(lib)/liba2a.so' '$(lib)/liba2a.so.$(MAJOR)' \
	  '$(lib)/liba2a.so.$(VERSION)' '$(lib)/liba2a.a' '$(lib)/pkgconfig/a2a.pc'
	rm -rf '$(lib)/cmake/a2a'

# The same files give the same bytes: sorted, of nobody, as old as SOURCE_DATE_EPOCH says, else as the last commit. A library
# without device code, which the first word of a fatbin tells, says so in its name.
dist: epoch = $(or $(SOURCE_DATE_EPOCH),$(shell git log -1 --format=%ct 2>/dev/null),0)
dist: all
	rm -rf target/dist
	set -e; name=a2a-$(VERSION)-$(HOST); LC_ALL=C grep -qaP '\x50\xed\x55\xba' $(LIB) || name=$$name-cpu; \
	tree=target/dist/$$name; \
	$(MAKE) --no-print-directory install DESTDIR= PREFIX=$$tree BINDIR=$$tree/bin LIBDIR=$$tree/lib INCLUDEDIR=$$tree/include; \
	install -m 644 README.md CHANGELOG.md LICENSE SECURITY.md $$tree; \
	cd target/dist; \
	tar --sort=name --format=gnu --owner=0 --group=0 --numeric-owner --mtime=@$(epoch) -cf $$name.tar $$name; gzip -n $$name.tar; \
	sha256sum $$name.tar.gz | tee $$name.tar.gz.sha256

clean:
	cargo clean

# ---------------------------------------------------------------------------------------------------------- the tests
# One target per stage; `make test` runs them in this order and stops at the first that fails.

STAGES := format kernels clippy rust nixl debug loom incidents soak header symbols hpp abi-c abi-cpp abi-sanitized abi-valgrind fuzz perf install cmake python docs demo
.PHONY: $(STAGES:%=test-%)

test: tools cxx $(NVCC_READY)
	@passed=0; \
	for stage in $(STAGES); do \
	  printf '\n== %s\n' $$stage; start=$$(date +%s); \
	  if ! $(MAKE) --no-print-directory PACKAGES='$(BOTH)' test-$$stage; then \
	    printf '\n%s failed\nstages: %d passed, 1 failed\n' $$stage $$passed; exit 1; \
	  fi; \
	  passed=$$((passed + 1)); printf '== %s: %d s\n' $$stage $$(($$(date +%s) - start)); \
	done; \
	printf '\nstages: %d passed, 0 failed\n' $$passed

test-format:
	cargo fmt --all -- --check
	cargo fmt --manifest-path tests/loom/Cargo.toml -- --check
	cargo fmt --manifest-path fuzz/Cargo.toml -- --check

# Without device code, in a directory of its own.
WITHOUT_NVCC := A2A_NVCC=none A2A_REQUIRE_NVCC=
CPU_ONLY     := $(WITHOUT_NVCC) CARGO_TARGET_DIR=target/cpu-only

# With device code, which spills nothing and is as docs/kernels.md says; and without.
test-kernels:
ifdef NO_NVCC
	@echo 'skipped: the kernels are not compiled: $(NO_NVCC)'
else
	$(PYTHON) tests/kernels_table.py --check $(PACKAGES)
endif
	$(CPU_ONLY) cargo test --no-run $(DEBUG_TESTS)
	$(PYTHON) -B tests/cpu_only.py target/cpu-only/debug/deps/liba2a.so

# Again with what only the builds for tests have (CONTRIBUTING.md): that needs no kernels, which take a minute each time.
test-clippy:
	cargo clippy --workspace --all-targets -- -D warnings
	$(WITHOUT_NVCC) cargo clippy --workspace --all-targets --features a2a/jitter,a2a/faults -- -D warnings
	$(CPU_ONLY) cargo clippy --manifest-path fuzz/Cargo.toml --all-targets -- -D warnings
	cargo clippy --manifest-path tests/loom/Cargo.toml --target-dir target/loom --all-targets -- -D warnings

# A real NCCL and a real NIXL, which some tests open: the environment's, or those of wheels, where the platform has them.
ifneq ($(and $(A2A_NCCL_LIB),$(A2A_NIXL_LIB)),)
else ifneq ($(filter Linux-x86_64 Linux-aarch64,$(shell uname -s)-$(shell uname -m)),)
test-rust test-debug test-nixl test-python: target/carriers/ready
test-rust test-debug test-nixl test-python: export A2A_NCCL_LIB ?= $(CURDIR)/target/carriers/site/nvidia/nccl/lib/libnccl.so.2
test-rust test-debug test-nixl test-python: export A2A_NIXL_LIB ?= $(CURDIR)/target/carriers/site/.nixl_cu13.mesonpy.libs/libnixl_capi.so
else
NO_CARRIERS := there are no wheels of NCCL and NIXL for $(shell uname -s -m), and A2A_NCCL_LIB and A2A_NIXL_LIB name none
endif

# Together with the benchmark, so that all build the library but once.
TESTED := $(BOTH) --package nccl-sys --package nixl-sys

# Nothing is ignored where they are there.
NOTHING_IGNORED := $(if $(NO_CARRIERS),,-- --include-ignored)

test-rust:
	cargo test --release $(TESTED) $(NOTHING_IGNORED)

test-nixl:
ifdef NO_CARRIERS
	@echo 'skipped: $(NO_CARRIERS)'; test '$(A2A_REQUIRE_CARRIERS)' != 1
else
	A2A_TEST_TRANSPORT=nixl cargo test --release $(TESTED) --test conformance -- --test-threads 2 low_latency
endif

# A debug build checks every addition, and poisons views that have ended. The one without device code, which test-kernels has built.
DEBUG_TESTS := --lib --test traffic --test poison
test-debug:
	$(CPU_ONLY) cargo test $(DEBUG_TESTS) $(NOTHING_IGNORED)

# The protocol of src/device/protocol.rs, in every order of memory and of threads; how many those are is shown.
test-loom:
	cargo test --release --manifest-path tests/loom/Cargo.toml --target-dir target/loom -- --nocapture

# One test at a time: each has 8 ranks.
test-soak soak:
	A2A_TEST_STEPS=$(SOAK_STEPS) A2A_TEST_COMMS=10000 cargo test --release $(TESTED) --test conformance -- soak/ --test-threads 1
test-soak: SOAK_STEPS := 100000
soak: SOAK_STEPS := 1000000

# In a directory of its own, so that no library with faults inside is ever taken for the one that is shipped.
INCIDENTS := $(WITHOUT_NVCC) CARGO_TARGET_DIR=target/faults \
             cargo test --release --features faults --test incidents
test-incidents:
	$(INCIDENTS)
incidents:
	A2A_INCIDENTS=100 $(INCIDENTS)

test-header:
	cargo test --package a2a-header
	CC='$(CC)' CXX='$(CXX)' tests/c/header_test.sh

test-symbols: lib
	tests/c/symbols_test.sh $(LIB) $(LIB:.so=.a) $(MAJOR)

test-hpp: target/tests/hpp_test_17 target/tests/hpp_test_20 target/tests/hpp_test_sanitized
	@set -ex; for test in $^; do $$test; done

test-abi-c: target/tests/abi_test_c
	$<
test-abi-cpp: target/tests/abi_test_cpp
	$<
# That the sanitizers are there is shown by defects on purpose. The library is instrumented in the build of the fuzz targets:
# once more with that one, whose defect is a caller's struct that is shorter than it says.
test-abi-sanitized: target/tests/abi_test_sanitized target/tests/defects_sanitized fuzz-targets
	tests/c/presence.sh AddressSanitizer:.heap-buffer-overflow target/tests/defects_sanitized heap_overflow
	tests/c/presence.sh runtime.error:.signed.integer.overflow target/tests/defects_sanitized signed_overflow
	tests/c/presence.sh LeakSanitizer:.detected.memory.leaks target/tests/defects_sanitized leak
	target/tests/abi_test_sanitized
	mkdir -p target/tests/sanitized
	ln -sf ../../../$(FUZZ_BIN)/deps/liba2a.so target/tests/sanitized/liba2a.so.$(MAJOR)
	LD_LIBRARY_PATH=target/tests/sanitized tests/c/presence.sh 'AddressSanitizer:.heap-buffer-overflow.*in a2a_query_memory' \
	  target/tests/defects_sanitized in_the_library
	LD_LIBRARY_PATH=target/tests/sanitized target/tests/abi_test_sanitized

test-abi-valgrind: target/tests/abi_test_c target/tests/defects
	@tests/c/valgrind.sh target/valgrind true || { [ $$? -eq 77 ] && exit 0; exit 1; }; set -ex; \
	tests/c/presence.sh Invalid.write tests/c/valgrind.sh target/valgrind target/tests/defects heap_overflow; \
	tests/c/presence.sh definitely.lost tests/c/valgrind.sh target/valgrind target/tests/defects leak; \
	tests/c/valgrind.sh target/valgrind target/tests/abi_test_c

target/tests/abi_test_c: tests/c/abi_test.c include/a2a.h | lib
	@mkdir -p $(@D)
	$(CC) -std=c11 $(CFLAGS_TEST) $< -o $@ $(LINK)
target/tests/abi_test_cpp: tests/c/abi_test.c include/a2a.h | lib
	@mkdir -p $(@D)
	$(CXX) -std=c++17 -x c++ $(CFLAGS_TEST) $< -o $@ -x none $(LINK)
target/tests/abi_test_sanitized: tests/c/abi_test.c include/a2a.h | lib
	@mkdir -p $(@D)
	$(CC) -std=c11 $(CFLAGS_TEST) -fsanitize=address,undefined -fno-sanitize-recover=all $< -o $@ $(LINK)

# a2a.hpp: half of the program is compiled without exceptions and without RTTI, and linked first: of what both halves have, its own
# is taken.
CFLAGS_HPP := $(CFLAGS_TEST) -Wshadow -Wconversion -Wold-style-cast
target/tests/hpp_test_17:        CFLAGS_HPP += -std=c++17
target/tests/hpp_test_20:        CFLAGS_HPP += -std=c++20
target/tests/hpp_test_sanitized: CFLAGS_HPP += -std=c++17 -fsanitize=address,undefined -fno-sanitize-recover=all
target/tests/hpp_test_%: tests/cpp/hpp_test.cpp tests/cpp/no_exceptions.cpp tests/cpp/no_exceptions.hpp include/a2a.hpp include/a2a.h | lib
	@mkdir -p $(@D)
	$(CXX) $(CFLAGS_HPP) -fno-exceptions -fno-rtti -c tests/cpp/no_exceptions.cpp -o $@.o
	$(CXX) $(CFLAGS_HPP) $@.o $< -o $@ $(LINK)

target/tests/defects: tests/c/defects.c include/a2a.h | lib
	@mkdir -p $(@D)
	$(CC) -std=c11 $(CFLAGS_TEST) $< -o $@ $(LINK)
target/tests/defects_sanitized: tests/c/defects.c include/a2a.h | lib
	@mkdir -p $(@D)
	$(CC) -std=c11 $(CFLAGS_TEST) -fsanitize=address,undefined -fno-sanitize-recover=all $< -o $@ $(LINK)

# The fuzz targets as cargo-fuzz builds and runs them (`cargo fuzz run --target-dir target/fuzz abi`), without having it
# compiled first. RUSTC_BOOTSTRAP lets a stable compiler instrument.
FUZZ         := abi routing rendezvous
FUZZ_BIN      = target/fuzz/$(HOST)/release
FUZZ_RUSTC   := -Zsanitizer=address -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
  -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing
A2A_FUZZ_SECONDS ?= 60
A2A_FUZZ_RUNS    ?= 10000000

fuzz-targets:
	$(WITHOUT_NVCC) RUSTC_BOOTSTRAP=1 RUSTFLAGS='$(FUZZ_RUSTC)' cargo build --release \
	  --manifest-path fuzz/Cargo.toml --target $(HOST) --target-dir target/fuzz

# Side by side. The committed corpus first, then what grows out of it; a finding lies in target/fuzz/findings.
test-fuzz: FUZZ_UNTIL := -max_total_time=$(A2A_FUZZ_SECONDS)
fuzz:      FUZZ_UNTIL := -runs=$(A2A_FUZZ_RUNS)
test-fuzz fuzz: fuzz-targets
	$(MAKE) --no-print-directory --jobs=$(words $(FUZZ)) --output-sync FUZZ_UNTIL=$(FUZZ_UNTIL) $(FUZZ:%=fuzz-%)

.PHONY: $(FUZZ:%=fuzz-%)
$(FUZZ:%=fuzz-%): fuzz-%:
	@mkdir -p target/fuzz/grown/$* target/fuzz/findings
	$(FUZZ_BIN)/$* $(FUZZ_UNTIL) -max_len=1024 -len_control=0 -timeout=60 -verbosity=0 -print_final_stats=1 \
	  -artifact_prefix=target/fuzz/findings/$*- target/fuzz/grown/$* fuzz/corpus/$*

# Its own tests; then every backend through the gate, as processes and threads, every routing; then a cell of the matrix.
PERF := target/release/a2a-perf --hidden 64 --experts 16 --topk 4 --iterations 2 --warmup 1
test-perf: perf
	cargo test --release --package a2a-perf
	$(PERF) --tokens 0,5 --routing hash,zipf,one_hot --cache warm,cold --format json --output target/perf.json
	$(PERF) --tokens 5 --mode threads --ranks 3 --dtype fp8,f8 --staged --format csv --output target/perf.csv
	target/release/a2a-perf --check threads/two_sided/2/0

test-install: target/venv/ready
	CC='$(CC)' CXX='$(CXX)' MAKE='$(MAKE)' tests/install/install_test.sh $(CURDIR)/target/install-test $(VERSION) $(CURDIR)/target/venv

# The examples, built by CMake with the library from the sources, then with what test-install installed; and a project that fetches
# the sources. The library is built with what `make` built.
target/install-test/unpacked:
	$(MAKE) --no-print-directory test-install
test-cmake: target/venv/ready | target/install-test/unpacked lib
	$(call build_with_cmake,examples,tree,-DCMAKE_DISABLE_FIND_PACKAGE_a2a=ON)
	$(call build_with_cmake,examples,installed,-DA2A_ROOT=$(CURDIR)/target/install-test/unpacked)
	$(call build_with_cmake,tests/install,fetched,-DA2A_SOURCE=$(CURDIR) -DA2A_CARGO_TARGET_DIR=$(CURDIR)/target)

define build_with_cmake
	CC='$(CC)' CXX='$(CXX)' target/venv/bin/cmake --fresh -S $(1) -B target/cmake-$(2) $(3) -DA2A_CARGO_ARGUMENTS='$(PACKAGES)'
	MAKEFLAGS= target/venv/bin/cmake --build target/cmake-$(2) --clean-first
	target/venv/bin/ctest --test-dir target/cmake-$(2) --output-on-failure
endef

test-python: target/venv/blocks wheel | lib
	CC='$(CC)' target/venv/bin/python -B -m pytest -q -rs -p no:cacheprovider tests/python

# The pages: their code, their links, and that what the library has stands in them.
test-docs: PACKAGES := $(BOTH)
test-docs: target/venv/ready | target/install-test/unpacked lib perf
	CC='$(CC)' CXX='$(CXX)' target/venv/bin/python -B tests/docs/check.py

test-demo: demo

target/venv/ready: tests/requirements.txt | python
	$(PYTHON) -m venv target/venv
	target/venv/bin/pip install --quiet --no-input --require-virtualenv -r $<
	touch $@

# Not every platform has wheels of these: the other tests then run all the same, and tests/python/test_blocks.py fails.
target/venv/blocks: tests/requirements-blocks.txt target/venv/ready
	-target/venv/bin/pip install --quiet --no-input --require-virtualenv --no-deps --only-binary :all: -r $< && touch $@

# `site` is its place, by a name without Python's version.
target/carriers/ready: tests/requirements-carriers.txt | python
	$(PYTHON) -m venv target/carriers
	target/carriers/bin/pip install --quiet --no-input --require-virtualenv --no-deps --only-binary :all: -r $<
	cd target/carriers && ln -sfn lib/python3*/site-packages site
	touch $@

# The compiler of device code and what it needs; toolkit is their place, by a name without Python's version.
target/cuda/ready: tests/requirements-cuda.txt | python
	$(PYTHON) -m venv target/cuda
	target/cuda/bin/pip install --quiet --no-input --require-virtualenv --no-deps --only-binary :all: -r $<
	cd target/cuda && ln -sfn lib/python3*/site-packages/nvidia/cu13 toolkit && toolkit/bin/nvcc --version
	touch $@
