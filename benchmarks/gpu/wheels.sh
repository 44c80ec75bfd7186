#!/usr/bin/env bash
# Gather, in .wheels (ignored by git), what a machine with torch, transformers and accelerate lacks for the battery.
#     bash benchmarks/gpu/wheels.sh [PYTHON_VERSION]     default 3.12; Linux x86-64
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
folder="$root/.wheels"
rm -rf "$folder"
platforms=()
for glibc in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
${PYTHON:-python3} -m pip download -q --no-deps --only-binary=:all: --python-version "${1:-3.12}" --implementation cp \
	"${platforms[@]}" --platform manylinux2014_x86_64 --constraint "$root/constraints.txt" --dest "$folder" \
	zarr numcodecs donfig google-crc32c isal nibabel pynrrd
mib=$(du -sm "$folder" | cut -f1)
echo "$folder: $(ls "$folder" | wc -l) wheels, $mib MiB"
[ "$mib" -le 60 ] || { echo "expected at most 60 MiB of wheels, found $mib" >&2; exit 1; }
