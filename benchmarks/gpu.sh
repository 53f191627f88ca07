#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under nine minutes: first whether every kernel and the pipeline are right,
# then how fast kernels are, then merges under a small budget. Nothing is installed. Results go to $OUT.
#
#     OUT=DIR bash benchmarks/gpu.sh          (default: benchmarks/results)
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
WORK=${WORK:-$(mktemp -d)}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
failed=0

part() { # seconds, name, command...
    local limit=$1 name=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | tee "$OUT/gpu_$name.txt"
    local code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || { echo "== $name: exit code $code"; failed=1; }
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
part 150 tests "$PYTHON" -m pytest -q -p no:cacheprovider -x --maxfail=10 tests/kernels tests/engine/test_gpu.py
part 170 kernels "$PYTHON" benchmarks/kernels.py --json "$OUT/gpu_kernels.json"
part 200 merges "$PYTHON" benchmarks/gpu_merge.py --dir "$WORK" --json "$OUT/gpu_merge.json" --seconds 150
exit $failed
