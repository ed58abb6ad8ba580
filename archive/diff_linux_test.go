package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"distkit/disk/sys"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

func mustDiff(t testing.TB, lower, upper string, opts DiffOptions) []byte {
	t.Helper()
	var b bytes.Buffer
	l, err := Diff(t.Context(), &b, lower, upper, opts)
	if err != nil {
		t.Fatal(err)
	}
	if got := digest.FromBytes(b.Bytes()); l.Digest != got || l.Size != int64(b.Len()) {
		t.Errorf("descriptor says %s of %d bytes, not %s of %d", l.Digest, l.Size, got, b.Len())
	}
	return b.Bytes()
}

// shell runs a script that changes a directory.
func shell(t testing.TB, dir, script string) {
	t.Helper()
	c := exec.Command("bash", "-euc", "umask 022\n"+script)
	c.Dir = dir
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
}

func copyTree(t testing.TB, from string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy")
	if out, err := exec.Command("cp", "-a", from, to).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	return to
}

// roundTrip checks that the layer between two trees turns one into the other.
func roundTrip(t testing.TB, lower, upper string, opts DiffOptions) []byte {
	t.Helper()
	b := mustDiff(t, lower, upper, withOwners(opts))
	got := copyTree(t, lower)
	mustApply(t, got, b, Options{Strict: true})
	equal(t, dump(t, got), dump(t, upper))
	return b
}

// withOwners makes a diff keep the owner of files that belong to an ordinary user, who could not set another owner.
func withOwners(opts DiffOptions) DiffOptions {
	if uid, gid := uint32(os.Geteuid()), uint32(os.Getegid()); uid != 0 {
		opts.UIDs, opts.GIDs = IDMap{{uid, uid, 1}}, IDMap{{gid, gid, 1}}
	}
	return opts
}

// list returns the entries of a plain layer.
func list(t testing.TB, data []byte) []string {
	t.Helper()
	var all []string
	r := tar.NewReader(bytes.NewReader(data))
	for {
		h, err := r.Next()
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		line := h.Name
		switch h.Typeflag {
		case tar.TypeLink:
			line += " = " + h.Linkname
		case tar.TypeSymlink:
			line += " -> " + h.Linkname
		}
		all = append(all, line)
	}
}

// base is the tree with which continuity's FSSuite begins.
const base = `mkdir -p etc usr/local/lib home; mkdir -m 700 home/derek
	printf '127.0.0.1 localhost' > etc/hosts; ln etc/hosts etc/hosts.allow
	printf '\0\0' > usr/local/lib/libnothing.so; chmod 755 usr/local/lib/libnothing.so
	ln -s libnothing.so usr/local/lib/libnothing.so.2`

// TestDiffSteps changes a tree in steps, each of which is a layer on top of the one before. It has the cases of
// continuity's FSSuite, those of containerd's TestDiffTar, and more.
func TestDiffSteps(t *testing.T) {
	for name, steps := range map[string][]string{
		"basic": {base,
			`printf '127.0.0.1 localhost.localdomain' > etc/hosts; printf '/dev/sda1\t/\text4\n' > etc/fstab; chmod 600 etc/fstab
			 : > etc/badfile; chmod 666 etc/badfile; echo zsh > home/derek/.zshrc; chmod 640 home/derek/.zshrc`,
			`rm etc/badfile; mv home/derek home/notderek`,
			`rm -r usr etc/hosts.allow`,
			`rm -r home; mkdir home; mkdir -m 700 home/derek; echo '#not going away' > home/derek/.bashrc; ln etc/hosts etc/hosts.allow`},
		"deletion": {`mkdir -p test/somedir; mkdir -m 700 lib; : > lib/hidden`,
			`: > test/a; : > test/b; mkdir test/otherdir; : > test/otherdir/.empty; rm -r lib; mkdir -m 700 lib; : > lib/not-hidden`,
			`rm -r test/a test/b test/otherdir; : > lib/newfile`},
		"update": {`mkdir d1; mkdir -m 700 d2; echo something > d1/f1; echo else > d1/f2; echo entirely > d1/f3`,
			`echo 'content of a different length' > d1/f1; chmod 664 d1/f1; rm d1/f3; echo updated > d1/f3; chmod 664 d1/f3
			 chmod 766 d1/f2; chmod 777 d2`},
		"directory permissions": {`mkdir -m 700 d1; mkdir -m 751 d2; mkdir -m 777 d3`,
			`echo x > d1/f; mkdir -m 700 d1/d; echo x > d1/d/f; echo x > d2/f; echo x > d3/f`},
		"parent directory permissions": {`mkdir -m 700 d1 d1/a d1/a/b d1/a/b/c; echo 1 > d1/a/b/f; mkdir -m 751 d2 d2/a d2/a/b d2/a/b/c; echo 1 > d2/a/b/f`,
			`echo 1 > d1/a/b/f; chmod 700 d1/a/b/c; echo 2 > d2/a/b/f; chmod 751 d2/a/b/c`},
		"hard link unmodified":          {base, `printf '127.0.0.1 localhost.localdomain' > etc/hosts`, `ln etc/hosts etc/hosts.deny`},
		"hard link before unmodified":   {base, `printf '127.0.0.1 localhost.localdomain' > etc/hosts`, `ln etc/hosts etc/before-hosts`},
		"hard link before modified":     {base, `printf '127.0.0.1 localhost.localdomain' > etc/hosts`, `rm etc/hosts; echo 127.0.0.1 > etc/hosts; ln etc/hosts etc/before-hosts`},
		"hard link divided":             {`echo 1 > a; ln a b; ln a c; ln a d`, `cp -p a x; rm c d; ln x c; mv x d`, `cp -p a x; mv x a`},
		"hard link united":              {`echo 1 > a; touch -d @7 a; cp -p a b; cp -p a c`, `ln -f a c`, `ln -f a b`},
		"hard link to what is not file": {`ln -s gone a; ln a b; mkfifo p`, `ln a c; ln p q`, `rm a`},
		"kinds replaced": {`mkdir -p a/b/c; echo 1 > f; ln -s a l; mkfifo p`,
			`rm -r a f l p; echo 1 > a; mkdir -p f/g; mkdir l; echo 2 > l/x; ln -s f p`,
			`rm -r a f l p; mkdir -p a/b; ln -s a f; mkfifo l; echo 3 > p`},
		"sparse and empty": {`truncate -s 3M hole; : > empty`, `printf x | dd of=hole bs=1 seek=2000000 conv=notrunc status=none; truncate -s 70000 empty`},
		"same but for content": {`printf one > f; touch -d @1000.5 f; printf two > g; touch -d @1000 g`,
			`printf eno > f; touch -d @1000.5 f; printf owt > g; touch -d @1000 g`},
		"times": {`echo 1 > old; touch -d @-5.25 old; mkdir d; touch -d @4294967297 d; ln -s x l; touch -hd @3.000000001 l`,
			`touch -d @-6 old; touch -d @1.5 d; touch -hd @3.000000002 l`},
		"names": {`mkdir "$(printf '%0200d' 0)"; echo 1 > $'a\nb'; : > $'\xff\xfe'; : > 'ü'; : > a=b; : > .wh; : > 'back\slash'; ln -s "$(printf '%0300d' 0)" l`,
			`mkdir -p "$(printf '%0200d' 0)/$(printf '%0250d' 1)"; rm $'a\nb' $'\xff\xfe' .wh; echo 2 > 'ü'; ln 'ü' "$(printf '%0255d' 2)"`,
			`rm "$(printf '%0255d' 2)"`},
	} {
		t.Run(name, func(t *testing.T) {
			lower := t.TempDir()
			for _, script := range steps {
				upper := copyTree(t, lower)
				shell(t, upper, script)
				roundTrip(t, lower, upper, DiffOptions{Compression: Uncompressed})
				roundTrip(t, upper, lower, DiffOptions{})
				whole := t.TempDir()
				mustApply(t, whole, mustDiff(t, "", upper, withOwners(DiffOptions{Compression: Zstd})), Options{Strict: true})
				equal(t, dump(t, whole), dump(t, upper))
				lower = upper
			}
		})
	}
}

func TestDiffHolds(t *testing.T) {
	for name, c := range map[string]struct {
		lower, upper string
		want         []string
	}{
		"nothing":             {base, ``, nil},
		"parents":             {base, `echo 2 > usr/local/lib/x; touch -r home usr/local/lib .`, []string{"usr/", "usr/local/", "usr/local/lib/", "usr/local/lib/x"}},
		"whiteouts' parents":  {base, `rm usr/local/lib/libnothing.so.2; touch -r home usr/local/lib`, []string{"usr/", "usr/local/", "usr/local/lib/", "usr/local/lib/.wh.libnothing.so.2"}},
		"one whiteout a tree": {base, `rm -r usr; touch -r home .`, []string{".wh.usr"}},
		"the top":             {base, `chmod 700 .`, []string{"./"}},
		"a link removed":      {base, `rm etc/hosts.allow; touch -r home etc`, []string{"etc/", "etc/.wh.hosts.allow"}},
		"a link changed":      {base, `chmod 600 etc/hosts`, []string{"etc/", "etc/hosts", "etc/hosts.allow = etc/hosts"}},
		"a link replaced":     {base, `cp -p etc/hosts x; echo 1 > x; mv x etc/hosts; touch -r home etc .`, []string{"etc/", "etc/hosts", "etc/hosts.allow"}},
		"sorted":              {``, `mkdir b a; : > b/z; : > b/a; : > b.c; : > B; touch -d @1 .`, []string{"./", "B", "a/", "b/", "b/a", "b/z", "b.c"}},
	} {
		t.Run(name, func(t *testing.T) {
			lower := t.TempDir()
			shell(t, lower, c.lower+"\ntouch -d @1000 $(find .)")
			upper := copyTree(t, lower)
			shell(t, upper, c.upper)
			if got := list(t, mustDiff(t, lower, upper, DiffOptions{Compression: Uncompressed})); !slices.Equal(got, c.want) {
				t.Errorf("layer holds %q, not %q", got, c.want)
			}
		})
	}
}

func TestDiffTakesSocketsForMissing(t *testing.T) {
	lower, upper := t.TempDir(), t.TempDir()
	shell(t, lower, "echo 1 > s; touch -d @1000 s .")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	t.Chdir(upper) // the path of a socket must be short
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: "s"}); err != nil {
		t.Fatal(err)
	}
	shell(t, upper, "chmod --reference="+lower+" .; touch -d @1000 .")
	for _, c := range []struct {
		lower, upper string
		want         []string
	}{{lower, upper, []string{".wh.s"}}, {upper, lower, []string{"s"}}, {upper, upper, nil}, {"", upper, []string{"./"}}} {
		if got := list(t, mustDiff(t, c.lower, c.upper, DiffOptions{Compression: Uncompressed})); !slices.Equal(got, c.want) {
			t.Errorf("layer holds %q, not %q", got, c.want)
		}
	}
}

func TestDiffRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		lower, upper string
		want         error
	}{
		"a name like a whiteout":      {``, `: > .wh.x`, errdefs.ErrNotImplemented},
		"to remove such a name":       {`: > .wh.x`, ``, errdefs.ErrNotImplemented},
		"a file in such a directory":  {`mkdir .wh.x`, `mkdir .wh.x; : > .wh.x/y`, errdefs.ErrNotImplemented},
		"a path longer than any":      {``, `n=$(printf '%0250d' 0); for i in {1..17}; do mkdir $n; cd $n; done`, errdefs.ErrNotImplemented},
		"a directory that is missing": {``, `rmdir "$PWD"`, errdefs.ErrNotFound},
		"a file":                      {``, `rmdir "$PWD"; : > "$PWD"`, errdefs.ErrInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			lower, upper := t.TempDir(), t.TempDir()
			shell(t, lower, c.lower)
			shell(t, upper, c.upper)
			if _, err := Diff(t.Context(), io.Discard, lower, upper, DiffOptions{}); !errors.Is(err, c.want) {
				t.Errorf("got %v, not %v", err, c.want)
			}
		})
	}
	dir := t.TempDir()
	shell(t, dir, ": > .wh.x; mkdir .wh.d; : > .wh.d/f")
	if got := list(t, mustDiff(t, dir, dir, DiffOptions{Compression: Uncompressed})); got != nil {
		t.Errorf("a layer of two trees that are the same holds %q", got)
	}
}

// A forest makes random trees and random changes of them.
type forest struct {
	*rand.Rand
	t    testing.TB
	root bool
}

func (f forest) pick(of ...string) string { return of[f.IntN(len(of))] }

// paths returns the files below dir, or its directories and dir itself.
func (f forest) paths(dir string, dirs bool) []string {
	var all []string
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() == dirs {
			all = append(all, p)
		}
		return err
	})
	if err != nil {
		f.t.Fatal(err)
	}
	return all
}

func (f forest) must(err error) {
	f.t.Helper()
	if err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOTDIR) && !errors.Is(err, unix.ENOENT) {
		f.t.Fatal(err)
	}
}

// attributes gives a file random attributes.
func (f forest) attributes(p string) {
	var st unix.Stat_t
	f.must(unix.Lstat(p, &st))
	kind := st.Mode & unix.S_IFMT
	if f.root && f.IntN(3) == 0 {
		f.must(unix.Lchown(p, f.IntN(3)*1_000_000_000, f.IntN(3)))
	}
	if kind != unix.S_IFLNK {
		modes := []uint32{0o644, 0o755, 0o600, 0o4755, 0o2711, 0o1777}
		if f.root {
			modes = append(modes, 0)
		}
		mode := modes[f.IntN(len(modes))]
		if kind == unix.S_IFDIR && !f.root {
			mode |= 0o700
		}
		f.must(unix.Chmod(p, mode))
	}
	if f.IntN(3) == 0 {
		name := "user.x"
		if kind != unix.S_IFREG && kind != unix.S_IFDIR || f.root && f.IntN(2) == 0 {
			name = "trusted.x"
		}
		if f.root || name == "user.x" {
			err := unix.Lsetxattr(p, name, []byte(f.pick("", "1", "a\x00=\nb", strings.Repeat("long", 100))), 0)
			if !errors.Is(err, unix.ENOTSUP) {
				f.must(err)
			}
		}
	}
	f.touch(p)
}

func (f forest) touch(p string) {
	ts := unix.Timespec{Sec: int64(f.IntN(3)) * 1000, Nsec: int64(f.IntN(2)) * 5}
	f.must(unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
}

// change makes one random change somewhere below dir.
func (f forest) change(dir string) {
	dirs, files := f.paths(dir, true), f.paths(dir, false)
	p := filepath.Join(f.pick(dirs...), f.pick("a", "b", "c", "d.e", "ü", "A"))
	file := p
	if len(files) > 0 {
		file = f.pick(files...)
	}
	switch f.IntN(12) {
	case 0, 1:
		f.must(os.Mkdir(p, 0o755))
	case 2, 3:
		w, err := os.OpenFile(p, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o644)
		if err != nil {
			return // the name is taken
		}
		_, _ = w.WriteString(f.pick("", "1", "2", "long enough"))
		f.must(w.Close())
	case 4:
		f.must(os.Symlink(f.pick("a", "../b", "/c"), p))
	case 5:
		f.must(unix.Mkfifo(p, 0o644))
	case 6:
		if !f.root {
			return
		}
		f.must(unix.Mknod(p, unix.S_IFCHR|0o600, int(unix.Mkdev(1, uint32(3+f.IntN(2))))))
	case 7, 8:
		if file != p {
			f.must(os.Link(file, p))
		}
	case 9:
		f.must(os.RemoveAll(f.pick(file, p)))
		return
	case 10:
		f.must(unix.Rename(f.pick(file, f.pick(dirs...)), p))
	case 11: // as a build with fixed times does
		var st unix.Stat_t
		if unix.Lstat(file, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size > 0 && st.Mode&0o600 == 0o600 {
			f.must(os.WriteFile(file, bytes.Repeat([]byte("x"), int(st.Size)), 0))
			f.must(unix.UtimesNanoAt(unix.AT_FDCWD, file, []unix.Timespec{st.Mtim, st.Mtim}, 0))
		}
		return
	}
	if _, err := os.Lstat(p); err == nil {
		f.attributes(p)
	}
}

func TestDiffAndApplyAreInverse(t *testing.T) {
	rounds := 150
	if testing.Short() {
		rounds = 20
	}
	for seed := range rounds {
		f := forest{rand.New(rand.NewPCG(uint64(seed), 5)), t, os.Geteuid() == 0}
		work := t.TempDir()
		trees := []string{filepath.Join(work, "lower"), filepath.Join(work, "upper")}
		f.must(os.Mkdir(trees[0], 0o755))
		for range f.IntN(40) {
			f.change(trees[0])
		}
		if f.IntN(3) > 0 {
			if out, err := exec.Command("cp", "-a", trees[0], trees[1]).CombinedOutput(); err != nil {
				t.Fatalf("cp: %v\n%s", err, out)
			}
		} else {
			f.must(os.Mkdir(trees[1], 0o700))
		}
		for range f.IntN(15) {
			f.change(trees[1])
		}
		for _, d := range f.paths(work, true)[1:] {
			if f.IntN(2) == 0 {
				f.touch(d)
			}
		}
		roundTrip(t, trees[0], trees[1], DiffOptions{Compression: Compression(f.IntN(3))})
		roundTrip(t, trees[1], trees[0], DiffOptions{Compression: Uncompressed})
		if t.Failed() {
			t.Fatalf("with seed %d", seed)
		}
		_ = os.RemoveAll(work)
	}
}

// fuzzed returns random numbers from a fuzzer's input, and from a generator when the input is used up.
type fuzzed struct {
	data []byte
	rest *rand.PCG
}

func (f *fuzzed) Uint64() (n uint64) {
	if len(f.data) < 2 {
		return f.rest.Uint64()
	}
	// The upper bits decide: two bytes are enough for every choice.
	n = uint64(f.data[0])<<56 | uint64(f.data[1])<<48
	f.data = f.data[2:]
	return n | f.rest.Uint64()>>16
}

// FuzzDiff makes two trees of the input, and applies the layers that lead from one to the other and back.
func FuzzDiff(f *testing.F) {
	f.Add([]byte("\x40\x00\x00\x10\x10"), uint8(6), uint8(3))
	f.Add([]byte("some of these and some of those"), uint8(20), uint8(9))
	f.Fuzz(func(t *testing.T, data []byte, lower, change uint8) {
		f := forest{rand.New(&fuzzed{data, rand.NewPCG(1, 2)}), t, os.Geteuid() == 0}
		work := t.TempDir()
		trees := []string{filepath.Join(work, "lower"), filepath.Join(work, "upper")}
		f.must(os.Mkdir(trees[0], 0o755))
		for range lower % 32 {
			f.change(trees[0])
		}
		if out, err := exec.Command("cp", "-a", trees[0], trees[1]).CombinedOutput(); err != nil {
			t.Fatalf("cp: %v\n%s", err, out)
		}
		for range change % 16 {
			f.change(trees[1])
		}
		n := calls(func() { mustDiff(t, trees[0], trees[1], DiffOptions{Compression: Uncompressed}) })
		if most := 50 * int64(len(names(t, trees[0]))+len(names(t, trees[1]))+2); n > most {
			t.Errorf("%d calls, more than %d", n, most)
		}
		roundTrip(t, trees[0], trees[1], DiffOptions{Compression: Uncompressed})
		roundTrip(t, trees[1], trees[0], DiffOptions{Compression: Uncompressed})
	})
}

func TestDiffIsReproducible(t *testing.T) {
	dir := t.TempDir()
	r := rand.New(rand.NewPCG(1, 2))
	var words [64]string
	for i := range words {
		words[i] = fmt.Sprintf("%x", sha256.Sum256([]byte{byte(i)}))[:3+i%9]
	}
	for i := range 200 {
		var b strings.Builder
		for b.Len() < 1<<r.IntN(20) {
			b.WriteString(words[r.IntN(len(words))])
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	other := copyTree(t, dir)
	for form, plain := range map[Compression]func(io.Reader) (io.Reader, error){
		Gzip:         func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) },
		Zstd:         func(r io.Reader) (io.Reader, error) { return zstd.NewReader(r) },
		Uncompressed: func(r io.Reader) (io.Reader, error) { return r, nil },
	} {
		first := mustDiff(t, "", dir, DiffOptions{Compression: form, Workers: 1})
		for workers := 1; workers <= 4; workers++ {
			if !bytes.Equal(first, mustDiff(t, "", other, DiffOptions{Compression: form, Workers: workers})) {
				t.Errorf("form %d: other bytes with %d workers", form, workers)
			}
		}
		var b bytes.Buffer
		l, err := Diff(t.Context(), &b, "", dir, DiffOptions{Compression: form})
		if err != nil {
			t.Fatal(err)
		}
		p, err := plain(&b)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := digest.FromReader(p); err != nil || got != l.DiffID {
			t.Errorf("form %d: diff ID is %s, not %s: %v", form, got, l.DiffID, err)
		}
		if r := mustApply(t, t.TempDir(), first, Options{ExpectDiffID: l.DiffID}); r.DiffID != l.DiffID {
			t.Errorf("form %d: Apply says %s", form, r.DiffID)
		}
	}
}

func TestDiffClampsTimes(t *testing.T) {
	dir := t.TempDir()
	shell(t, dir, "echo 1 > a; touch -d @1000.5 a; echo 2 > b; touch -d @3000 b; touch -d @5000 .")
	got := t.TempDir()
	mustApply(t, got, mustDiff(t, "", dir, DiffOptions{Latest: time.Unix(2000, 0)}), Options{})
	for name, want := range map[string]time.Time{"a": time.Unix(1000, 5e8), "b": time.Unix(2000, 0), ".": time.Unix(2000, 0)} {
		if info, err := os.Stat(filepath.Join(got, name)); err != nil || !info.ModTime().Equal(want) {
			t.Errorf("%s has the time %v, not %v; %v", name, info.ModTime(), want, err)
		}
	}
}

// TestDiffIsPlainUSTAR checks that a layer has no extended headers where none are needed.
func TestDiffIsPlainUSTAR(t *testing.T) {
	dir := t.TempDir()
	shell(t, dir, "mkdir -p d; echo 1 > d/f; ln d/f g; ln -s x l; touch -hd @1000 l d/f d .")
	b := mustDiff(t, "", dir, DiffOptions{Compression: Uncompressed})
	if bytes.Contains(b, []byte("PaxHeaders")) || bytes.Contains(b, []byte("././@LongLink")) {
		t.Error("a layer of short names and whole seconds has extended headers")
	}
}

type failing struct{ after int }

func (f *failing) Write(p []byte) (int, error) {
	if f.after -= len(p); f.after < 0 {
		return 0, unix.ENOSPC
	}
	return len(p), nil
}

func TestDiffEndsEarly(t *testing.T) {
	dir := t.TempDir()
	noise := make([]byte, 8<<20)
	_, _ = rand.NewChaCha8([32]byte{}).Read(noise)
	if err := os.WriteFile(filepath.Join(dir, "f"), noise, 0o644); err != nil {
		t.Fatal(err)
	}
	fds := openFDs(t)
	for form := range Uncompressed + 1 {
		for _, after := range []int{0, 5, 1 << 20, 8 << 20} {
			if _, err := Diff(t.Context(), &failing{after}, "", dir, DiffOptions{Compression: form}); !errors.Is(err, unix.ENOSPC) {
				t.Errorf("form %d: got %v where output fails after %d bytes", form, err, after)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		w := writerFunc(func(p []byte) (int, error) { cancel(); return len(p), nil })
		if _, err := Diff(ctx, w, "", dir, DiffOptions{Compression: form}); err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("form %d: got %v when cancelled", form, err)
		}
		cancel()
		if _, err := Diff(ctx, io.Discard, "", dir, DiffOptions{Compression: form}); !errors.Is(err, context.Canceled) {
			t.Errorf("form %d: got %v when cancelled before", form, err)
		}
	}
	if n := openFDs(t); n != fds {
		t.Errorf("%d descriptors are open, %d were before", n, fds)
	}
}

// TestDiffSeesChanges truncates a file while it is read.
func TestDiffSeesChanges(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "f")
	if err := os.WriteFile(file, make([]byte, 16<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	written := 0
	w := writerFunc(func(p []byte) (int, error) {
		if written += len(p); written > 1<<20 {
			return len(p), os.Truncate(file, 1)
		}
		return len(p), nil
	})
	_, err := Diff(t.Context(), w, "", dir, DiffOptions{Compression: Uncompressed, Workers: 1})
	if err == nil || !strings.Contains(err.Error(), "changed while it was read") {
		t.Errorf("got %v", err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// TestDiffOfUpper uses an upper directory that overlayfs itself has written.
func TestDiffOfUpper(t *testing.T) {
	needRoot(t)
	work := t.TempDir()
	at := func(name string) string { return filepath.Join(work, name) }
	// The work directory of a test may be on overlayfs, which can't be used for an upper directory.
	if err := unix.Mount("tmpfs", work, "tmpfs", 0, "size=64m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(work, unix.MNT_DETACH) })
	for _, d := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(at(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	shell(t, at("lower"), base+`
		mkdir -p opaque/sub gone/deep kind; echo 1 > opaque/one; echo 2 > opaque/sub/two; echo 3 > kind/f; echo 4 > linked; ln linked linked2`)
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,index=off,metacopy=off,redirect_dir=off", at("lower"), at("upper"), at("work"))
	if err := unix.Mount("overlay", at("merged"), "overlay", 0, options); err != nil {
		t.Fatalf("mount overlay: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(at("merged"), unix.MNT_DETACH) })
	shell(t, at("merged"), `rm -r gone usr/local/lib/libnothing.so; echo new > etc/new; ln etc/new etc/new2
		rm -r opaque; mkdir -m 750 opaque; echo 3 > opaque/three; chmod 600 etc/hosts
		rm -r kind; echo 5 > kind; rm home/derek -r; ln -s gone home/derek; touch -d @77.7 home .; rm linked2`)

	b := mustDiff(t, "", at("upper"), DiffOptions{Compression: Uncompressed, Overlay: true})
	got := copyTree(t, at("lower"))
	mustApply(t, got, b, Options{Strict: true})
	equal(t, dump(t, got), dump(t, at("merged")))
	for _, want := range []string{".wh.gone", "opaque/.wh..wh..opq", "etc/new2 = etc/new"} {
		if !slices.Contains(list(t, b), want) {
			t.Errorf("layer does not hold %s: %q", want, list(t, b))
		}
	}
	roundTrip(t, at("lower"), at("merged"), DiffOptions{})

	// In overlay form the layer makes the same upper directory again.
	again := filepath.Join(work, "again")
	if err := os.Mkdir(again, 0o755); err != nil {
		t.Fatal(err)
	}
	mustApply(t, again, b, Options{Strict: true, Whiteouts: Overlay})
	if second := mustDiff(t, "", again, DiffOptions{Compression: Uncompressed, Overlay: true}); !bytes.Equal(second, b) {
		t.Errorf("applied in overlay form and read again it holds %q, not %q", list(t, second), list(t, b))
	}

	if _, err := Diff(t.Context(), io.Discard, "", at("upper"), DiffOptions{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an upper directory read as a tree: %v", err)
	}
	if _, err := Diff(t.Context(), io.Discard, at("lower"), at("upper"), DiffOptions{Overlay: true}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an upper directory beside a lower: %v", err)
	}
	marked := filepath.Join(work, "marked")
	if err := os.Mkdir(marked, 0o755); err != nil {
		t.Fatal(err)
	}
	shell(t, marked, "mkdir d o; : > d/gone; : > d/here; : > o/f")
	for name, value := range map[string]string{"d opaque": "x", "d/gone whiteout": "y", "o opaque": "y", "o/f origin": "z"} {
		p, attribute, _ := strings.Cut(name, " ")
		if err := unix.Setxattr(filepath.Join(marked, p), "trusted.overlay."+attribute, []byte(value), 0); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{"./", "d/", "d/.wh.gone", "d/here", "o/", "o/.wh..wh..opq", "o/f"}
	if got := list(t, mustDiff(t, "", marked, DiffOptions{Compression: Uncompressed, Overlay: true})); !slices.Equal(got, want) {
		t.Errorf("layer holds %q, not %q", got, want)
	}
	for _, a := range []string{"metacopy", "redirect"} {
		dir := filepath.Join(work, a)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		shell(t, dir, ": > f")
		if err := unix.Setxattr(dir+"/f", "trusted.overlay."+a, []byte("x"), 0); err != nil {
			t.Fatal(err)
		}
		if _, err := Diff(t.Context(), io.Discard, "", dir, DiffOptions{Overlay: true}); !errdefs.IsNotImplemented(err) {
			t.Errorf("%s: %v", a, err)
		}
	}
}

// A plain archive may have any names. It has no entry for the top, nor for files that are mounted below it. A file that
// has grown since it was listed is archived completely.
func TestDiffArchive(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	mustApply(t, dir, layerOf(t, dirEntry("etc", 0o750), fileEntry("etc/a", "1"), hardlink("etc/b", "etc/a"), fileEntry("etc/secret", "below"), dirEntry("mnt", 0o700), fileEntry("other", "")), Options{})
	if err := os.WriteFile(filepath.Join(dir, "etc/.wh.x"), []byte("2"), 0o600); err != nil {
		t.Fatal(err)
	}
	want, named := "etc/ etc/.wh.x etc/a etc/b etc/secret mnt/", "mnt/"
	if sys.Capable(unix.CAP_SYS_ADMIN) {
		if err := unix.Mount("tmpfs", filepath.Join(dir, "mnt"), "tmpfs", 0, ""); err == nil {
			defer func() { _ = unix.Unmount(filepath.Join(dir, "mnt"), 0) }()
			if err := os.WriteFile(filepath.Join(dir, "mnt/inside"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			// A file can be a mount point, too.
			if err := unix.Mount(filepath.Join(dir, "other"), filepath.Join(dir, "etc/secret"), "", unix.MS_BIND, ""); err != nil {
				t.Fatal(err)
			}
			defer func() { _ = unix.Unmount(filepath.Join(dir, "etc/secret"), 0) }()
			want, named = strings.Replace(want, "etc/secret ", "", 1), "mnt/ mnt/inside"
		}
	}
	entries := func(opts DiffOptions) string {
		t.Helper()
		opts.Archive, opts.Compression = true, Uncompressed
		var out bytes.Buffer
		if _, err := Diff(t.Context(), &out, "", dir, opts); err != nil {
			t.Fatal(err)
		}
		var got []string
		for r := tar.NewReader(&out); ; {
			h, err := r.Next()
			if err == io.EOF {
				return strings.Join(got, " ")
			}
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, h.Name)
		}
	}
	if got := entries(DiffOptions{Exclude: []string{"other"}}); got != want {
		t.Errorf("%q, not %q", got, want)
	}
	// A file that the caller names may itself be a mount point.
	if got := entries(DiffOptions{Only: []string{"mnt"}}); got != named {
		t.Errorf("a mounted directory by its name: %q, not %q", got, named)
	}

	top, err := openTop(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer top.close()
	listed, err := stat(top.fd, "", "other")
	if err != nil {
		t.Fatal(err)
	}
	write := func(text string) {
		if err := os.WriteFile(filepath.Join(dir, "other"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("grown")
	fd, err := listed.openNow()
	if err != nil || listed.st.Size != 5 {
		t.Fatalf("a file of %d bytes: %v", listed.st.Size, err)
	}
	_ = unix.Close(fd)
	if err := os.Rename(filepath.Join(dir, "other"), filepath.Join(dir, "moved")); err != nil {
		t.Fatal(err)
	}
	write("another")
	if _, err := listed.openNow(); !errors.Is(err, unix.ENOENT) {
		t.Errorf("another file is opened: %v", err)
	}
	other := filepath.Join(dir, "other")
	if err := errors.Join(os.Remove(other), unix.Mkfifo(other, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := listed.openNow(); !errors.Is(err, unix.ENOENT) {
		t.Errorf("a pipe is opened: %v", err)
	}
}
