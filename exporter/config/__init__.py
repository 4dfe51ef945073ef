"""The configuration: one immutable value, read strictly, swapped whole.

load.py        what others call: file + flags -> Config, or every problem at once
schema.py      the typed values, each key with a sentence; the JSON Schema
web_file.py    the web configuration file: file -> WebFile
rules.py       what two keys say about each other
read.py        nodes -> typed values
document.py    text -> nodes, strictly (the only file that imports yaml)
kinds.py       how one value is written: durations, sizes, addresses, URLs
secret.py      a value that never prints
"""
