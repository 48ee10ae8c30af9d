#!/usr/bin/env bash
# ./run.sh NBCLIENTS NBMINCLIENTS NBFITCLIENTS NBROUNDS      (2 2 2 3 if left out)
# ENGINE="vectorized process" ./run.sh 200 100 20 3          which engines to compare
# ./run.sh --memory                                          memory against the number of clients
cd "$(dirname "$0")" && exec "${PYTHON:-python3}" scaling.py "$@"
