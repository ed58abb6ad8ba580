//go:build e2e

package e2e

import (
	"os/exec"
	"testing"

	"distkit/testdata/fixture"
)

// TestPackage makes the Debian package twice, which gives the same bytes, and installs, upgrades and removes it: on a system where nothing has the
// name snap, and on one where another program has it.
func TestPackage(t *testing.T) {
	fixture.Need(t, "root,jq,busybox,dpkg-deb")
	p := before(t, nil)
	p.before = "true" // what is mounted is in a namespace of its own
	// This compiles a lot, with Go's cache.
	make := exec.Command("bash", "-euc", `make -C "$0" -s all; for out in first second; do "$0/scripts/package" $out deb; done`, fixture.Root)
	make.Dir = p.dir
	if out, err := make.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	p.sh(`
cmp first/*.deb second/*.deb

bare() { # DIR
	mkdir -p "$1"/bin "$1"/proc "$1"/usr/bin "$1"/var/lib/dpkg
	mount --bind /proc "$1/proc"
	touch "$1"/var/lib/dpkg/status
	cp "$(command -v busybox)" "$1"/bin/busybox
	ln -s busybox "$1"/bin/sh
	for applet in readlink ln rm; do ln -s ../../bin/busybox "$1/usr/bin/$applet"; done
}
packages() { dpkg --root="$1" --force-depends "${@:2}" 2>&1; } # DIR [ARG…]
ours() { find "$1/usr" ! -type d ! -lname '*/busybox' ! -path '*/usr/bin/other'; } # DIR

bare new
packages new -i first/*.deb >/dev/null
for command in "distkit pull" dist-path snap task run "distkit snap" "distkit run-bundle"; do
	[[ $command == *pull ]] || chroot new $command --version
done
test -L new/usr/bin/snap -a -f new/usr/share/man/man5/distkit-layout.5 -a -f new/usr/share/bash-completion/completions/snap
jq -e '.packages | length > 20' new/usr/share/doc/distkit/sbom.spdx.json >/dev/null
test -f new/usr/share/doc/distkit/licenses/github.com/spf13/cobra/LICENSE.txt
packages new -i second/*.deb >/dev/null
chroot new snap --version
packages new -r distkit >/dev/null
[[ -z $(ours new) ]] || { ours new; exit 1; }

bare taken
printf '#!/bin/sh\necho theirs\n' >taken/usr/bin/snap
chmod 755 taken/usr/bin/snap
packages taken -i first/*.deb | grep '^distkit: /usr/bin/snap is another program'
chroot taken distkit snap --version | grep '^snap version'
chroot taken task --version
packages taken -r distkit >/dev/null
[[ $(ours taken) == taken/usr/bin/snap && $(chroot taken snap) == theirs ]]

# Without a package, to a directory with a space in its name.
to=$PWD/'a prefix'
install -D "$1/bin/snap" "$to/bin/snap" # as versions without libexec had it
PATH=/usr/bin:/bin make -C "$1" -s install PREFIX="$to"
test -L "$to/bin/snap"
"$to/bin/snap" --version
"$to/bin/dist-pull" --version
"$to/bin/distkit" unpack --version
make -C "$1" -s uninstall PREFIX="$to"
[[ -z $(find "$to" ! -type d) ]]
`, "package", fixture.Root)
}
