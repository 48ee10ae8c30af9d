#!/usr/bin/env bash
# ./prepare_data.sh [FOLDER]      puts CIFAR-10 where the example looks for it, or into FOLDER: 170 MB, once
# PYTHON=python3.12 ./prepare_data.sh      which Python has shoal
set -euo pipefail
archive=cifar-10-python.tar.gz
folder=${1:-${SHOAL_DATA_DIR:-$HOME/.cache/shoal}/cifar10}

if [ -e "$folder/$archive" ] || [ -d "$folder/cifar-10-batches-py" ]; then
  echo "CIFAR-10 is in $folder"
  exit
fi
"${PYTHON:-python3}" - "$folder" <<'PYTHON' || { cat >&2 <<TOLD; exit 1; }
import sys
from shoal.data import cifar10
from shoal.errors import DataError
try:
    cifar10(data_dir=sys.argv[1])
except DataError as error:
    sys.exit(f"prepare_data.sh: {error}")
PYTHON
To do it by hand: put https://www.cs.toronto.edu/~kriz/$archive into $folder.
Without it the example trains on Fashion-MNIST, where the Debian package dataset-fashion-mnist is installed or a folder with
the four files of https://github.com/zalandoresearch/fashion-mnist is given as --data_dir, and else on scikit-learn's digits.
TOLD
echo "CIFAR-10 is in $folder"
