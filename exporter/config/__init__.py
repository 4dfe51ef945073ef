"""The configuration: one immutable value, read strictly, replaced as a whole.

load.py       what others call: file and flags → Config, or every problem at once
schema.py     the typed configuration: one line per key
web_file.py   the web configuration file → WebFile
rules.py      rules between keys
read.py       nodes → typed values
keys.py       what a struct says about the keys of a file; the JSON Schema
yaml.py       text → nodes with their places, strictly; the only file that imports yaml
values.py     how one value is written: durations, sizes, addresses, URLs
secret.py     a value that never prints
files.py      opens regular files without waiting
tls.py        the TLS context of a client
state_url.py  where the state is kept: SQLite, memory or a Redis address
"""
