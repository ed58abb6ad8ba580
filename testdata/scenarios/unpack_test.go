package scenarios

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"distkit/testdata/fixture"
)

// layerTar makes a layer of entries. By default they belong to root, have mode 0644 or 0755, and an old time.
func layerTar(t testing.TB, entries []tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i, h := range entries {
		content := []byte(nil)
		switch {
		case h.Typeflag == 0 && strings.HasSuffix(h.Name, "/"):
			h.Typeflag = tar.TypeDir
		case h.Typeflag == 0:
			h.Typeflag = tar.TypeReg
			content = fmt.Appendf(nil, "%s %d", h.Name, i)
		}
		if h.Mode == 0 {
			h.Mode = map[byte]int64{tar.TypeDir: 0o755}[h.Typeflag] | 0o644
		}
		if h.ModTime.IsZero() {
			h.ModTime = time.Unix(1e9+int64(i), 0)
		}
		h.Size, h.Format = int64(len(content)), tar.FormatPAX
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("%s: %v", h.Name, err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func to(kind byte, name, target string) tar.Header {
	return tar.Header{Typeflag: kind, Name: name, Linkname: target}
}

func xattr(h tar.Header, name, value string) tar.Header {
	h.PAXRecords = map[string]string{"SCHILY.xattr." + name: value}
	return h
}

// edges are images whose layers have another meaning alone than on top of the layers below.
var edges = map[string][][]tar.Header{
	"merged /usr": {
		{{Name: "usr/lib/"}, {Name: "usr/lib/libc.so"}, to(tar.TypeSymlink, "lib", "usr/lib"), {Name: "etc/"}},
		{{Name: "lib/libx.so"}, {Name: "etc/x"}},
		{{Name: "lib/deep/er/liby.so"}, {Name: "usr/lib/libz.so"}},
	},
	"implicit directories": {
		{xattr(tar.Header{Name: "a/", Mode: 0o1777, Uid: 7, Gid: 8}, "user.x", "y"), {Name: "a/b/", Mode: 0o750, Gid: 3}, {Name: "a/b/c/", Mode: 0o700, Uid: 5}, {Name: "./", Mode: 0o711, Uid: 9}},
		{{Name: "a/b/c/new"}, {Name: "a/fresh/new"}},
		{{Name: "a/b/", Mode: 0o777}, {Name: "a/b/c/d/e"}, {Name: "a/fresh/more"}},
		{{Name: "a/b/c/late"}, xattr(tar.Header{Name: "a/b/c/", Mode: 0o711, Uid: 6}, "user.z", "")},
	},
	"hard links": {
		{{Name: "f", Mode: 0o640, Uid: 4}, to(tar.TypeLink, "g", "f"), {Name: "dir/", Mode: 0o700}, {Name: "dir/f"},
			to(tar.TypeSymlink, "s", "nowhere"), {Name: "pipe", Typeflag: tar.TypeFifo}, {Name: "dev", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}},
		{to(tar.TypeLink, "h", "f"), to(tar.TypeLink, "new/i", "h"), to(tar.TypeLink, "dir/j", "dir/f"), to(tar.TypeLink, "t", "s"), to(tar.TypeLink, "q", "pipe"), to(tar.TypeLink, "e", "dev")},
		{to(tar.TypeLink, "k", "new/i"), {Name: ".wh.f"}, to(tar.TypeLink, "l", "h"), to(tar.TypeLink, "m", "h"), {Name: "h"}},
		{to(tar.TypeLink, "away", "dir/j"), {Name: ".wh.dir"}},
	},
	"whiteouts": {
		{{Name: "a/"}, {Name: "a/f"}, {Name: "a/g"}, {Name: "b/"}, {Name: "b/c/"}, {Name: "b/c/f"}, {Name: "gone"}, {Name: ".wh.nothing"}},
		{{Name: ".wh.gone"}, {Name: "a/.wh.f"}, {Name: "a/.wh.never"}, {Name: "new/.wh.x"}, {Name: "new/y"}, {Name: "b/.wh..wh..opq"}, {Name: "b/c/new"}},
		{{Name: "gone/"}, {Name: "gone/f"}, {Name: "a/f"}, {Name: "b/.wh.c"}, {Name: "b/c"}},
		{{Name: "b/c/"}, {Name: "b/c/f"}, {Name: ".wh.gone"}, {Name: "gone"}},
	},
	"all hidden": {
		{{Name: "a/"}, {Name: "a/f"}, {Name: "b"}},
		{{Name: "c"}, {Name: ".wh..wh..opq"}, {Name: "a/g"}},
		{{Name: "a/h"}},
	},
	"kinds": {
		{{Name: "f"}, {Name: "d/"}, {Name: "d/f"}, to(tar.TypeSymlink, "s", "d"), to(tar.TypeSymlink, "abs", "/d")},
		{{Name: "f/"}, {Name: "f/f"}, {Name: "s/new"}, {Name: "abs/x", Uid: 3}},
		{{Name: "d"}, {Name: "f"}, {Name: "s"}, {Name: "abs/"}, {Name: "abs/own"}},
		{{Name: "d/"}, {Name: "d/g"}, {Name: "s/"}, {Name: "s/over"}, {Name: "setuid", Mode: 0o4755, Uid: 2}, xattr(tar.Header{Name: "cap"}, "security.capability", "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")},
	},
}

// meeting is an image with few names, so that its layers concern the same files: directories a, b and c, symbolic links
// d and e that may replace them, and files f, g and h.
func meeting(seed uint64) [][]tar.Header {
	rnd := rand.New(rand.NewPCG(seed, 5))
	one := func(names string) string { return string(names[rnd.IntN(len(names))]) }
	below := func(dirs string) string {
		p := ""
		for range rnd.IntN(4) {
			p += one(dirs) + "/"
		}
		return p
	}
	var files []string
	image := make([][]tar.Header, 3)
	for l := range image {
		for range 4 + rnd.IntN(8) {
			var h tar.Header
			switch k := rnd.IntN(20); {
			case l > 0 && k < 3:
				h.Name = below("abc") + ".wh." + one("abcdefgh")
			case l > 0 && k < 4:
				h.Name = below("abc") + one("abc") + "/.wh..wh..opq"
			case k < 8:
				h = xattr(tar.Header{Name: below("abc") + one("abc") + "/", Mode: 0o700 + rnd.Int64N(64)}, "user.x", fmt.Sprint(k))
			case k < 10:
				h = to(tar.TypeSymlink, below("abc")+one("de"), []string{"a", "/b", "../c", "a/../b", "b/c", "."}[rnd.IntN(6)])
			case k < 13 && len(files) > 0:
				h = to(tar.TypeLink, below("abc")+one("fgh"), files[rnd.IntN(len(files))])
			default:
				h = tar.Header{Name: below("aabbccde") + one("fgh"), Mode: 0o600 + rnd.Int64N(64)}
				files = append(files, h.Name)
			}
			h.Uid = 1 + rnd.IntN(3)
			image[l] = append(image[l], h)
		}
	}
	return image
}

// describeTree returns one line per file below dir, with everything that a layer can state about it. With links, it
// also returns which names belong to one file.
func describeTree(t *testing.T, dir string, links bool) []string {
	t.Helper()
	var lines []string
	first := map[uint64]string{}
	err := filepath.WalkDir(dir, func(name string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(name, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, name)
		when := fmt.Sprint(st.Mtim.Sec, ".", st.Mtim.Nsec)
		if st.Mtim.Sec > 1.5e9 || st.Mtim.Sec == 0 { // a directory without an entry has the time 0 in an EROFS image
			when = "now"
		}
		line := fmt.Sprintf("%s %o %d:%d %s", rel, st.Mode, st.Uid, st.Gid, when)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %q", b)
		case unix.S_IFLNK:
			target, err := os.Readlink(name)
			if err != nil {
				return err
			}
			line += " -> " + target
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" %d", st.Rdev)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR && links {
			if as := first[st.Ino]; as != "" {
				line += " = " + as
			} else {
				first[st.Ino] = rel
			}
		}
		names := make([]byte, 4096)
		n, _ := unix.Llistxattr(name, names)
		all := strings.Split(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00")
		slices.Sort(all)
		for _, x := range all {
			value := make([]byte, 256)
			if n, err := unix.Lgetxattr(name, x, value); err == nil && x != "security.selinux" {
				line += fmt.Sprintf(" %s=%q", x, value[:n])
			}
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

// place is the directory in which the images of a test are unpacked.
type place struct {
	w   *fixture.World
	dir string
}

func (p place) run(driver, script string, args ...string) (string, error) {
	c := exec.Command("bash", append([]string{"-euo", "pipefail", "-c", script}, args...)...)
	c.Dir, c.Env = p.dir, append(slices.Clone(p.w.Vars), "CONTAINERD_SNAPSHOTTER="+driver)
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	err := fixture.Run(c)
	if err != nil {
		err = fmt.Errorf("%w: %s", err, errs.Bytes())
	} else if errs.Len() > 0 {
		err = errors.New(errs.String())
	}
	return strings.TrimSuffix(out.String(), "\n"), err
}

// store stores an image of the layers, and returns its digest.
func (p place) store(t *testing.T, name string, layers [][]tar.Header) {
	t.Helper()
	type descriptor struct {
		MediaType string `json:"mediaType"`
		Digest    string `json:"digest"`
		Size      int    `json:"size"`
	}
	add := func(mediaType string, b []byte) descriptor {
		sum := sha256.Sum256(b)
		d := descriptor{mediaType, fmt.Sprintf("sha256:%x", sum), len(b)}
		file := filepath.Join(p.dir, "blob")
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := p.run("", `dist-ingest --expected-digest "$0" < blob > /dev/null`, d.Digest); err != nil {
			t.Fatal(out, err)
		}
		return d
	}
	encode := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var descriptors []descriptor
	var diffIDs []string
	for _, l := range layers {
		d := add("application/vnd.oci.image.layer.v1.tar", layerTar(t, l))
		descriptors, diffIDs = append(descriptors, d), append(diffIDs, d.Digest)
	}
	config := add("application/vnd.oci.image.config.v1+json", encode(map[string]any{
		"architecture": "amd64", "os": "linux", "rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs},
	}))
	manifest := add("application/vnd.oci.image.manifest.v1+json", encode(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": descriptors,
	}))
	if out, err := p.run("", `dist-image create --replace "$0" "$1" > /dev/null`, name, manifest.Digest); err != nil {
		t.Fatal(out, err)
	}
}

// sequential applies an image's layers one after another, by hand, and leaves a view of the last one.
const sequential = `
dist-image layers "$0" | {
	parent=''
	while IFS=$'\t' read -r digest _ _ diffid _; do
		snap prepare --mount mnt "hand $parent$diffid" ${parent:+"$parent"} > mounts
		dist-apply --expect-diff-id "$diffid" mnt < "$(dist-path -n "$digest")" > applied || { snap rm --umount "hand $parent$diffid"; exit 1; }
		snap umount mnt
		snap commit "by hand $parent$diffid" "hand $parent$diffid"
		parent="by hand $parent$diffid"
	done
	snap view --mount mnt look "$parent" > mounts
}`

// TestParallelEqualsSequential checks that dist-unpack, which applies all layers at the same time, makes the same files
// as applying one layer after another.
func TestParallelEqualsSequential(t *testing.T) {
	for _, need := range []string{"root", "overlay"} {
		if !fixture.Has(need) {
			t.Skipf("needs %s", need)
		}
	}
	images := map[string][][]tar.Header{}
	for name, layers := range edges {
		images[name] = layers
	}
	for seed := range uint64(30) {
		images[fmt.Sprintf("meeting %d", seed)] = meeting(seed)
	}
	w, dir := surroundings(t)
	places := map[string]place{"overlayfs": {w, dir}, "native": {w, dir}, "erofs": {w, dir}}
	if fixture.Has("mkfs.btrfs") {
		places["btrfs"] = place{w, onBtrfs(t, dir)}
	}
	refused := 0
	for name, layers := range images {
		t.Run(name, func(t *testing.T) {
			var likeNative, linkedNative []string
			for _, driver := range []string{"native", "overlayfs", "erofs", "btrfs"} {
				p, ok := places[driver]
				if !ok || (driver == "native" || driver == "btrfs") && edges[name] == nil { // these apply layers one after another anyway
					continue
				}
				ref := "example.org/" + strings.ReplaceAll(strings.Trim(name, "/"), " ", "-")
				ref = strings.ReplaceAll(ref, "/", "-")
				p.store(t, ref, layers)
				if err := os.MkdirAll(filepath.Join(p.dir, "mnt"), 0o755); err != nil {
					t.Fatal(err)
				}
				_, seqErr := p.run(driver, sequential, ref)
				var want, wantLoose []string
				if seqErr == nil {
					want, wantLoose = describeTree(t, filepath.Join(p.dir, "mnt"), true), describeTree(t, filepath.Join(p.dir, "mnt"), false)
					if out, err := p.run(driver, "snap rm --umount look"); err != nil {
						t.Fatal(out, err)
					}
				}
				_, err := p.run(driver, `chain=$(dist-unpack "$0"); snap view --mount mnt look "$chain" > mounts`, ref)
				if (err == nil) != (seqErr == nil) {
					t.Fatalf("%s: in parallel: %v; one by one: %v", driver, err, seqErr)
				}
				if err != nil {
					if left, _ := p.run(driver, "snap ls kind==active"); left != "" {
						t.Errorf("%s: left: %s", driver, left)
					}
					t.Logf("%s refuses it: %v", driver, err)
					refused++
					return
				}
				if driver == "erofs" { // layers that are merged at once keep their hard links to files of lower layers, which copying up breaks
					if want = linkedNative; want == nil {
						want = wantLoose
					}
				}
				got := describeTree(t, filepath.Join(p.dir, "mnt"), driver != "erofs" || linkedNative != nil)
				if out, err := p.run(driver, "snap rm --umount look; test -z \"$(snap ls kind==active kind==view)\""); err != nil {
					t.Error(out, err)
				}
				compare(t, driver+" in parallel", got, want)
				if likeNative == nil {
					likeNative = wantLoose
				}
				if driver == "native" {
					linkedNative = want
				}
				compare(t, driver+" and native", wantLoose, likeNative)
			}
		})
	}
	if refused > 20 {
		t.Errorf("%d images were refused: too many to mean anything", refused)
	}
}

// onBtrfs returns a directory on a new btrfs file system, which is in a file below dir.
func onBtrfs(t *testing.T, dir string) string {
	t.Helper()
	mnt := filepath.Join(dir, "btrfs")
	c := exec.Command("sh", "-euc", `truncate -s 512M "$0.image"; mkfs.btrfs -q "$0.image"; mkdir "$0"; mount -o loop "$0.image" "$0"`, mnt)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", mnt).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	return mnt
}

func compare(t *testing.T, what string, got, want []string) {
	t.Helper()
	for _, l := range want {
		if !slices.Contains(got, l) {
			t.Errorf("%s: lacks %s", what, l)
		}
	}
	for _, l := range got {
		if !slices.Contains(want, l) {
			t.Errorf("%s: has %s", what, l)
		}
	}
}
