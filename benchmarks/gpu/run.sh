#!/usr/bin/env bash
# Everything that needs a GPU, phase by phase.
#   benchmarks/gpu/run.sh PHASE FOLDER
#   build     the CUDA library, and what compute-sanitizer runs
#   test      pytest -m gpu, and compute-sanitizer over the kernels
#   ops       every op against torch
#   generate  rollouts against the peers that are installed: 1.3B, 1B, 7B; short, long, natural
#   step      PPO iterations of OPT-1.3B + 350M against the plain HF loop
#   memory    the largest models that train on this GPU, with LoRA
#   all       build, test and ops in short: what checks the kernels
# Each ends inside ten minutes; a part that fails does not stop the others. Leaves a log of each
# part, JSON records, plots and PHASE.summary.json in FOLDER. No network. PYTHON and CUDA_HOME choose
# the tools. Exits with 0 if all went well, with 1 if a part failed, and with 3 without a GPU, where
# build and all build what they would run, and the others run nothing.
set -uo pipefail

phases="build test ops generate step memory all"
if [[ $# -ne 2 || " $phases " != *" $1 "* ]]; then
  echo "usage: $0 {${phases// /|}} FOLDER" >&2
  exit 2
fi
phase=$1
mkdir -p "$2" || exit 2
out=$(cd "$2" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

python=${PYTHON:-python3}
nvcc=${CUDA_HOME:+$CUDA_HOME/bin/nvcc}
nvcc=${nvcc:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
sanitizer=$(command -v compute-sanitizer || echo "$(dirname "$nvcc")/compute-sanitizer")
families="norm activation rope sampling gather advantage"
model_families="attention linear"
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

# What compute-sanitizer runs: the kernels and two drivers, without torch.
build_drivers() {
  build_driver memory_check $families && build_driver memory_check_model $model_families
}

# build_driver NAME FAMILY...
build_driver() {
  local name=$1 family sources=()
  shift
  for family in "$@"; do sources+=("csrc/cuda/$family.cu"); done
  "$nvcc" -std=c++17 -O2 -lineinfo -arch="$target" --threads 0 -DHE_DEVICE=cuda -Icsrc \
    "${sources[@]}" "tests/cuda/$name.cu" -o "$scratch/$name"
}

# sanitize TOOL...: each over every family; racecheck is slow, so it gets small shapes.
sanitize() {
  local status=0 tool family
  if [[ ! -x $sanitizer ]]; then
    echo "no compute-sanitizer on PATH or beside nvcc: install it with the CUDA toolkit"
    return 1
  fi
  build_drivers || return
  for tool in "$@"; do
    for family in $families; do watch memory_check; done
    for family in $model_families; do watch memory_check_model; done
  done
  return $status
}

# watch PROGRAM: one tool over one family, both of sanitize.
watch() {
  echo "== $tool $family"
  "$sanitizer" --tool "$tool" --error-exitcode 9 "$scratch/$1" "$family" \
    $([[ $tool == racecheck ]] && echo quick) || status=1
}

# Also where some module that a test imports is missing: the other tests run.
run_tests() {
  "$python" -m pytest -m gpu -q -p no:cacheprovider --continue-on-collection-errors
}

export -f build_library build_drivers build_driver sanitize watch run_tests
export python nvcc sanitizer families model_families target scratch

finish() {
  local joined
  joined=$(printf ', %s' "${parts[@]}")
  echo "{\"gpu\": $1, \"seconds\": $SECONDS, \"parts\": [${joined:2}]}" >"$out/$phase.summary.json"
  cat "$out/$phase.summary.json"
}

# bench NAME SECONDS WHAT OPTIONS...: one `rlhf bench`, its record and plot in FOLDER/NAME/.
bench() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" -m rlhf.cli.main bench "$@" --output "$out/$name"
}

run_build() {
  part build 300 build_library
  part drivers 150 build_drivers
}

run_test() {
  part tests 300 run_tests
  part sanitizer 250 sanitize memcheck synccheck racecheck
}

run_ops() {
  part ops 400 "$python" -m benchmarks.gpu.ops "$out/ops.json"
}

# The peers that compile or load for long have a part of their own: one that runs out of time takes
# only its own figures along.
run_generate() {
  local shape="--prompt 256 --new_tokens 128"
  bench generate-opt-1.3b 110 generate --model opt-1.3b $shape --batch 1,8,32,128 \
    --peers hf,ours --repeats 3
  bench generate-opt-1.3b-compiled 120 generate --model opt-1.3b $shape --batch 1,32 \
    --peers hf-compile,ours --repeats 3
  bench generate-opt-1.3b-others 80 generate --model opt-1.3b $shape --batch 1,32 \
    --peers hf-cb,vllm,deepspeed-he,ours --repeats 2
  bench generate-llama-1b 50 generate --model llama-3.2-1b $shape --batch 1,32,128 \
    --peers hf,ours --repeats 2
  bench generate-llama-7b 60 generate --model llama-2-7b $shape --batch 1,32 \
    --peers hf,ours --repeats 2
  bench generate-long 80 generate --model opt-1.3b --prompt 1024 --new_tokens 1024 --batch 8 \
    --peers hf,ours --repeats 1
  bench generate-natural 45 generate --model opt-1.3b --prompt 256 --new_tokens 256 --batch 64 \
    --lengths natural --peers hf,ours --repeats 2
}

run_step() {
  bench step-opt-1.3b 280 step --model opt-1.3b --critic opt-350m --prompt 256 --new_tokens 256 \
    --batch 32 --peers hf,ours --repeats 3
  bench step-opt-1.3b-natural 200 step --model opt-1.3b --critic opt-350m --prompt 256 \
    --new_tokens 256 --batch 32 --lengths natural --peers hf,colossal,ours --repeats 2
}

run_memory() {
  local size
  bench memory-opt-1.3b 120 memory --model opt-1.3b --prompt 256 --new_tokens 256 --batch 8,64 \
    --peers hf,ours
  for size in 13b 30b 66b; do
    bench "memory-opt-$size-lora" 140 step --model "opt-$size" --critic opt-350m --lora 64 \
      --prompt 256 --new_tokens 256 --batch 8 --peers ours --repeats 1
  done
}

run_all() {
  part build 150 build_library
  part tests 200 run_tests
  part sanitizer 110 sanitize memcheck
  part ops 120 "$python" -m benchmarks.gpu.ops "$out/ops.json"
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no GPU: nothing is measured"
  target=sm_90a
  case $phase in
    build | all) run_build ;;
    *) part imports 60 "$python" -c 'import benchmarks.gpu.ops, rlhf.bench.step' ;;
  esac
  finish false
  exit 3
fi

"run_$phase"
finish true
! grep -q '"status": [^0]' "$out/$phase.summary.json"
