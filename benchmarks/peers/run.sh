#!/usr/bin/env bash
# Installs pfl-research and Flower side by side, then compares them with shoal. Options go to compare.py; see README.md.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
export PEERS_ENVS="${PEERS_ENVS:-$here/.envs}"
python="${PYTHON:-python3}"

case " $* " in
  *" -h "* | *" --help "*) exec "$python" "$here/compare.py" --help ;;
esac
# pfl 0.6 wants a Python below 3.13.
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || {
  echo "the peers need Python 3.11 or 3.12; name one with: PYTHON=python3.12 $0 …" >&2
  exit 2
}
if [ -z "${PEERS_SHOAL:-}" ] && [ -x "$root/.venv/bin/shoal" ]; then
  export PEERS_SHOAL="$root/.venv/bin/shoal"
fi

# Torch first, by its pin: asked for without it, pip may take a build with gigabytes of CUDA packages.
install() {
  local env="$PEERS_ENVS/$1"
  [ -e "$env/done" ] && return
  echo "installing $2 into $env" >&2
  "$python" -m venv --clear "$env"
  "$env/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
  "$env/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 "$2"
  touch "$env/done"
}
install pfl 'pfl[pytorch]==0.6.*'
install flower 'flwr[simulation]==1.41.*'

exec "$python" "$here/compare.py" "$@"
