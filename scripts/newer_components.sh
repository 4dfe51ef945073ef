#!/bin/sh
# Unpack the newest Prometheus, promtool, Alertmanager and VictoriaMetrics of Debian's newer suites into .cache/newer, beside
# the installed ones. Nothing is installed. Where they cannot be had, say why and go on: their tests are skipped.
set -eu
cd "$(dirname "$0")/.."
target=$PWD/.cache/newer
packages="prometheus promtool prometheus-alertmanager victoria-metrics"
suites="sid forky trixie"

[ ! -e "$target/ready" ] || exit 0
skip() {
    echo "newer components: $1. Their tests are skipped." >&2
    exit 0
}
command -v apt-get >/dev/null && command -v dpkg >/dev/null || skip "this is not Debian"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -r "$keyring" ] || skip "Debian's keyring is missing"
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | sed -n -E 's/^(URIs: *|deb (\[[^]]*\] )?)([^ ]*\/debian)\/?( .*)?$/\3/p' | head -n 1)
[ -n "$mirror" ] || skip "no Debian mirror is configured"

rm -rf "$target"
mkdir -p "$target/lists/partial" "$target/archives/partial" "$target/root"
log=$target/log
apt() {
    apt-get -o Dir::Etc::sourcelist="$target/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State::lists="$target/lists" \
        -o Dir::Cache="$target" -o Acquire::Languages=none -o APT::Sandbox::User= "$@" >>"$log" 2>&1
}
for suite in $suites; do
    echo "deb [signed-by=$keyring] $mirror $suite main" >"$target/sources.list"
    # shellcheck disable=SC2086 # a list of packages
    if apt update && (cd "$target/archives" && apt download $packages); then
        for package in "$target"/archives/*.deb; do
            dpkg -x "$package" "$target/root" || skip "$package cannot be unpacked"
        done
        rm -rf "$target/lists" "$target/archives" "$target"/*.bin
        touch "$target/ready"
        echo "newer components from $suite:"
        for command in prometheus promtool prometheus-alertmanager victoria-metrics; do
            "$target/root/usr/bin/$command" --version 2>&1 | grep -m 1 . | cut -c 1-100
        done
        exit 0
    fi
done
skip "none of $suites gave them (log: $log)"
