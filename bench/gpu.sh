#!/bin/sh
# bench/gpu.sh [--dry-run] [--seconds N] [OUTDIR]    everything worth doing on a GPU machine, in one call of nine minutes
#
#   environment   driver, versions, commit
#   litmus        whether the grid barrier holds on this GPU; without it nothing below is worth much
#   tests         the tests of kernels and backends that run on CUDA
#   sanitizer     compute-sanitizer's memcheck and racecheck on one step of each Triton backend
#   record        probes, suites, comparison and profile -> recording.json, trace.json.gz
#   train         the 50,000-step run of the backend that was recorded as the fastest, in fp32 and in tf32x3
#                 -> train-fp32.jsonl, train-tf32x3.jsonl, train.png
#
# All of it ends within N seconds (540). A stage may take its most, and never what is kept for those behind it: the
# record gets whatever the others leave of theirs. What matters most comes first in it. A stage for which nothing is left
# is skipped with a line. What a stage prints goes straight into OUTDIR/log.txt.
#
# OUTDIR (default: $OUT, else runs/gpu) ends with at most eight files. It installs nothing, and writes nothing beside
# OUTDIR and a temporary folder, into which the package is built; what the machine lacks is left out with the reason.
# --dry-run walks every stage with tiny sizes, on the CPU and in Triton's interpreter where there is no GPU; its times
# mean nothing.
#
# PYTHON names the interpreter (default: .venv/bin/python, else python3), MLP_FAST_NAMES a copy of names.txt, and
# MLP_FAST_COMMIT the commit where this is no checkout.
set -u

dry= total=540
while :; do
    case ${1:-} in
    --dry-run) dry=yes ;;
    --seconds)
        total=${2:-}
        if [ $# -gt 1 ]; then shift; fi
        ;;
    *) break ;;
    esac
    shift
done
case $total:${1:-} in
*[!0-9]*:* | :* | *:-*)
    echo "usage: bench/gpu.sh [--dry-run] [--seconds N] [OUTDIR]" >&2
    exit 2
    ;;
esac
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-${OUT:-$root/runs/gpu}}
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

# share SECONDS: that part of N which they are of 540
share() {
    echo $(($1 * total / 540))
}
grace=$(($(share 8) + 1)) # from the signal that ends a stage to the one that kills it: a kernel may hang
closing=$(share 8)        # for the last lines

# allowed MOST KEEP: the seconds that a stage may take, at most its share of MOST, with its share of KEEP left for others
allowed() {
    most=$(share "$1")
    left=$((total - ($(date +%s) - began) - grace - closing - $(share "$2")))
    echo $((left < most ? left : most))
}

# limited SECONDS COMMAND...: runs a command with a time limit. In the background, since a trap waits for what is in the
# foreground; there a shell has SIGINT ignored, which a command would inherit. With SIGINT pytest and bench.record end as
# by Ctrl-C, and say what they have so far.
running=
limited() {
    limit=$1
    shift
    timeout -s INT -k "$grace" "$limit" env --default-signal=INT "$@" &
    running=$!
    wait "$running"
    code=$?
    running=
    return $code
}

# ask CODE [ARGUMENT...]: what a few lines of Python print
ask() {
    (cd "$work" && timeout -k 1 "$(($(share 20) + 1))" "$python" -c "$@") 2>> "$log"
}

stop() {
    trap '' INT TERM
    if [ -n "$running" ]; then
        kill "$running"
        wait "$running"
    fi
    exit "$1"
}

# stage NAME MOST KEEP COMMAND...: runs a command as long as allowed, with its output in the log, the end of it on the
# screen
stage() {
    name=$1
    limit=$(allowed "$2" "$3")
    shift 3
    if [ "$limit" -lt $(($(share 10) + 1)) ]; then
        skip "$name" "the $total s are nearly used up"
        failed="$failed '$name'"
        return
    fi
    say "== $name"
    start=$(date +%s)
    before=$(wc -c < "$log")
    limited "$limit" "$@" >> "$log" 2>&1
    code=$?
    tail -c +$((before + 1)) "$log" | tail -n "${shown:-3}"
    took=$(($(date +%s) - start))
    if [ $code -eq 124 ] || [ $code -eq 137 ]; then say "$name: ended by its limit of $limit s"; fi
    say "== $name: exit code $code after $took s"
    if [ $code -ne 0 ]; then failed="$failed '$name'"; fi
}

skip() {
    say "== $1: skipped: $2"
}

has() {
    ask "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)" "$1"
}

if ask "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
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
if ! limited $(($(share 20) + 1)) sh -c 'cd "$1" && exec "$2" setup.py -q build --build-base "$3/build" --build-lib "$3/site"' \
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
if ! ask "from mlp_fast.corpus.load import load; load('names')"; then
    data=embedded
    say "The names corpus is not here, so the golden trace of 1,000 steps is left out, and the last run trains on the"
    say "embedded corpus. MLP_FAST_NAMES=FILE names a copy of names.txt; python -m mlp_fast.corpus fetch gets one."
fi

shown=8
stage environment 60 260 sh -c '
    timeout 10 nvidia-smi || echo "nvidia-smi: not found"
    "$1" -c "
import json, torch
from mlp_fast.measure import machine
print(json.dumps(machine.facts(torch.device(\"$2\")), indent=1))"
    "$1" -m mlp_fast.train --list-backends --device auto' sh "$python" "$device"

shown=12
# Tests spend their time compiling: one process for each core, up to eight, where pytest-xdist is installed.
several=
if has xdist; then several="-n $(nproc 2> /dev/null | awk '{ print $1 < 8 ? $1 : 8 }') --dist worksteal"; fi
# The versions here may be others than the pinned ones, and their warnings are no fault of the kernels.
tests() { # NAME MOST KEEP FILTER OPTIONS-AND-FILES...: pytest without what it may lack here
    name=$1 most=$2 keep=$3 filter=$4
    shift 4
    stage "$name" "$most" "$keep" env OMP_NUM_THREADS=1 "$python" -m pytest "$@" -c "$root/pyproject.toml" \
        --rootdir "$root" -k "$filter" -p no:cacheprovider -v -o addopts=--strict-markers -o faulthandler_timeout=20 \
        -W default
}
# Alone on the GPU, and before anything that relies on the barrier.
litmus=numbers
if [ $device = cpu ]; then litmus=interpreter; fi
if ! has pytest; then
    skip tests "pytest is not installed; the suites below check every backend against float64 before they time it"
elif ! has pytest_benchmark; then
    skip "litmus test of the grid barrier" "pytest-benchmark is not installed"
else
    tests "litmus test of the grid barrier" 60 260 $litmus "$site/bench/test_barrier.py"
fi
if ! has pytest; then
    :
elif [ -n "$dry" ]; then
    tests "tests of the kernels" 80 260 gather "$root/tests/interpreted/test_triton_op.py"
    tests "tests of the backends" 80 260 "eager and state_goes" "$root/tests/test_backends.py"
else
    # The files of tests/interpreted that compile for the GPU where there is one; the others need the interpreter.
    # shellcheck disable=SC2086
    tests "tests of the step kernels" 80 260 test $several "$root/tests/interpreted/test_train_step.py" \
        "$root/tests/interpreted/test_persistent_step.py" "$root/tests/interpreted/test_evaluation.py"
    # shellcheck disable=SC2086
    tests "tests of the backends" 50 260 "triton or eager" $several "$root/tests/test_backends.py"
    operators=$root/tests/interpreted/test_ops_kernels.py
    if ! has hypothesis; then
        operators=
        skip "tests of the operators" "hypothesis is not installed"
    fi
    # shellcheck disable=SC2086
    tests "tests of the kernels" 60 260 test $several $operators "$root/tests/interpreted/test_triton_op.py"
fi

triton=$(ask "
from mlp_fast import backends
from mlp_fast.config import Config
config = Config(device='$device')
print(*(n for n in backends.REGISTRY if n.startswith('triton') and backends.unsupported(n, config) is None))")
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null || true)
shown=3
for backend in $triton; do
    one_step="-m mlp_fast.profile --backend $backend --device $device --steps 1 --warmup 0 --no-profiler $sizes"
    if [ -n "$sanitizer" ] && [ $device = cuda ]; then
        # Inside the segments of torch's caching allocator memcheck sees no bounds. Without it memory cannot be had while
        # a graph is captured, as triton-op does.
        uncached=PYTORCH_NO_CUDA_MEMORY_CACHING=1
        if [ "$backend" = triton-op ]; then uncached=; fi
        # A plain step comes first: Triton compiles for it, not under the sanitizer, which makes all loading slow.
        # shellcheck disable=SC2086
        stage "memcheck $backend" 40 250 env $uncached sh -c \
            '"$@" && exec "$0" --tool memcheck --error-exitcode 1 "$@"' "$sanitizer" "$python" $one_step
        # shellcheck disable=SC2086
        stage "racecheck $backend" 40 250 "$sanitizer" --tool racecheck --error-exitcode 1 "$python" $one_step
    elif [ -n "$dry" ]; then
        # shellcheck disable=SC2086
        stage "one step of $backend (no compute-sanitizer here)" 45 250 "$python" $one_step
    else
        skip "memcheck and racecheck of $backend" "compute-sanitizer was not found"
    fi
done
if [ -z "$triton" ]; then skip sanitizer "no Triton backend is available here"; fi

rm -f "$out/recording.json" # of an earlier call: it must not choose the backend below
seconds=$(allowed 540 100)
shown=400
# shellcheck disable=SC2086
stage record 540 100 "$python" -m bench.record $dry_option --device $device --budget $((seconds - $(share 30))) \
    --out "$out/recording.json" --trace "$work/trace.json"
if [ -s "$work/trace.json" ]; then gzip -9 -c "$work/trace.json" > "$out/trace.json.gz"; fi

fastest=$(ask '
import sys
from pathlib import Path
from bench.recording import load
print(load(Path(sys.argv[1])).fastest())' "$out/recording.json")
if [ -z "$fastest" ]; then
    fastest=auto
    if [ $device = cuda ]; then fastest=triton; fi
fi
plot=
if has matplotlib; then plot="--plot $out/train.png"; else skip "plot of the run" "matplotlib is not installed"; fi
shown=5 keep=45
for precision in fp32 tf32x3; do
    case $fastest in
    triton*) ;;
    *) if [ $precision != fp32 ]; then continue; fi ;; # --dry-run without a GPU
    esac
    # shellcheck disable=SC2086
    stage "train $precision" 35 $keep "$python" -m mlp_fast.train --backend $fastest --device $device --num-steps $steps \
        --precision $precision --data $data $sizes --log-json "$out/train-$precision.jsonl" $plot
    plot= keep=0
done

say "== all: $(($(date +%s) - began)) s${failed:+; failed:$failed}"
say "keep recording.json as bench/results/<device>/<date>.json, then run: python -m bench.report"
ls -l "$out"
[ -z "$failed" ]
