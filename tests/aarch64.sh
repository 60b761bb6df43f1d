#!/usr/bin/env bash
# The kernel tests on emulated 64-bit ARMs: a cross build of the kernels under a Debian Python in user-mode qemu.
#
# Needs Debian or Ubuntu with g++-aarch64-linux-gnu and qemu-user, and 1.5 GB under .aarch64; no root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ARM="$PWD/.aarch64"
TORCH=2.9.1 # the last release whose ARM wheel comes without CUDA; only the tests use it

for tool in qemu-aarch64 aarch64-linux-gnu-g++ apt-get dpkg; do
    command -v "$tool" >/dev/null || { echo "$tool is missing: apt install g++-aarch64-linux-gnu qemu-user"; exit 1; }
done

if [ ! -e "$ARM/.installed" ]; then
    echo "Fetching an ARM Python into .aarch64 (once; a few minutes)"
    rm -rf "$ARM"
    mkdir -p "$ARM"/apt/lists/partial "$ARM"/apt/cache/archives/partial "$ARM"/sysroot
    touch "$ARM/apt/status"
    export APT_CONFIG="$ARM/apt.conf"
    cat >"$APT_CONFIG" <<END
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "";
Dir::State "$ARM/apt";
Dir::State::status "$ARM/apt/status";
Dir::Cache "$ARM/apt/cache";
Debug::NoLocking "true";
END
    apt-get -qq update
    apt-get -qq install --download-only -y --no-install-recommends python3 libstdc++6 libgomp1 2>/dev/null
    for package in "$ARM"/apt/cache/archives/*.deb; do dpkg -x "$package" "$ARM/sysroot"; done
    version=$(cd "$ARM/sysroot/usr/bin" && ls python3.* | grep -o '3\.[0-9]*' | head -1)
    wheels() {
        .venv/bin/python -m pip --disable-pip-version-check install -q --target "$ARM/site" --no-deps \
            --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
            --python-version "$version" --only-binary :all: "$@" 2>/dev/null
    }
    wheels "torch==$TORCH" numpy typing_extensions sympy mpmath networkx jinja2 markupsafe filelock fsspec \
        platformdirs pytest iniconfig packaging pluggy pygments hypothesis sortedcontainers
    rm -rf "$ARM/apt"
    touch "$ARM/.installed"
fi

_PYTHON_HOST_PLATFORM=linux-aarch64 CC=aarch64-linux-gnu-gcc CXX=aarch64-linux-gnu-g++ \
    LDSHARED="aarch64-linux-gnu-gcc -shared" \
    .venv/bin/python setup.py -q build_ext --build-lib build/aarch64 --build-temp build/aarch64/objects
export SHOAL_TEST_LIBRARY=build/aarch64/shoal/kernels/libshoal.so
export PYTHONPATH="$PWD/.typing:$ARM/site" QEMU_LD_PREFIX="$ARM/sysroot"

check() { # CPU HOME OPTIONS…: all kernel tests on this CPU, on which the library should choose this home
    export QEMU_CPU=$1
    echo "Kernel tests on a $1, whose kernels are $2"
    qemu-aarch64 "$ARM"/sysroot/usr/bin/python3 - "$2" <<END
import ctypes, sys
choose = ctypes.CDLL("$SHOAL_TEST_LIBRARY").shoal_choose
choose.restype = ctypes.c_char_p
chosen = choose(b"").decode()
sys.exit(chosen != sys.argv[1] and f"The library chooses {chosen}")
END
    # Deselected is what the emulator cannot do: start a second program, and threads in a forked child.
    qemu-aarch64 "$ARM"/sysroot/usr/bin/python3 -m pytest -p no:cacheprovider "${@:3}" tests/kernels/test_{attention,feed_forward,fixed_order,inputs,native,shared}.py \
        --deselect tests/kernels/test_native.py::test_the_environment_names_the_home \
        --deselect tests/kernels/test_fixed_order.py::test_processes_with_other_kernels_choose_the_same_experts \
        --deselect tests/kernels/test_native.py::test_a_forked_child_computes_too </dev/null
}

# Not `max`: matrix products of torch use its SVE, which is emulated eight times slower.
check cortex-a76 neon_dot "$@" # as in a Raspberry Pi 5
check cortex-a72 neon "$@"     # as in a Raspberry Pi 4, without dot products
