#!/bin/sh
# bench/gpu.sh [--dry-run] [OUTDIR]    everything worth doing on a GPU machine, in one call of under ten minutes
#
#   environment   driver, versions, commit
#   tests         the tests of kernels and backends that run on CUDA
#   sanitizer     compute-sanitizer on one step of each Triton backend
#   record        probes, suites, comparison and profile -> recording.json, trace.json.gz
#   train         the 50,000-step run of the backend that was recorded as the fastest, in fp32 and in tf32x3
#                 -> train-fp32.jsonl, train-tf32x3.jsonl, train.png
#
# Seconds that the stages may take, of 600: build 20, environment 20, tests 70 + 50 + 90 + 30, sanitizer 3 * 40, so 400
# before the record, which ends at 490; train 2 * 35. Each of the last three may need 10 more to be killed: 590. The
# record gets what the others have left of theirs, 90 at the least; what matters most comes first in it.
#
# OUTDIR (default: runs/gpu) ends with at most eight files. It installs nothing: the package is built into a temporary
# folder, and what the machine lacks is left out with the reason. --dry-run walks every stage with tiny sizes, on the
# CPU and in Triton's interpreter where there is no GPU; its times mean nothing.
#
# PYTHON names the interpreter (default: .venv/bin/python, else python3), MLP_FAST_NAMES a copy of names.txt, and
# MLP_FAST_COMMIT the commit where this is no checkout.
set -u

dry=
if [ "${1:-}" = --dry-run ]; then
    dry=yes
    shift
fi
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$root/runs/gpu}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
python=${PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    if [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
fi
case $python in # the stages run elsewhere
/*) ;;
*/*) python=$PWD/$python ;;
esac
case ${MLP_FAST_NAMES:-/} in
/*) ;;
*) export MLP_FAST_NAMES="$PWD/$MLP_FAST_NAMES" ;;
esac
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
trap 'stop 130' INT
trap 'stop 143' TERM
log=$out/log.txt
: > "$log"
began=$(date +%s)
failed=

say() {
    printf '%s\n' "$*" | tee -a "$log"
}

# limited SECONDS COMMAND...: runs a command with a time limit. In the background, since a trap waits for what is in the
# foreground; and killed 10 seconds after it was asked to end, since Python does not hear that in a kernel that hangs.
running=
limited() {
    limit=$1
    shift
    timeout -k 10 "$limit" "$@" &
    running=$!
    wait "$running"
    code=$?
    running=
    return $code
}

stop() {
    trap '' INT TERM
    if [ -n "$running" ]; then
        kill "$running"
        wait "$running"
    fi
    exit "$1"
}

# stage NAME SECONDS COMMAND...: runs a command with a time limit, its output into the log and the end of it to the screen
stage() {
    name=$1
    shift
    say "== $name"
    start=$(date +%s)
    limited "$@" > "$work/output" 2>&1
    code=$?
    cat "$work/output" >> "$log"
    tail -n "${shown:-3}" "$work/output"
    if [ $code -eq 124 ] || [ $code -eq 137 ]; then say "$name: ended by its limit of $limit s"; fi
    say "== $name: exit code $code after $(($(date +%s) - start)) s"
    if [ $code -ne 0 ]; then failed="$failed $name"; fi
}

skip() {
    say "== $1: skipped: $2"
}

has() {
    (cd "$work" && "$python" -c "import $1") > /dev/null 2>&1
}

if "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>> "$log"; then
    device=cuda
else
    device=cpu
    if [ -z "$dry" ]; then
        say "bench/gpu.sh: no CUDA device was found; --dry-run walks the stages without one"
        exit 2
    fi
    # Two processes' threads that wait for each other cost a dry run more than its work.
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
fi

# The package as it would be installed, kernels/ and data/ inside it, with the C kernel where there is a compiler. Without
# setuptools the same layout is made of links.
site=$work/site
mkdir "$site"
if ! limited 20 sh -c 'cd "$1" && exec "$2" setup.py -q build --build-base "$3/build" --build-lib "$3/site"' \
    sh "$root" "$python" "$work" >> "$log" 2>&1; then
    rm -rf "$site"
    mkdir -p "$site/mlp_fast"
    for path in "$root"/mlp_fast/*; do ln -s "$path" "$site/mlp_fast/"; done
    ln -s "$root/kernels" "$site/mlp_fast/kernels"
    ln -s "$root/data" "$site/mlp_fast/data"
fi
ln -s "$root/bench" "$site/bench"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
if [ -e "$root/.git" ] && commit=$(git -C "$root" rev-parse --short=12 HEAD 2> /dev/null); then
    if [ -n "$(git -C "$root" status --porcelain --untracked-files=no)" ]; then commit=$commit+; fi
    export MLP_FAST_COMMIT="$commit"
fi
cd "$work" || exit 2 # not the checkout: there `import mlp_fast` would find the package without its kernels

sizes= steps=50000 dry_option= warm=50
if [ -n "$dry" ]; then
    sizes="--embedding-size 8 --hidden-size 32 --batch-size 16" steps=20 dry_option=--dry-run warm=2
fi

data=names
if ! "$python" -c "from mlp_fast.corpus.load import load; load('names')" > /dev/null 2>&1; then
    data=embedded
    say "The names corpus is not here, so the golden trace of 1,000 steps is left out, and the last run trains on the"
    say "embedded corpus. MLP_FAST_NAMES=FILE names a copy of names.txt; python -m mlp_fast.corpus fetch gets one."
fi

shown=8
stage environment 20 sh -c '
    nvidia-smi || echo "nvidia-smi: not found"
    "$1" -c "
import json, torch
from mlp_fast.measure import machine
print(json.dumps(machine.facts(torch.device(\"$2\")), indent=1))"
    "$1" -m mlp_fast.train --list-backends --device auto' sh "$python" "$device"

shown=12
# The versions here may be others than the pinned ones, and their warnings are no fault of the kernels.
tests() { # NAME SECONDS FILTER FILES...: pytest without what it may lack here
    name=$1 limit=$2 filter=$3
    shift 3
    stage "$name" "$limit" "$python" -m pytest "$@" -c "$root/pyproject.toml" --rootdir "$root" -k "$filter" \
        -p no:cacheprovider -q -o addopts=--strict-markers -W default
}
if ! has pytest; then
    skip tests "pytest is not installed; the suites below check every backend against float64 before they time it"
elif [ -n "$dry" ]; then
    tests "tests of the kernels" 60 gather "$root/tests/interpreted/test_triton_op.py"
    tests "tests of the backends" 60 "eager and state_goes" "$root/tests/test_backends.py"
else
    # The files of tests/interpreted that compile for the GPU where there is one; the others need the interpreter.
    if has hypothesis; then
        tests "tests of the kernels" 70 "test" "$root/tests/interpreted/test_ops_kernels.py" \
            "$root/tests/interpreted/test_triton_op.py"
    else
        tests "tests of the kernels" 70 "test" "$root/tests/interpreted/test_triton_op.py"
        skip "tests of the operators" "hypothesis is not installed"
    fi
    tests "tests of the backends" 50 "triton or eager" "$root/tests/test_backends.py"
    tests "tests of the step kernels" 90 "test" "$root/tests/interpreted/test_train_step.py" \
        "$root/tests/interpreted/test_persistent_step.py" "$root/tests/interpreted/test_evaluation.py"
    tests "litmus test of the grid barrier" 30 numbers "$site/bench/test_barrier.py"
fi

triton=$("$python" -c "
from mlp_fast import backends
from mlp_fast.config import Config
config = Config(device='$device')
print(*(n for n in backends.REGISTRY if n.startswith('triton') and backends.unsupported(n, config) is None))" 2>> "$log")
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null || true)
for backend in $triton; do
    one_step="-m mlp_fast.profile --backend $backend --device $device --steps 1 --warmup 0 --no-profiler $sizes"
    if [ -n "$sanitizer" ] && [ $device = cuda ]; then
        # A plain step comes first: Triton compiles for it, not under the sanitizer, which makes all loading slow.
        # shellcheck disable=SC2086
        stage "sanitizer $backend" 40 sh -c '"$@" && exec "$0" --tool memcheck --error-exitcode 1 "$@"' \
            "$sanitizer" "$python" $one_step
    elif [ -n "$dry" ]; then
        # shellcheck disable=SC2086
        stage "sanitizer $backend (the step alone: no compute-sanitizer here)" 45 "$python" $one_step
    else
        skip "sanitizer $backend" "compute-sanitizer was not found"
    fi
done
if [ -z "$triton" ]; then skip sanitizer "no Triton backend is available here"; fi

left=$((490 - ($(date +%s) - began)))
if [ $left -lt 60 ]; then left=60; fi # only if something above was not ended by its limit
rm -f "$out/recording.json" # of an earlier call: it must not choose the backend below
shown=400
# shellcheck disable=SC2086
stage record $left "$python" -m bench.record $dry_option --device $device --budget $((left - 30)) \
    --out "$out/recording.json" --trace "$work/trace.json"
if [ -s "$work/trace.json" ]; then gzip -9 -c "$work/trace.json" > "$out/trace.json.gz"; fi

fastest=$("$python" -c '
import sys
from pathlib import Path
from bench.recording import load
print(load(Path(sys.argv[1])).fastest())' "$out/recording.json" 2>> "$log")
if [ -z "$fastest" ]; then
    fastest=auto
    if [ $device = cuda ]; then fastest=triton; fi
fi
plot=
if has matplotlib; then plot="--plot $out/train.png"; else skip "plot of the run" "matplotlib is not installed"; fi
shown=5
for precision in fp32 tf32x3; do
    case $fastest in
    triton*) ;;
    *) if [ $precision != fp32 ]; then continue; fi ;; # --dry-run without a GPU
    esac
    # shellcheck disable=SC2086
    stage "train $precision" 35 "$python" -m mlp_fast.train --backend $fastest --device $device --num-steps $steps \
        --precision $precision --data $data $sizes --log-json "$out/train-$precision.jsonl" $plot
    plot=
done

say "== all: $(($(date +%s) - began)) s${failed:+; failed:$failed}"
say "keep recording.json as bench/results/<device>/<date>.json, then run: python -m bench.report"
ls -l "$out"
[ -z "$failed" ]
