#!/usr/bin/env bash
# The kernel tests against builds with sanitizers: memory errors and undefined behaviour, then data races.
#
# Python itself is not instrumented, so the runtimes are preloaded and leaks are not looked for. Linux with GCC.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=.venv/bin/python
CXX=${CXX:-g++}

build() { # NAME SANITIZERS
    echo "Building the kernels with -fsanitize=$2"
    CFLAGS="-fsanitize=$2 -fno-omit-frame-pointer" CXXFLAGS="-fsanitize=$2 -fno-omit-frame-pointer" \
        LDFLAGS="-fsanitize=$2" $PYTHON setup.py -q build_ext --build-lib "build/$1" --build-temp "build/$1/objects"
    export SHOAL_TEST_LIBRARY="build/$1/shoal/kernels/libshoal.so"
}

check() { # "PRELOADED RUNTIMES…" OPTIONS…
    local preload=""
    for name in $1; do preload+="$($CXX -print-file-name="lib$name.so") "; done
    shift
    # TSan needs an address space that is laid out as it expects.
    LD_PRELOAD="$preload" setarch -R $PYTHON -m pytest -p no:cacheprovider "$@" tests/kernels/test_{attention,feed_forward,fixed_order,inputs,native,shared}.py </dev/null
}

export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1:report_signal_unsafe=0:die_after_fork=0
build address address,undefined
check "asan ubsan"
build thread thread
# A fork of a process with threads may start none of its own under TSan.
check tsan --deselect tests/kernels/test_native.py::test_a_forked_child_computes_too
