# What run_torch_ddp.sh and run_tf_mwms.sh share, which source it: several nodes on this machine, each with GPUs and a
# log of its own. The exit code is 0 if all nodes end well; where one fails, the others are ended.
#
# They set: node     what a node is called
#           log      the beginning of the logs' names
#           script   what the nodes run
#           here     the ranks of the nodes on this machine
# and have: command_of RANK ARGUMENTS, which sets the words of a node's command in `command`

set -uo pipefail
set -m  # each node in a process group of its own, which hears Ctrl-C from here only

GRACE=5  # seconds in which the other nodes may notice by themselves that one has failed
KILL=10  # seconds from the request to end until what is left is killed

python=${PYTHON:-python3}

refuse() { echo "${0##*/}: error: $*" >&2; exit 2; }
is_number() { [[ $1 =~ ^(0|[1-9][0-9]*)$ ]]; }

find_gpus() {  # ARGUMENTS: sets the GPUs that may be used, and how many of them a node has
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
}

threads_each() {  # PROCESSES: prints how many threads each of them may use
  local threads=$(($(nproc) / $1))
  echo $((threads > 1 ? threads : 1))
}

log_of() { echo "${log}_$1.log"; }

start() {  # PLACE ARGUMENTS: starts the node at that place among those on this machine
  local rank=${here[$1]} visible=()
  : >"$(log_of "$rank")" || refuse "this folder cannot be written, and the logs are for it"
  ((${#gpus[@]})) && visible=("CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:$1*share:share}")")
  command_of "$rank" "${@:2}"
  # Whoever has started a process may be killed, and it is to end then too.
  setpriv --pdeathsig TERM env "${visible[@]}" "${command[@]}" >"$(log_of "$rank")" 2>&1 &
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
  local told why
  told=$(log_of "$1")
  why=$(grep -m 1 "^${script##*/}: .*error: " "$told") || why=$(grep -v '^[=-]*$' "$told" | tail -n 1)
  printf '%s\n' "${0##*/}: $node $1 failed with code $2; its log is $told" ${why:+"$why"} >&3
}

run_nodes() {  # ARGUMENTS: runs all nodes that are here, shows what the first of them says, and exits with their code
  local signal='' code=0 first=''
  declare -A left  # the ranks of the nodes that run, by their processes
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
