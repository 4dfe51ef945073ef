#!/bin/sh
# msgspec decodes no document that has one lone surrogate escape anywhere, also in a member that nobody asked for.
#
# Expected: \ud800 is valid by the grammar of JSON (RFC 8259, section 8.2, says so). A decoder gives a replacement, or
# complains about this string; a member that the type does not have is skipped.
# Seen: DecodeError for the whole document, and the message speaks of something else ("Input data was truncated", or the
# end of a hex escape). The json module decodes it.
# Cost: a platform that cuts names in the middle of a pair makes a page of 200 rows unreadable because of one name.
# Replace lone escapes in the body before a second try.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'msgspec==0.22.0' 2>/dev/null
"$work/venv/bin/python" - <<'PY'
import json
import sys

import msgspec


class Row(msgspec.Struct):
    id: int


class NamedRow(msgspec.Struct):
    id: int
    name: str


def outcome(body, kind):
    try:
        return repr(msgspec.json.decode(body, type=kind))
    except msgspec.DecodeError as error:
        return f"{type(error).__name__}: {error}"


print("msgspec", msgspec.__version__, "Python", sys.version.split()[0])
SHORT, LONG = b'[{"id": 1, "name": "\\ud800"}, {"id": 2, "name": "b"}]', b'[{"id": 1, "name": "\\ud800 and more"}]'
seen = [outcome(body, list[kind]) for body in (SHORT, LONG) for kind in (Row, NamedRow)]
seen += [outcome(b'"\\ud800"', str), outcome(b'"\\ud83d\\ude00"', str)]
for one in seen:
    print(one)
assert json.loads(SHORT)[1] == {"id": 2, "name": "b"}, "the json module has changed"
assert all(one.startswith("DecodeError: ") for one in seen[:5]), "lone surrogates are decoded now"
assert "truncated" in seen[4], "the message has changed"
assert seen[5] == repr("\U0001f600")
PY
echo "still so"
