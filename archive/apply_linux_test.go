package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"distkit/layer"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		if strings.Contains(os.Getenv("TEST_REQUIRE"), "root") {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
}

func TestWhiteouts(t *testing.T) {
	base := []entry{
		fileEntry("a/one", "1"), fileEntry("a/two", "2"), fileEntry("a/b/three", "3"), fileEntry("a/b/c/four", "4"),
		fileEntry("d/five", "5"), symlink("l", "a/b"), fileEntry("f", "6"),
	}
	all := []string{"a", "a/b", "a/b/c", "a/b/c/four", "a/b/three", "a/one", "a/two", "d", "d/five", "f", "l"}
	without := func(gone ...string) []string {
		return slices.DeleteFunc(slices.Clone(all), func(p string) bool {
			return slices.ContainsFunc(gone, func(g string) bool { return p == g || strings.HasPrefix(p, g+"/") })
		})
	}
	and := func(list []string, more ...string) []string {
		list = append(list, more...)
		slices.Sort(list)
		return list
	}
	for _, test := range []struct {
		name  string
		layer []entry
		left  []string
	}{
		{"File", []entry{fileEntry("a/.wh.one", "")}, without("a/one")},
		{"Directory", []entry{fileEntry(".wh.a", "")}, without("a")},
		{"Missing", []entry{fileEntry("a/.wh.nothing", "")}, all},
		{"MissingParent", []entry{fileEntry("n/.wh.nothing", "")}, and(without(), "n")},
		{"Symlink", []entry{fileEntry(".wh.l", "")}, without("l")},
		{"ThroughSymlink", []entry{fileEntry("l/.wh.c", "")}, without("a/b/c")},
		{"WithBody", []entry{fileEntry("a/.wh.one", "what is this")}, without("a/one")},
		{"AsDirectory", []entry{dirEntry("a/.wh.b/", 0o755)}, without("a/b")},
		{"ThenFile", []entry{fileEntry(".wh.a", ""), fileEntry("a", "new")}, and(without("a"), "a")},
		{"ThenDirectory", []entry{fileEntry(".wh.a", ""), dirEntry("a", 0o755), fileEntry("a/new", "")}, and(without("a"), "a", "a/new")},
		{"ThenImplicitDirectory", []entry{fileEntry(".wh.a", ""), fileEntry("a/b/new", "")}, and(without("a"), "a", "a/b", "a/b/new")},
		{"OfOwnFile", []entry{fileEntry("a/one", "new"), fileEntry("a/.wh.one", "")}, all},
		{"OfOwnDirectory", []entry{dirEntry("n", 0o755), fileEntry("n/x", ""), fileEntry(".wh.n", "")}, and(without(), "n", "n/x")},
		{"AfterAddingBelow", []entry{fileEntry("a/b/new", ""), fileEntry(".wh.a", "")}, and(without("a"), "a", "a/b", "a/b/new")},
		{"Opaque", []entry{fileEntry("a/.wh..wh..opq", "")}, and(without("a"), "a")},
		{"OpaqueFirst", []entry{fileEntry("a/.wh..wh..opq", ""), fileEntry("a/b/new", "")}, and(without("a"), "a", "a/b", "a/b/new")},
		{"OpaqueLast", []entry{fileEntry("a/b/new", ""), fileEntry("a/.wh..wh..opq", "")}, and(without("a"), "a", "a/b", "a/b/new")},
		{"OpaqueBetween", []entry{fileEntry("a/n1", ""), fileEntry("a/.wh..wh..opq", ""), fileEntry("a/n2", "")}, and(without("a"), "a", "a/n1", "a/n2")},
		{"OpaqueKeepsNamedDirectory", []entry{dirEntry("a/b", 0o700), fileEntry("a/.wh..wh..opq", "")}, and(without("a"), "a", "a/b")},
		{"OpaqueKeepsRewritten", []entry{fileEntry("a/one", "new"), hardlink("a/b/three", "a/one"), fileEntry("a/.wh..wh..opq", "")},
			and(without("a"), "a", "a/b", "a/b/three", "a/one")},
		{"OpaqueKeepsOwnLinkToLower", []entry{hardlink("a/link", "f"), fileEntry("a/.wh..wh..opq", "")}, and(without("a"), "a", "a/link")},
		{"OpaqueTwice", []entry{fileEntry("a/.wh..wh..opq", ""), fileEntry("a/new", ""), fileEntry("a/.wh..wh..opq", "")}, and(without("a"), "a", "a/new")},
		{"OpaqueNested", []entry{fileEntry("a/b/.wh..wh..opq", ""), fileEntry("a/.wh..wh..opq", "")}, and(without("a"), "a", "a/b")},
		{"OpaqueRoot", []entry{fileEntry("a/new", ""), fileEntry(".wh..wh..opq", "")}, []string{"a", "a/new"}},
		{"ReplacedDirectory", []entry{fileEntry("a", "file"), dirEntry("a", 0o755), fileEntry("a/new", "")}, and(without("a"), "a", "a/new")},
		{"AufsMetadata", []entry{dirEntry(".wh..wh.plnk", 0o755), fileEntry(".wh..wh.plnk/1.2", ""), fileEntry(".wh..wh.aufs", "")}, all},
	} {
		t.Run(test.name, func(t *testing.T) {
			root := t.TempDir()
			mustApply(t, root, layerOf(t, base...), Options{})
			mustApply(t, root, layerOf(t, test.layer...), Options{})
			equal(t, names(t, root), test.left)
		})
	}
}

// mountOverlay mounts upper over lower, or skips the test.
func mountOverlay(t *testing.T, dir, lower, upper string) string {
	t.Helper()
	work, merged := filepath.Join(dir, "work"), filepath.Join(dir, "merged")
	for _, d := range []string{work, merged} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,index=off,metacopy=off,redirect_dir=off", lower, upper, work)
	if err := unix.Mount("overlay", merged, "overlay", 0, opts); err != nil {
		if strings.Contains(os.Getenv("TEST_REQUIRE"), "overlay") {
			t.Fatalf("mount overlay: %v", err)
		}
		t.Skipf("mount overlay: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(merged, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return merged
}

// A layer in overlay form, mounted over its lower directory, is the same tree as the layer applied to the lower
// directory itself.
func TestOverlayEqualsRemove(t *testing.T) {
	needRoot(t)
	for seed := range uint64(150) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rnd := mrand.New(mrand.NewPCG(seed, 1))
			base, upper := layerOf(t, randomEntries(rnd, 12, false)...), layerOf(t, randomEntries(rnd, 10, true)...)
			dir := t.TempDir()
			for _, d := range []string{"lower", "upper", "plain"} {
				if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			in := func(d string) string { return filepath.Join(dir, d) }
			if _, err := apply(t, in("lower"), base, Options{}); err != nil {
				return
			}
			mustApply(t, in("plain"), base, Options{})
			if _, err := apply(t, in("plain"), upper, Options{}); err != nil {
				return // a file as a parent: the upper directory alone does not show it
			}
			if _, err := apply(t, in("upper"), upper, Options{Whiteouts: Overlay}); errdefs.IsNotImplemented(err) {
				return
			} else if err != nil {
				t.Fatal(err)
			}
			merged := mountOverlay(t, dir, in("lower"), in("upper"))
			// overlayfs lists a whiteout in a directory that no lower layer has, if it hides nothing, but can't open
			// it.
			ghost := func(name string) bool {
				info, err := os.Lstat(filepath.Join(in("lower"), filepath.Dir(name)))
				return err != nil || !info.IsDir()
			}
			equal(t, content(t, merged, ghost), content(t, in("plain"), nil))
		})
	}
}

// content returns the names and types of files and their contents.
func content(t *testing.T, dir string, ghost func(string) bool) []string {
	var list []string
	for _, n := range names(t, dir) {
		info, err := os.Lstat(filepath.Join(dir, n))
		if errors.Is(err, os.ErrNotExist) && ghost != nil && ghost(n) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		line := n + " " + info.Mode().Type().String()
		if info.Mode().IsRegular() {
			b, err := os.ReadFile(filepath.Join(dir, n))
			if err != nil {
				t.Fatal(err)
			}
			line += " " + string(b)
		}
		list = append(list, line)
	}
	return list
}

// randomEntries makes a layer with few names, so that entries concern the same files.
func randomEntries(rnd *mrand.Rand, n int, whiteouts bool) []entry {
	var list []entry
	pick := func() string { return string("abc"[rnd.IntN(3)]) }
	for i := range n {
		var path []string
		for range 1 + rnd.IntN(3) {
			path = append(path, pick())
		}
		name := strings.Join(path, "/")
		switch k := rnd.IntN(10); {
		case whiteouts && k < 2:
			path[len(path)-1] = ".wh." + path[len(path)-1]
			list = append(list, fileEntry(strings.Join(path, "/"), ""))
		case whiteouts && k < 4:
			list = append(list, fileEntry(name+"/.wh..wh..opq", ""))
		case k < 6:
			list = append(list, dirEntry(name, 0o755))
		case k < 7:
			list = append(list, entry{Header: tar.Header{Typeflag: tar.TypeFifo, Name: name, Mode: 0o644}})
		default:
			list = append(list, fileEntry(name, fmt.Sprint(i, whiteouts)))
		}
	}
	return list
}

func TestOverlayForm(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	r := mustApply(t, root, layerOf(t,
		dirEntry("d", 0o755), fileEntry("d/.wh.gone", ""), fileEntry("o/.wh..wh..opq", ""), fileEntry("o/new", ""),
		fileEntry(".wh.a", ""), fileEntry("a/b", ""), fileEntry("s/x", ""), fileEntry(".wh.s", ""),
		entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: "x", Mode: 0o755, PAXRecords: map[string]string{
			"SCHILY.xattr.trusted.overlay.redirect": "/etc", "SCHILY.xattr.user.kept": "1"}}},
	), Options{Whiteouts: Overlay})
	if r.Whiteouts != 4 || r.Entries != 9 {
		t.Errorf("%d whiteouts of %d entries, not 4 of 9", r.Whiteouts, r.Entries)
	}
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(root, "d/gone"), &st); err != nil || !isWhiteout(&st) {
		t.Errorf("d/gone: %v, mode %o", err, st.Mode)
	}
	for p, want := range map[string]string{
		"o": ` trusted.overlay.opaque="y"`, "a": ` trusted.overlay.opaque="y"`, "s": ` trusted.overlay.opaque="y"`, "d": "",
		"x": ` trusted.overlay.overlay.redirect="/etc" user.kept="1"`,
	} {
		if got := xattrDump(filepath.Join(root, p)); got != want {
			t.Errorf("%s has attributes %q, not %q", p, got, want)
		}
	}
	if _, err := apply(t, t.TempDir(), layerOf(t, fileEntry(".wh..wh..opq", "")), Options{Whiteouts: Overlay}); !errdefs.IsNotImplemented(err) {
		t.Errorf("an opaque root is %v", err)
	}
}

func attributeLayer(t testing.TB) []byte {
	set := func(e entry, f func(*tar.Header)) entry { f(&e.Header); return e }
	return layerOf(t,
		set(dirEntry("./", 0o711), func(h *tar.Header) { h.Uid, h.Gid = 7, 8 }),
		set(dirEntry("d", 0), func(h *tar.Header) { h.Uid, h.Gid = 1, 2 }),
		set(fileEntry("d/locked", "x"), func(h *tar.Header) { h.Mode = 0 }),
		set(fileEntry("setuid", "x"), func(h *tar.Header) { h.Mode, h.Uid, h.Gid = 0o6755, 1000, 4294967294 }),
		set(fileEntry("open", "x"), func(h *tar.Header) { h.Mode = 0o666 }),
		set(dirEntry("sticky", 0o3777), func(h *tar.Header) { h.Uid, h.Gid = 5, 6 }),
		fileEntry("sticky/inherits", "x"), dirEntry("sticky/sub", 0o755),
		set(fileEntry("old", "x"), func(h *tar.Header) { h.ModTime = time.Unix(-86400, 0) }),
		set(symlink("link", "no/where"), func(h *tar.Header) { h.ModTime, h.Uid, h.Gid = then.Add(time.Hour), 9, 9 }),
		set(fileEntry("capable", "x"), func(h *tar.Header) {
			h.Mode, h.Uid, h.Gid = 0o755, 11, 11
			h.PAXRecords = map[string]string{
				"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
				"SCHILY.xattr.user.one":            "1",
				"LIBARCHIVE.xattr.user.t%77o":      "MgA",
			}
		}),
		set(dirEntry("marked", 0o755), func(h *tar.Header) { h.PAXRecords = map[string]string{"SCHILY.xattr.user.dir": "yes"} }),
		entry{Header: tar.Header{Typeflag: tar.TypeChar, Name: "null", Mode: 0o666, Devmajor: 1, Devminor: 3}},
		entry{Header: tar.Header{Typeflag: tar.TypeBlock, Name: "blk", Mode: 0o660, Gid: 6, Uid: 1, Devmajor: 259, Devminor: 70000}},
		entry{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "fifo", Mode: 0o622}},
		hardlink("again", "capable"), hardlink("linkagain", "link"),
		fileEntry(strings.Repeat("long/", 60)+strings.Repeat("n", 200), "deep"),
	)
}

func TestAttributes(t *testing.T) {
	needRoot(t)
	data := attributeLayer(t)
	for _, mask := range []int{0o022, 0o077} {
		t.Run(fmt.Sprintf("umask=%03o", mask), func(t *testing.T) {
			defer unix.Umask(unix.Umask(mask))
			root := t.TempDir()
			r := mustApply(t, root, data, Options{Strict: true})
			if len(r.Unset) > 0 {
				t.Errorf("unset: %v", r.Unset)
			}
			lines := dump(t, root)
			now := regexpTimes(lines, "long")
			equal(t, now, []string{
				". 40711 7:8 T",
				`again 100755 11:11 T 1 H = again security.capability="\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" user.one="1" user.two="2\x00"`,
				"blk 60660 1:6 T " + fmt.Sprint(unix.Mkdev(259, 70000)),
				`capable 100755 11:11 T 1 H = again security.capability="\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" user.one="1" user.two="2\x00"`,
				"d 40000 1:2 T",
				"d/locked 100000 0:0 T 1 H",
				"fifo 10622 0:0 T",
				"link 120777 9:9 1486098306.000000789 -> no/where",
				"linkagain 120777 9:9 1486098306.000000789 -> no/where = link",
				`marked 40755 0:0 T user.dir="yes"`,
				"null 20666 0:0 T " + fmt.Sprint(unix.Mkdev(1, 3)),
				"old 100644 0:0 -86400.000000000 1 H",
				"open 100666 0:0 T 1 H",
				"setuid 106755 1000:4294967294 T 1 H",
				"sticky 43777 5:6 T",
				"sticky/inherits 100644 0:0 T 1 H",
				"sticky/sub 40755 0:0 T",
			})
		})
	}
}

// regexpTimes shortens the parts that are the same everywhere, and drops lines that begin with skip.
func regexpTimes(lines []string, skip string) []string {
	var out []string
	hash := fmt.Sprintf("%x", digestOf("x"))
	for _, l := range lines {
		if strings.HasPrefix(l, skip) {
			continue
		}
		l = strings.Replace(l, fmt.Sprintf("%d.%09d", then.Unix(), then.Nanosecond()), "T", 1)
		l = strings.Replace(l, hash, "H", 1)
		l = strings.Replace(l, "= capable", "= again", 1)
		if strings.HasPrefix(l, "again ") {
			l = strings.Replace(l, " H", " H = again", 1)
		}
		out = append(out, l)
	}
	return out
}

func digestOf(s string) []byte {
	h := digest.SHA256.Hash()
	h.Write([]byte(s))
	return h.Sum(nil)
}

// A directory of a lower layer keeps its times unless the layer names it. If the layer has an entry for it, it takes
// all attributes of the entry.
func TestLowerDirectories(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	lower := dirEntry("d", 0o2700)
	lower.PAXRecords = map[string]string{"SCHILY.xattr.user.lower": "1"}
	mustApply(t, root, layerOf(t, lower, dirEntry("d/e", 0o755)), Options{})
	mustApply(t, root, layerOf(t, fileEntry("d/e/new", ""), fileEntry("d/.wh.x", "")), Options{})
	equal(t, slices.DeleteFunc(regexpTimes(dump(t, root), "."), func(l string) bool { return strings.HasPrefix(l, "d/e/") }),
		[]string{`d 42700 0:0 T user.lower="1"`, "d/e 40755 0:0 T"})
	upper := dirEntry("d", 0o711)
	upper.Uid, upper.ModTime = 3, then.Add(time.Second)
	mustApply(t, root, layerOf(t, upper), Options{})
	if got := dump(t, root)[1]; got != "d 40711 3:0 1486094707.000000789" {
		t.Error(got)
	}
}

func TestDefaultACL(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	// user::rwx, group::---, other::---: files that are created in the directory would get no group bits.
	acl := "\x02\x00\x00\x00\x01\x00\x07\x00\xff\xff\xff\xff\x04\x00\x00\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff"
	if err := unix.Setxattr(root, "system.posix_acl_default", []byte(acl), 0); err != nil {
		t.Skipf("set ACL: %v", err)
	}
	mustApply(t, root, layerOf(t, fileEntry("f", ""), dirEntry("d", 0o755), fileEntry("d/f", ""), fileEntry("implicit/f", "")), Options{})
	// With a named user too: files that are created in the directory would inherit that.
	acl = acl[:12] + "\x02\x00\x07\x00\x05\x00\x00\x00" + acl[12:20] + "\x10\x00\x07\x00\xff\xff\xff\xff" + acl[20:]
	if err := unix.Setxattr(root, "system.posix_acl_default", []byte(acl), 0); err != nil {
		t.Fatal(err)
	}
	mustApply(t, root, layerOf(t, fileEntry("f2", ""), dirEntry("d2", 0o755), fileEntry("d2/f", ""), fileEntry("implicit2/f", "")), Options{})
	for _, l := range dump(t, root) {
		if strings.HasPrefix(l, ". ") {
			continue
		}
		if strings.Contains(l, "acl") {
			t.Error(l)
		}
		if !strings.Contains(l, " 100644 ") && !strings.Contains(l, " 40755 ") {
			t.Error(l)
		}
	}
}

func manyFiles(t testing.TB, n int) []byte {
	rnd := mrand.New(mrand.NewPCG(3, 4))
	body := make([]byte, 150<<10)
	_, _ = rand.Read(body)
	var list []entry
	var files []string
	for i := range n {
		dir := fmt.Sprintf("d%d/e%d", rnd.IntN(20), rnd.IntN(20))
		switch rnd.IntN(12) {
		case 0:
			list = append(list, dirEntry(dir, int64(0o700+rnd.IntN(0o77))))
		case 1:
			list = append(list, symlink(fmt.Sprintf("%s/l%d", dir, i), "x"))
		case 2:
			if len(files) > 0 {
				list = append(list, hardlink(fmt.Sprintf("%s/h%d", dir, i), files[rnd.IntN(len(files))]))
			}
		case 3:
			if len(files) > 0 { // a file that is replaced
				list = append(list, fileEntry(files[rnd.IntN(len(files))], fmt.Sprint(i)))
			}
		case 4:
			size := rnd.IntN(len(body))
			list = append(list, fileEntry(fmt.Sprintf("%s/big%d", dir, i), string(body[:size])))
		default:
			size := rnd.IntN(3000)
			name := fmt.Sprintf("%s/f%d", dir, i)
			files = append(files, name)
			e := fileEntry(name, string(body[:size]))
			e.Mode = int64(rnd.IntN(0o10000))
			if os.Geteuid() != 0 {
				e.Mode |= 0o400 // so that this test can read the file
			}
			list = append(list, e)
		}
	}
	for i := range 20 { // so that every directory has its own times
		list = append(list, dirEntry(fmt.Sprintf("d%d", i), 0o755))
		for j := range 20 {
			list = append(list, dirEntry(fmt.Sprintf("d%d/e%d", i, j), 0o755))
		}
	}
	return layerOf(t, list...)
}

func TestParallelEqualsSequential(t *testing.T) {
	data := manyFiles(t, 1500)
	var first []string
	for _, workers := range []int{1, 2, 8} {
		root := filepath.Join(t.TempDir(), "root")
		if err := os.Mkdir(root, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(root, then, then); err != nil {
			t.Fatal(err)
		}
		mustApply(t, root, data, Options{Workers: workers})
		lines := dump(t, root)
		for i, l := range lines {
			if strings.HasPrefix(l, ". ") {
				lines[i] = "."
			}
		}
		if first == nil {
			first = lines
		}
		equal(t, lines, first)
	}
}

func gz(t testing.TB, parts ...[]byte) []byte {
	var b bytes.Buffer
	for _, p := range parts {
		w := gzip.NewWriter(&b)
		_, _ = w.Write(p)
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

func zst(t testing.TB, parts ...[]byte) []byte {
	e, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	skippable := append([]byte{0x5a, 0x2a, 0x4d, 0x18, 5, 0, 0, 0}, "hello"...)
	b := skippable
	for _, p := range parts {
		b = append(e.EncodeAll(p, b), skippable...)
	}
	return b
}

func TestCompression(t *testing.T) {
	plain := append(manyFiles(t, 100), make([]byte, 700)...)
	plain = append(plain, "trailing bytes that belong to the diff ID"...)
	half := len(plain) / 2
	want := digest.FromBytes(plain)
	for name, data := range map[string][]byte{
		"plain": plain, "gzip": gz(t, plain), "gzip-members": gz(t, plain[:half], nil, plain[half:]),
		"zstd": zst(t, plain), "zstd-frames": zst(t, plain[:half], nil, plain[half:]),
	} {
		t.Run(name, func(t *testing.T) {
			r := mustApply(t, t.TempDir(), data, Options{ExpectDiffID: want})
			if r.DiffID != want || r.Size != int64(len(plain)) {
				t.Errorf("got %s and %d bytes, expected %s and %d", r.DiffID, r.Size, want, len(plain))
			}
			_, err := apply(t, t.TempDir(), data, Options{ExpectDiffID: digest.FromString("another")})
			if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "diff ID mismatch") {
				t.Errorf("another diff ID expected: %v", err)
			}
		})
	}
	for _, data := range []string{
		"\xfd7zXZ\x00\x00\x04", "BZh91AY&SY", "\x04\x22\x4d\x18\x64\x40\xa7", "\x1f\x9d\x90", "LZIP\x01\x0c",
		"\x5d\x00\x00\x80\x00\xff\xff\xff\xff\xff\xff\xff\xff",
	} {
		if _, err := apply(t, t.TempDir(), []byte(data), Options{}); !errdefs.IsNotImplemented(err) {
			t.Errorf("%q: %v", data, err)
		}
	}
}

func TestTruncated(t *testing.T) {
	plain := layerOf(t, dirEntry("d", 0o755), fileEntry("d/f", strings.Repeat("x", 1300)), symlink("d/l", "f"),
		entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: strings.Repeat("n", 150), Mode: 0o644}, body: "y"}, fileEntry("empty", ""))
	root := t.TempDir()
	check := func(kind string, data []byte, n int) {
		t.Helper()
		fds := openFDs(t)
		_, err := apply(t, root, data[:n], Options{})
		if !errdefs.IsDataLoss(err) {
			t.Errorf("%s cut to %d of %d bytes: %v", kind, n, len(data), err)
		}
		if now := openFDs(t); now != fds {
			t.Errorf("%s cut to %d: %d descriptors are open, not %d", kind, n, now, fds)
		}
	}
	end := len(plain) - 1024
	for n := 0; n <= end; n += 128 {
		check("plain", plain, n)
	}
	for kind, data := range map[string][]byte{"gzip": gz(t, plain), "zstd": zst(t, plain)[13:]} {
		most := len(data)
		if kind == "zstd" {
			most -= 13 // a frame that can be skipped may be missing
		}
		for n := range most {
			check(kind, data, n)
		}
		for n := 0; n < most; n += 3 {
			bad := slices.Clone(data)
			bad[n] ^= 0x55
			_, _ = apply(t, root, bad, Options{})
		}
	}
	// If the marker is missing, the layer is complete only if it has the expected diff ID.
	cut := plain[:end]
	if _, err := apply(t, root, cut, Options{ExpectDiffID: digest.FromBytes(cut)}); err != nil {
		t.Errorf("without its marker, as expected: %v", err)
	}
	// One block of zeros is enough for every reader.
	mustApply(t, root, plain[:end+512], Options{})
	// An end inside a file is never accepted.
	cut = plain[:1200]
	if _, err := apply(t, root, cut, Options{ExpectDiffID: digest.FromBytes(cut)}); !errdefs.IsDataLoss(err) {
		t.Errorf("cut in a file, as expected: %v", err)
	}
}

var fraction = regexp.MustCompile(`\.\d{9}`)

func TestSparse(t *testing.T) {
	if _, err := exec.LookPath("tar"); err != nil {
		t.Skip("no tar")
	}
	src := t.TempDir()
	f, err := os.Create(filepath.Join(src, "holes"))
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{1 << 20, 40<<20 + 77} {
		if _, err := f.WriteAt([]byte("data"), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(f.Truncate(50<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	want := dump(t, src)
	for _, format := range []string{"gnu", "posix --sparse-version=0.0", "posix --sparse-version=0.1", "posix --sparse-version=1.0"} {
		t.Run(format, func(t *testing.T) {
			args := append(strings.Fields("-C "+src+" --owner=0 --group=0 -cS --format="+format), ".")
			data, err := exec.Command("tar", args...).Output()
			if err != nil {
				t.Fatal(err)
			}
			root := t.TempDir()
			mustApply(t, root, data, Options{})
			got, want := dump(t, root), slices.Clone(want)
			if format == "gnu" { // GNU's format has no fractions of seconds
				for i, l := range want {
					want[i] = fraction.ReplaceAllString(l, ".000000000")
				}
			}
			equal(t, got, want)
			var st unix.Stat_t
			if err := unix.Stat(filepath.Join(root, "holes"), &st); err != nil || st.Size != 50<<20 || st.Blocks*512 > 1<<20 {
				t.Errorf("%v: %d bytes in %d blocks", err, st.Size, st.Blocks)
			}
		})
	}
}

// Sparse files whose holes would take ages to read are refused, be it one or many.
func TestSparseBomb(t *testing.T) {
	for _, sizes := range [][]int64{{1 << 62}, {1 << 41}, {1 << 20, layer.MaxSparse}, {1 << 30, layer.MaxSparse - 1<<30 + 1}} {
		var b []byte
		for i, size := range sizes {
			name := fmt.Sprint("bomb", i)
			b = block(b, 'x', "pax", record("GNU.sparse.major", "1")+record("GNU.sparse.minor", "0")+record("GNU.sparse.name", name)+record("GNU.sparse.realsize", fmt.Sprint(size)))
			b = block(b, '0', name, "1\n0\n0\n"+strings.Repeat("\x00", 506))
		}
		if _, err := apply(t, t.TempDir(), append(b, make([]byte, 1024)...), Options{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%d: %v", sizes, err)
		}
	}
}

// silent blocks in Read until it is told to stop, like a producer that hangs.
type silent struct {
	data io.Reader
	stop chan struct{}
}

func (s silent) Read(p []byte) (int, error) {
	if n, err := s.data.Read(p); err == nil {
		return n, nil
	}
	<-s.stop
	return 0, os.ErrDeadlineExceeded
}

func (s silent) SetReadDeadline(time.Time) error { close(s.stop); return nil }

func TestCancel(t *testing.T) {
	data := manyFiles(t, 200)
	goroutines, fds := runtime.NumGoroutine(), openFDs(t)
	for _, n := range []int{0, 100, 5000, 100 << 10, len(data) - 2000} {
		ctx, cancel := context.WithCancel(t.Context())
		r := silent{bytes.NewReader(data[:n]), make(chan struct{})}
		time.AfterFunc(time.Millisecond, cancel)
		if _, err := Apply(ctx, t.TempDir(), r, Options{}); !errors.Is(err, context.Canceled) {
			t.Errorf("after %d bytes: %v", n, err)
		}
	}
	// When a layer fails, a producer that hangs is ended.
	bad := append(layerOf(t, dirEntry("d", 0o755))[:1536], layerOf(t, fileEntry(".wh..", ""))...)
	if _, err := Apply(t.Context(), t.TempDir(), silent{bytes.NewReader(append(bad, make([]byte, chunkSize)...)), make(chan struct{})}, Options{}); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	if n := openFDs(t); n != fds {
		t.Errorf("%d descriptors are open, not %d", n, fds)
	}
	// A goroutine that has reported its end may still have to run its last instructions.
	for tries := 0; runtime.NumGoroutine() > goroutines; tries++ {
		if tries == 1000 {
			t.Fatalf("%d goroutines run, not %d", runtime.NumGoroutine(), goroutines)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestBadTarget(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := apply(t, file, layerOf(t), Options{}); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	if _, err := apply(t, t.TempDir(), layerOf(t), Options{ExpectDiffID: "sha256:x"}); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	if _, err := apply(t, t.TempDir(), []byte(strings.Repeat("not a layer ", 100)), Options{}); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "not a layer") {
		t.Error(err)
	}
	// A header that can't be read is an error of an archive, whether it is the first header or a later one. The message
	// says where it is.
	for _, before := range [][]entry{nil, {fileEntry("first", "x")}} {
		at := len(layerOf(t, before...)) - 2*blockSize
		bad := fileEntry("second", "x")
		bad.ModTime, bad.Format = time.Unix(1, 5e8), tar.FormatPAX
		b := bytes.Replace(layerOf(t, append(before, bad)...), []byte("mtime=1.5"), []byte("mtime=abc"), 1)
		if _, err := apply(t, t.TempDir(), b, Options{}); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), fmt.Sprintf("at byte %d:", at)) {
			t.Error(err)
		}
	}
	if r, err := apply(t, t.TempDir(), layerOf(t), Options{}); err != nil || r.Entries != 0 || r.Size != 1024 {
		t.Errorf("empty layer: %+v, %v", r, err)
	}
}

// TestUnprivileged runs itself as the user nobody.
func TestUnprivileged(t *testing.T) {
	const variable = "ARCHIVE_TEST_UNPRIVILEGED"
	root := os.Getenv(variable)
	if root == "" {
		needRoot(t)
		dir, err := os.MkdirTemp("/tmp", "archive-test-")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		exe := filepath.Join(dir, "test")
		self, err := os.ReadFile("/proc/self/exe")
		if err != nil {
			t.Fatal(err)
		}
		root = filepath.Join(dir, "root")
		if err := errors.Join(os.WriteFile(exe, self, 0o755), os.Mkdir(root, 0o755), os.Chown(root, 65534, 65534), os.Chmod(dir, 0o755)); err != nil {
			t.Fatal(err)
		}
		c := exec.Command(exe, "-test.run=^TestUnprivileged$", "-test.v")
		c.Dir, c.Env = dir, append(os.Environ(), variable+"="+root, "TMPDIR="+root)
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := c.CombinedOutput()
		t.Logf("%s", out)
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	if os.Geteuid() == 0 {
		t.Fatal("still root")
	}
	r := mustApply(t, root, attributeLayer(t), Options{})
	for kind, n := range map[string]int64{"owners": 6, "set-ID bits": 1, "devices": 2, "security attributes": 1} {
		if r.Unset[kind] != n {
			t.Errorf("%s unset: %d, not %d", kind, r.Unset[kind], n)
		}
	}
	for p, want := range map[string]uint32{"d": 0o40000, "setuid": 0o100755, "fifo": 0o10622} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(root, p), &st); err != nil || st.Mode != want {
			t.Errorf("%s: %v, mode %o, not %o", p, err, st.Mode, want)
		}
	}
	checkKeptOwners(t)
	// A layer above it changes files in a directory whose mode does not let its owner in.
	mustApply(t, root, layerOf(t, fileEntry("d/e/f", "x"), fileEntry("d/.wh.locked", "")), Options{})
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(root, "d"), &st); err != nil || st.Mode != 0o40000 || st.Mtim.Sec != then.Unix() {
		t.Errorf("d: %v, mode %o, time %d", err, st.Mode, st.Mtim.Sec)
	}
	if err := os.Chmod(filepath.Join(root, "d"), 0o755); err != nil {
		t.Fatal(err)
	}
	if got := names(t, filepath.Join(root, "d")); !slices.Equal(got, []string{"e", "e/f"}) {
		t.Errorf("d holds %q", got)
	}
	mustApply(t, root, layerOf(t, dirEntry("d/e", 0), fileEntry("d/e/g", "x"), fileEntry(".wh.d", "")), Options{})
	strict := filepath.Join(root, "strict")
	if err := os.Mkdir(strict, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := apply(t, strict, attributeLayer(t), Options{Strict: true}); !errors.Is(err, unix.EPERM) {
		t.Errorf("strict: %v", err)
	}
}

// checkKeptOwners applies a layer that has owners, as an ordinary user, and makes a layer of the result.
func checkKeptOwners(t *testing.T) {
	owned := func(e entry, uid, gid int) entry { e.Uid, e.Gid = uid, gid; return e }
	own := []entry{
		owned(dirEntry("d", 0o555), 1, 2), owned(fileEntry("d/f", "x"), 300, 4294967294), owned(fileEntry("me", "x"), os.Getuid(), os.Getgid()),
		owned(fileEntry("group", "x"), 8, 0), {Header: tar.Header{Typeflag: tar.TypeReg, Name: "locked", Mode: 0o400, Uid: 5, Gid: 6,
			PAXRecords: map[string]string{"SCHILY.xattr.user.rootlesscontainers": "a lie", "SCHILY.xattr.user.x": "1"}}},
	}
	root := t.TempDir()
	r := mustApply(t, root, layerOf(t, own...), Options{})
	t.Cleanup(func() { _ = os.Chmod(filepath.Join(root, "d"), 0o755) })
	if r.Unset["owners"] != 4 {
		t.Errorf("%d owners unset, not 4", r.Unset["owners"])
	}
	if v := xattrDump(filepath.Join(root, "d")); v != ` user.rootlesscontainers="\b\x01\x10\x02"` {
		t.Error(v)
	}
	// Files that the user creates belong to root in the layer, as with umoci.
	if err := os.WriteFile(filepath.Join(root, "made"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	own = append(own, fileEntry("made", ""))
	var b bytes.Buffer
	if _, err := Diff(t.Context(), &b, "", root, DiffOptions{Compression: Uncompressed}); err != nil {
		t.Fatal(err)
	}
	tr := tar.NewReader(&b)
	for h, err := tr.Next(); err != io.EOF; h, err = tr.Next() {
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range own {
			if e.Name == strings.TrimSuffix(h.Name, "/") && (e.Uid != h.Uid || e.Gid != h.Gid || e.Mode != h.Mode || h.PAXRecords["SCHILY.xattr."+ownerAttribute] != "") {
				t.Errorf("%s: %d:%d %o %q, not %d:%d %o", h.Name, h.Uid, h.Gid, h.Mode, h.PAXRecords, e.Uid, e.Gid, e.Mode)
			}
		}
	}
}
