#!/bin/sh
# All that is measured on a graphics card, in a quarter of an hour: sets up, runs the tests on the card, then measures.
#
#   bench/gpu.sh [--out DIR] [--dry-run] [--parts tests,copies,dense,…] [--seconds 780]
#
# Results go to DIR ($OUT if that is set, else bench/results/gpu): results.json, summary.txt, log.txt. `--dry-run` does the
# same with tiny models on a device that the CPU plays. Needs a python with torch (PYTHON; 3.11 or later) and a C++ compiler.
# Other packages come from .whl, a folder of wheels, if it is there, else from the package index. Where a command may take
# ten minutes at most, run it twice: --parts
# tests,tests-triton,copies,kernels,dense,dense-torch,crossover,layers and then the others.
set -eu
cd "$(dirname "$0")/.."
out=${OUT:-bench/results/gpu}
python=${PYTHON:-python3}
[ "${1:-}" != --out ] || { out=$2; shift 2; }
mkdir -p "$out"

began=$(date +%s)
packages='pyzmq msgspec xxhash tokenizers platformdirs prompt_toolkit cryptography zeroconf huggingface_hub gguf pytest
hypothesis psutil click jinja2 rich safetensors transformers accelerate cffi pycparser ifaddr wcwidth'
site=${SHOAL_GPU_SITE:-/tmp/shoal-gpu-site}
ours="$PWD/.typing:$PWD/bench:$PWD/tests" given=${PYTHONPATH:-}
found() { # also what has been installed below $site
	export PYTHONPATH="$ours"
	for place in "$site" "$site"/lib/python*/*-packages "$site"/local/lib/python*/*-packages; do
		[ ! -d "$place" ] || PYTHONPATH=$PYTHONPATH:$place
	done
	PYTHONPATH=$PYTHONPATH${given:+:$given}
}
found
lacking() {
	"$python" -P - $packages <<-'END'
		import sys
		from importlib.metadata import PackageNotFoundError, version
		for name in sys.argv[1:]:
		    try:
		        version(name)
		    except PackageNotFoundError:
		        print(name)
	END
}
more=$(lacking)
if [ -n "$more" ]; then
	if [ -d .whl ]; then
		"$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl
	else # --prefix takes what is there already, torch above all; --target would fetch it once more
		"$python" -m pip install -q --prefix "$site" $more
	fi >>"$out/log.txt" 2>&1 || echo "not all of these could be installed: $more" | tee -a "$out/log.txt"
	found
fi

# Kernels built elsewhere may want another system library than there is here.
native() { "$python" -P -c 'import shoal.kernels as k, sys; sys.exit(k.home() == "reference")' 2>>"$out/log.txt"; }
native || "$python" setup.py build_ext --inplace >>"$out/log.txt" 2>&1 || true
native || echo 'the kernels could not be built (log.txt): the processor computes with the reference' | tee -a "$out/log.txt"
echo "ready after $(($(date +%s) - began)) s"

exec "$python" -P bench/cards/measure_card.py --out "$out" "$@"
