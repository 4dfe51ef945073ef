#!/bin/sh
# Run the two commands of the README in a fresh Debian 12, as somebody has it who installed python3, make and git: a root
# directory by debootstrap, the committed state of this repository cloned into it. Needs root and the network.
#   fresh.sh demo     make demo until /metrics answers, with the seconds that took
#   fresh.sh test     make test
#   fresh.sh          both
set -eu
cd "$(dirname "$0")/.."
base=$PWD/.cache/fresh/debian root=$PWD/.cache/fresh/root
mkdir -p .cache/fresh

# Everything runs in name spaces of its own: mounts and processes end with this script.
if [ -z "${FRESH_INSIDE:-}" ]; then
    FRESH_INSIDE=1 exec unshare --mount --pid --fork --kill-child sh "$0" "$@"
fi

if ! [ -e "$base/.done" ]; then
    rm -rf "$base"
    debootstrap --variant=minbase --include=python3,make,git,ca-certificates bookworm "$base" >.cache/fresh/debootstrap.log 2>&1
    touch "$base/.done"
fi
rm -rf "$root"
cp -a "$base" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
cp /etc/resolv.conf /etc/hosts "$root/etc/"
# A network may have a proxy or an authority of its own; the newcomer has set that up.
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
git bundle create --quiet "$root/root/repository" HEAD

inside() {
    # shellcheck disable=SC2046 # a list of assignments without spaces
    env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
        $(env | grep -E '^(https?_proxy|no_proxy|HTTPS?_PROXY|NO_PROXY|PIP_(CERT|INDEX_URL|PROXY)|NODE_EXTRA_CA_CERTS)=' || true) \
        chroot "$root" "$@"
}
inside git -c advice.detachedHead=false clone --quiet /root/repository /root/blueking-exporter

demo() {
    echo "fresh: make demo"
    inside sh -eu -c '
        cd /root/blueking-exporter
        begun=$(date +%s)
        make demo >/tmp/demo.log 2>&1 &
        until python3 -c "import urllib.request as u; u.urlopen(\"http://127.0.0.1:10071/metrics\", timeout=5)" 2>/dev/null; do
            kill -0 $! 2>/dev/null || { cat /tmp/demo.log; exit 1; }
            [ $(($(date +%s) - begun)) -lt 300 ] || { cat /tmp/demo.log; echo "fresh: no answer in 300 s"; exit 1; }
            sleep 0.5
        done
        cat /tmp/demo.log
        echo "fresh: make demo answered after $(($(date +%s) - begun)) s"
        kill $!
        wait $! 2>/dev/null || true
    '
}

case ${1:-} in
demo) demo ;;
test) inside make -C /root/blueking-exporter test ;;
"") demo; inside make -C /root/blueking-exporter test ;;
*) sed -n '2,7p' "$0" >&2; exit 2 ;;
esac
