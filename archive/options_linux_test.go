package archive

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"distkit/disk/sys"
)

func TestLimits(t *testing.T) {
	t.Parallel()
	data := layerOf(t, fileEntry("a/b/c/f", strings.Repeat("x", 100_000)), dirEntry("d", 0o755))
	sparse := block(block(nil, 'x', "pax", record("GNU.sparse.major", "1")+record("GNU.sparse.minor", "0")+record("GNU.sparse.realsize", "1000000")), '0', "f", "1\n0\n0\n"+strings.Repeat("\x00", 506))
	sparse = append(sparse, make([]byte, 1024)...)
	for name, test := range map[string]struct {
		data []byte
		opts Options
		ok   bool
	}{
		"bytes":         {data, Options{MaxBytes: int64(len(data))}, true},
		"a byte less":   {data, Options{MaxBytes: int64(len(data)) - 1}, false},
		"few bytes":     {data, Options{MaxBytes: 5000}, false},
		"sparse":        {sparse, Options{MaxBytes: 1_000_000}, true},
		"larger sparse": {sparse, Options{MaxBytes: 999_999}, false},
		"entries":       {data, Options{MaxEntries: 5}, true},
		"more entries":  {data, Options{MaxEntries: 4}, false},
		"depth":         {data, Options{MaxDepth: 4}, true},
		"deeper":        {data, Options{MaxDepth: 3}, false},
		"directories":   {data, Options{MaxDepth: 1}, false},
	} {
		_, err := apply(t, t.TempDir(), test.data, test.opts)
		if test.ok != (err == nil) || !test.ok && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOnlyAndExclude(t *testing.T) {
	t.Parallel()
	data := layerOf(t, dirEntry("etc", 0o700), fileEntry("etc/passwd", ""), fileEntry("etc/ssl/key", ""), fileEntry("etcetera", ""), symlink("lib", "usr/lib"),
		fileEntry("usr/lib/x/y", ""), fileEntry("usr/.wh.low", ""), fileEntry("low/.wh..wh..opq", ""))
	for _, test := range []struct {
		only, exclude []string
		want          string
	}{
		{nil, []string{"/etc/", "usr/low", "./low"}, "etcetera lib low low/kept usr usr/lib usr/lib/x usr/lib/x/y usr/low"},
		{[]string{"etc"}, nil, "etc etc/passwd etc/ssl etc/ssl/key low low/kept usr usr/low"},
		{[]string{"etc"}, []string{"etc/ssl"}, "etc etc/passwd low low/kept usr usr/low"},
		{[]string{"etc/ssl", "low"}, nil, "etc etc/ssl etc/ssl/key low usr usr/low"},
		{[]string{"lib/x", "usr"}, nil, "lib low low/kept usr usr/lib usr/lib/x usr/lib/x/y"},
	} {
		root := t.TempDir()
		mustApply(t, root, layerOf(t, fileEntry("usr/low", ""), fileEntry("low/kept", "")), Options{})
		r := mustApply(t, root, data, Options{Only: test.only, Exclude: test.exclude})
		if got := strings.Join(names(t, root), " "); got != test.want {
			t.Errorf("only %q exclude %q: %s, not %s", test.only, test.exclude, got, test.want)
		}
		if r.DiffID != digest.FromBytes(data) {
			t.Error("another diff ID")
		}
		if fi, err := os.Stat(filepath.Join(root, "etc")); err == nil && fi.Mode().Perm() != 0o700 {
			t.Errorf("a directory on the way has mode %v", fi.Mode())
		}
	}
}

// diffNames returns the sorted names of a layer's entries, without the top.
func diffNames(t *testing.T, lower, upper string, opts DiffOptions) string {
	t.Helper()
	opts.Latest, opts.Compression = time.Unix(1, 0), Uncompressed
	var got []string
	for r := tar.NewReader(bytes.NewReader(mustDiff(t, lower, upper, opts))); ; {
		h, err := r.Next()
		if err != nil {
			break
		}
		if name := strings.TrimSuffix(h.Name, "/"); name != "." {
			got = append(got, name)
		}
	}
	slices.Sort(got)
	return strings.Join(got, " ")
}

// Files that are left out of a comparison are not changed where the layer is applied.
func TestDiffOnlyAndExclude(t *testing.T) {
	t.Parallel()
	lower, upper := t.TempDir(), t.TempDir()
	mustApply(t, lower, layerOf(t, fileEntry("etc/passwd", "1"), fileEntry("etc/ssl/key", "1"), fileEntry("etc/ssl/gone", ""), fileEntry("gone/x", ""), dirEntry("usr", 0o755), fileEntry("usr/lib", "1")), Options{})
	mustApply(t, upper, layerOf(t, fileEntry("etc/passwd", "2"), fileEntry("etc/ssl/key", "2"), fileEntry("etcetera", ""), hardlink("new", "etcetera"), dirEntry("usr", 0o755), fileEntry("usr/lib", "1")), Options{})
	for _, test := range []struct {
		only, exclude []string
		want          string
	}{
		{nil, nil, ".wh.gone etc etc/passwd etc/ssl etc/ssl/.wh.gone etc/ssl/key etcetera new"},
		{nil, []string{"/etc/ssl", "./gone/", "new"}, "etc etc/passwd etcetera"},
		{[]string{"etc/ssl"}, nil, "etc etc/ssl etc/ssl/.wh.gone etc/ssl/key"},
		{[]string{"etc", "gone"}, []string{"etc/ssl/gone"}, ".wh.gone etc etc/passwd etc/ssl etc/ssl/key"},
		{[]string{"gone/x", "usr"}, nil, ""},
	} {
		if got := diffNames(t, lower, upper, DiffOptions{Only: test.only, Exclude: test.exclude}); got != test.want {
			t.Errorf("only %q exclude %q: %s, not %s", test.only, test.exclude, got, test.want)
		}
	}
	// Entries above the files that are left out would remove them, unless LOWER has no directory there.
	lower, upper = t.TempDir(), t.TempDir()
	mustApply(t, lower, layerOf(t, fileEntry("a/x", ""), fileEntry("a/y", ""), fileEntry("b/x", ""), fileEntry("c/x", ""), fileEntry("f", ""), fileEntry("g", ""), fileEntry("keep", "")), Options{})
	mustApply(t, upper, layerOf(t, fileEntry("b", "1"), symlink("c", "keep"), fileEntry("g", "1"), hardlink("h", "b"), fileEntry("keep", "")), Options{})
	for _, test := range []struct {
		overlay       bool
		only, exclude []string
		want          string
	}{
		{false, nil, []string{"a/z"}, ".wh.f b c g h"},
		{false, nil, []string{"a/x", "b/x", "c/x", "f/x", "g/x"}, ".wh.f g h"},
		{false, []string{"b/x", "c/x", "g/x", "h"}, nil, "g h"},
		{false, []string{"b", "c/x"}, []string{"c/y"}, "b"},
		{true, nil, []string{"b/x", "c/x", "g/x"}, "h keep"},
		{true, []string{"b/x", "c"}, nil, "c"},
	} {
		low := lower
		if test.overlay {
			low = ""
		}
		if got := diffNames(t, low, upper, DiffOptions{Only: test.only, Exclude: test.exclude, Overlay: test.overlay}); got != test.want {
			t.Errorf("overlay %t only %q exclude %q: %s, not %s", test.overlay, test.only, test.exclude, got, test.want)
		}
	}
	if err := os.Mkdir(filepath.Join(upper, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	// An opaque marker above the files that are left out would hide them.
	if err := unix.Setxattr(filepath.Join(upper, "etc"), "user.overlay.opaque", []byte("y"), 0); err != nil {
		t.Skip(err)
	}
	for _, test := range []struct {
		only, exclude string
		want          int
	}{{"etc/ssl", "x", 0}, {"etc", "x", 1}, {"etc", "etc/ssl", 0}} {
		data := mustDiff(t, "", upper, DiffOptions{Overlay: true, Only: []string{test.only}, Exclude: []string{test.exclude}, Compression: Uncompressed})
		if n := bytes.Count(data, []byte("etc/.wh..wh..opq")); n != test.want {
			t.Errorf("%+v: %d markers", test, n)
		}
	}
}

// Owners, and the root of capabilities, are mapped, and mapped back.
func TestIDMaps(t *testing.T) {
	needRoot(t)
	t.Parallel()
	uids, err := ParseIDMap([]string{"0:100000:10", "70:5"})
	if err != nil {
		t.Fatal(err)
	}
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	owned := func(e entry, uid, gid int) entry { e.Uid, e.Gid = uid, gid; return e }
	capable := fileEntry("capable", "x")
	capable.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": capability}
	list := []entry{owned(dirEntry("./", 0o755), 0, 0), capable, owned(fileEntry("f", "x"), 9, 3), owned(symlink("l", "x"), 70, 70)}
	root := t.TempDir()
	opts := Options{Strict: true, UIDs: uids, GIDs: IDMap{{0, 200000, 100}}}
	mustApply(t, root, layerOf(t, list...), opts)
	for p, want := range map[string][2]uint32{"capable": {100000, 200000}, "f": {100009, 200003}, "l": {5, 200070}} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(root, p), &st); err != nil || st.Uid != want[0] || st.Gid != want[1] {
			t.Errorf("%s: %v, owner %d:%d, not %v", p, err, st.Uid, st.Gid, want)
		}
	}
	b := make([]byte, 64)
	n, err := unix.Lgetxattr(filepath.Join(root, "capable"), capabilityAttribute, b)
	if err != nil || n != 24 || b[3] != 3 || !bytes.Equal(b[20:n], []byte{0xa0, 0x86, 1, 0}) {
		t.Errorf("capabilities are %q (%v)", b[:max(n, 0)], err)
	}
	back := mustDiff(t, "", root, DiffOptions{Compression: Uncompressed, UIDs: opts.UIDs, GIDs: opts.GIDs})
	r := tar.NewReader(bytes.NewReader(back))
	for _, e := range list {
		h, err := r.Next()
		if err != nil || h.Name != e.Name || h.Uid != e.Uid || h.Gid != e.Gid || h.PAXRecords["SCHILY.xattr.security.capability"] != e.PAXRecords["SCHILY.xattr.security.capability"] {
			t.Errorf("%s: %v, %+v", e.Name, err, h)
		}
	}
	// An owner that is not in the map is not set, and neither are set-ID bits.
	setuid := owned(fileEntry("f", "x"), 10, 0)
	setuid.Mode = 0o4755
	res := mustApply(t, t.TempDir(), layerOf(t, setuid), Options{UIDs: uids})
	if res.Unset["owners"] != 1 || res.Unset["set-ID bits"] != 1 {
		t.Errorf("unset: %v", res.Unset)
	}
	if _, err := apply(t, t.TempDir(), layerOf(t, setuid), opts); err == nil {
		t.Error("an owner that is not mapped passes as strict")
	}
	if _, err := Diff(t.Context(), io.Discard, "", root, DiffOptions{UIDs: IDMap{{0, 100000, 1}}}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("files of owners that are not mapped: %v", err)
	}
	for _, bad := range []string{"", "1", "1:2:0", "1:2:3:4", "-1:0", "a:b", "0:4294967295:1", "4294967290:0:10"} {
		if _, err := ParseIDMap([]string{bad}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestEmptyLayers(t *testing.T) {
	t.Parallel()
	empty := digest.FromString("")
	for name, data := range map[string][]byte{"plain": nil, "gzip": gz(t, nil), "zstd": zst(t, nil)} {
		r, err := apply(t, t.TempDir(), data, Options{ExpectDiffID: empty})
		if err != nil || r.DiffID != empty || r.Size != 0 {
			t.Errorf("%s: %+v %v", name, r, err)
		}
		for _, expect := range []digest.Digest{"", digest.FromString("x")} {
			if _, err := apply(t, t.TempDir(), data, Options{ExpectDiffID: expect}); !errdefs.IsDataLoss(err) {
				t.Errorf("%s, expected %q: %v", name, expect, err)
			}
		}
	}
}

// Attributes in the forms in which GNU tar, bsdtar and star write them.
func TestAttributesOfOthers(t *testing.T) {
	root := t.TempDir()
	e := fileEntry("f", "x")
	e.PAXRecords = map[string]string{
		"SCHILY.xattr.user.a%3Db":     "1",
		"LIBARCHIVE.xattr.user.a%3Db": "MQ",
		"SCHILY.xattr.user.100%25":    "2",
		"SCHILY.acl.access":           "user::rw-,user:nobody:r--:65534,group::r--,mask::r--,other::r--",
		"SCHILY.xattr.security.bad":   "?",
	}
	plain := fileEntry("plain", "x")
	plain.PAXRecords = map[string]string{"SCHILY.acl.access": "user::rw-,group::r--,other::r--"}
	large := fileEntry("large", "x")
	large.PAXRecords = map[string]string{"SCHILY.xattr.user.large": strings.Repeat("x", 70_000)}
	broken := fileEntry("broken", "x")
	broken.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": "?"}
	many := fileEntry("many", "x")
	many.PAXRecords = map[string]string{"SCHILY.xattr.\x1b]0;a.x": "", "SCHILY.xattr.b.x": ""}
	data := layerOf(t, e, plain, large, broken, many)
	r := mustApply(t, root, data, Options{})
	if got := xattrDump(filepath.Join(root, "f")); !strings.Contains(got, `user.100%="2" user.a=b="1"`) {
		t.Error(got)
	}
	if r.Unset["ACLs"] != 1 || r.Unset["user attributes"] != 1 || r.Unset["security attributes"] == 0 || r.Unset["other attributes"] != 2 || len(r.Unset) != 4 {
		t.Errorf("unset: %v", r.Unset)
	}
	again := t.TempDir()
	mustApply(t, again, mustDiff(t, "", root, DiffOptions{Compression: Uncompressed}), Options{})
	if a, b := xattrDump(filepath.Join(root, "f")), xattrDump(filepath.Join(again, "f")); a != b {
		t.Errorf("%s became %s", a, b)
	}
}

// A device that overlayfs would read as a whiteout is not made, not even in a directory that may become a lower one.
func TestWhiteoutDeviceIsNotMade(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	mustApply(t, root, layerOf(t, fileEntry("f", "")), Options{})
	r := mustApply(t, root, layerOf(t, entry{Header: tar.Header{Typeflag: tar.TypeChar, Name: "f"}}, fileEntry("g", "")), Options{})
	if got := strings.Join(names(t, root), " "); got != "g" || r.Unset["devices"] != 1 {
		t.Errorf("left %q, unset %v", got, r.Unset)
	}
}

func TestDiffEntersNoMount(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	sub := filepath.Join(root, "sub")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", sub, "tmpfs", 0, ""); err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(sub, unix.MNT_DETACH) })
	if _, err := Diff(t.Context(), io.Discard, "", root, DiffOptions{}); !errors.Is(err, sys.ErrMounted) || !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
}

// Root without capabilities, as in a pod that drops them all, is limited by permission bits, and keeps owners as an
// ordinary user does.
func TestRootWithoutCapabilities(t *testing.T) {
	needRoot(t)
	const variable = "ARCHIVE_TEST_NO_CAPABILITIES"
	if os.Getenv(variable) == "" {
		c := exec.Command(os.Args[0], "-test.run=^TestRootWithoutCapabilities$", "-test.v")
		c.Env = append(os.Environ(), variable+"=1")
		var out []byte
		done := make(chan error)
		go func() { // in a thread of its own, which ends with the goroutine
			runtime.LockOSThread()
			for i := range uintptr(64) {
				_ = unix.Prctl(unix.PR_CAPBSET_DROP, i, 0, 0, 0)
			}
			var err error
			out, err = c.CombinedOutput()
			done <- err
		}()
		if err := <-done; err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	if sys.Capable(unix.CAP_CHOWN) || sys.Capable(unix.CAP_DAC_OVERRIDE) {
		t.Fatal("it has capabilities")
	}
	root := t.TempDir()
	f := fileEntry("d/f", "x")
	f.Uid, f.Gid = 1, 2
	mustApply(t, root, layerOf(t, dirEntry("d", 0o555), f), Options{})
	mustApply(t, root, layerOf(t, fileEntry("d/g", "y"), fileEntry("d/h/i", "z"), fileEntry("d/.wh.none", "")), Options{})
	owners := map[string][2]int{}
	for tr := tar.NewReader(bytes.NewReader(mustDiff(t, "", root, DiffOptions{Compression: Uncompressed}))); ; {
		h, err := tr.Next()
		if err != nil {
			break
		}
		owners[h.Name] = [2]int{h.Uid, h.Gid}
	}
	if owners["d/f"] != [2]int{1, 2} || owners["d/g"] != [2]int{0, 0} {
		t.Errorf("owners are %v", owners)
	}
	if err := os.Chmod(filepath.Join(root, "d"), 0o755); err != nil { // for the cleanup
		t.Fatal(err)
	}
}
