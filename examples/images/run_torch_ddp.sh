#!/usr/bin/env bash
# ./run_torch_ddp.sh ARGUMENTS            train_torch_ddp.py with these arguments on two nodes, both on this machine
# NPROC=4 ./run_torch_ddp.sh …            so many processes a node, not one for each of its GPUs (or one without GPUs)
# NODE_RANK=1 MASTER_ADDR=10.0.0.1 ./run_torch_ddp.sh …      this machine is node 1, and node 0 has that address
# NNODES (2), MASTER_PORT (29500, or any that is free where all nodes are here), OMP_NUM_THREADS, PYTHON (python3)
#
# What node N says is in ./job_torch_ddp_N.log, and the first one's also here. The exit code is 0 if all nodes end well;
# where one fails, the others are ended.
source "$(dirname "$0")/nodes.sh" || exit

MEETING=300  # seconds in which all nodes must have come

node=node log=job_torch_ddp script=$(dirname "$0")/train_torch_ddp.py

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
  find_gpus "$@"
  nproc=${NPROC:-$((share > 1 ? share : 1))}
  is_number "$nproc" && ((nproc)) || refuse "NPROC=$nproc is no number of processes: leave it out for one a GPU"
  if ((${#gpus[@]} && nproc * ${#here[@]} > ${#gpus[@]})); then
    refuse "${#here[@]} × $nproc processes need as many GPUs, and there are ${#gpus[@]}: use --accelerator cpu, or NPROC"
  fi
  share=$nproc
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_each $((nproc * ${#here[@]})))} PYTHONUNBUFFERED=1
}

command_of() {  # RANK ARGUMENTS
  command=(
    "$python" -m torch.distributed.run --nnodes="$nnodes" --node-rank="$1" --nproc-per-node="$nproc"
    --master-addr="$MASTER_ADDR" --master-port="$port" --rdzv-conf="timeout=$MEETING"
    --no-python setpriv --pdeathsig KILL "$python" "$script" "${@:2}"
  )
}

main() {  # ARGUMENTS. A function is read whole before it runs, so this file may change meanwhile.
  find_place
  divide_machine "$@"
  run_nodes "$@"
}

main "$@"
