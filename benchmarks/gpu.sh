#!/usr/bin/env bash
# Everything that needs a GPU, in two calls of under nine minutes: first whether every kernel, the pipeline and the matrix
# solvers are right, then how fast kernels are, then solvers, then merges under a small budget; apart from these, GradFix
# on layers of a 13B Llama, which needs transformers and writes 36 GB to $WORK. Nothing is installed. Results go to $OUT.
#
#     OUT=DIR bash benchmarks/gpu.sh                   (default: benchmarks/results)
#     OUT=DIR bash benchmarks/gpu.sh transport         (GradFix)
#     OUT=DIR bash benchmarks/gpu.sh compose           (learned coefficients, 36 GB too)
#     OUT=DIR bash benchmarks/gpu.sh gradients_right anchors_right anchors      FDA on one unit of a 13B Llama
#     bash benchmarks/gpu.sh solvers_right solvers     these parts alone
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
WORK=${WORK:-$(mktemp -d)}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
failed=0
chosen=" ${*:-tests solvers_right kernels solvers merges} "

part() { # seconds, name, command...
    local limit=$1 name=$2
    shift 2
    [[ $chosen = *" $name "* ]] || return 0
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | tee "$OUT/gpu_$name.txt"
    local code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || { echo "== $name: exit code $code"; failed=1; }
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
part 115 tests "$PYTHON" -m pytest -q -p no:cacheprovider -x --maxfail=10 tests/kernels tests/engine/test_gpu.py \
    tests/engine/test_gpu_matrices.py --ignore tests/kernels/test_matrix_benchmark.py
part 60 solvers_right "$PYTHON" benchmarks/matrix.py --device cuda --check
part 130 kernels "$PYTHON" benchmarks/kernels.py --json "$OUT/gpu_kernels.json" --seconds 105
part 130 solvers "$PYTHON" benchmarks/matrix.py --device cuda --json "$OUT/gpu_matrix.json" --seconds 120
part 100 merges "$PYTHON" benchmarks/gpu_merge.py --dir "$WORK" --json "$OUT/gpu_merge.json" --seconds 65
part 60 gradients_right "$PYTHON" -m pytest -q -p no:cacheprovider tests/methods/test_fda_formulas.py -k "cuda"
part 60 anchors_right "$PYTHON" benchmarks/anchors.py --case unit --quick --device cuda --vram 2GiB --dir "$WORK"
part 500 anchors "$PYTHON" benchmarks/anchors.py --case unit --device cuda --vram 8GiB --ram 16GiB --dir "$WORK" --save
part 500 transport "$PYTHON" benchmarks/transport_cost.py --device cuda --vram 8GiB --dir "$WORK" \
    --json "$OUT/gpu_transport.json"
part 500 compose "$PYTHON" benchmarks/compose_cost.py --device cuda --vram 8GiB --dir "$WORK" \
    --json "$OUT/gpu_compose.json"
exit $failed
