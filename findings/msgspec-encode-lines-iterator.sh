#!/bin/sh
# msgspec's Encoder.encode_lines leaves one iterator behind at each call, unless its argument is a list.
#
# Expected: encoding a tuple, a view of a dict or a set releases everything, as encoding a list does.
# Seen: the iterator that the call made is never freed (48 bytes for a tuple, 72 for a view of a dict). Nothing raises.
# Cost: a process that encodes thousands of small collections per second grows without end. Give encode_lines a list.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'msgspec==0.22.0' 2>/dev/null
"$work/venv/bin/python" - <<'PY'
import collections
import gc
import sys

import msgspec

CALLS = 1000
encoder = msgspec.json.Encoder()


def iterators():
    return collections.Counter(type(one).__name__ for one in gc.get_objects() if "iterator" in type(one).__name__)


def left_behind(collection):
    """Iterators that live on after some calls, by type."""
    gc.collect()
    before = iterators()
    for _ in range(CALLS):
        encoder.encode_lines(collection)
    gc.collect()
    return dict(iterators() - before)


print("msgspec", msgspec.__version__, "Python", sys.version.split()[0])
seen = {}
for kind, collection in (("list", [1.5]), ("tuple", (1.5,)), ("view of a dict", {1: 1.5}.values()), ("set", {1.5})):
    seen[kind] = left_behind(collection)
    print(f"{kind}: after {CALLS} calls {seen[kind] or 'nothing'} left behind")
expected = {
    "list": {},
    "tuple": {"tuple_iterator": CALLS},
    "view of a dict": {"dict_valueiterator": CALLS},
    "set": {"set_iterator": CALLS},
}
sys.exit(None if seen == expected else f"changed: expected {expected}")
PY
