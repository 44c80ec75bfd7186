#!/usr/bin/env bash
# All that is to be known of a GPU, in one command of under 9 minutes; nothing is downloaded. README.md says how.
#     bash benchmarks/gpu/battery.sh [--size 3b|tiny] [--device cuda|cpu] [--only STEP,STEP]
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
if [ -d "$root/.wheels" ] && ! $python -c 'import google_crc32c, isal, nibabel, nrrd, zarr' 2> /dev/null; then
	site=$(mktemp -d)
	$python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$root"/.wheels/*.whl
fi
names=$(mktemp -d) # two folders are imported by other names than their own
for pair in photon_data:photon_data photon_train:photon_train photon_cli:cli photon_pipelines:pipelines; do
	ln -s "$root/${pair#*:}" "$names/${pair%:*}"
done
export PYTHONPATH="$names:${site:+$site:}${PYTHONPATH:-}"
exec $python "$root/benchmarks/gpu/battery.py" "$@"
