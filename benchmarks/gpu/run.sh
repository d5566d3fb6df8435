#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build, tests, compute-sanitizer, op benchmarks.
#   benchmarks/gpu/run.sh FOLDER
# Leaves a log of each part, ops.json and summary.json in FOLDER. A part that fails does not stop
# the others; each has a time limit, together under ten minutes. No network. PYTHON and CUDA_HOME
# choose the tools. Exits with 0 if all went well, with 1 if a part failed, and with 3 without a
# GPU, where it builds what it would run and says so.
set -uo pipefail

if [[ $# -ne 1 ]]; then
  echo "usage: $0 FOLDER" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

python=${PYTHON:-python3}
nvcc=${CUDA_HOME:+$CUDA_HOME/bin/nvcc}
nvcc=${nvcc:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
families="norm activation rope sampling gather advantage"
target=native
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HYBRID_ENGINE_NATIVE=require
parts=()

# part NAME SECONDS COMMAND...: runs it, which may be a function here, with its output in NAME.log.
part() {
  local name=$1 limit=$2 begin=$SECONDS status=0 verdict=ok
  shift 2
  timeout --kill-after=10 "$limit" bash -c '"$@"' bash "$@" >"$out/$name.log" 2>&1 || status=$?
  [[ $status -eq 0 ]] || verdict="FAILED with $status, see $out/$name.log"
  echo "$name: $verdict, $((SECONDS - begin)) s"
  parts+=("{\"name\": \"$name\", \"status\": $status, \"seconds\": $((SECONDS - begin))}")
}

# The library, with nvcc's report of registers and spills behind the messages.
build_library() {
  "$python" - <<'PYTHON'
from hybrid_engine.ops import build, native

library = build.build_cuda(native.source_directory())
print(library, library.with_name("build.log").read_text(), sep="\n")
PYTHON
}

# What compute-sanitizer runs: the kernels and a driver, without torch.
build_driver() {
  local sources=()
  for family in $families; do sources+=("csrc/cuda/$family.cu"); done
  "$nvcc" -std=c++17 -O2 -lineinfo -arch="$target" --threads 0 -DHE_DEVICE=cuda -Icsrc \
    "${sources[@]}" tests/cuda/memory_check.cu -o "$scratch/memory_check"
}

# Every tool over every family; racecheck is slow, so it gets small shapes.
sanitize() {
  local status=0 tool family
  build_driver || return
  for tool in memcheck synccheck racecheck; do
    for family in $families; do
      echo "== $tool $family"
      compute-sanitizer --tool $tool --error-exitcode 9 "$scratch/memory_check" "$family" \
        $([[ $tool == racecheck ]] && echo quick) || status=1
    done
  done
  return $status
}

export -f build_library build_driver sanitize
export python nvcc families target scratch

finish() {
  local joined
  joined=$(printf ', %s' "${parts[@]}")
  echo "{\"gpu\": $1, \"seconds\": $SECONDS, \"parts\": [${joined:2}]}" >"$out/summary.json"
  cat "$out/summary.json"
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no GPU: a dry run, which builds the library and the driver and measures nothing"
  target=sm_90a
  part build 300 build_library
  part sanitizer 150 build_driver
  part ops 60 "$python" -c 'import benchmarks.gpu.ops, benchmarks.gpu.cases_model'
  finish false
  exit 3
fi

part build 150 build_library
part tests 220 "$python" -m pytest -m gpu -q -p no:cacheprovider
part sanitizer 110 sanitize
part ops 100 "$python" -m benchmarks.gpu.ops "$out/ops.json"
finish true
! grep -q '"status": [^0]' "$out/summary.json"
