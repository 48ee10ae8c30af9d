#!/usr/bin/env bash
# ./run_tf_mwms.sh ARGUMENTS       train_tf_multiworker_mirroredstrategy.py with these arguments on two workers, both on
#                                  this machine, each with half of its GPUs; without GPUs, each on the CPU
# OMP_NUM_THREADS, PYTHON (python3)
#
# What worker N says is in ./job_tf_mwms_N.log, and the chief's, worker 0, also here. The exit code is 0 if both workers
# end well; where one fails, the other is ended.
source "$(dirname "$0")/nodes.sh" || exit

node=worker log=job_tf_mwms script=$(dirname "$0")/train_tf_multiworker_mirroredstrategy.py
here=(0 1)

HOLD='
import signal
from shoal.processes.ports import held_ports
signal.signal(signal.SIGINT, signal.SIG_IGN)
with held_ports(2) as ports:
    print(*ports, flush=True)
    signal.pause()
'

find_place() {  # ARGUMENTS: makes sure that nothing says that the workers are elsewhere
  local ours="this starts both workers, on this machine; for others start ${script##*/} on each"
  [[ -z ${WORKERS:-} ]] || refuse "WORKERS=$WORKERS is set, and $ours"
  [[ -z ${TF_CONFIG:-} ]] || refuse "TF_CONFIG is set, and $ours"
  case " $*" in
    *" -wi"* | *" --worker-index"* | *" --workers"*) refuse "-wi or --workers is given, and $ours" ;;
  esac
}

divide_machine() {  # ARGUMENTS: the GPUs and the cores
  find_gpus "$@"
  if ((${#gpus[@]} && !share)); then
    refuse "${#here[@]} workers need a GPU each, and there is ${#gpus[@]}: use --accelerator cpu"
  fi
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_each ${#here[@]})} PYTHONUNBUFFERED=1
  export TF_GRPC_REUSE_PORT=true  # the ports are held here
  export TF_NUM_INTRAOP_THREADS=${TF_NUM_INTRAOP_THREADS:-$OMP_NUM_THREADS}
}

hold_ports() {  # sets a port for each worker, which nobody else is given before it listens there
  local held
  exec {held}< <(exec setpriv --pdeathsig KILL "$python" -c "$HOLD")
  read -ra ports <&"$held" || refuse "$python has found no free ports"
}

command_of() {  # RANK ARGUMENTS
  command=(setpriv --pdeathsig KILL "$python" "$script" --worker-index "$1" "${@:2}")
}

main() {  # ARGUMENTS. A function is read whole before it runs, so this file may change meanwhile.
  find_place "$@"
  divide_machine "$@"
  hold_ports
  export WORKERS=127.0.0.1:${ports[0]},127.0.0.1:${ports[1]}
  run_nodes "$@"
}

main "$@"
