#!/bin/sh
# SQLite, run by root: a process that only reads changes the ctime of the write-ahead log.
#
# Expected: mode=ro and a SELECT leave the files as they are.
# Seen: opening the log calls fchown (to give it the owner of the database), which renews its ctime. mtime stays.
# Cost: who watches a database for foreign changes by ctime sees one whenever somebody looks. Run it as root.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'pysqlite3-binary==0.5.4.post2' 2>/dev/null
"$work/venv/bin/python" - <<'PY'
import os
import pathlib
import sys
import tempfile
import time

import pysqlite3.dbapi2 as sqlite

if os.getuid() != 0:
    sys.exit("run it as root: only root's SQLite calls fchown")
with tempfile.TemporaryDirectory() as folder:
    file, log = pathlib.Path(folder, "a.db"), pathlib.Path(folder, "a.db-wal")
    writer = sqlite.connect(str(file))
    writer.execute("PRAGMA journal_mode=wal")
    writer.execute("CREATE TABLE t (x)")
    writer.commit()
    before = log.stat()
    time.sleep(0.1)
    reader = sqlite.connect(f"file:{file}?mode=ro", uri=True)
    reader.execute("SELECT count(*) FROM t").fetchone()
    after = log.stat()
    reader.close()
    writer.close()
seen = {"mtime": before.st_mtime_ns != after.st_mtime_ns, "ctime": before.st_ctime_ns != after.st_ctime_ns}
print("SQLite", sqlite.sqlite_version, "Python", sys.version.split()[0])
print("changed by a reader:", seen)
sys.exit(None if seen == {"mtime": False, "ctime": True} else "changed")
PY
