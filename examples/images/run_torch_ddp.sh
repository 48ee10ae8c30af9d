#!/usr/bin/env bash
# ./run_torch_ddp.sh ARGUMENTS            train_torch_ddp.py with these arguments on two nodes, both on this machine
# NPROC=4 ./run_torch_ddp.sh …            so many processes a node, not one for each of its GPUs (or one without GPUs)
# NODE_RANK=1 MASTER_ADDR=10.0.0.1 ./run_torch_ddp.sh …      this machine is node 1, and node 0 has that address
# NNODES (2), MASTER_PORT (29500, or any that is free where all nodes are here), OMP_NUM_THREADS, PYTHON (python3)
#
# What node N says is in ./job_torch_ddp_N.log, and the first one's also here. The exit code is 0 if all nodes end well;
# where one fails, the others are ended.
set -uo pipefail
set -m  # each node in a process group of its own, which hears Ctrl-C from here only

MEETING=300  # seconds in which all nodes must have come
GRACE=5      # seconds in which the other nodes may notice by themselves that one has failed
KILL=10      # seconds from the request to end until what is left is killed

refuse() { echo "${0##*/}: error: $*" >&2; exit 2; }
is_number() { [[ $1 =~ ^(0|[1-9][0-9]*)$ ]]; }

free_port() {  # below those that the system gives away, so that nobody takes it by chance meanwhile
  "$python" - <<'END'
import random, socket
for port in random.sample(range(15000, 32768), 100):
    try:
        socket.create_server(("", port)).close()
    except OSError:
        continue
    print(port)
    break
END
}

find_place() {  # what runs here: the nodes, and where all of them meet
  python=${PYTHON:-python3} script=$(dirname "$0")/train_torch_ddp.py
  nnodes=${NNODES:-2}
  is_number "$nnodes" && ((nnodes)) || refuse "NNODES=$nnodes is no number of nodes: leave it out for 2"

  if [[ -v NODE_RANK ]]; then
    is_number "$NODE_RANK" && ((NODE_RANK < nnodes)) || refuse "NODE_RANK=$NODE_RANK is not among 0 to $((nnodes - 1))"
    [[ -n ${MASTER_ADDR:-} ]] || refuse "NODE_RANK=$NODE_RANK is for several machines: set MASTER_ADDR to that of node 0"
    here=("$NODE_RANK") port=${MASTER_PORT:-29500}
  else
    [[ -z ${MASTER_ADDR:-} ]] || refuse "MASTER_ADDR=$MASTER_ADDR is for several machines: set NODE_RANK too, or unset it"
    mapfile -t here < <(seq 0 $((nnodes - 1)))
    MASTER_ADDR=127.0.0.1 port=${MASTER_PORT:-$(free_port)}
  fi
}

divide_machine() {  # ARGUMENTS: the GPUs and the cores, among the nodes that run here
  gpus=()
  case " $* " in
    *" --accelerator cpu "* | *" --accelerator=cpu "*) ;;
    *)
      if [[ -v CUDA_VISIBLE_DEVICES ]]; then
        IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
      elif command -v nvidia-smi >/dev/null; then
        mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader)
      fi
      ;;
  esac
  share=$((${#gpus[@]} / ${#here[@]}))
  nproc=${NPROC:-$((share > 1 ? share : 1))}
  is_number "$nproc" && ((nproc)) || refuse "NPROC=$nproc is no number of processes: leave it out for one a GPU"
  if ((${#gpus[@]} && nproc * ${#here[@]} > ${#gpus[@]})); then
    refuse "${#here[@]} × $nproc processes need as many GPUs, and there are ${#gpus[@]}: use --accelerator cpu, or NPROC"
  fi

  cores=$(nproc)
  threads=$((cores / (nproc * ${#here[@]})))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))} PYTHONUNBUFFERED=1
}

log_of() { echo "job_torch_ddp_$1.log"; }

start() {  # PLACE ARGUMENTS: starts the node at that place among those on this machine
  local rank=${here[$1]} visible=()
  : >"$(log_of "$rank")" || refuse "this folder cannot be written, and the logs are for it"
  ((${#gpus[@]})) && visible=("CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:$1*nproc:nproc}")")
  # Whoever has started a process may be killed, and it is to end then too.
  setpriv --pdeathsig TERM env "${visible[@]}" "$python" -m torch.distributed.run \
    --nnodes="$nnodes" --node-rank="$rank" --nproc-per-node="$nproc" --master-addr="$MASTER_ADDR" --master-port="$port" \
    --rdzv-conf="timeout=$MEETING" --no-python setpriv --pdeathsig KILL "$python" "$script" "${@:2}" \
    >"$(log_of "$rank")" 2>&1 &
  left[$!]=$rank first=${first:-$!}
}

is_running() {  # PROCESS
  local running
  running=$'\n'$(jobs -rp)$'\n'
  [[ $running == *$'\n'"$1"$'\n'* ]]
}

wait_for() {  # SECONDS PROCESSES
  local pid until=$((SECONDS + $1))
  for pid in "${@:2}"; do
    while is_running "$pid" && ((SECONDS < until)); do sleep 0.1; done
  done
}

look_for_ends() {  # forgets the nodes that have ended, and tells of those that failed
  local pid status
  for pid in "${!left[@]}"; do
    is_running "$pid" && continue
    wait "$pid"
    status=$?
    ((status)) && tell_failure "${left[$pid]}" "$status"
    code=$((code ? code : status))
    unset "left[$pid]"
  done
}

end_what_is_left() {  # SIGNAL
  ((${#left[@]})) || return
  kill "-$1" "${!left[@]}"
  wait_for "$KILL" "${!left[@]}"
  for pid in "${!left[@]}"; do kill -KILL -- "-$pid"; done
}

tell_failure() {  # RANK CODE
  local log why
  log=$(log_of "$1")
  why=$(grep -m 1 "^${script##*/}: .*error: " "$log") || why=$(grep -v '^[=-]*$' "$log" | tail -n 1)
  printf '%s\n' "${0##*/}: node $1 failed with code $2; its log is $log" ${why:+"$why"} >&3
}

main() {  # ARGUMENTS. A function is read whole before it runs, so this file may change meanwhile.
  find_place
  divide_machine "$@"
  declare -A left  # the ranks of the nodes that run, by their processes
  signal='' code=0 first=''
  trap 'signal=INT' INT
  trap 'signal=TERM' TERM
  for place in "${!here[@]}"; do start "$place" "$@"; done
  tail --pid="$first" --sleep-interval=0.2 -n +1 -f "$(log_of "${here[0]}")" &
  shown=$!

  exec 3>&2 2>/dev/null  # bash itself has nothing to say about those that a signal ends
  while ((${#left[@]} && !code)) && [[ -z $signal ]]; do
    sleep 0.5
    look_for_ends
  done
  if [[ -n $signal ]]; then
    end_what_is_left "$signal"
    code=$([[ $signal == INT ]] && echo 130 || echo 143)
  elif ((code)); then
    wait_for "$GRACE" "${!left[@]}"
    look_for_ends
    end_what_is_left TERM
  fi
  wait_for 2 "$shown"
  kill "$shown"
  exit "$code"
}

main "$@"
