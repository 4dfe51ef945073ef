#!/bin/sh
# Make a virtual environment.
#   venv.sh PYTHON VENV product       what the exporter imports; it runs from this folder
#   venv.sh PYTHON VENV development   the exporter itself (editable), its extras, and what tests and checks need
set -eu
python=$1 venv=$2 what=$3

"$python" - <<'PY' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f"blueking-exporter needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}. Try: make PYTHON=python3.12")
PY

# Debian takes ensurepip out of python3; it comes with python3-venv.
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing python3-venv"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
    else
        echo "Python's venv module is missing. Install it first (Debian, Ubuntu: apt-get install python3-venv)." >&2
        exit 1
    fi
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
case $what in
product)
    dependencies=$("$venv/bin/python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")')
    printf '%s\n' "$dependencies" > "$venv/requirements.txt"
    pip install --requirement "$venv/requirements.txt"
    ;;
development)
    # Dependency groups need pip 25.1; Debian 12 brings 23.0.
    pip install 'pip>=25.1'
    pip install --editable '.[redis,web-auth]' --group dev
    ;;
esac
