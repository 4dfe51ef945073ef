#!/bin/sh
# Run the fast half of the suite on every Python from 3.11 up that this machine has. usage: pythons.sh [pytest arguments]
set -eu
cd "$(dirname "$0")/.."

passed=
for path in $(for minor in 11 12 13 14 15; do command -v "python3.$minor" || true; done) "$HOME"/.pyenv/versions/3.*/bin/python3; do
    version=$("$path" -c 'import ensurepip, sys, venv; print("%d.%d.%d" % sys.version_info[:3] if sys.version_info >= (3, 11) else "")' 2>/dev/null) || continue
    case " $passed " in *" $version "*) continue ;; esac
    [ -n "$version" ] || continue
    echo "pythons: $version"
    sh scripts/venv.sh "$path" ".cache/pythons/$version" development
    ".cache/pythons/$version/bin/python" -m pytest -q -m 'not slow and not component' -k 'not truth and not contract and not process' \
        tests/blueking tests/collectors tests/config tests/metrics "$@"
    passed="$passed $version"
done
echo "pythons: passed on$passed"
