#!/usr/bin/env bash
# Records what benchmarks/README.md shows, on the GPU at hand, a JSON file a program:
#     PYTHON=.venv/bin/python scripts/record_benchmarks.sh benchmarks/results/h100   (h200 on an H200: a folder for each card)
# About 20 minutes on a GPU with 16 cores. The programs of a lot compile side by side and are timed one after the other, when none of them
# compiles. What matters most for the page starts first; a file holds what was measured so far, if the time runs out. Ends with
# status 1 if a program failed, or none was to run. FASTVIM_BENCH_ONLY="scan_* train_tiny" runs those alone.
# FASTVIM_BENCH_PATIENCE: seconds after which a lot is timed even if a program of it still compiles (300).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
out=${1:?folder for the results}
# A missing package ends it here, and not each program by itself.
"$python" -m fastvim_jax bench --help >/dev/null || exit 1
mkdir -p "$out/family" build/benchmarks
logs=$(mktemp -d build/benchmarks/XXXXXX)
locks=$(mktemp -d)
trap 'rm -rf "$locks"' EXIT
declare -A running=() # process: name
begun=0 failures=0
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=0.96 FASTVIM_COMPILATION_CACHE=off

wanted() { # NAME: $FASTVIM_BENCH_ONLY may hold patterns of the names to run
  local pattern
  [ -n "${FASTVIM_BENCH_ONLY:-}" ] || return 0
  for pattern in $FASTVIM_BENCH_ONLY; do
    [[ $1 == $pattern ]] && return 0
  done
  return 1
}
again() { # COMMAND...: once more if a signal ended it; PyTorch's compiler crashes now and then; the second time in one thread
  local code=0
  "$@" || code=$?
  ((code < 128)) || { code=0; TORCHINDUCTOR_COMPILE_THREADS=1 "$@" || code=$?; }
  return "$code"
}
bench() { # NAME BENCH-OR-PROGRAM.py OPTIONS...: run in the background, result in NAME.json
  local name=$1 command=(-m fastvim_jax bench "${@:2}")
  wanted "$name" || return
  case $2 in *.py) command=("${@:2}") ;; esac
  again nice -n "${BENCH_NICE:-0}" "$python" "${command[@]}" --json "$out/$name.json" >"$logs/$(basename "$name").txt" 2>&1 7>&- 8>&- &
  running[$!]=$name
  begun=$((begun + 1))
  printf '%4d s  started %s\n' "$SECONDS" "$name"
}
ended() { # PROCESS...: waits for them
  local process code
  for process in "$@"; do
    code=0
    wait "$process" || code=$?
    if ((code)); then
      printf '%4d s  FAILED %s (status %d)\n' "$SECONDS" "${running[$process]}" "$code"
      failures=$((failures + 1))
    fi
  done
}
tiny=fastvim_tiny_patch16_224 small=fastvim_small_patch16_224 base=fastvim_base_patch16_224 vim=vim_tiny_patch16_224

# A lot of programs is timed once all of it has compiled.
lot() { # NAME
  lot=$1 others=()
}
start() { # NAME BENCH OPTIONS...
  wanted "$1" || return
  FASTVIM_BENCH_LOCK=$locks/$lot bench "$@"
  others+=($!)
  sleep "${STAGGER:-1}"
}
finish() {
  ended "${others[@]}"
  printf '%4d s  done with the %s lot\n' "$SECONDS" "$lot"
}

# What is required, with the peer in the same run. The first rows are timed first and `later` ones when those are done. Then comes the
# row by the clock, when no other program computes, and at the end the largest batches, one after the other and alone.
exec 7>"$locks/required_clock.timing" 8>"$locks/required_later.timing"
flock -x 7 && flock -x 8
touch "$locks/required.compiling"
for late in later clock; do ln -s required.compiling "$locks/required_$late.compiling"; done
gpu_memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1)
part=$(awk -v all="${gpu_memory:-81559}" 'BEGIN { printf "%.3f", 0.96 * 81559 / all }')
rest=() clock=()
later() {
  wanted "$1" || return
  BENCH_NICE=10 FASTVIM_BENCH_LOCK=$locks/required_later bench "$@"
  rest+=($!)
  sleep "${STAGGER:-1}"
}
by_clock() {
  FASTVIM_BENCH_LOCK=$locks/required_clock bench "$@" && clock+=($!)
}
largest() { # NAME BLOCKS BATCH...: on a GPU of 80 GB, all of it one region, as a memory that grows is in pieces
  wanted "$1" || return
  XLA_PYTHON_CLIENT_PREALLOCATE=true XLA_PYTHON_CLIENT_MEM_FRACTION=$part bench "$1" \
    train --models "$base" --largest-batch --batches "${@:3}" --blocks "$2"
  ended $!
}
torch=
"$python" -c 'import timm, torch; assert torch.cuda.is_available()' >/dev/null 2>&1 && torch=yes
peer() { # NAME OPTIONS...: where its libraries are
  [ -n "$torch" ] || return 0
  TORCHINDUCTOR_COMPILE_THREADS=4 TORCHINDUCTOR_CACHE_DIR=$locks/$1 TRITON_CACHE_DIR=$locks/$1/triton start "$1" benchmarks/peers/deit.py "${@:2}"
}

lot required
for size in base small tiny; do
  peer "peer_deit_$size" --models "$size"
  peer "peer_deit_${size}_step" --models "$size" --rows step
done
peer peer_deit_512 --models tiny --pixels 512 --batch 32
peer peer_deit_1024 --models tiny --pixels 1024 --batch 8
peer peer_deit_2048 --models tiny --pixels 2048 --batch 2
start train_small train --models "$small" --batches 128
start train_tiny train --models "$tiny" --batches 128
start model_base model --models "$base"
start model_small model --models "$small"
start model_tiny_224 model --models "$tiny"
by_clock model_tiny_1 model --models "$tiny" --batches 1
for pixels in 512 1024 2048; do start "model_tiny_$pixels" model --models "$tiny" --pixels "$pixels"; done
start model_vim_2048 model --models "$vim" --pixels 2048
start model_tiny_f32 model --models "$tiny" --precisions f32
later train_base train --models "$base" --batches 128
later train_base_scanned train --models "$base" --batches 128 --blocks scan
later train_tiny_scanned train --models "$tiny" --batches 128 --blocks scan
for size in tiny small base; do later "train_vit_$size" train --models "vit_${size}_patch16_224" --batches 128; done
later model_base_scanned model --models "$base" --blocks scan
later model_tiny_scanned model --models "$tiny" --blocks scan
for size in tiny small base; do later "model_vit_$size" model --models "vit_${size}_patch16_224"; done
later model_vim_224 model --models "$vim"
later masked_step_vit benchmarks/masked_speed.py --rows step --models mae_vit_base_patch16_224
[ -z "$torch" ] || later peer_mae benchmarks/peers/mae_vit.py
later fallbacks_lines benchmarks/fallbacks.py --only 0 1 2 3
later fallbacks_masked benchmarks/fallbacks.py --only 4 5 6 7 8
later fallbacks_options benchmarks/fallbacks.py --only 9 10 11 12
finish
exec 8>&-
ended "${rest[@]}"
exec 7>&-
ended "${clock[@]}"
largest train_base_largest_batch scan 1152 1024 896
printf '%4d s  largest batches done\n' "$SECONDS"
if wanted train_base_compile; then # alone, as nothing else compiles
  bench train_base_compile train --models "$base" --batches 128 --compile-only --blocks unroll
  ended $!
fi

lot second # compiles fast: blocks scanned
start scan_targets scan --lengths 14 196 1024 16384 --batches 128 128 32 2 --implementations pallas mamba_ssm --dtypes float32
start model_tiny_large_scanned model --models "$tiny" --pixels 512 1024 2048 --blocks scan
start model_tiny_f32_scanned model --models "$tiny" --precisions f32 --pixels 224 512 1024 2048 --blocks scan
start model_vim_scanned model --models "$vim" --pixels 224 2048 --blocks scan
start scan_pair scan --pair
start mixer_core_f32 mixer --parts core --dtypes float32 --pixels 224 512
start mixer_core_f32_large mixer --parts core --dtypes float32 --pixels 1024 2048
finish

lot third
start scan_lengths scan --lengths 7 14 32 64 128 196 1024 4096 16384 --batches 4096 128 1024 512 256 128 32 8 2 --dtypes float32
start mixer_stages_large mixer --parts stages --pixels 1024 2048
start mixer_stages mixer --parts stages --pixels 224 512
start mixer_core_bf16 mixer --parts core --dtypes bfloat16
finish
lot fourth
start scan_bf16 scan --lengths 14 196 1024 4096 16384 --batches 128 128 32 8 2 --implementations pallas --dtypes bfloat16
start model_tiny_f32_large model --models "$tiny" --precisions f32 --pixels 512 1024 2048
start model_vit_tf32 model --models vit_tiny_patch16_224 "$tiny" --precisions tf32 --blocks scan
finish
lot fifth # what it keeps belongs into pallas_kernels/selective_scan/tuned, under the device's name
for shape in "14 128" "196 128" "1024 32" "16384 2"; do
  start "scan_tune_${shape% *}" scan --tune --tuned-file "$out/tuned.json" --lengths "${shape% *}" --batches "${shape#* }"
done
finish

# Channel models and models with dense outputs, for family.md. More than 16 programs a lot autotune on one GPU for minutes, and
# programs that autotune at the same time choose badly. Peers are PyTorch's, where its libraries are.
torch_lot() {
  [ -z "$torch" ] || TORCHINDUCTOR_COMPILE_THREADS=4 start "$@"
}
lot channels
for patch in 16 8; do
  for kind in fast:fastchannelvim vim:channelvim; do
    model=${kind#*:}_small_patch${patch}_224
    start "family/channel_${kind%:*}_$patch" model --models "$model" --batches 8 64 --precisions bf16
  done
  torch_lot "family/channel_peer_$patch" benchmarks/channel_speed.py peer --dtypes bfloat16 --mode default --patches "$patch"
done
finish
lot channels_float32
for patch in 16 8; do
  start "family/channel_tf32_fastchannelvim_$patch" model --models "fastchannelvim_small_patch${patch}_224" --batches 8 64 --precisions tf32
  start "family/channel_float32_fastchannelvim_$patch" model --models "fastchannelvim_small_patch${patch}_224" --batches 8 64 --precisions f32 --blocks scan
  start "family/channel_float32_channelvim_$patch" model --models "channelvim_small_patch${patch}_224" --batches 8 64 --precisions tf32 f32 --blocks scan
done
finish
# Candidates for products by Triton take most of the time that the following programs compile, so XLA leaves them out. Records say it.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_triton_gemm=false"
lot segmentation
for size in tiny small base; do
  start "family/segment_$size" segment --models "fastvim_${size}_patch16_224" --pixels 512 --batches 16 --parts backbone heads classes whole
done
start family/segment_vit_512 segment --models vit_tiny_patch16_224 --pixels 512 --batches 16 --parts whole
for model in fastvim vit; do
  start "family/segment_${model}_1024" segment --models "${model}_tiny_patch16_224" --pixels 1024 --batches 4 --parts whole
done
finish
lot detection
for batch in 1 8; do
  start "family/detect_tiny_$batch" detect --models "$tiny" --batches "$batch" --parts backbone neck rpn proposals boxes detections masks whole
  start "family/detect_small_base_$batch" detect --models "$small" "$base" --batches "$batch" --parts backbone neck whole --blocks scan
done
torch_lot family/detect_torchvision detect --peer eager parts --batches 1 8
finish
lot family_training
for size in tiny small base; do
  start "family/segment_train_$size" segment --models "fastvim_${size}_patch16_224" --pixels 512 --batches 16 --parts train --blocks scan
  start "family/detect_train_$size" detect --models "fastvim_${size}_patch16_224" --batches 8 --parts train --blocks scan
done
for model in fastchannelvim channelvim channelvit; do
  start "family/channel_train_$model" benchmarks/channel_speed.py train --models "${model}_small_patch16_224" --blocks scan
done
finish

if ((!begun)); then
  printf 'No program has a name like %s.\n' "${FASTVIM_BENCH_ONLY:-}"
  exit 1
fi
for log in "$logs"/*.txt; do
  printf '\n== %s\n' "$(basename "$log" .txt)"
  grep -v '^W0\|^I0\|^E0' "$log" | cut -c-230 | tail -n 30
done
printf '\n%4d s  done\n' "$SECONDS"
((!failures))
