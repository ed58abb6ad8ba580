package content_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"distkit/content"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// The test binary is also the program of the other processes in the tests: see child.
func TestMain(m *testing.M) {
	if job := os.Getenv("CONTENT_TEST_CHILD"); job != "" {
		if err := child(job, os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// jobs are the functions that other processes run. A job gets the store and its arguments. The test that needs a job
// registers it.
var jobs = map[string]func(*content.Store, []string) error{}

// child runs one job in the store at args[0]. It runs in a process of its own.
func child(job string, args []string) error {
	s, err := content.Open(args[0])
	if err != nil {
		return err
	}
	if jobs[job] == nil {
		return fmt.Errorf("no such job: %s", job)
	}
	return jobs[job](s, args[1:])
}

func init() {
	// hold REF DIGEST: ingests standard input, prints after each piece how much is stored, and never ends by itself.
	jobs["hold"] = func(s *content.Store, args []string) error {
		w, err := s.Writer(context.Background(), args[0], 0, digest.Digest(args[1]))
		if err != nil {
			return err
		}
		buf := make([]byte, 1<<20)
		for {
			fmt.Println(w.Offset())
			n, err := os.Stdin.Read(buf)
			if err != nil {
				select {}
			}
			if _, err := w.Write(buf[:n]); err != nil {
				return err
			}
		}
	}
	// ingest REF DIGEST FILE: waits for the lock, appends the file to the ingest, and prints the outcome.
	jobs["ingest"] = func(s *content.Store, args []string) error {
		ctx, expected := context.Background(), digest.Digest(args[1])
		w, err := s.Writer(ctx, args[0], 0, expected, content.Wait)
		if errdefs.IsAlreadyExists(err) {
			fmt.Println("exists")
			return nil
		}
		if err != nil {
			return err
		}
		defer w.Close()
		f, err := os.Open(args[2])
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := io.Copy(w, f); err != nil {
			return err
		}
		fmt.Println("stored")
		if err := w.Commit(ctx, 0, expected, nil); !errdefs.IsAlreadyExists(err) {
			return err
		}
		return nil
	}
}

func childCommand(job string, args ...string) *exec.Cmd {
	c := exec.Command(os.Args[0], args...)
	c.Env = append(os.Environ(), "CONTENT_TEST_CHILD="+job)
	c.Stderr = os.Stderr
	return c
}

// process is another process that uses a store.
type process struct {
	*exec.Cmd
	t   *testing.T
	in  io.WriteCloser
	out *bufio.Reader
}

// start runs a job in another process, which is ended with the test if it still runs.
func start(t *testing.T, s *content.Store, job string, args ...string) *process {
	t.Helper()
	p := &process{Cmd: childCommand(job, append([]string{s.Root()}, args...)...), t: t}
	in, err := p.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := p.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	p.in, p.out = in, bufio.NewReader(out)
	t.Cleanup(p.kill)
	return p
}

// line reads the next line that the process prints.
func (p *process) line() string {
	p.t.Helper()
	line, err := p.out.ReadString('\n')
	if err != nil {
		p.t.Fatalf("the other process ended: %q, %v", line, err)
	}
	return strings.TrimSuffix(line, "\n")
}

func (p *process) kill() {
	if p.ProcessState == nil {
		_ = p.Process.Kill()
		_ = p.Wait()
	}
}

// holder is a process that has an ingest open.
type holder struct{ *process }

func hold(t *testing.T, s *content.Store, ref string, expected digest.Digest) holder {
	t.Helper()
	h := holder{start(t, s, "hold", ref, string(expected))}
	h.stored()
	return h
}

// stored waits until the process prints that it has stored that many bytes.
func (h holder) stored() int {
	h.t.Helper()
	n, err := strconv.Atoi(h.line())
	if err != nil {
		h.t.Fatal(err)
	}
	return n
}

func (h holder) write(b []byte) {
	h.t.Helper()
	go h.in.Write(b)
	for n := 0; n < len(b); {
		n = h.stored()
	}
}

func status(t *testing.T, s *content.Store, ref string) content.Status {
	t.Helper()
	st, err := s.Status(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func TestAKilledIngestResumes(t *testing.T) {
	b, dgst := random(t, 5<<20)
	for _, expected := range []digest.Digest{dgst, ""} {
		s := newStore(t)
		h := hold(t, s, "ref", expected)
		h.write(b[:3<<20])
		if st := status(t, s, "ref"); !st.Active || st.Offset != 3<<20 || st.Ref != "ref" || st.Expected != expected {
			t.Errorf("while it is written: %+v", st)
		}
		if _, err := s.Writer(t.Context(), "ref", 0, expected); !errdefs.IsUnavailable(err) {
			t.Errorf("a second writer: %v", err)
		}
		if err := s.Abort(t.Context(), "ref"); !errdefs.IsUnavailable(err) {
			t.Errorf("abort: %v", err)
		}
		h.kill()
		if st := status(t, s, "ref"); st.Active || st.Offset != 3<<20 {
			t.Errorf("after the kill: %+v", st)
		}
		w, err := s.Writer(t.Context(), "ref", int64(len(b)), expected)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		if w.Offset() != 3<<20 || w.Digest() != digest.FromBytes(b[:3<<20]) {
			t.Errorf("resumed at %d, %s", w.Offset(), w.Digest())
		}
		if _, err := w.Write(b[w.Offset():]); err != nil {
			t.Fatal(err)
		}
		if err := w.Commit(t.Context(), 0, dgst, nil); err != nil {
			t.Fatal(err)
		}
		wantBlob(t, s, dgst, b)
		if got := files(t, filepath.Join(s.Root(), "ingest")); len(got) > 0 {
			t.Errorf("left in ingest: %q", got)
		}
	}
}

func TestManyProcessesStoreABlobOnce(t *testing.T) {
	s := newStore(t)
	b, dgst := random(t, 1<<20)
	file := filepath.Join(t.TempDir(), "blob")
	if err := os.WriteFile(file, b, 0o644); err != nil {
		t.Fatal(err)
	}
	h := hold(t, s, string(dgst), dgst) // the ingest that is found by its digest
	h.write(b[:100])
	const n = 16
	outs := make([]bytes.Buffer, n)
	children := make([]*exec.Cmd, n)
	for i := range children {
		c := childCommand("ingest", s.Root(), "ref"+strconv.Itoa(i), string(dgst), file)
		c.Stdout = &outs[i]
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		children[i] = c
	}
	if _, err := s.Writer(t.Context(), "other", 0, dgst); !errdefs.IsUnavailable(err) {
		t.Errorf("without waiting: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Writer(ctx, "other", 0, dgst, content.Wait); !errors.Is(err, context.Canceled) {
		t.Errorf("waiting with a cancelled context: %v", err)
	}
	h.kill() // the others take over; the first of them finds 100 bytes and continues with the wrong ones
	stored, failed := 0, 0
	for i, c := range children {
		if err := c.Wait(); err != nil {
			failed++
			continue
		}
		if strings.TrimSpace(outs[i].String()) == "stored" {
			stored++
		}
	}
	// The job appends the whole file to the 100 bytes, so the process that resumed failed. The bytes that it left make
	// the next one fail, too. None of them may store a wrong blob because of that.
	if stored > 1 {
		t.Errorf("%d stored it", stored)
	}
	if stored == 0 {
		if _, err := s.Path(dgst); !errdefs.IsNotFound(err) {
			t.Errorf("a blob nobody stored: %v", err)
		}
		err := s.Abort(t.Context(), string(dgst))
		// For a moment the kernel may still give the lock to the wait that was cancelled.
		for tries := 0; errdefs.IsUnavailable(err) && tries < 1000; tries++ {
			time.Sleep(5 * time.Millisecond)
			err = s.Abort(t.Context(), string(dgst))
		}
		if err != nil {
			t.Fatal(err)
		}
	}

	children = children[:0]
	outs = make([]bytes.Buffer, n)
	for i := range n {
		c := childCommand("ingest", s.Root(), "ref"+strconv.Itoa(i), string(dgst), file)
		c.Stdout = &outs[i]
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		children = append(children, c)
	}
	stored = 0
	for i, c := range children {
		if err := c.Wait(); err != nil {
			t.Errorf("process %d: %v", i, err)
		}
		if strings.TrimSpace(outs[i].String()) == "stored" {
			stored++
		}
	}
	if stored != 1 {
		t.Errorf("%d of %d stored it", stored, n)
	}
	wantBlob(t, s, dgst, b)
}

func TestALookDoesNotMakeBusy(t *testing.T) {
	s := newStore(t)
	w, err := s.Writer(t.Context(), "ref", 0, "")
	if err != nil {
		t.Fatal(err)
	}
	_, _ = w.Write([]byte("x"))
	_ = w.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for ctx.Err() == nil {
				if _, err := s.ListStatuses(t.Context()); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 300 {
		w, err := s.Writer(t.Context(), "ref", 0, "")
		if err != nil {
			t.Error(err)
			break
		}
		_ = w.Close()
	}
	cancel()
	wg.Wait()
}

func TestIngestsThatAreTornHeal(t *testing.T) {
	b, dgst := random(t, 100_000)
	key := string(dgst)
	dir := func(s *content.Store) string {
		return filepath.Join(s.Root(), "ingest", digest.FromString(key).Encoded())
	}
	write := func(t *testing.T, s *content.Store, name string, b []byte) {
		if err := os.WriteFile(filepath.Join(dir(s), name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	begin := func(t *testing.T, s *content.Store, b []byte) {
		w, err := s.Writer(t.Context(), "ref", 0, dgst)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(b); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		tear   func(t *testing.T, s *content.Store)
		listed bool
		offset int
	}{
		"empty":        {func(*testing.T, *content.Store) {}, false, 0},
		"only a lock":  {func(t *testing.T, s *content.Store) { write(t, s, "lock", nil) }, false, 0},
		"only data":    {func(t *testing.T, s *content.Store) { write(t, s, "data", b[:500]) }, false, 0},
		"only a state": {func(t *testing.T, s *content.Store) { write(t, s, "state", []byte("{")) }, false, 0},
		"empty files": {func(t *testing.T, s *content.Store) {
			for _, f := range []string{"ref", "total", "expected", "startedat", "updatedat", "state", "data"} {
				write(t, s, f, nil)
			}
		}, false, 0},
		"ref and data alone": {func(t *testing.T, s *content.Store) {
			write(t, s, "ref", []byte("ref\n"))
			write(t, s, "data", b[:500])
		}, true, 500},
		"nonsense": {func(t *testing.T, s *content.Store) {
			begin(t, s, b[:500])
			for _, f := range []string{"total", "expected", "startedat", "updatedat", "state"} {
				write(t, s, f, []byte("\x00\xff nonsense"))
			}
		}, true, 500},
		"without ref": {func(t *testing.T, s *content.Store) {
			begin(t, s, b[:500])
			_ = os.Remove(filepath.Join(dir(s), "ref"))
		}, false, 0},
		"without data": {func(t *testing.T, s *content.Store) {
			begin(t, s, b[:500])
			_ = os.Remove(filepath.Join(dir(s), "data"))
		}, false, 0},
		"data longer than all": {func(t *testing.T, s *content.Store) { begin(t, s, append(slices.Clone(b), "more"...)) }, true, 0},
		"data shorter than its state": {func(t *testing.T, s *content.Store) {
			begin(t, s, b[:5000])
			if err := os.Truncate(filepath.Join(dir(s), "data"), 4000); err != nil {
				t.Fatal(err)
			}
		}, true, 4000},
		"data longer than its state": {func(t *testing.T, s *content.Store) {
			begin(t, s, b[:5000])
			f, err := os.OpenFile(filepath.Join(dir(s), "data"), os.O_WRONLY|os.O_APPEND, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			_, _ = f.Write(b[5000:6000])
		}, true, 6000},
		"read-only data": {func(t *testing.T, s *content.Store) {
			begin(t, s, b[:500])
			_ = os.Chmod(filepath.Join(dir(s), "data"), 0o444)
		}, true, 500},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			if err := os.MkdirAll(dir(s), 0o755); err != nil {
				t.Fatal(err)
			}
			c.tear(t, s)
			list, err := s.ListStatuses(t.Context())
			if err != nil || (len(list) == 1) != c.listed {
				t.Errorf("listed %+v, %v", list, err)
			}
			w, err := s.Writer(t.Context(), "ref", int64(len(b)), dgst)
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			if w.Offset() != int64(c.offset) || w.Digest() != digest.FromBytes(b[:c.offset]) {
				t.Errorf("resumed at %d, %s", w.Offset(), w.Digest())
			}
			if _, err := w.Write(b[w.Offset():]); err != nil {
				t.Fatal(err)
			}
			if err := w.Commit(t.Context(), 0, "", nil); err != nil {
				t.Fatal(err)
			}
			wantBlob(t, s, dgst, b)
			if got := files(t, filepath.Join(s.Root(), "ingest")); len(got) > 0 {
				t.Errorf("left in ingest: %q", got)
			}
		})
	}
}

func TestUnknownFilesStay(t *testing.T) {
	s := newStore(t)
	w, err := s.Writer(t.Context(), "ref", 0, "")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(s.Root(), "ingest", digest.FromString("ref").Encoded())
	if err := os.WriteFile(filepath.Join(dir, "mine"), []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, _ = w.Write([]byte("x"))
	if err := w.Commit(t.Context(), 0, "", nil); err != nil {
		t.Fatal(err)
	}
	if got := files(t, dir); !slices.Equal(got, []string{"mine"}) {
		t.Errorf("left are %q", got)
	}
	if list, err := s.ListStatuses(t.Context()); err != nil || len(list) > 0 {
		t.Errorf("listed %v, %v", list, err)
	}
	put(t, s, []byte("y"))
}

func TestAStateOfAnotherBootIsNotBelieved(t *testing.T) {
	if runtime.GOOS != "linux" && runtime.GOOS != "darwin" {
		t.Skip("no boot ID here: a state is never believed")
	}
	b, dgst := random(t, 1<<20)
	for _, c := range []struct {
		expected digest.Digest
		reboot   bool
		want     digest.Digest
	}{
		{dgst, false, digest.FromBytes(b[:1000])},                     // from the saved state: the bytes that were stored, not those in the file now
		{dgst, true, digest.FromString(strings.Repeat("\x00", 1000))}, // the file is read again
		{"", false, digest.FromBytes(b[:1000])},
		{"", true, digest.FromString("")}, // nothing would show the loss
	} {
		s := newStore(t)
		w, err := s.Writer(t.Context(), "ref", 0, c.expected)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = w.Write(b[:1000])
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		key := "ref"
		if c.expected != "" {
			key = string(c.expected)
		}
		dir := filepath.Join(s.Root(), "ingest", digest.FromString(key).Encoded())
		if err := os.WriteFile(filepath.Join(dir, "data"), make([]byte, 1000), 0o644); err != nil {
			t.Fatal(err)
		}
		if c.reboot {
			var state map[string]any
			text, err := os.ReadFile(filepath.Join(dir, "state"))
			if err != nil || json.Unmarshal(text, &state) != nil {
				t.Fatalf("state %q, %v", text, err)
			}
			state["boot"] = "another"
			text, _ = json.Marshal(state)
			if err := os.WriteFile(filepath.Join(dir, "state"), text, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		w, err = s.Writer(t.Context(), "ref", 0, c.expected)
		if err != nil {
			t.Fatal(err)
		}
		if got := w.Digest(); got != c.want {
			t.Errorf("expected %q, reboot %v: resumed at %d with %s", c.expected, c.reboot, w.Offset(), got)
		}
		_ = w.Close()
	}
}

func TestNoStaleTail(t *testing.T) {
	s := newStore(t)
	long, _ := random(t, 100_000)
	short, dgst := random(t, 1000)
	for _, size := range []int64{0, int64(len(short))} {
		w, err := s.Writer(t.Context(), "ref", 0, "")
		if err != nil {
			t.Fatal(err)
		}
		_, _ = w.Write(long)
		_ = w.Close()
		w, err = s.Writer(t.Context(), "ref", size, "")
		if err != nil {
			t.Fatal(err)
		}
		if size == 0 {
			if err := w.Truncate(0); err != nil {
				t.Fatal(err)
			}
		}
		if w.Offset() != 0 {
			t.Fatalf("resumed at %d", w.Offset())
		}
		_, _ = w.Write(short)
		if err := w.Commit(t.Context(), 0, "", nil); err != nil {
			t.Fatal(err)
		}
		wantBlob(t, s, dgst, short)
		if err := s.Delete(t.Context(), dgst); err != nil {
			t.Fatal(err)
		}
	}
}

func TestWhatIsWrongIsNotStored(t *testing.T) {
	b, dgst := random(t, 1000)
	other := digest.FromString("other")
	for name, c := range map[string]struct {
		size, commitSize int64
		expected, commit digest.Digest
		write            []byte
	}{
		"digest":           {0, 0, other, "", b},
		"digest at commit": {0, 0, "", other, b},
		"size":             {2000, 0, "", "", b},
		"size at commit":   {0, 999, "", "", b},
		"short":            {1000, 0, dgst, "", b[:999]},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			w, err := s.Writer(t.Context(), "ref", c.size, c.expected)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(c.write); err != nil {
				t.Fatal(err)
			}
			err = w.Commit(t.Context(), c.commitSize, c.commit, nil)
			if !errdefs.IsDataLoss(err) || !errdefs.IsFailedPrecondition(err) {
				t.Errorf("commit: %v", err)
			}
			if w.Offset() != int64(len(c.write)) {
				t.Errorf("kept are %d bytes", w.Offset())
			}
			if err := s.Digests(t.Context(), func(d digest.Digest) error { return fmt.Errorf("stored %s", d) }); err != nil {
				t.Error(err)
			}
			if err := w.Abort(); err != nil {
				t.Error(err)
			}
			if got := files(t, filepath.Join(s.Root(), "ingest")); len(got) > 0 {
				t.Errorf("left in ingest: %q", got)
			}
			if _, err := w.Write(b); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("write after abort: %v", err)
			}
		})
	}
}

func TestTooMuchIsRefusedAtOnce(t *testing.T) {
	s := newStore(t)
	w, err := s.Writer(t.Context(), "ref", 10, "")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if n, err := w.Write(make([]byte, 11)); n != 0 || !errdefs.IsDataLoss(err) {
		t.Errorf("%d, %v", n, err)
	}
	if fi, err := os.Stat(filepath.Join(s.Root(), "ingest", digest.FromString("ref").Encoded(), "data")); err != nil || fi.Size() != 0 {
		t.Errorf("stored are %d bytes, %v", fi.Size(), err)
	}
}

func TestRefs(t *testing.T) {
	s := newStore(t)
	for _, ref := range []string{"", "a\nb", "a\x00b", "a\tb", "\xff", strings.Repeat("x", 4097)} {
		if _, err := s.Writer(t.Context(), ref, 0, ""); !errdefs.IsInvalidArgument(err) {
			t.Errorf("ref %.20q: %v", ref, err)
		}
	}
	for _, ref := range []string{"../../x", ".", "/", "ünï", strings.Repeat("x", 4096)} {
		w, err := s.Writer(t.Context(), ref, 0, "")
		if err != nil {
			t.Errorf("ref %.20q: %v", ref, err)
			continue
		}
		_ = w.Abort()
	}
}

func TestStatuses(t *testing.T) {
	s := newStore(t)
	b, dgst := random(t, 1000)
	begin := time.Now()
	for i, ref := range []string{"first", "second", "third"} {
		size, expected := int64(0), digest.Digest("")
		if ref == "second" {
			size, expected = 1000, dgst
		}
		w, err := s.Writer(t.Context(), ref, size, expected)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = w.Write(b[:100*i])
		defer w.Close()
		if ref == "third" {
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	list, err := s.ListStatuses(t.Context())
	if err != nil || len(list) != 3 {
		t.Fatalf("%+v, %v", list, err)
	}
	for i, st := range list {
		if st.Ref != []string{"first", "second", "third"}[i] || st.Offset != int64(100*i) || st.Active != (i < 2) ||
			st.StartedAt.Before(begin) || st.UpdatedAt.Before(begin.Add(-time.Second)) {
			t.Errorf("status %d is %+v", i, st)
		}
	}
	if st := list[1]; st.Total != 1000 || st.Expected != dgst {
		t.Errorf("status is %+v", st)
	}
	for _, ref := range []string{"second", string(dgst)} {
		if st := status(t, s, ref); st.Ref != "second" {
			t.Errorf("status of %s is %+v", ref, st)
		}
	}
	if s.Offset(dgst) != 100 {
		t.Errorf("offset is %d", s.Offset(dgst))
	}
	if err := s.Abort(t.Context(), "third"); err != nil {
		t.Error(err)
	}
	if err := s.Abort(t.Context(), "third"); !errdefs.IsNotFound(err) {
		t.Errorf("abort of none: %v", err)
	}
	if err := s.Abort(t.Context(), "second"); !errdefs.IsUnavailable(err) {
		t.Errorf("abort of one that is open: %v", err)
	}
}

// onlyReader hides the other methods of a reader.
type onlyReader struct{ io.Reader }

func TestWriteBlob(t *testing.T) {
	b, dgst := random(t, 1<<20)
	wrong := bytes.Repeat([]byte("x"), 1000)
	for name, c := range map[string]struct {
		r    io.Reader
		left []byte // the bytes that an earlier attempt left
		exp  digest.Digest
		ok   bool
	}{
		"new":                 {onlyReader{bytes.NewReader(b)}, nil, dgst, true},
		"new, digest unknown": {onlyReader{bytes.NewReader(b)}, nil, "", true},
		"resumed by seeking":  {bytes.NewReader(b), b[:1000], dgst, true},
		"resumed by neither":  {onlyReader{bytes.NewReader(b)}, b[:1000], dgst, true},
		"left is wrong, seek": {bytes.NewReader(b), wrong, dgst, true},
		"left is wrong, read": {onlyReader{bytes.NewReader(b)}, wrong, dgst, true},
		"left is wrong, none": {bytes.NewReader(b), wrong, "", true},
		"left is all":         {bytes.NewReader(b), b, dgst, true},
		"left is too much":    {bytes.NewReader(b), append(slices.Clone(b), 1), dgst, true},
		"wrong":               {bytes.NewReader(wrong), nil, dgst, false},
		"wrong, resumed":      {bytes.NewReader(wrong), b[:10], dgst, false},
		"too long":            {bytes.NewReader(append(slices.Clone(b), 1)), nil, dgst, false},
		"too short":           {bytes.NewReader(b[:10]), nil, dgst, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			if c.left != nil {
				w, err := s.Writer(t.Context(), "ref", 0, c.exp)
				if err != nil {
					t.Fatal(err)
				}
				_, _ = w.Write(c.left)
				_ = w.Close()
			}
			got, err := content.WriteBlob(t.Context(), s, "ref", c.r, int64(len(b)), c.exp)
			if c.ok {
				if err != nil || got != dgst {
					t.Fatalf("%s, %v", got, err)
				}
				wantBlob(t, s, dgst, b)
			} else if !errdefs.IsDataLoss(err) {
				t.Fatalf("%s, %v", got, err)
			}
			if got := files(t, filepath.Join(s.Root(), "ingest")); len(got) > 0 {
				t.Errorf("left in ingest: %q", got)
			}
			if got, err := content.WriteBlob(t.Context(), s, "ref", bytes.NewReader(b), int64(len(b)), dgst); err != nil || got != dgst {
				t.Errorf("again: %s, %v", got, err)
			}
		})
	}
}

func TestWriteBlobSeeksFromWhereTheReaderIs(t *testing.T) {
	s := newStore(t)
	b, _ := random(t, 1000)
	r := bytes.NewReader(b)
	_, _ = r.Seek(100, io.SeekStart)
	w, err := s.Writer(t.Context(), "ref", 0, digest.FromBytes(b[100:]))
	if err != nil {
		t.Fatal(err)
	}
	_, _ = w.Write(b[100:150])
	_ = w.Close()
	if _, err := content.WriteBlob(t.Context(), s, "ref", r, 900, digest.FromBytes(b[100:])); err != nil {
		t.Fatal(err)
	}
}

// failing returns an error after some bytes.
type failing struct {
	r io.Reader
	n int
}

func (f *failing) Read(p []byte) (int, error) {
	if f.n == 0 {
		return 0, errors.New("cut")
	}
	n, err := f.r.Read(p[:min(len(p), f.n)])
	f.n -= n
	return n, err
}

func TestWriteBlobKeepsWhatCameBeforeAFailure(t *testing.T) {
	s := newStore(t)
	b, dgst := random(t, 1<<20)
	if _, err := content.WriteBlob(t.Context(), s, "ref", &failing{bytes.NewReader(b), 600_000}, 0, dgst); err == nil || err.Error() != "cut" {
		t.Fatalf("%v", err)
	}
	if st := status(t, s, "ref"); st.Offset != 600_000 {
		t.Errorf("kept: %+v", st)
	}
}
