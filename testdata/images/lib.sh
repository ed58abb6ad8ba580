# shellcheck shell=bash disable=SC2034,SC2154
# What the image builders share. A builder has set -euo pipefail, and before it sources this:
#   bin   folder of helper programs (built on demand)     work  scratch, removed by the builder
# It works on a store at a time: `into DIR` makes DIR the store that add, manifest and name use.

into() {
	store=$1
	mkdir -p "$(dirname "$store")"
}

# layer DIR: the paths named on standard input, NUL-ended, as a tar whose bytes depend on names,
# modes and contents alone. All is root's but data/, which is 999's, as the images' passwd says.
layer() {
	local tar=(tar --directory "$1" --file "$work/layer.tar" --format=ustar --no-recursion
		--null --files-from=- --mtime=@1700000000 --numeric-owner)
	LC_ALL=C sort -z > "$work/layer.list"
	grep -zvE '^data(/|$)' "$work/layer.list" | "${tar[@]}" --create --owner=0 --group=0
	if grep -zqE '^data(/|$)' "$work/layer.list"; then
		grep -zE '^data(/|$)' "$work/layer.list" | "${tar[@]}" --append --owner=999 --group=999
	fi
	cat "$work/layer.tar"
	rm "$work/layer.tar"
}

# everything DIR: the paths below DIR, as layer takes them.
everything() { find "$1" -mindepth 1 -printf '%P\0'; }

# add MEDIATYPE: standard input → a blob of the store; prints its descriptor.
add() {
	dist-ingest --root "$store" "build-$BASHPID-$RANDOM" |
		jq -Rc --arg type "$1" 'split("\t") | {mediaType: $type, digest: .[0], size: (.[1] | tonumber)}'
}

# diffid: the digest of standard input.
diffid() { echo "sha256:$(sha256sum | cut -d' ' -f1)"; }

# name TAG: gives the descriptor on standard input that tag in the store.
name() { dist-image --root "$store" create --replace "$1" - > /dev/null; }

# The media types of the two families, by the family's name.
declare -Ag manifest_type=(
	[oci]=application/vnd.oci.image.manifest.v1+json
	[docker]=application/vnd.docker.distribution.manifest.v2+json
) index_type=(
	[oci]=application/vnd.oci.image.index.v1+json
	[docker]=application/vnd.docker.distribution.manifest.list.v2+json
) config_type=(
	[oci]=application/vnd.oci.image.config.v1+json
	[docker]=application/vnd.docker.container.image.v1+json
) layer_type=(
	[oci]=application/vnd.oci.image.layer.v1.tar
	[docker]=application/vnd.docker.image.rootfs.diff.tar
)

# manifest FAMILY CONFIG LAYER…: descriptors → the manifest's descriptor.
manifest() {
	local family=$1 config=$2
	shift 2
	printf '%s\n' "$@" | jq -sc --arg type "${manifest_type[$family]}" --argjson config "$config" \
		'{schemaVersion: 2, mediaType: $type, config: $config, layers: .}' | add "${manifest_type[$family]}"
}

# index FAMILY ARCH DESCRIPTOR [ARCH DESCRIPTOR]…: manifests by architecture → the index's descriptor.
index() {
	local family=$1
	shift
	while [ $# -gt 0 ]; do
		jq -c --arg arch "$1" '. + {platform: {architecture: $arch, os: "linux"}}' <<< "$2"
		shift 2
	done | jq -sc --arg type "${index_type[$family]}" '{schemaVersion: 2, mediaType: $type, manifests: .}' |
		add "${index_type[$family]}"
}
