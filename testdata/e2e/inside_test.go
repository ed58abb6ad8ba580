//go:build e2e

package e2e

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"distkit/testdata/fixture"
)

const large = "docker.io/library/large:latest"

// putLarge puts an image of more than 245 MB to the registry: that of Debian's packages, and a layer with a small file between
// large ones that don't compress, what package managers keep, a set-user-ID program and a whiteout.
const putLarge = `
root=docker.io/library/redis to=docker.io/library/large
dist-fetch "$root" single >single
jq -r '(.config, .layers[]).digest' single >all
while read -r d; do dist-fetch "$root" "$d" >blob && dist-put "$to" "$d" <blob >/dev/null; done <all
mkdir -p files/{opt,data,etc,var/lib/dpkg,usr/lib/apk/db,usr/bin}
for i in {100..200}; do head -c 2100000 /dev/urandom >"files/opt/$i"; done
echo 'a small file' >files/opt/150-small
echo 'a needle' >files/etc/needle
echo '#!/bin/sh' >files/usr/bin/set-id && chmod 4755 files/usr/bin/set-id
printf 'Package: %s\nStatus: install ok installed\n\n' libc6 dash >files/var/lib/dpkg/status
printf 'C:Q1\nP:%s\nV:1\n\n' musl busybox >files/usr/lib/apk/db/installed
touch files/data/.wh.README
tar --sort=name --owner=0 --group=0 --numeric-owner -C files -cf layer.tar .
igzip -1 -c layer.tar >layer.tgz
digest() { echo "sha256:$(sha256sum <"$1" | cut -d' ' -f1)"; }
dist-put "$to" "$(digest layer.tgz)" <layer.tgz >/dev/null
dist-fetch "$root" "$(jq -r .config.digest single)" | jq -c --arg d "$(digest layer.tar)" '.rootfs.diff_ids += [$d]' >config
dist-put "$to" "$(digest config)" <config >/dev/null
jq -c --arg c "$(digest config)" --argjson n "$(stat -c %s config)" --arg l "$(digest layer.tgz)" --argjson s "$(stat -c %s layer.tgz)" \
	'.config.digest = $c | .config.size = $n | .layers += [.layers[0] | .digest = $l | .size = $s]' single |
	dist-put "$to" latest mediatype:application/vnd.oci.image.manifest.v1+json >/dev/null
jq '[.layers[].size] | add' single; stat -c %s layer.tgz
rm -r layer.tar layer.tgz blob`

// moved returns how many requests a script made, and how many bytes the answers had. It checks what the script printed.
func (p *place) moved(want, script string, args ...string) (requests int, bytes int64) {
	p.t.Helper()
	p.Reset()
	if got := p.sh(script, args...); got != want {
		p.t.Errorf("%s %q: got %.200q, not %.200q", script, args, got, want)
	}
	for _, r := range p.Log() {
		requests, bytes = requests+1, bytes+r.Bytes
	}
	p.t.Logf("%s: %d requests, %d bytes", script, requests, bytes)
	return requests, bytes
}

// example returns the lines of a page's example that come after a line.
func (p *place) example(page, after string) string {
	p.t.Helper()
	b, err := os.ReadFile(filepath.Join(fixture.Root, "cmd", page, page+".1.md"))
	if err != nil {
		p.t.Fatal(err)
	}
	_, text, ok := strings.Cut(string(b), "\n"+after+"\n")
	if !ok {
		p.t.Fatalf("%s(1) has no example %q", page, after)
	}
	var lines []string
	for line := range strings.Lines(text) {
		if code, ok := strings.CutPrefix(line, "    "); ok {
			lines = append(lines, code)
		} else if len(lines) > 0 {
			break
		}
	}
	return strings.Join(lines, "")
}

// TestLookInside looks into a large image at Debian's registry, by ranges and whole, and compares with what umoci unpacks.
func TestLookInside(t *testing.T) {
	p := here(t)
	fixture.Need(t, "umoci,igzip,ncdu")
	p.set("XDG_CACHE_HOME="+p.dir+"/mine", "image="+large)
	var sizes [2]int64
	if err := scan(p.sh(putLarge), &sizes[0], &sizes[1]); err != nil {
		t.Fatal(err)
	}
	if sizes[0]+sizes[1] < 245e6 {
		t.Fatalf("an image of %d bytes", sizes[0]+sizes[1])
	}

	// Without an index layers are fetched whole, from the topmost on until the file is found; with one, a file is a few requests for little.
	const few, little = 5, 3 << 20
	file := func(path string) string { return "dist-file --remote " + large + " " + path }
	if _, n := p.moved("a small file", file("opt/150-small")); n > sizes[1]+1<<20 {
		t.Errorf("without an index: %d bytes, and the layer has %d", n, sizes[1])
	}
	if _, n := p.moved("", "dist-ls --remote $image >/dev/null"); n > sizes[0]+1<<20 {
		t.Errorf("the layers without an index: %d bytes, and they have %d", n, sizes[0])
	}
	for path, want := range map[string]string{"opt/150-small": "a small file", "/etc/needle": "a needle"} {
		if requests, n := p.moved(want, file(path)); requests > few || n > little {
			t.Errorf("%s: %d requests, %d bytes", path, requests, n)
		}
	}
	if requests, n := p.moved("", `dist-ls -lR --remote "$image" >listed`); requests > few || n > little {
		t.Errorf("a list by the index: %d requests, %d bytes", requests, n)
	}

	// Recipes of the pages, of the image at the registry.
	remote := func(recipe string) string {
		return strings.NewReplacer("dist-file ", "dist-file --remote ", "dist-ls ", "dist-ls --remote ").Replace(recipe)
	}
	for _, r := range []struct{ page, title, want string }{
		{"dist-file", "The packages of an image of Debian:", "libc6\ndash"},
		{"dist-file", "Of one of Alpine:", "musl\nbusybox"},
		{"dist-file", "The same, with the names of the files:", "etc/etc/needle"},
		{"dist-ls", "Every file with the set-user-ID bit, and the layer that brought it:", "/usr/bin/chfn 2\n/usr/bin/chsh 2\n/usr/bin/gpasswd 2\n/usr/bin/passwd 2\n/usr/bin/set-id 4"},
	} {
		script := remote(p.example(r.page, r.title))
		script = strings.ReplaceAll(script, "grep -rl root", "grep -rl needle")
		requests, n := p.moved(r.want, "{\n"+script+"}")
		if requests > few || n > little {
			t.Errorf("%s: %d requests, %d bytes", r.title, requests, n)
		}
	}
	p.sh(`diff <(dist-file --remote docker.io/library/redis:single etc/passwd) <(dist-file --remote "$image" etc/passwd)`)

	// Another user makes indexes and puts them to the registry: there a third one finds them, and so does another store.
	p.set("XDG_CACHE_HOME=" + p.dir + "/other")
	p.sh(`dist-pull -q "$image" >/dev/null && dist-index -q "$image" >indexes &&
		dist-copy-graph --from-root .content --to-remote docker.io/library/large - <indexes >/dev/null`)
	p.set("XDG_CACHE_HOME=" + p.dir + "/third")
	digest := p.sh("cat indexes")
	// The indexes of the four layers are fetched at the same time, in one round trip. This registry has no API of referrers, so that
	// the tag of the fallback is one round trip more.
	for flag, most := range map[string]int{"--unverified": few + 1, "--index=" + digest: few - 1} {
		if requests, n := p.moved("a small file", file("opt/150-small")+" "+flag); requests-3 > most || n > little {
			t.Errorf("%s: %d requests, %d bytes", flag, requests, n)
		}
	}
	p.sh(`dist-pull --root elsewhere -q --referrers "$image" >/dev/null`)
	subject := p.sh(`dist-image target -q "$image"`)
	if got := p.sh(`dist-referrers ./elsewhere "$0" | grep -c -F "$1"`, subject, digest); got != "1" {
		t.Errorf("the other store has %s referrers with the indexes", got)
	}

	// The list is what umoci unpacks, and so are contents, sums of bytes, and what two images differ in.
	p.sh(`umoci unpack --image ".content:$image" large >/dev/null && dist-pull -q ` + single + ` >/dev/null && umoci unpack --image .content:` + single + ` small >/dev/null`)
	list := `find . -printf '/%P\t%M\t%U:%G\t%s\t%l\n' | awk -F '\t' -v OFS='\t' '$2 ~ /^d/ { $4 = 0 } { print }' | LC_ALL=C sort`
	want := p.sh("cd large/rootfs && " + list)
	for _, from := range []string{"", "--remote ", "--remote --unverified "} {
		got := p.sh("dist-ls -lR " + from + `"$image" | cut -f1-4,6 | LC_ALL=C sort`)
		if got != want {
			t.Errorf("dist-ls %sdiffers from what umoci unpacks:\n%s", from, difference(want, got))
		}
	}
	p.sh(`mkdir copy && dist-file --tar "$image" / | tar -x -C copy && diff -r --no-dereference large/rootfs copy && rm -r copy`)
	sums := p.sh(`cd large/rootfs && find . -type f -printf '%P\t%i\t%s\n' | LC_ALL=C sort |
		awk -F '\t' '!seen[$2]++ { p = "/" $1; while (sub("/[^/]*$", "", p)) { n[p] += $3; if (p == "") break } } END { for (p in n) if (n[p]) print (p == "" ? "/" : p) "\t" n[p] }' | LC_ALL=C sort`)
	if got := p.sh(`dist-du "$image" | cut -f1,2 | awk -F '\t' '$2 > 0' | LC_ALL=C sort`); got != sums {
		t.Errorf("dist-du differs from find:\n%s", difference(sums, got))
	}
	if got, want := p.sh(`dist-du --ncdu "$image" | ncdu -0 -f - -o - | jq 'reduce (.. | objects) as $f ({}; if $f.hlnkc then .links["\($f.ino)"] = $f.asize else .files += ($f.asize // 0) end) | .files + (.links // {} | add)'`), p.sh(`dist-du -a "$image" | awk -F '\t' 'NR > 1 { n = $2 } END { print n }'`); got != want {
		t.Errorf("ncdu counts %s bytes, not %s", got, want)
	}
	for change, which := range map[string]string{"A": "-13", "D": "-23"} {
		names := "(cd %/rootfs && find . -printf '/%P\\n' | LC_ALL=C sort)"
		want := p.sh("LC_ALL=C comm " + which + " <" + strings.Replace(names, "%", "small", 1) + " <" + strings.Replace(names, "%", "large", 1))
		got := p.sh(`dist-image diff --only files `+single+` "$image" | awk -F '\t' -v c="$0" '$3 == c { print $1 }' | LC_ALL=C sort`, change)
		if want == "" || got != want {
			t.Errorf("%s: dist-image diff differs from what umoci unpacks:\n%s", change, difference(want, got))
		}
	}
	want = p.sh(`{ dist-image manifest "$image" | jq -r '.digest' && dist-cat "$0" | jq -r '(.config, .layers[]).digest' && echo "$1" && dist-cat "$1" | jq -r '(.config, .layers[]).digest'; } | sort -u`, subject, digest)
	if got := p.sh(`dist-image tree "$image" | cut -f1 | sort -u`); got != want {
		t.Errorf("dist-image tree:\n%s", difference(want, got))
	}
}

// scan reads numbers, one a line.
func scan(text string, numbers ...*int64) error {
	for _, n := range numbers {
		line, rest, _ := strings.Cut(text, "\n")
		v, err := strconv.ParseInt(line, 10, 64)
		if err != nil {
			return err
		}
		*n, text = v, rest
	}
	return nil
}
