#!/bin/sh
# Build what is released into dist/: sdist, wheel, a bill of materials (CycloneDX) and checksums.
# Everything is built twice, and both times have to be the same bit for bit: whoever has the commit can check a release.
set -eu
cd "$(dirname "$0")/.."
bin=$PWD/.venv/bin

[ -z "$(git status --porcelain)" ] || { echo "release: commit or remove these first:" >&2; git status --short >&2; exit 1; }
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
commit=$(git rev-parse HEAD)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for round in 1 2; do
    # A copy of what git has: files that are ignored must not get in.
    mkdir "$work/source-$round"
    git archive "$commit" | tar -x -C "$work/source-$round"
    "$bin/python" -m build --outdir "$work/dist-$round" "$work/source-$round" >"$work/log" 2>&1 || { tail "$work/log" >&2; exit 1; }
    # The bill lists what a user gets: the wheel with its extras and their dependencies, nothing of the tests.
    "$bin/python" -m venv "$work/venv-$round"
    wheel=$(echo "$work/dist-$round"/*.whl)
    "$work/venv-$round/bin/python" -m pip install --quiet --disable-pip-version-check "$wheel[redis,web-auth]"
    "$work/venv-$round/bin/python" -m pip uninstall --quiet --yes pip setuptools 2>/dev/null || true
    "$bin/cyclonedx-py" environment --output-reproducible --of JSON -o "$work/dist-$round/sbom.cdx.json" "$work/venv-$round/bin/python"
    # The installed wheel is named by the folder it came from, which is another one each time.
    "$bin/python" - "$work/dist-$round" <<'PY'
import json
import pathlib
import sys

file = pathlib.Path(sys.argv[1], "sbom.cdx.json")
bill = json.loads(file.read_text(encoding="utf-8"))
for component in bill["components"]:
    component.pop("externalReferences", None) if component["name"] == "blueking-exporter" else None
file.write_text(json.dumps(bill, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
PY
    (cd "$work/dist-$round" && sha256sum ./*.whl ./*.tar.gz sbom.cdx.json | sed 's# \./# #' >SHA256SUMS)
done
diff "$work/dist-1/SHA256SUMS" "$work/dist-2/SHA256SUMS" || { echo "release: two builds of one commit differ" >&2; exit 1; }

rm -rf dist
cp -r "$work/dist-1" dist
echo "release: $commit, built twice, the same"
cat dist/SHA256SUMS
