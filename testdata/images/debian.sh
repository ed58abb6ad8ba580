#!/bin/bash
# Builds an image of real Debian packages: debian.sh DIR [CACHE] makes the OCI layout DIR with
# the names latest (an index of this machine's architecture) and manifest (what it lists):
#
#   base    libc, dash, coreutils and what they need, with /usr merged
#   redis   redis-server, redis-tools and what they need besides
#   config  users and the data directory
#
# Packages are downloaded once and kept in CACHE, with the list of them; the same packages give
# the same bytes. Needs root's apt-get, dpkg-deb, Go, jq, GNU tar, and distkit's commands on PATH.
# shellcheck disable=SC2154 # what lib.sh sets
set -euo pipefail

dir=$(realpath -m "${1:?usage: debian.sh DIR [CACHE]}")
cache=$(realpath -m "${2:-${XDG_CACHE_HOME:-$HOME/.cache}/distkit/debian}")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
umask 022
declare -A layer_type config_type # lib.sh sets them
# shellcheck disable=SC1091
. "$here/lib.sh"

# closure PACKAGE…: the files of the packages, and of all that they need on an empty system.
closure() {
	: > "$work/status"
	mkdir -p "$work/archives/partial" # what the machine's own cache has would not be listed
	apt-get install --print-uris -qq -y --no-install-recommends \
		-o Dir::State::status="$work/status" -o Dir::Cache::archives="$work/archives" "$@" |
		awk '{print $2}' | LC_ALL=C sort
}

fetch() {
	local base=(base-files base-passwd coreutils dash)
	closure "${base[@]}" > "$work/base"
	closure "${base[@]}" redis-server > "$work/all"
	LC_ALL=C comm -13 "$work/base" "$work/all" > "$work/redis"
	(
		cd "$cache"
		# FILE_VERSION_ARCH.deb → FILE=VERSION; apt escapes the epoch's colon in file names.
		sed -E 's/^([^_]+)_([^_]+)_.*/\1=\2/; s/%3a/:/' "$work/all" | xargs apt-get download -qq
	)
	cp "$work/base" "$work/redis" "$cache/"
}

mkdir -p "$cache"
exec 9> "$cache/lock"
flock 9
if ! [ -s "$cache/redis" ]; then
	fetch 1>&2 || { apt-get update -qq 1>&2 && fetch 1>&2; }
fi

root=$work/root
mkdir -p "$root"/usr/{bin,sbin,lib,lib64} "$root/data"
ln -s usr/bin usr/sbin usr/lib usr/lib64 "$root/"

# unpack LIST: the files of those packages, into the tree that is there.
unpack() {
	while read -r deb; do
		dpkg-deb --fsys-tarfile "$cache/$deb" |
			tar --extract --directory "$root" --no-same-owner --preserve-permissions --keep-directory-symlink
	done < "$cache/$1"
}

export CGO_ENABLED=0
go -C "$here" build -o "$work/compress" ./compress
layers=() diffids=()
: > "$work/before"
# finish: what the tree has more than at the last call becomes a layer, with the directories above.
finish() {
	everything "$root" | LC_ALL=C sort -z > "$work/now"
	LC_ALL=C comm -z -13 "$work/before" "$work/now" |
		awk 'BEGIN { RS = ORS = "\0"; FS = OFS = "/" } { while (!seen[$0]++) { print; if (NF == 1) break; NF-- } }' |
		layer "$root" > "$work/tar"
	mv "$work/now" "$work/before"
	diffids+=("$(diffid < "$work/tar")")
	layers+=("$("$work/compress" gzip < "$work/tar" | add "${layer_type[oci]}+gzip")")
}

into "$dir"
unpack base
finish
unpack redis
finish
cp "$root/usr/share/base-passwd/passwd.master" "$root/etc/passwd"
cp "$root/usr/share/base-passwd/group.master" "$root/etc/group"
echo 'redis:x:999:999:redis:/data:/usr/sbin/nologin' >> "$root/etc/passwd"
echo 'redis:x:999:' >> "$root/etc/group"
echo 'an append-only file would be here' > "$root/data/README"
finish

arch=$(dpkg --print-architecture)
version=$(sed -nE 's/^redis-server_([^_]+)_.*/\1/p' "$cache/redis")
config=$(jq -nc --arg arch "$arch" --arg version "${version#*%3a}" '{
	created: "2023-11-14T22:13:20Z", architecture: $arch, os: "linux",
	config: {
		ExposedPorts: {"6379/tcp": {}}, WorkingDir: "/data", User: "redis",
		Env: ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "REDIS_VERSION=\($version)"],
		Cmd: ["redis-server", "--save", "", "--protected-mode", "no"], Volumes: {"/data": {}}
	},
	rootfs: {type: "layers", diff_ids: $ARGS.positional}
}' --args "${diffids[@]}" | add "${config_type[oci]}")
manifest=$(manifest oci "$config" "${layers[@]}")
name manifest <<< "$manifest"
index oci "$arch" "$manifest" | name latest
