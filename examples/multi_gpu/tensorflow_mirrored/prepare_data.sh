#!/usr/bin/env bash
# ./prepare_data.sh [FOLDER]      puts CIFAR-10 where the example looks for it, or into FOLDER: 170 MB, once
exec "$(dirname "$0")/../torch_ddp/prepare_data.sh" "$@"
