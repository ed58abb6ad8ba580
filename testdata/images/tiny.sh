#!/bin/bash
# Builds the small image of the tests: tiny.sh DIR makes a tree of OCI layouts that a registry
# over DIR serves as
#
#   library/redis   docker's media types, a list of linux/amd64 and linux/arm64: latest, 7
#   tiny            OCI's media types: latest (an index), amd64 and arm64 (manifests),
#                   zstd, plain (amd64's layers in that compression), numeric (user 999:999)
#   redis           OCI's media types, amd64 alone: latest, old
#
# Needs Go, jq, GNU tar, and distkit's commands on PATH. The same sources give the same bytes.
# shellcheck disable=SC2154 # what lib.sh sets
set -euo pipefail

dir=$(realpath -m "${1:?usage: tiny.sh DIR}")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
umask 022
declare -A layer_type config_type # lib.sh sets them
# shellcheck disable=SC1091
. "$here/lib.sh"

export CGO_ENABLED=0
go -C "$here" build -o "$work/compress" ./compress
for arch in amd64 arm64; do
	GOOS=linux GOARCH=$arch go -C "$here" build -trimpath -buildvcs=false -ldflags='-s -w -buildid=' -o "$work/tiny-$arch" ./tiny
done

# Three layers. base holds what the others remove or hide.
base=$work/base lib=$work/lib
mkdir -p "$base"/{bin,data,etc/tiny/conf.d,proc,root,run,sys,tmp,dev,usr/bin,usr/lib,usr/share/doc/old,var/cache/tiny}
chmod 1777 "$base/tmp"
chmod 0700 "$base/root"
chmod 0750 "$base/data"
cat > "$base/etc/passwd" <<-'END'
	root:x:0:0:root:/root:/bin/false
	nobody:x:65534:65534:nobody:/nonexistent:/bin/false
	redis:x:999:999:redis:/data:/bin/false
END
cat > "$base/etc/group" <<-'END'
	root:x:0:
	tty:x:5:
	staff:x:50:redis
	nogroup:x:65534:
	redis:x:999:
END
echo 'removed by the app layer' > "$base/usr/share/doc/old/README"
echo 'hidden by the app layer' > "$base/etc/tiny/conf.d/hidden"
echo 'replaced by the lib layer' > "$base/etc/tiny/release"
echo 'stays' > "$base/var/cache/tiny/kept"

mkdir -p "$lib"/{etc/tiny,usr/lib/tiny}
echo '1' > "$lib/etc/tiny/release"
head -c 65536 /dev/zero > "$lib/usr/lib/tiny/zeros"
ln "$lib/usr/lib/tiny/zeros" "$lib/usr/lib/tiny/zeros.1"
ln -s zeros "$lib/usr/lib/tiny/zeros.so"
chmod 0640 "$lib/usr/lib/tiny/zeros"

for arch in amd64 arm64; do
	app=$work/app-$arch
	mkdir -p "$app"/{etc/tiny/conf.d,usr/bin,usr/share/doc}
	install -m 0755 "$work/tiny-$arch" "$app/usr/bin/tiny"
	ln -s tiny "$app/usr/bin/redis-server"
	ln -s tiny "$app/usr/bin/redis-cli"
	: > "$app/usr/share/doc/.wh.old"
	: > "$app/etc/tiny/conf.d/.wh..wh..opq"
	echo 'shown' > "$app/etc/tiny/conf.d/shown"
done

for part in base lib app-amd64 app-arm64; do
	everything "$work/$part" | layer "$work/$part" > "$work/$part.tar"
	diffid < "$work/$part.tar" > "$work/$part.diffid"
	"$work/compress" gzip < "$work/$part.tar" > "$work/$part.gzip"
	"$work/compress" zstd < "$work/$part.tar" > "$work/$part.zstd"
done

# image FAMILY ARCH COMPRESSION [USER]: prints the manifest's descriptor.
image() {
	local family=$1 arch=$2 compression=$3 user=${4:-redis} part config layers=()
	local type=${layer_type[$family]} suffix=+$compression file=$compression
	[ "$family" = docker ] && suffix=.$compression
	[ "$compression" = plain ] && suffix='' file=tar
	for part in base lib "app-$arch"; do
		layers+=("$(add "$type$suffix" < "$work/$part.$file")")
	done
	config=$(jq -nc --arg arch "$arch" --arg user "$user" \
		--arg base "$(< "$work/base.diffid")" --arg lib "$(< "$work/lib.diffid")" --arg app "$(< "$work/app-$arch.diffid")" '{
		created: "2023-11-14T22:13:20Z", architecture: $arch, os: "linux",
		config: {
			User: $user, ExposedPorts: {"6379/tcp": {}}, WorkingDir: "/data",
			Env: ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "REDIS_VERSION=7.0.0"],
			Entrypoint: ["tiny"], Cmd: ["redis-server"], Volumes: {"/data": {}}, Labels: {"org.example.size": "tiny"}
		},
		rootfs: {type: "layers", diff_ids: [$base, $lib, $app]},
		history: [{created_by: "base"}, {created_by: "ENV REDIS_VERSION=7.0.0", empty_layer: true}, {created_by: "lib"}, {created_by: "app"}]
	}' | add "${config_type[$family]}")
	manifest "$family" "$config" "${layers[@]}"
}

into "$dir/library/redis"
list=$(index docker amd64 "$(image docker amd64 gzip)" arm64 "$(image docker arm64 gzip)")
name latest <<< "$list"
name 7 <<< "$list"

into "$dir/tiny"
amd64=$(image oci amd64 gzip)
arm64=$(image oci arm64 gzip)
index oci amd64 "$amd64" arm64 "$arm64" | name latest
name amd64 <<< "$amd64"
name arm64 <<< "$arm64"
image oci amd64 zstd | name zstd
image oci amd64 plain | name plain
image oci amd64 gzip 999:999 | name numeric

into "$dir/redis"
amd64=$(image oci amd64 gzip)
name latest <<< "$amd64"
name old <<< "$amd64"
