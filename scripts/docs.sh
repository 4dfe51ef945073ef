#!/bin/sh
# Write what is generated: the metric reference in both languages, the schema of the configuration, the rules and
# dashboards of the mixin. With --check: write nothing, fail if they are out of step.
set -eu
cd "$(dirname "$0")/.."
exporter=.venv/bin/blueking-exporter
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT

mkdir -p "$new/en" "$new/zh"
$exporter metrics --lang=en > "$new/en/metrics.md"
$exporter metrics --lang=zh > "$new/zh/metrics.md"
$exporter schema > "$new/config.schema.json"

for file in en/metrics.md zh/metrics.md config.schema.json; do
    if [ "${1:-}" = --check ]; then
        diff -u "docs/$file" "$new/$file" || { echo "docs/$file is out of step; run: make docs" >&2; exit 1; }
    else
        cp "$new/$file" "docs/$file"
    fi
done

.venv/bin/python -m mixin.render "$@"
