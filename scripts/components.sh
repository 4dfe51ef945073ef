#!/bin/sh
# Install the real servers and tools that the tests talk to, where that is possible: Debian (or a relative) and root.
# Elsewhere say what is missing and go on: those tests are then skipped, each with its reason. Nothing is left running.
set -eu

# command:package
wanted="
prometheus:prometheus
promtool:prometheus
prometheus-alertmanager:prometheus-alertmanager
amtool:prometheus-alertmanager
redis-server:redis-server
chromium:chromium
systemd-analyze:systemd
npm:npm
"
missing= packages=
for pair in $wanted; do
    command -v "${pair%%:*}" >/dev/null || { missing="$missing ${pair%%:*}"; packages="$packages ${pair#*:}"; }
done
# Chromium draws boxes in place of Chinese without it.
if command -v dpkg >/dev/null && ! dpkg -s fonts-noto-cjk >/dev/null 2>&1; then
    missing="$missing fonts-noto-cjk" packages="$packages fonts-noto-cjk"
fi
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "components: cannot install$missing: this is not Debian. Tests that need them are skipped." >&2
    exit 0
fi
if [ "$(id -u)" != 0 ]; then
    echo "components: cannot install$missing: not root. Tests that need them are skipped; to have them, run: sudo sh $0" >&2
    exit 0
fi

# Debian starts a server when its package is installed. The tests start their own, so this forbids it while we install.
if [ ! -e /usr/sbin/policy-rc.d ]; then
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    trap 'exit 1' INT TERM
    printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
    chmod 755 /usr/sbin/policy-rc.d
fi

echo "components: installing$missing"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
# shellcheck disable=SC2086 # a list of packages
if apt-get -o DPkg::Lock::Timeout=300 update -qq >"$log" 2>&1 &&
    apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends $packages >>"$log" 2>&1; then
    rm -f "$log"
else
    tail -n 20 "$log" >&2
    echo "components: installing failed (log: $log). Tests that need them are skipped." >&2
fi
