#!/usr/bin/env bash
# Layers of real Debian packages: debian.sh DIR SET… makes DIR/SET.tar.gz of each SET:
#
#   usr     a /usr tree: coreutils, redis, Python, git and all that they need (hard links, setuid, links)
#   npm     node modules: npm, webpack, eslint and their like, with all that they need
#   small   npm and the sources of Go, of Rust's library and of Linux's headers: some 85,000 small files
#   large   Chromium, LLVM and Clang's library: some 470 MB in a few files
#   tiny    a few packages with something of everything
#
# Packages are downloaded once and kept in $CACHE (default: distkit/layers in the user's cache).
# Needs root's apt-get, dpkg-deb, Go and GNU tar. The same packages give the same layer.
set -euo pipefail

dir=$(realpath -m -- "${1:?usage: debian.sh DIR SET…}")
shift
cache=$(realpath -m -- "${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/distkit/layers}")
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d -- "${TMPDIR:-/tmp}/layers.XXXXXX")
trap 'chmod -R u+w -- "$work"; rm -rf -- "$work"' EXIT
umask 022
mkdir -p -- "$dir" "$cache"

# closure PACKAGE…: the files of the packages, and of all that they need on an empty system.
closure() {
	: >"$work/status"
	mkdir -p "$work/archives/partial" # what the machine's own cache has would not be listed
	apt-get install --print-uris -qq -y --no-install-recommends \
		-o Dir::State::status="$work/status" -o Dir::Cache::archives="$work/archives" "$@" |
		awk '{print $2}'
}

# alone REGEX…: the file of the newest package of each name, without what it needs.
alone() {
	local regex name
	for regex; do
		name=$(apt-cache pkgnames | grep -xE -- "$regex" | sort -V | tail -n 1)
		apt-get download --print-uris -qq "$name" | awk '{print $2}'
	done
}

list() {
	case $1 in
	usr) closure base-files base-passwd coreutils dash redis-server python3 git sudo iputils-ping ;;
	npm) closure npm webpack eslint gulp mocha node-typescript ;;
	small)
		list npm
		alone 'golang-1\.[0-9]+-src' rust-src 'linux-headers-.*[0-9]-common'
		;;
	large) alone chromium 'libllvm[0-9]+' 'libclang-cpp[0-9]+' ;;
	tiny) alone base-files sudo libc-bin dash gzip perl-base iputils-ping zlib1g tzdata ;;
	*) echo "debian.sh: no set $1" >&2 && return 2 ;;
	esac
}

# download SET: the packages' files into the cache, their names into its list.
download() {
	list "$1" | LC_ALL=C sort >"$work/list"
	(
		cd -- "$cache"
		# FILE_VERSION_ARCH.deb → FILE=VERSION; apt escapes the epoch's colon in file names.
		while read -r file; do
			[[ -s $file ]] || sed -E 's/^([^_]+)_([^_]+)_.*/\1=\2/; s/%3a/:/' <<<"$file"
		done <"$work/list" | xargs -r apt-get -o APT::Sandbox::User=root download -qq
	)
	mv -- "$work/list" "$cache/$1.list"
}

exec 9>"$cache/lock"
flock 9
for set; do
	if ! [[ -s $cache/$set.list ]]; then
		download "$set" 1>&2 || { apt-get update -qq 1>&2 && download "$set" 1>&2; }
	fi
	root=$work/$set
	mkdir -p -- "$root"/usr/{bin,sbin,lib,lib64}
	ln -s usr/bin usr/sbin usr/lib usr/lib64 "$root/"
	while read -r deb; do
		dpkg-deb --fsys-tarfile "$cache/$deb" |
			tar --extract --directory "$root" --same-owner --preserve-permissions --keep-directory-symlink
	done <"$cache/$set.list"
	[[ -x $work/compress ]] || CGO_ENABLED=0 go -C "$here/../images" build -o "$work/compress" ./compress
	tar --directory "$root" --create --format=posix --pax-option=delete=atime,delete=ctime,exthdr.name=%d/PaxHeaders/%f \
		--sort=name --numeric-owner --xattrs --xattrs-include='*' . | "$work/compress" gzip >"$dir/$set.new"
	mv -- "$dir/$set.new" "$dir/$set.tar.gz"
	rm -rf -- "$root"
done
