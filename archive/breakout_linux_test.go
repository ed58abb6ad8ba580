package archive

import (
	"archive/tar"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"distkit/compression"
	"distkit/disk/sys"
)

type breakout struct {
	name    string
	base    []entry
	layer   []entry
	refused bool              // with ErrInvalidArgument
	content map[string]string // of files, as seen inside the target
	same    [2]string         // two names of one inode
	differ  [2]string
	absent  []string
}

// breakouts are the cases of containerd's TestBreakouts, and more swaps of directories and links. Whether or not the
// layer can be applied, nothing outside the target may change.
func breakouts() []breakout {
	base := []entry{dirEntry("etc", 0o755), fileEntry("etc/passwd", "inside")}
	with := func(more ...entry) []entry { return append(slices.Clone(base), more...) }
	mine := [2]string{"localpasswd", "etc/passwd"}
	below := [2]string{"localetc/localpasswd", "etc/passwd"}
	return []breakout{
		{name: "SymlinkAbsolute",
			layer:   []entry{dirEntry("etc", 0o755), symlink("localetc", "/etc"), fileEntry("/localetc/unbroken", "x")},
			content: map[string]string{"etc/unbroken": "x"}},
		{name: "SymlinkUpAndOut",
			layer:   []entry{dirEntry("etc", 0o755), dirEntry("dummy", 0o755), symlink("localetc", "/dummy/../etc"), fileEntry("/localetc/unbroken", "x")},
			content: map[string]string{"etc/unbroken": "x"}},
		{name: "SymlinkMultipleAbsolute",
			layer: []entry{dirEntry("etc", 0o755), dirEntry("dummy", 0o755), symlink("/dummy/etc", "/etc"),
				symlink("localetc", "/dummy/etc"), fileEntry("/dummy/etc/unbroken", "x"), fileEntry("/localetc/two", "y")},
			content: map[string]string{"etc/unbroken": "x", "etc/two": "y"}},
		{name: "SymlinkMultipleRelative",
			layer: []entry{dirEntry("etc", 0o755), dirEntry("dummy", 0o755), symlink("/dummy/etc", "/etc"),
				symlink("localetc", "./dummy/etc"), fileEntry("/dummy/etc/unbroken", "x"), fileEntry("/localetc/two", "y")},
			content: map[string]string{"etc/unbroken": "x", "etc/two": "y"}},
		{name: "SymlinkEmptyFile",
			layer:   []entry{dirEntry("etc", 0o755), fileEntry("etc/emptied", "notempty"), symlink("localetc", "/etc"), fileEntry("/localetc/emptied", "")},
			content: map[string]string{"etc/emptied": ""}},
		{name: "HardlinkRelative",
			layer: with(dirEntry("breakouts", 0o755), symlink("breakouts/d1", "../../etc"), hardlink("breakouts/mypasswd", "/breakouts/d1/passwd")),
			same:  [2]string{"breakouts/mypasswd", "etc/passwd"}},
		{name: "HardlinkDownAndOut",
			layer: with(dirEntry("breakouts", 0o755), dirEntry("downandout", 0o755), symlink("breakouts/d1", "../downandout/../../etc"),
				hardlink("breakouts/mypasswd", "/breakouts/d1/passwd")),
			same: [2]string{"breakouts/mypasswd", "etc/passwd"}},
		{name: "HardlinkAbsolute", layer: with(symlink("localetc", "/etc"), hardlink("localpasswd", "/localetc/passwd")), same: mine},
		{name: "HardlinkRelativeLong", layer: with(symlink("localetc", "../../../../../../../etc"), hardlink("localpasswd", "/localetc/passwd")), same: mine},
		{name: "HardlinkRelativeUpAndOut", layer: with(dirEntry("upandout", 0o755), symlink("localetc", "upandout/../../../etc"), hardlink("localpasswd", "/localetc/passwd")), same: mine},
		{name: "HardlinkRelativeUpAndOutMissing", layer: with(symlink("localetc", "upandout/../../../etc"), hardlink("localpasswd", "/localetc/passwd")), refused: true},
		{name: "HardlinkDirectRelative", layer: with(hardlink("localpasswd", "../../../../../etc/passwd")), same: mine},
		{name: "HardlinkDirectAbsolute", layer: with(hardlink("localpasswd", "/etc/passwd")), same: mine},
		{name: "HardlinkOutsideOnly", layer: with(hardlink("localpasswd", "../../tmp/passwd")), refused: true},
		{name: "SymlinkParentDirectory", layer: with(symlink("..", "/etc/"), hardlink("localpasswd", "/etc/passwd")), same: mine},
		{name: "SymlinkEmptyFilename", layer: with(symlink("", "/etc/"), hardlink("localpasswd", "/etc/passwd")), same: mine},
		{name: "SymlinkParentRelative", layer: with(symlink("localetc/sub/..", "/etc/"), hardlink("/localetc/localpasswd", "/etc/passwd")), same: below},
		{name: "SymlinkSlashEnded", layer: with(dirEntry("localetc/", 0o770), hardlink("/localetc/localpasswd", "/etc/passwd")), same: below},
		{name: "SymlinkOverrideDirectory", base: with(dirEntry("localetc", 0o755)),
			layer: []entry{symlink("localetc", "/etc"), hardlink("/localetc/localpasswd", "/etc/passwd")}, same: below},
		{name: "SymlinkOverrideDirectoryRelative", base: with(dirEntry("localetc", 0o755)),
			layer: []entry{symlink("localetc", "../../etc"), hardlink("/localetc/localpasswd", "/etc/passwd")}, same: below},
		{name: "DirectoryOverrideSymlink", base: with(symlink("localetc", "/etc")),
			layer: []entry{dirEntry("/localetc/", 0o755), hardlink("/localetc/localpasswd", "/etc/passwd")},
			same:  below, absent: []string{"etc/localpasswd"}},
		{name: "DirectoryOverrideSymlinkAndHardlink", base: with(symlink("localetc", "etc"), hardlink("/localetc/localpasswd", "/etc/passwd")),
			layer:  []entry{dirEntry("/localetc/", 0o755), fileEntry("/localetc/localpasswd", "different")},
			differ: below, content: map[string]string{"etc/passwd": "inside", "localetc/localpasswd": "different"}},
		{name: "FileOverHardlink", base: with(hardlink("copy", "etc/passwd")),
			layer: []entry{fileEntry("copy", "different")}, differ: [2]string{"copy", "etc/passwd"}, content: map[string]string{"etc/passwd": "inside"}},

		{name: "WhiteoutRootParent", base: base, layer: []entry{fileEntry(".wh...", "")}, refused: true},
		{name: "WhiteoutParent", base: base, layer: []entry{fileEntry("etc/.wh...", "")}, refused: true},
		{name: "WhiteoutRoot", base: base, layer: []entry{fileEntry(".wh..", "")}, refused: true},
		{name: "WhiteoutCurrentDirectory", base: base, layer: []entry{fileEntry("etc/.wh..", "")}, refused: true},
		{name: "WhiteoutNothing", base: base, layer: []entry{fileEntry("etc/.wh.", "")}, refused: true},
		{name: "WhiteoutSymlink", base: with(symlink("localetc", "/etc")), layer: []entry{fileEntry(".wh.localetc", "")},
			content: map[string]string{"etc/passwd": "inside"}, absent: []string{"localetc"}},
		{name: "WhiteoutSymlinkPath", base: with(fileEntry("etc/whitedout", "x"), symlink("localetc", "/etc")), layer: []entry{fileEntry("localetc/.wh.whitedout", "")},
			content: map[string]string{"etc/passwd": "inside"}, absent: []string{"etc/whitedout"}},
		{name: "WhiteoutDirectoryName", base: with(symlink("localetc", "/etc")), layer: []entry{fileEntry(".wh.etc/somefile", "non-empty")},
			content: map[string]string{"etc/passwd": "inside", ".wh.etc/somefile": "non-empty"}},
		{name: "WhiteoutDeadSymlinkParent", base: with(symlink("localetc", "/dne")), layer: []entry{fileEntry("localetc/.wh.etc", "")},
			content: map[string]string{"etc/passwd": "inside"}},
		{name: "WhiteoutRelativePath", base: with(symlink("localetc", "/dne")), layer: []entry{fileEntry("dne/../.wh.etc", "")}, absent: []string{"etc"}},
		{name: "WhiteoutOpaque", base: with(fileEntry("etc/shadow", "secret")),
			layer:   []entry{fileEntry("etc/.wh..wh..opq", ""), fileEntry("etc/group", "all groups")},
			content: map[string]string{"etc/group": "all groups"}, absent: []string{"etc/passwd", "etc/shadow"}},
		{name: "WhiteoutOpaqueOutOfOrder", base: base,
			layer:   []entry{fileEntry("etc/group", "all groups"), fileEntry("etc/.wh..wh..opq", "")},
			content: map[string]string{"etc/group": "all groups"}, absent: []string{"etc/passwd"}},
		{name: "WhiteoutOpaqueThroughSymlink", base: with(symlink("out", "../../../etc")),
			layer: []entry{fileEntry("out/.wh..wh..opq", "")}, absent: []string{"etc/passwd"}},
		{name: "WhiteoutUp", base: base, layer: []entry{fileEntry("../../../.wh.etc", "")}, absent: []string{"etc"}},

		{name: "SymlinkOverridePath",
			layer: []entry{dirEntry("foo", 0o755), dirEntry("foo/tmp", 0o755), fileEntry("foo/tmp/breakout", "1"), symlink("foo", "/"),
				fileEntry("foo/tmp/breakout", "2"), dirEntry("foo", 0o755), dirEntry("foo/tmp", 0o755), fileEntry("foo/tmp/breakout", "3")},
			content: map[string]string{"tmp/breakout": "2", "foo/tmp/breakout": "3"}},
		{name: "HardlinkSymlinkBeforeCreateTarget",
			layer: []entry{dirEntry("etc", 0o770), symlink("localpasswd", "/etc/passwd"), hardlink("localpasswd-dup", "localpasswd"), fileEntry("/etc/passwd", "after")},
			same:  [2]string{"localpasswd-dup", "etc/passwd"}},
		{name: "HardlinkSymlinkRelative", layer: with(symlink("passwdlink", "../../../../../etc/passwd"), hardlink("localpasswd", "/passwdlink")), same: mine},
		{name: "HardlinkSymlinkAbsolute", layer: with(symlink("passwdlink", "/etc/passwd"), hardlink("localpasswd", "/passwdlink")), same: mine},
		{name: "HardlinkSymlinkChmod",
			layer: []entry{symlink("link", "../../../etc/passwd"), {Header: tar.Header{Typeflag: tar.TypeLink, Name: "sketchy", Linkname: "link", Mode: 0o777}}}},

		// Directories that are swapped while they are open.
		{name: "SwapDirectoryForSymlinkOut",
			layer:   []entry{dirEntry("a", 0o755), fileEntry("a/one", "1"), symlink("a", "../../../etc"), fileEntry("a/passwd", "2")},
			content: map[string]string{"etc/passwd": "2"}},
		{name: "SwapDirectoryInTheMiddle",
			layer:   []entry{fileEntry("a/b/c/one", "1"), symlink("a/b", "/x"), fileEntry("a/b/c/two", "2")},
			content: map[string]string{"x/c/two": "2"}, absent: []string{"x/c/one"}},
		{name: "SwapWhatALinkLeadsTo",
			layer:   []entry{fileEntry("a/one", "1"), symlink("l", "a"), fileEntry("l/two", "2"), symlink("a", "b"), fileEntry("l/three", "3")},
			content: map[string]string{"b/three": "3"}, absent: []string{"b/one", "b/two"}},
		{name: "SwapLink",
			layer:   []entry{dirEntry("a", 0o755), dirEntry("b", 0o755), symlink("l", "a"), fileEntry("l/one", "1"), symlink("l", "b"), fileEntry("l/two", "2")},
			content: map[string]string{"a/one": "1", "b/two": "2"}, absent: []string{"a/two", "b/one"}},
		{name: "SwapLinkInAChain",
			layer: []entry{dirEntry("a", 0o755), dirEntry("b", 0o755), symlink("m", "a"), symlink("l", "m/s"), fileEntry("l/one", "1"),
				symlink("m", "b"), fileEntry("l/two", "2")},
			content: map[string]string{"a/s/one": "1", "b/s/two": "2"}},
		{name: "SwapLinkForDirectory",
			layer:   []entry{dirEntry("a", 0o755), symlink("l", "/a"), fileEntry("l/one", "1"), dirEntry("l", 0o755), fileEntry("l/two", "2")},
			content: map[string]string{"a/one": "1", "l/two": "2"}, absent: []string{"a/two"}},
		{name: "SwapByWhiteout", base: []entry{fileEntry("a/b/old", "0")},
			layer:   []entry{fileEntry("a/.wh.b", ""), symlink("a/b", "../../../../etc"), fileEntry("a/b/passwd", "1")},
			content: map[string]string{"etc/passwd": "1"}},
		{name: "SwapByOpaque", base: []entry{fileEntry("a/b/old", "0"), dirEntry("c", 0o755), symlink("l", "a/b")},
			layer:   []entry{fileEntry("l/.wh.none", ""), fileEntry("a/b/new", "1"), fileEntry("a/.wh..wh..opq", ""), fileEntry("l/newer", "2")},
			content: map[string]string{"a/b/new": "1", "a/b/newer": "2"}, absent: []string{"a/b/old"}},
		{name: "SwapByHardlink",
			layer: []entry{fileEntry("f", "1"), dirEntry("a", 0o755), fileEntry("a/x", "2"), hardlink("a", "f"), fileEntry("a/y", "3")}, refused: true},
		{name: "HardlinkReplacesItsTargetsParent", layer: []entry{fileEntry("a/x", "1"), hardlink("a", "a/x")}, refused: true},
		{name: "HardlinkToItself", layer: []entry{fileEntry("a/x", "1"), symlink("l", "a"), hardlink("l/x", "a/x")}, refused: true},
		{name: "HardlinkToDirectory", layer: []entry{dirEntry("a", 0o755), hardlink("b", "a")}, refused: true},
		{name: "SymlinkLoop", layer: []entry{symlink("a", "b"), symlink("b", "a"), fileEntry("a/x", "1")}},
		{name: "SymlinkToItselfBelow", layer: []entry{symlink("a", "a/a"), fileEntry("a/x", "1")}},
		{name: "FileAsParent", layer: []entry{fileEntry("a", "1"), fileEntry("a/x", "2")}, refused: true},
		{name: "FileOverDirectory", base: base, layer: []entry{fileEntry("etc", "1")}, content: map[string]string{"etc": "1"}},
		{name: "RootReplaced", base: base, layer: []entry{symlink("/", "/etc"), symlink("./", "/etc"), fileEntry("a/..", "x"), fileEntry("x", "1")},
			content: map[string]string{"x": "1", "etc/passwd": "inside"}},
		{name: "NamesUp", layer: []entry{fileEntry("../../../../../../etc/passwd", "1"), fileEntry("/../tmp/x", "2")},
			content: map[string]string{"etc/passwd": "1", "tmp/x": "2"}},
		{name: "LongName", layer: []entry{fileEntry(strings.Repeat("n/", 32<<10)+"x", "1")}, refused: true},
		{name: "DeepName", layer: []entry{fileEntry(strings.Repeat("n/", 2000)+"x", "1"), fileEntry("y", "2")}, content: map[string]string{"y": "2"}},
		{name: "LongComponent", layer: []entry{fileEntry(strings.Repeat("n", 256), "1")}},
		{name: "DeviceNumber", layer: []entry{{Header: tar.Header{Typeflag: tar.TypeChar, Name: "c", Devmajor: 1 << 20, Devminor: 3, Format: tar.FormatGNU}}}, refused: true},
		{name: "UnknownType", layer: []entry{{Header: tar.Header{Typeflag: 'Z', Name: "z"}}}, refused: true},
		{name: "OwnerOutOfRange", layer: []entry{{Header: tar.Header{Typeflag: tar.TypeReg, Name: "f", Uid: 1 << 32, Gid: 1}}}, refused: true},
	}
}

func TestBreakouts(t *testing.T) {
	for _, fallback := range []bool{false, true} {
		name := "openat2"
		if fallback {
			name = "walk"
		}
		t.Run(name, func(t *testing.T) {
			was := sys.NoOpenat2.Load()
			sys.NoOpenat2.Store(fallback)
			defer sys.NoOpenat2.Store(was)
			for _, b := range breakouts() {
				t.Run(b.name, func(t *testing.T) { b.test(t) })
			}
		})
	}
}

func (b breakout) test(t *testing.T) {
	j := newJail(t)
	mustApply(t, j.root, layerOf(t, b.base...), Options{})
	before := j.around(t)
	fds := openFDs(t)
	_, err := apply(t, j.root, layerOf(t, b.layer...), Options{})
	if n := openFDs(t); n != fds {
		t.Errorf("%d descriptors are open, not %d", n, fds)
	}
	equal(t, j.around(t), before)
	if b.refused != (err != nil && errdefs.IsInvalidArgument(err)) {
		t.Errorf("error is %v", err)
	}
	if err == nil && b.refused {
		return
	}
	for p, want := range b.content {
		f, err := j.open(p, unix.O_RDONLY)
		if err != nil {
			t.Error(err)
			continue
		}
		got, err := io.ReadAll(f)
		f.Close()
		if err != nil || string(got) != want {
			t.Errorf("%s holds %q (%v), not %q", p, got, err, want)
		}
	}
	for _, p := range b.absent {
		if f, err := j.open(p, unix.O_PATH|unix.O_NOFOLLOW); err == nil {
			f.Close()
			t.Errorf("%s exists", p)
		}
	}
	for pair, want := range map[[2]string]bool{b.same: true, b.differ: false} {
		if pair[0] != "" && j.same(t, pair) != want {
			t.Errorf("%s and %s are one file: %v, not %v", pair[0], pair[1], !want, want)
		}
	}
}

// An archive for a directory of the target changes nothing outside the target, either. Its names lead out of the
// directory only through a symbolic link.
func TestBreakoutsBelow(t *testing.T) {
	t.Parallel()
	for _, b := range breakouts() {
		t.Run(b.name, func(t *testing.T) {
			j := newJail(t)
			mustApply(t, j.root, layerOf(t, append([]entry{dirEntry("real/sub", 0o755), symlink("link", "/real"), fileEntry("etc/passwd", "inside")}, b.base...)...), Options{})
			before := j.around(t)
			_, err := apply(t, j.root, layerOf(t, b.layer...), Options{Archive: true, Below: "/link/sub"})
			equal(t, j.around(t), before)
			if b.refused && !errdefs.IsInvalidArgument(err) && !strings.HasPrefix(b.name, "Whiteout") {
				t.Errorf("error is %v", err)
			}
		})
	}
	j := newJail(t)
	mustApply(t, j.root, layerOf(t, dirEntry("real/sub", 0o700), symlink("link", "/real")), Options{})
	mustApply(t, j.root, layerOf(t, dirEntry("./", 0o777), fileEntry("../../up", "1"), fileEntry(".wh.name", "2"), fileEntry(".wh..wh..opq", "3"), hardlink("hard", "/up")),
		Options{Archive: true, Below: "link/sub"})
	if got := strings.Join(names(t, j.root), " "); got != "link real real/sub real/sub/.wh..wh..opq real/sub/.wh.name real/sub/hard real/sub/up" {
		t.Error(got)
	}
	if info, err := os.Stat(filepath.Join(j.root, "real/sub")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the directory has mode %v: %v", info.Mode(), err)
	}
}

func (j jail) same(t *testing.T, pair [2]string) bool {
	var infos []os.FileInfo
	for _, p := range pair {
		f, err := j.open(p, unix.O_PATH)
		if err != nil {
			t.Fatal(err)
		}
		info, err := f.Stat()
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		infos = append(infos, info)
	}
	return os.SameFile(infos[0], infos[1])
}

// A link to a file's absolute name on the host leads to a name inside the target.
func TestBreakoutHostPath(t *testing.T) {
	j := newJail(t)
	secret := filepath.Join(j.outside, "etc", "passwd")
	before := j.around(t)
	mustApply(t, j.root, layerOf(t, symlink(secret, secret+"x"), hardlink("sketchy", secret),
		symlink("out", filepath.Join(j.outside, "etc")), fileEntry("out/passwd", "mine"), fileEntry(filepath.Join(j.outside, "tmp")+"/.wh.passwd", "")), Options{})
	equal(t, j.around(t), before)
}

func FuzzApply(f *testing.F) {
	for _, b := range breakouts() {
		if !strings.HasPrefix(b.name, "Long") && !strings.HasPrefix(b.name, "Deep") { // these take long to mutate
			f.Add(layerOf(f, b.layer...))
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) { fuzz(t, data) })
}

// FuzzEntries makes a well-formed archive of each input. Its names concern the same files.
func FuzzEntries(f *testing.F) {
	f.Add([]byte("\x00\x01\x02\x03\x04\x05\x06\x07"))
	f.Add([]byte("\x00\x00\x00\x01\x05\x13\x02\x09\x00\x00\x05\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		parts := []string{"a", "b", "c", "..", "etc", ".wh.a", ".wh.b", ".wh..wh..opq", ".", ""}
		targets := []string{"a", "/", "..", "../../../etc", "/a/b", "b/../..", "a/..", "/etc/passwd", "c"}
		path := func(n byte) string { return parts[int(n)%len(parts)] + "/" + parts[int(n)/len(parts)%len(parts)] }
		var entries []entry
		for ; len(data) >= 3 && len(entries) < 64; data = data[3:] {
			name, target := strings.TrimSuffix(path(data[1]), "/"), targets[int(data[2])%len(targets)]
			switch data[0] % 6 {
			case 0:
				entries = append(entries, dirEntry(name, int64(data[2])<<1))
			case 1, 2:
				entries = append(entries, fileEntry(name, "body"))
			case 3:
				entries = append(entries, symlink(name, target))
			case 4:
				entries = append(entries, hardlink(name, path(data[2])))
			case 5:
				entries = append(entries, fileEntry(name+"/passwd", "body"))
			}
		}
		fuzz(t, layerOf(t, entries...))
	})
}

// FuzzHeader makes a header with a correct checksum of each input, after PAX records, so that the code behind these is
// reached.
func FuzzHeader(f *testing.F) {
	whole := layerOf(f, entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: "a/b", Uid: 1 << 25, Mode: 0o7777, Format: tar.FormatGNU}, body: "x"})
	f.Add(whole[:blockSize], record("path", "../x")+record("SCHILY.xattr.user.a", "1"), "body")
	f.Add(whole[:blockSize], record("GNU.sparse.major", "1")+record("GNU.sparse.minor", "0")+record("GNU.sparse.realsize", "99"), "1\n0\n1\n")
	f.Add(whole[:blockSize], record("size", "5")+record("mtime", "-1.5")+record("LIBARCHIVE.xattr.user.%61", "AQ"), "")
	f.Fuzz(func(t *testing.T, header []byte, pax, body string) {
		var b []byte
		if pax != "" {
			b = block(b, 'x', "pax", pax)
		}
		h := make([]byte, blockSize)
		copy(h, header)
		b = append(b, checksum(h)...)
		b = append(b, body...)
		fuzz(t, append(b, make([]byte, 2*blockSize+-len(body)&(blockSize-1))...))
	})
}

// record is one record of a PAX header.
func record(k, v string) string {
	n := len(k) + len(v) + 4
	for len(fmt.Sprintf("%d %s=%s\n", n, k, v)) != n {
		n++
	}
	return fmt.Sprintf("%d %s=%s\n", n, k, v)
}

// block appends an entry to an archive. Name and body may have any bytes.
func block(b []byte, typeflag byte, name string, body string) []byte {
	h := make([]byte, blockSize)
	copy(h, name)
	copy(h[100:], "0000644\x000000000\x000000000\x00")
	copy(h[124:], fmt.Sprintf("%011o\x00%011o\x00", len(body), 0))
	h[156] = typeflag
	copy(h[257:], "ustar\x0000")
	b = append(append(b, checksum(h)...), body...)
	return append(b, make([]byte, -len(body)&(blockSize-1))...)
}

// checksum writes the correct checksum into a header.
func checksum(h []byte) []byte {
	copy(h[148:], "        ")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	return h
}

func fuzz(t *testing.T, data []byte) {
	j := newJail(t)
	mustApply(t, j.root, layerOf(t, dirEntry("etc", 0o755), fileEntry("etc/passwd", "inside"), symlink("b", "/a"), fileEntry("c/b/a", "1")), Options{})
	before := j.around(t)
	fds := openFDs(t)
	most := callsPerByte*int64(len(data)) + 200 // for the files that exist, and for the beginning and the end
	if compression.Sniff(data) != compression.None {
		most = 1 << 62
	}
	for _, w := range []Whiteouts{Remove, OverlayUser} {
		if n := calls(func() { _, _ = apply(t, j.root, data, Options{Whiteouts: w}) }); n > most {
			t.Errorf("%d calls for %d bytes", n, len(data))
		}
	}
	if n := openFDs(t); n != fds {
		t.Errorf("%d descriptors are open, not %d", n, fds)
	}
	equal(t, j.around(t), before)
}
