#!/usr/bin/env bash
# ./launch_multi_gpu.sh --mode ddp|dp --gpus N --batch-size 32 --epochs 20 --lr 0.001 [flags of main_multi_gpu.py]
# ./launch_multi_gpu.sh                    asks for them on a terminal; elsewhere takes ddp on all GPUs there are
# PYTHON=python3.12 ./launch_multi_gpu.sh  which Python
#
# The learning rate is 0.001 × GPUs where none is given. A --mode other than ddp and dp is that of main_multi_gpu.py.
# Without GPUs, N processes train on the CPU.
set -euo pipefail
python=${PYTHON:-python3}
main=$(dirname "$(realpath "${BASH_SOURCE[0]}")")/main_multi_gpu.py
mode=ddp gpus='' batch_size=32 epochs=20 lr='' rest=()

refuse() { echo "launch_multi_gpu.sh: $*" >&2; exit 2; }
count_gpus() { "$python" -c 'import torch; print(torch.cuda.device_count() or 1)'; }
ask() { # VARIABLE QUESTION
  local answer
  read -rp "$2 [${!1}]: " answer
  printf -v "$1" %s "${answer:-${!1}}"
}

asks=false
if [ $# = 0 ] && [ -t 0 ]; then asks=true; fi
while [ $# -gt 0 ]; do
  option=$1 joined=false value=${2-}
  case $option in --*=*) joined=true value=${option#*=} option=${option%%=*} ;; esac
  case $option in
    --mode | --gpus | --batch-size | --epochs | --lr)
      $joined || [ $# -gt 1 ] || refuse "$option needs a value"
      case $option:$value in
        --mode:ddp | --mode:dp) mode=$value ;;
        --mode:*) rest+=(--mode "$value") ;;
        --gpus:*) gpus=$value ;;
        --batch-size:*) batch_size=$value ;;
        --epochs:*) epochs=$value ;;
        --lr:*) lr=$value ;;
      esac
      $joined || shift
      ;;
    *) rest+=("$1") ;;
  esac
  shift
done

[ -n "$gpus" ] || gpus=$(count_gpus)
if $asks; then
  ask mode "ddp or dp"
  ask gpus "GPUs"
  ask batch_size "examples on each GPU"
  ask epochs "epochs"
fi
[[ $mode = ddp || $mode = dp ]] || refuse "--mode $mode: ddp or dp"
[[ $gpus =~ ^[1-9][0-9]*$ ]] || refuse "--gpus $gpus: a number ≥ 1"
[ -n "$lr" ] || lr=$(awk "BEGIN { print 0.001 * $gpus }")
if $asks; then ask lr "learning rate"; fi

flags=(--batch-size "$batch_size" --epochs "$epochs" --lr "$lr" ${rest[@]+"${rest[@]}"})
echo "$mode on $gpus devices, $batch_size examples on each, $epochs epochs, learning rate $lr" >&2
if [ "$mode" = ddp ]; then
  # --standalone takes a free port: two trainings on one machine do not meet.
  exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$gpus" "$main" --multi-gpu ddp "${flags[@]}"
fi
exec "$python" "$main" --multi-gpu dp --gpu-ids "$(seq -s, 0 $((gpus - 1)))" "${flags[@]}"
