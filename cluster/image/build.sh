#!/usr/bin/env bash
# Build the image without a daemon, by buildah with chroot isolation, on a base made from Debian's packages.
#
#   cluster/image/build.sh [TAG]
#
# Takes root, buildah and debootstrap (both are packages of Debian). With BASE=<image> that image is the base instead.
# BUILD_ARGS is handed to buildah: BUILD_ARGS="--build-arg TORCH=cuda". WHEELS is a folder of wheels that pip uses, and
# CERTS a bundle of certificates for it, where the way to PyPI needs one.
set -euo pipefail
cd "$(dirname "$0")/../.."
tag=${1:-localhost/serve-app:latest}
suite=${SUITE:-bookworm}
mirror=${MIRROR:-http://deb.debian.org/debian}
base=${BASE:-localhost/serve-app-base:$suite}
wheels=${WHEELS:-}
for command in buildah debootstrap; do
  command -v "$command" >/dev/null || { echo "cluster/image/build.sh: needs $command: apt-get install buildah debootstrap" >&2; exit 1; }
done
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
if [ -z "${BASE:-}" ] && ! buildah inspect --type image "$base" >/dev/null 2>&1; then
  root=$(mktemp -d)
  trap 'rm -rf "$root"' EXIT
  debootstrap --variant=minbase --include=bash,ca-certificates,python3,python3-venv "$suite" "$root" "$mirror"
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
  container=$(buildah from scratch)
  buildah copy --quiet "$container" "$root" / >/dev/null
  buildah commit --quiet --rm "$container" "$base" >/dev/null
fi
options=(--network host --layers=false --format oci)
if [ -n "$wheels" ]; then
  options+=(--volume "$wheels:/wheels:ro" --build-arg PIP_FIND_LINKS=/wheels --build-arg CPU_INDEX=)
fi
if [ -n "${CERTS:-}" ]; then
  options+=(--volume "$CERTS:/certs.pem:ro" --build-arg PIP_CERT=/certs.pem)
fi
# shellcheck disable=SC2086 # BUILD_ARGS are several words
buildah build "${options[@]}" ${BUILD_ARGS:-} --build-arg "BASE=$base" \
  --ignorefile cluster/image/Dockerfile.dockerignore -f cluster/image/Dockerfile -t "$tag" .
buildah images "$tag"
