package main

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"distkit/content"

	"github.com/opencontainers/go-digest"
)

// The test binary is also the command.
func TestMain(m *testing.M) {
	if os.Getenv("DIST_INGEST_TEST") != "" {
		main()
	}
	os.Exit(m.Run())
}

// fixture is a working directory with a store and a file of random bytes.
type fixture struct {
	t    *testing.T
	dir  string
	s    *content.Store
	b    []byte
	dgst string
}

func newFixture(t *testing.T) *fixture {
	f := &fixture{t: t, dir: t.TempDir(), b: make([]byte, 1<<20)}
	_, _ = rand.Read(f.b)
	f.dgst = string(digest.FromBytes(f.b))
	f.file("blob", f.b)
	var err error
	if f.s, err = content.Open(filepath.Join(f.dir, "store")); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fixture) file(name string, b []byte) {
	f.t.Helper()
	if err := os.WriteFile(filepath.Join(f.dir, name), b, 0o644); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) command(stdin io.Reader, args ...string) *exec.Cmd {
	c := exec.Command(os.Args[0], args...)
	c.Dir, c.Stdin = f.dir, stdin
	c.Env = append(os.Environ(), "DIST_INGEST_TEST=1", "DIST_ROOT="+f.s.Root(), "DIGEST="+f.dgst)
	return c
}

type result struct {
	status   int
	out, err string
}

func (f *fixture) run(stdin io.Reader, args ...string) result {
	f.t.Helper()
	var out, errs bytes.Buffer
	c := f.command(stdin, args...)
	c.Stdout, c.Stderr = &out, &errs
	err := c.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		f.t.Fatal(err)
	}
	return result{c.ProcessState.ExitCode(), out.String(), errs.String()}
}

// script runs dist-ingest with a shell script as its command.
func (f *fixture) script(script string, args ...string) result {
	f.t.Helper()
	return f.run(nil, append(args, "ref", "--", "sh", "-c", script)...)
}

func (f *fixture) want(r result, status int, stderr string) {
	f.t.Helper()
	if r.status != status || !strings.Contains(r.err, stderr) || stderr == "" && r.err != "" {
		f.t.Errorf("status %d, stderr %q; want %d, %q", r.status, r.err, status, stderr)
	}
	if strings.Count(r.err, "\n") > 1 {
		f.t.Errorf("more than one line: %q", r.err)
	}
}

// stored checks that the blob is complete, and that nothing is left of the ingest.
func (f *fixture) stored(r result) {
	f.t.Helper()
	f.want(r, 0, "")
	if want := f.dgst + "\t" + strconv.Itoa(len(f.b)) + "\n"; r.out != want {
		f.t.Errorf("stdout %q, not %q", r.out, want)
	}
	f.there()
}

func (f *fixture) there() {
	f.t.Helper()
	path, err := f.s.Path(digest.Digest(f.dgst))
	if err != nil {
		f.t.Fatal(err)
	}
	if b, err := os.ReadFile(path); err != nil || !bytes.Equal(b, f.b) {
		f.t.Errorf("the blob has %d bytes, %v", len(b), err)
	}
	f.left(-1)
}

// left checks that an ingest with n bytes is there; -1 means no ingest, not even a directory.
func (f *fixture) left(n int64) {
	f.t.Helper()
	list, err := f.s.ListStatuses(f.t.Context())
	if err != nil {
		f.t.Fatal(err)
	}
	entries, err := os.ReadDir(filepath.Join(f.s.Root(), "ingest"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		f.t.Fatal(err)
	}
	switch {
	case n < 0 && len(entries) > 0:
		f.t.Errorf("left in ingest/: %v", entries)
	case n >= 0 && (len(list) != 1 || list[0].Offset != n || list[0].Active):
		f.t.Errorf("left: %+v, not %d bytes", list, n)
	}
}

// ran returns the lines that runs of a script have appended to the file "runs".
func (f *fixture) ran() []string {
	b, _ := os.ReadFile(filepath.Join(f.dir, "runs"))
	return strings.Fields(string(b))
}

func TestStandardInput(t *testing.T) {
	f := newFixture(t)
	size := strconv.Itoa(len(f.b))
	f.stored(f.run(bytes.NewReader(f.b), "--expected-digest", f.dgst, "--expected-size", size))
	// the blob exists: nothing is read
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	f.stored(f.run(r, "--expected-digest", f.dgst, "ref"))
	f.want(f.run(r, "--expected-digest", f.dgst, "--expected-size", "7"), 4, "size mismatch")
	f.want(f.run(r, "--expected-digest", f.dgst, "--expected-size", "0"), 4, "size mismatch")
	f.stored(f.run(bytes.NewReader(f.b), "ref"))
}

func TestNothingIsABlobToo(t *testing.T) {
	f := newFixture(t)
	empty := string(digest.FromString(""))
	f.want(f.run(strings.NewReader("x"), "--expected-size", "0", "ref"), 4, "size mismatch")
	f.left(-1)
	if r := f.run(nil, "--expected-size", "0", "ref"); r.status != 0 || r.out != empty+"\t0\n" {
		t.Errorf("%+v", r)
	}
}

func TestWhatIsWrongIsThrownAway(t *testing.T) {
	f := newFixture(t)
	for name, args := range map[string][]string{
		"digest mismatch": {"--expected-digest", f.dgst},
		"size mismatch":   {"--expected-size", "8"},
		"more than":       {"--expected-size", "2", "--expected-digest", f.dgst},
	} {
		f.want(f.run(strings.NewReader("wrong"), append(args, "ref")...), 4, name)
		f.left(-1)
		f.want(f.run(nil, append(args, "ref", "--", "echo", "wrong")...), 4, name)
		f.left(-1)
	}
	f.want(f.run(strings.NewReader("wrong"), "--keep", "--expected-digest", f.dgst, "ref"), 4, "digest mismatch")
	f.left(5)
	f.stored(f.script(`tail -c +$((DIST_OFFSET+1)) blob`, "--expected-digest", f.dgst))
}

func TestUsage(t *testing.T) {
	f := newFixture(t)
	for _, args := range [][]string{
		{}, {"--"}, {"ref", "--"}, {"a", "b"}, {"--expected-size", "-1", "ref"}, {"--expected-size", "x", "ref"},
		{"--expected-digest", "sha256:abc", "ref"}, {"--expected-digest", "", "ref"}, {"a\nb"}, {""},
	} {
		f.want(f.run(nil, args...), 2, "dist-ingest: ")
	}
	f.want(f.run(nil, "--expected-digest", "sha384:"+strings.Repeat("a", 96)), 10, "sha384")
	if _, err := os.Stat(f.s.Root()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a store was created: %v", err)
	}
}

func TestCommand(t *testing.T) {
	f := newFixture(t)
	f.stored(f.script(`echo x >>runs; test $DIST_OFFSET = 0 && cat blob`, "--expected-digest", f.dgst))
	f.stored(f.script(`echo x >>runs; cat blob`, "--expected-digest", f.dgst))
	if len(f.ran()) != 1 {
		t.Errorf("the command ran %d times", len(f.ran()))
	}
	f.stored(f.script(`cat blob`)) // without an expected digest
}

func TestStatusOfTheCommand(t *testing.T) {
	for script, want := range map[string]struct {
		status int
		stderr string
		left   int64
	}{
		`exit 3`:                                   {3, "", -1},
		`echo oops >&2; exit 1`:                    {1, "oops\n", -1},
		`head -c 1000 blob; exit 1`:                {1, "", 1000},
		`head -c 1000 blob; exit 255`:              {255, "", 1000},
		`head -c 1000 blob; exit 4`:                {4, "", -1},
		`head -c 1000 blob; exec 1>&-; kill -9 $$`: {128 + 9, "", 1000},
		`head -c 1000 blob; exec 1>&-; exit 9`:     {9, "", 1000},
		`head -c 1000 blob`:                        {4, "digest mismatch", -1},
	} {
		f := newFixture(t)
		f.want(f.script(script, "--expected-digest", f.dgst), want.status, want.stderr)
		f.left(want.left)
		f.stored(f.script(`tail -c +$((DIST_OFFSET+1)) blob`, "--expected-digest", f.dgst))
	}
	f := newFixture(t)
	f.want(f.run(nil, "ref", "--", "no-such-command"), 127, "no-such-command")
	f.want(f.run(nil, "ref", "--", "./no-such-command"), 127, "no-such-command")
	f.want(f.run(nil, "ref", "--", "./blob"), 126, "permission denied")
	f.left(-1)
}

func TestTemporaryFailuresAreTriedAgain(t *testing.T) {
	f := newFixture(t)
	// each attempt brings 300,000 bytes more, except for one that brings none
	f.stored(f.script(`echo $DIST_OFFSET >>runs
		test $(wc -l <runs) = 2 && exit 6
		tail -c +$((DIST_OFFSET+1)) blob | head -c 300000
		test $((DIST_OFFSET+300000)) -ge $(wc -c <blob) || exit 6`, "--expected-digest", f.dgst))
	if got, want := strings.Join(f.ran(), " "), "0 300000 300000 600000 900000"; got != want {
		t.Errorf("offsets were %s, not %s", got, want)
	}

	f = newFixture(t)
	f.want(f.script(`echo x >>runs; head -c $((5000-DIST_OFFSET)) blob; exit 6`, "--expected-digest", f.dgst), 6, "")
	if n := len(f.ran()); n != 4 {
		t.Errorf("ran %d times", n)
	}
	f.left(5000)
	r := f.run(nil, "--expected-digest", f.dgst, "ref", "--", "sh", "-c", `test $0 = 5000 && tail -c +5001 blob`, "{offset}")
	f.stored(r)

	// a command that brings only a few bytes each time is not run for ever
	f = newFixture(t)
	f.want(f.script(`echo x >>runs; tail -c +$((DIST_OFFSET+1)) blob | head -c 500; exit 6`, "--expected-digest", f.dgst), 6, "")
	if n := len(f.ran()); n != 3 {
		t.Errorf("ran %d times for a few bytes each", n)
	}
	f.left(1500)
}

func TestWithoutADigestHalvesAreNotMixed(t *testing.T) {
	f := newFixture(t)
	f.want(f.script(`head -c 1000 blob; exit 1`), 1, "")
	f.left(1000)
	f.stored(f.script(`test -e tried || { touch tried; head -c 2000 blob; exit 6; }; cat blob`))
	f = newFixture(t)
	f.want(f.script(`head -c 1000 blob; exit 1`), 1, "")
	f.stored(f.script(`test $DIST_OFFSET = 1000 && tail -c +1001 blob`))
}

func TestWhatWasResumedWronglyIsFetchedOnceMore(t *testing.T) {
	for name, left := range map[string]string{"wrong": "wrong", "ignored": ""} {
		f := newFixture(t)
		if left == "" {
			left = string(f.b[:1000])
		}
		f.file("left", []byte(left))
		f.want(f.script(`cat left; exit 1`, "--expected-digest", f.dgst), 1, "")
		script := `echo $DIST_OFFSET >>runs; tail -c +$((DIST_OFFSET+1)) blob`
		if name == "ignored" {
			script = `echo $DIST_OFFSET >>runs; cat blob`
		}
		f.stored(f.script(script, "--expected-digest", f.dgst, "--expected-size", strconv.Itoa(len(f.b))))
		if got, want := strings.Join(f.ran(), " "), strconv.Itoa(len(left))+" 0"; got != want {
			t.Errorf("%s: offsets were %s, not %s", name, got, want)
		}
	}
	f := newFixture(t)
	f.want(f.script(`echo wrong; exit 1`, "--expected-digest", f.dgst), 1, "")
	f.want(f.script(`echo x >>runs; echo wrong`, "--expected-digest", f.dgst), 4, "digest mismatch")
	if n := len(f.ran()); n != 2 {
		t.Errorf("ran %d times", n)
	}
	f.left(-1)
}

// TestPastTheEnd tests a producer that refuses an offset beyond the end.
func TestPastTheEnd(t *testing.T) {
	f := newFixture(t)
	f.want(f.script(`cat blob blob; exit 1`, "--expected-digest", f.dgst), 1, "")
	f.stored(f.script(`test $DIST_OFFSET -le $(wc -c <blob) || exit 2; tail -c +$((DIST_OFFSET+1)) blob`, "--expected-digest", f.dgst))
}

func TestTooMuchEndsTheCommand(t *testing.T) {
	f := newFixture(t)
	f.want(f.run(nil, "--expected-size", "100000", "ref", "--", "cat", "/dev/zero"), 4, "size mismatch")
	f.left(-1)
}

// waiting starts a command that writes "ready" to a FIFO and then waits.
func (f *fixture) waiting(args ...string) *exec.Cmd {
	f.t.Helper()
	fifo := filepath.Join(f.dir, "fifo")
	_ = os.Remove(fifo)
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		f.t.Fatal(err)
	}
	c := f.command(nil, append(args, "--", "sh", "-c", `trap '(echo got >>runs) 2>/dev/null; exit 1' TERM; head -c 1000 blob; echo ready >fifo; while :; do sleep 0.05; done`)...)
	c.Stderr = os.Stderr
	if err := c.Start(); err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() {
		if c.ProcessState == nil {
			_ = c.Process.Signal(syscall.SIGTERM) // it waits for its command, which writes to the FIFO
			_ = c.Wait()
		}
	})
	if b, err := os.ReadFile(fifo); err != nil || string(b) != "ready\n" {
		f.t.Fatalf("%q, %v", b, err)
	}
	return c
}

func TestSignals(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		f := newFixture(t)
		c := f.waiting("--expected-digest", f.dgst, "ref")
		f.want(f.run(nil, "--no-wait", "--expected-digest", f.dgst, "other"), 5, "busy")
		if err := c.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		_ = c.Wait()
		if ws := c.ProcessState.Sys().(syscall.WaitStatus); !ws.Signaled() || ws.Signal() != sig {
			t.Errorf("sent %v: %v", sig, c.ProcessState)
		}
		if got := strings.Join(f.ran(), " "); got != "got" {
			t.Errorf("the command was told %q", got)
		}
		f.left(1000)
	}
}

func TestWaitingForAnother(t *testing.T) {
	f := newFixture(t)
	c := f.waiting("--expected-digest", f.dgst, "first")
	second := f.command(nil, "--expected-digest", f.dgst, "second", "--", "sh", "-c", `echo $DIST_OFFSET >>runs; tail -c +$((DIST_OFFSET+1)) blob`)
	var out bytes.Buffer
	second.Stdout, second.Stderr = &out, os.Stderr
	if err := second.Start(); err != nil {
		t.Fatal(err)
	}
	_ = c.Process.Kill() // the second process takes over
	_ = c.Wait()
	if err := second.Wait(); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(f.ran(), " "); !strings.Contains(got, "1000") && !strings.Contains(got, "0") {
		t.Errorf("ran from %q", got)
	}
	f.there()

	f = newFixture(t)
	c = f.waiting("ref")
	f.want(f.run(strings.NewReader("x"), "ref"), 5, fmt.Sprintf("dist-ingest: ingest ref: busy: process %d (", c.Process.Pid))
}

func TestStoresThatCanNotBe(t *testing.T) {
	f := newFixture(t)
	f.want(f.run(strings.NewReader("x"), "--root", "blob", "ref"), 1, "not a directory")
	f.file("layout", nil)
	if err := os.Mkdir(filepath.Join(f.dir, "other"), 0o755); err != nil {
		t.Fatal(err)
	}
	f.file("other/oci-layout", []byte(`{"imageLayoutVersion":"9.0.0"}`))
	f.want(f.run(strings.NewReader("x"), "--root", "other", "ref"), 8, "9.0.0")
}
