#!/bin/sh
# Build and run the image without a container engine and without a registry: buildah with chroot isolation, on a base that
# debootstrap makes of Debian packages. Everything lies below .cache/image.
#   image.sh base               make the base, once
#   image.sh build              build the Dockerfile on it
#   image.sh root               print where the image's file system is, extracted
#   image.sh inspect            print the image's configuration as JSON
#   image.sh run COMMAND…       run a command in the image, with the host's network, as the image's user
#   image.sh clean
set -eu
cd "$(dirname "$0")/.."
store=$PWD/.cache/image base=localhost/debian-python tag=localhost/blueking-exporter
mkdir -p "$store"
[ -f "$store/registries.conf" ] || printf 'unqualified-search-registries = []\nshort-name-mode = "disabled"\n' > "$store/registries.conf"
[ -f "$store/policy.json" ] || printf '{"default": [{"type": "insecureAcceptAnything"}]}\n' > "$store/policy.json"
export BUILDAH_ISOLATION=chroot CONTAINERS_REGISTRIES_CONF="$store/registries.conf" REGISTRIES_CONFIG_PATH="$store/registries.conf"

b() { buildah --storage-driver vfs --root "$store/root" --runroot "$store/run" "$@"; }

case ${1:-} in
base)
    b inspect --type image "$base" >/dev/null 2>&1 && exit 0
    if ! [ -e "$store/debian/.done" ]; then
        rm -rf "$store/debian"
        debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates bookworm "$store/debian" >"$store/debootstrap.log" 2>&1
        touch "$store/debian/.done"
    fi
    container=$(b from scratch)
    b add -q "$container" "$store/debian" / >/dev/null
    b config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    b commit -q --signature-policy "$store/policy.json" "$container" "$base" >/dev/null
    b rm "$container" >/dev/null
    ;;
build)
    # The machine's certificates are mounted while RUN runs, for a registry behind a proxy; they do not get into the image.
    b build --quiet --format docker --signature-policy "$store/policy.json" --pull=never --network=host --layers \
        -v /etc/ssl/certs:/etc/ssl/certs:ro --build-arg PYTHON_IMAGE="$base" \
        --build-arg VERSION="$(sed -n 's/^__version__ = "\(.*\)"/\1/p' exporter/__init__.py)" -t "$tag" .
    ;;
root)
    b rm blueking-exporter-root >/dev/null 2>&1 || true
    b from --pull-never --signature-policy "$store/policy.json" --name blueking-exporter-root "$tag" >/dev/null
    b mount blueking-exporter-root
    ;;
inspect) b inspect --type image "$tag" ;;
run)
    shift
    container=$(b from --pull-never --signature-policy "$store/policy.json" "$tag")
    trap 'b rm "$container" >/dev/null' EXIT
    b run --network=host "$container" -- "$@"
    ;;
clean)
    b rm --all >/dev/null 2>&1 || true
    rm -rf "$store"
    ;;
*) sed -n '2,9p' "$0" >&2; exit 2 ;;
esac
