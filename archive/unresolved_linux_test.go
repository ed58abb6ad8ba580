package archive

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// records parses the text that Options.Unresolved received.
func records(t testing.TB, b []byte) [][3]string {
	t.Helper()
	fields := strings.Split(string(b), "\x00")
	if len(fields)%3 != 1 || fields[len(fields)-1] != "" {
		t.Fatalf("%d fields: %q", len(fields), b)
	}
	var list [][3]string
	for f := fields; len(f) >= 3; f = f[3:] {
		list = append(list, [3]string(f[:3]))
	}
	return list
}

func TestUnresolvedRecords(t *testing.T) {
	needRoot(t)
	var b bytes.Buffer
	root := t.TempDir()
	mustApply(t, root, layerOf(t,
		fileEntry("a/b/f", ""), dirEntry("a/b", 0o755), dirEntry("c", 0o755), fileEntry("c/.wh.gone", ""),
		symlink("s", "a/x"), fileEntry("s/f", ""), hardlink("h", "a/lower"), hardlink("h2", "h"), hardlink("h3", "s/deep/lower"),
		fileEntry("o/.wh..wh..opq", ""), fileEntry("o/p/new", ""), dirEntry(".", 0o755), dirEntry("c", 0o700),
	), Options{Whiteouts: Overlay, Unresolved: &b})
	want := [][3]string{
		{"directory", ".", ""}, {"directory", "a", ""}, {"directory", "a/b", ""}, {"named", "a/b", ""},
		{"whiteout", "c/gone", ""}, {"directory", "a/x", ""}, {"link", "h", "a/lower"}, {"link", "h2", "h"},
		{"link", "h3", "a/x/deep/lower"}, {"directory", "o", ""}, {"named", ".", ""},
	}
	if got := records(t, b.Bytes()); !slices.Equal(got, want) {
		t.Errorf("got %q\nnot %q", got, want)
	}
	for _, name := range []string{"h", "h2", "h3"} {
		if info, err := os.Lstat(filepath.Join(root, name)); err != nil || info.Mode().Type() != os.ModeSocket {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	for name, entries := range map[string][]entry{
		"link to whiteout":      {fileEntry(".wh.x", ""), hardlink("h", "x")},
		"link to below it":      {fileEntry(".wh.x", ""), hardlink("h", "x/y")},
		"link to in opaque":     {fileEntry("d/.wh..wh..opq", ""), hardlink("h", "d/x")},
		"link to below opaque":  {fileEntry("d/.wh..wh..opq", ""), hardlink("h", "d/x/y")},
		"link to below a file":  {fileEntry("f", ""), hardlink("h", "f/y")},
		"link to a directory":   {dirEntry("d", 0o755), hardlink("h", "d")},
		"link to itself":        {hardlink("h", "./h")},
		"link to the root":      {hardlink("h", "/")},
		"link to an empty name": {hardlink("h", "")},
		"opaque root":           {fileEntry(".wh..wh..opq", "")},
		"directory replaced":    {fileEntry("a/b", ""), fileEntry("a", "")},
		"link to its parent":    {hardlink("a", "a/b")},
		"link up":               {symlink("s", "x/../y"), hardlink("h", "s/z")},
	} {
		b.Reset()
		mustApply(t, t.TempDir(), layerOf(t, entries...), Options{Whiteouts: Overlay, Unresolved: &b})
		if !slices.ContainsFunc(records(t, b.Bytes()), func(r [3]string) bool { return r[0] == "again" }) {
			t.Errorf("%s: %q", name, b.String())
		}
	}
}

func TestUnresolvedRefuses(t *testing.T) {
	needRoot(t)
	var b bytes.Buffer
	empty := layerOf(t)
	if _, err := apply(t, t.TempDir(), empty, Options{Unresolved: &b}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("with whiteouts removed: %v", err)
	}
	full := t.TempDir()
	shell(t, full, "touch f")
	if _, err := apply(t, full, empty, Options{Whiteouts: Overlay, Unresolved: &b}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("in a directory that is not empty: %v", err)
	}
	fails := writerFunc(func([]byte) (int, error) { return 0, unix.ENOSPC })
	if _, err := apply(t, t.TempDir(), empty, Options{Whiteouts: Overlay, Unresolved: fails}); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("on a full disk: %v", err)
	}
}

// errAgain says that a layer must be applied again.
var errAgain = errors.New("apply again")

// A settler adds the missing parents to a layer in upper, as dist-apply(1) describes. The view of the layers below is
// lower. This is the smallest implementation, for comparisons.
type settler struct {
	t            *testing.T
	lower, upper string
}

func (s settler) in(dir, p string) string { return filepath.Join(dir, p) }

// find looks for p in lower, and follows no symbolic link.
func (s settler) find(p string) *unix.Stat_t {
	at := s.lower
	var st unix.Stat_t
	for _, name := range strings.Split(p, "/") {
		at += "/" + name
		if err := unix.Lstat(at, &st); err != nil {
			return nil
		}
		if at != s.lower+"/"+p && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return nil
		}
	}
	return &st
}

func (s settler) run(cmd string, args ...string) {
	s.t.Helper()
	c := exec.Command("sh", append([]string{"-euc", cmd, "sh"}, args...)...)
	if out, err := c.CombinedOutput(); err != nil {
		s.t.Fatalf("%s %q: %v: %s", cmd, args, err, out)
	}
}

// keepTimes runs a function that changes a directory, and keeps the directory's times.
func (s settler) keepTimes(dir string, do func()) {
	s.t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		s.t.Fatal(err)
	}
	do()
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, dir, []unix.Timespec{st.Atim, st.Mtim}, 0); err != nil {
		s.t.Fatal(err)
	}
}

func (s settler) like(lower, upper string) {
	s.t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(lower, &st); err != nil {
		s.t.Fatal(err)
	}
	s.must(os.Chown(upper, int(st.Uid), int(st.Gid)))
	s.must(unix.Chmod(upper, st.Mode&0o7777))
	for _, name := range []string{"user.x"} {
		v := make([]byte, 100)
		if n, err := unix.Lgetxattr(lower, name, v); err == nil {
			s.must(unix.Setxattr(upper, name, v[:n], 0))
		}
	}
	s.must(unix.UtimesNanoAt(unix.AT_FDCWD, upper, []unix.Timespec{st.Atim, st.Mtim}, 0))
}

func (s settler) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s settler) settle(list [][3]string) error {
	last := map[string]string{}
	for _, r := range list {
		kind, p := r[0], r[1]
		switch kind {
		case "again":
			return errAgain
		case "directory", "named":
			last[p] = kind
			if st := s.find(p); p != "." && st != nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
				return errAgain
			}
		}
	}
	stage := s.t.TempDir()
	if err := s.links(list, stage); err != nil {
		return err
	}
	for _, r := range list {
		p := s.in(s.upper, r[1])
		var st unix.Stat_t
		if r[0] == "whiteout" && unix.Lstat(p, &st) == nil && isWhiteout(&st) && s.find(r[1]) == nil {
			s.keepTimes(filepath.Dir(p), func() { s.must(os.Remove(p)) })
		}
	}
	for p, kind := range last {
		if kind == "directory" && (p == "." || s.find(p) != nil) {
			s.like(s.in(s.lower, p), s.in(s.upper, p))
		}
	}
	return nil
}

func (s settler) links(list [][3]string, stage string) error {
	copies := map[string]string{}
	for i, r := range list {
		if r[0] != "link" {
			continue
		}
		name, target := r[1], r[2]
		if copies[target] == "" {
			st := s.find(target)
			if st == nil || st.Mode&unix.S_IFMT == unix.S_IFDIR {
				return errAgain
			}
			copies[target] = fmt.Sprintf("%s/%d", stage, i)
			s.run(`cp -a -- "$1" "$2"`, s.in(s.lower, target), copies[target])
			s.copyUp(target, copies[target])
		}
		copies[name] = copies[target]
	}
	for _, r := range list {
		if r[0] != "link" {
			continue
		}
		name := r[1]
		at := s.in(s.upper, name)
		if info, err := os.Lstat(at); err == nil && info.Mode().Type() == os.ModeSocket {
			s.keepTimes(filepath.Dir(at), func() { s.run(`ln -f -P -- "$1" "$2"`, copies[name], at) })
		}
	}
	return nil
}

// copyUp copies what find found in lower at p into upper, if the layer shows it.
func (s settler) copyUp(p, from string) {
	parts := strings.Split(p, "/")
	at := s.upper
	for i, name := range parts {
		var st unix.Stat_t
		next := at + "/" + name
		err := unix.Lstat(next, &st)
		switch {
		case err == nil && (st.Mode&unix.S_IFMT != unix.S_IFDIR || i == len(parts)-1):
			return
		case err == nil && strings.Contains(xattrDump(next), "trusted.overlay.opaque"):
			return
		case err == nil:
		case i == len(parts)-1:
			s.keepTimes(at, func() { s.run(`ln -P -- "$1" "$2"`, from, next) })
		default:
			s.keepTimes(at, func() { s.must(os.Mkdir(next, 0o755)) })
			s.like(s.in(s.lower, strings.Join(parts[:i+1], "/")), next)
		}
		at = next
	}
}

// metEntries makes a layer with few names and all kinds of entries, so that entries concern the same files. The names
// below are those of lower layers, if there are any.
func metEntries(rnd *mrand.Rand, n int, below []string) []entry {
	upper := below != nil
	pick := func() string {
		p := string("abc"[rnd.IntN(3)])
		for range rnd.IntN(3) {
			p += "/" + string("abc"[rnd.IntN(3)])
		}
		return p
	}
	var list []entry
	for i := range n {
		var e entry
		p := pick()
		switch k := rnd.IntN(20); {
		case upper && k < 3:
			e = fileEntry(filepath.Join(filepath.Dir(p), ".wh."+filepath.Base(p)), "")
		case upper && k < 4:
			e = fileEntry(p+"/.wh..wh..opq", "")
		case k < 8:
			e = dirEntry(p, 0o700+rnd.Int64N(64))
			if rnd.IntN(2) == 0 {
				e.PAXRecords = map[string]string{"SCHILY.xattr.user.x": fmt.Sprint(i)}
			}
		case k < 9:
			e = symlink(p, []string{"a", "/b", "../c", "a/../b", "b/c", "."}[rnd.IntN(6)])
		case k < 13:
			e = hardlink(p, pick())
			if upper {
				e.Linkname = below[rnd.IntN(len(below))]
			}
		default:
			e = fileEntry(p, fmt.Sprint(i, upper))
			e.Mode = 0o600 + rnd.Int64N(64)
		}
		e.Uid, e.ModTime = 1+rnd.IntN(3), then.Add(time.Duration(rnd.IntN(1e6))*time.Second)
		list = append(list, e)
	}
	return list
}

var recent = regexp.MustCompile(` 1[7-9]\d{8}\.\d{9}`)

// A layer that is applied alone and settled later is the same as the layer applied on top of its parents.
func TestSettledEqualsSequential(t *testing.T) {
	needRoot(t)
	const seeds = 100
	settled, again, kinds := 0, 0, map[string]int{}
	for seed := range uint64(seeds) {
		rnd := mrand.New(mrand.NewPCG(seed, 4))
		dir := t.TempDir()
		in := func(d string) string { return filepath.Join(dir, d) }
		shell(t, dir, "mkdir -p lower seq/upper alone/upper")
		possible := func(root string, entries []entry) (list []entry) {
			for _, e := range entries {
				if _, err := apply(t, root, layerOf(t, e), Options{}); err == nil {
					list = append(list, e)
				}
			}
			return list
		}
		possible(in("lower"), metEntries(rnd, 20, nil))
		shell(t, dir, "cp -a lower trial")
		upper := layerOf(t, possible(in("trial"), metEntries(rnd, 2+rnd.IntN(8), names(t, in("lower"))))...)
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			sequential := mountOverlay(t, in("seq"), in("lower"), in("seq/upper"))
			before, serr := apply(t, sequential, upper, Options{})
			var b bytes.Buffer
			after, err := apply(t, in("alone/upper"), upper, Options{Whiteouts: Overlay, Unresolved: &b})
			if err != nil {
				if serr == nil {
					t.Fatalf("alone: %v", err)
				}
				return
			}
			list := records(t, b.Bytes())
			if err := (settler{t, in("lower"), in("alone/upper")}).settle(list); errors.Is(err, errAgain) {
				again++
				return
			}
			if serr != nil {
				t.Fatalf("settled what can't be applied: %v", serr)
			}
			settled++
			for _, r := range list {
				kinds[r[0]]++
			}
			merged := mountOverlay(t, in("alone"), in("lower"), in("alone/upper"))
			now := func(lines []string) []string {
				for i := range lines {
					lines[i] = recent.ReplaceAllString(lines[i], " now")
				}
				return lines
			}
			equal(t, now(dump(t, merged)), now(dump(t, sequential)))
			if before.DiffID != after.DiffID || before.Entries != after.Entries || before.Whiteouts != after.Whiteouts {
				t.Errorf("%+v is not %+v", after, before)
			}
			if t.Failed() {
				for _, r := range list {
					t.Logf("%q", r)
				}
				r := tar.NewReader(bytes.NewReader(upper))
				for h, err := r.Next(); err == nil; h, err = r.Next() {
					t.Logf("%c %s %s", h.Typeflag, h.Name, h.Linkname)
				}
			}
		})
	}
	t.Logf("%d settled, %d to apply again, %v", settled, again, kinds)
	if settled < seeds/2 || again == 0 || kinds["link"] < 5 || kinds["whiteout"] < 5 || kinds["named"] < 5 {
		t.Error("too few to mean anything")
	}
}
