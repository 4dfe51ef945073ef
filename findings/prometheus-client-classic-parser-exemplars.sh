#!/bin/sh
# prometheus_client's parser of the classic text format reads an OpenMetrics page with exemplars without an error, and wrongly.
#
# Expected: an error at the first `# {…}` behind a sample, or the exemplar is left out.
# Seen: the time of the exemplar becomes the time of the sample; where the exemplar has no time, its value does.
# Cost: who checks a page with this parser and the wrong Accept header stores samples at times that never were.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'prometheus-client==0.26.0' 2>/dev/null
"$work/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as classic

PAGE = """\
# TYPE runs counter
runs_total 17.0 # {run="42"} 1.0 1795878784.5
# TYPE seconds histogram
seconds_bucket{le="1.0"} 3.0 # {run="42"} 0.5
seconds_bucket{le="+Inf"} 3.0
seconds_count 3.0
seconds_sum 1.5
# EOF
"""
print("prometheus-client", version("prometheus-client"), "Python", sys.version.split()[0])


def times(parse):
    return {
        sample.name: sample.timestamp
        for family in parse(PAGE)
        for sample in family.samples
        if sample.name == "runs_total" or sample.labels.get("le") == "1.0"
    }


print("OpenMetrics parser, times of the samples:", times(openmetrics))
print("classic parser, times of the samples:", times(classic))
right = {"runs_total": None, "seconds_bucket": None}
wrong = {"runs_total": 1795878.7845, "seconds_bucket": 0.0005}
sys.exit(None if (times(openmetrics), times(classic)) == (right, wrong) else "changed")
PY
