#!/usr/bin/env bash
# The tables of docs/benchmarks.md that need a GPU, as Markdown on standard output: benchmarks/gpu.sh > gpu.md
# About 20 minutes on one GPU. SHOAL and PYTHON name the commands, MODELS and
# COHORTS what to measure.
set -euo pipefail
shoal="${SHOAL:-shoal}"
models="${MODELS:-lenet resnet18gn transformer}"
cohorts="${COHORTS:-10 100 1000}"

command -v nvidia-smi >/dev/null || { echo "$0: there is no GPU here (no nvidia-smi)" >&2; exit 2; }
said="$(mktemp)"
trap 'rm -f "$said"' EXIT

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | sed 's/^/- GPU: /'
"$shoal" doctor | sed 's/^/- /'
echo "- command: \`MODELS=\"$models\" COHORTS=\"$cohorts\" benchmarks/gpu.sh\`"

# field KEY: reads one value out of a measurement's JSON.
field() { python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }

row() {  # model cohort engine precision baseline
  local found
  if ! found="$(timeout 300 "$shoal" bench simulate --model "$1" --population 1000 --cohort "$2" --engine "$3" \
      --precision "$4" --baseline "$5" --device cuda --rounds 4 --json 2>"$said")"; then
    echo "| $1 | $2 | $3 | $4 | $5 | failed: $(tail -n 1 "$said") | | | | |"
    return
  fi
  printf '| %s | %s | %s | %s | %s | %.0f | %s | %s | %.0f | %.1f |\n' "$1" "$2" "$3" "$4" "$5" \
    "$(field clients_per_second <<<"$found")" "$(field block_size <<<"$found")" "$(field variant <<<"$found")" \
    "$(($(field peak_device_bytes <<<"$found") / 1048576))" "$(field baseline_ratio <<<"$found")"
}

echo
echo "| model | cohort | engine | precision | baseline | clients/s | block | run | device MiB | times the baseline |"
echo "|---|---:|---|---|---|---:|---:|---|---:|---:|"
for model in $models; do
  for cohort in $cohorts; do
    for precision in fp32 bf16; do
      row "$model" "$cohort" vectorized "$precision" loop
    done
    row "$model" "$cohort" sequential fp32 loop
  done
  row "$model" 10 vectorized fp32 spawn
  row "$model" 10 process fp32 loop
done

echo
"${PYTHON:-python3}" "$(dirname "$0")/training.py" --device cuda --precision bf16 --batch-size 1024
echo
echo '```'
"$shoal" bench devices --model resnet18gn --largest 4096
echo '```'
