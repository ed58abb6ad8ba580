package content_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"distkit/content"
	"distkit/disk"
	"distkit/disk/layout"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// sweepIngests returns the ref or path of each ingest that was swept.
func sweepIngests(t *testing.T, s *content.Store, before time.Time, dryRun bool) (refs []string) {
	t.Helper()
	err := s.SweepIngests(t.Context(), before, dryRun, nil, func(l content.Leftover) error {
		refs = append(refs, cmp.Or(l.Ref, l.Path))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(refs)
	return refs
}

// leave writes a text into an ingest and closes it.
func leave(t *testing.T, s *content.Store, ref, text string) {
	t.Helper()
	w, err := s.Writer(t.Context(), ref, 0, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

func ingestDir(s *content.Store, ref string) string {
	return filepath.Join(s.Root(), "ingest", digest.FromString(ref).Encoded())
}

func TestSweepIngests(t *testing.T) {
	s := newStore(t)
	later, hourAgo := time.Now().Add(time.Hour), time.Now().Add(-time.Hour)
	if got := sweepIngests(t, s, later, false); len(got) != 0 {
		t.Errorf("in no store: %q", got)
	}
	kept := put(t, s, []byte("a blob"))
	leave(t, s, "old", "old")
	leave(t, s, "young", "young")
	w, err := s.Writer(t.Context(), "busy", 0, "")
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	// All files of the ingest are old.
	age := func(dir string) {
		files, _ := filepath.Glob(dir + "/*")
		for _, f := range append(files, dir) {
			if err := os.Chtimes(f, hourAgo, hourAgo); err != nil {
				t.Fatal(err)
			}
		}
	}
	age(ingestDir(s, "old"))
	age(ingestDir(s, "busy"))
	if got := sweepIngests(t, s, time.Now().Add(-time.Minute), true); !slices.Equal(got, []string{"old"}) {
		t.Errorf("dry run: %q", got)
	}
	if list, _ := s.ListStatuses(t.Context()); len(list) != 3 {
		t.Errorf("after a dry run: %+v", list)
	}
	if got := sweepIngests(t, s, time.Now().Add(-time.Minute), false); !slices.Equal(got, []string{"old"}) {
		t.Errorf("%q", got)
	}
	// An ingest that was resumed since is not old, even if nothing was written.
	age(ingestDir(s, "young"))
	again, err := s.Writer(t.Context(), "young", 0, "")
	if err != nil {
		t.Fatal(err)
	}
	if again.Offset() != 5 {
		t.Errorf("resumes at %d", again.Offset())
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	if got := sweepIngests(t, s, time.Now().Add(-time.Minute), false); len(got) != 0 {
		t.Errorf("what was resumed: %q", got)
	}
	if got := sweepIngests(t, s, later, false); !slices.Equal(got, []string{"young"}) {
		t.Errorf("%q", got)
	}
	if _, err := w.Write([]byte("goes on")); err != nil {
		t.Error(err)
	}
	if err := w.Commit(t.Context(), 0, "", nil); err != nil {
		t.Error(err)
	}
	wantBlob(t, s, kept, []byte("a blob"))
	if left, _ := os.ReadDir(filepath.Join(s.Root(), "ingest")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

// A crash, or another program, may leave any of these in the place of an ingest. A sweep removes everything that
// belongs to distkit and nothing else. Until then a writer with that ref can still work.
func TestTornIngests(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"empty":           {},
		"lock alone":      {"lock": ""},
		"no data":         {"lock": "", "ref": "torn\n", "startedat": "2020-01-01T00:00:00Z\n"},
		"no ref":          {"lock": "", "data": "stale bytes"},
		"empty ref":       {"lock": "", "data": "stale bytes", "ref": ""},
		"bad ref":         {"lock": "", "data": "stale bytes", "ref": "a\x00b\n"},
		"no lock":         {"data": "stale bytes", "ref": "torn\n"},
		"too long":        {"lock": "", "data": "stale bytes", "ref": "torn\n", "total": "3\n"},
		"torn total":      {"lock": "", "data": "stale bytes", "ref": "torn\n", "total": "12x"},
		"negative total":  {"lock": "", "data": "stale bytes", "ref": "torn\n", "total": "-5\n"},
		"bad times":       {"lock": "", "data": "stale bytes", "ref": "torn\n", "startedat": "yesterday\n", "updatedat": "\n"},
		"bad digest":      {"lock": "", "data": "stale bytes", "ref": "torn\n", "expected": "sha256:12\n"},
		"torn state":      {"lock": "", "data": "stale bytes", "ref": "torn\n", "state": `{"algorithm":"sha256","off`},
		"state too far":   {"lock": "", "data": "st", "ref": "torn\n", "state": `{"algorithm":"sha256","offset":9,"boot":"x","state":"AA=="}`},
		"state aside":     {"lock": "", "data": "stale bytes", "ref": "torn\n", "state.tmp": "{"},
		"updatedat alone": {"updatedat": "2020-01-01T00:00:00Z\n"},
		"unknown too":     {"lock": "", "data": "stale bytes", "ref": "torn\n", "notes": "mine"},
		"unknown alone":   {"notes": "mine"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			if err := s.Init(); err != nil {
				t.Fatal(err)
			}
			make := func() {
				dir := ingestDir(s, "torn")
				if err := os.MkdirAll(dir, 0o755); err != nil {
					t.Fatal(err)
				}
				for f, text := range files {
					if err := os.WriteFile(filepath.Join(dir, f), []byte(text), 0o644); err != nil {
						t.Fatal(err)
					}
				}
			}
			left := func() (names []string) {
				entries, _ := os.ReadDir(ingestDir(s, "torn"))
				for _, e := range entries {
					names = append(names, e.Name())
				}
				return names
			}
			want := []string(nil)
			if _, ok := files["notes"]; ok {
				want = []string{"notes"}
			}
			later := time.Now().Add(time.Hour)
			make()
			if _, err := s.ListStatuses(t.Context()); err != nil {
				t.Error(err)
			}
			swept := sweepIngests(t, s, later, false)
			if (len(swept) == 1) != (name != "unknown alone") {
				t.Errorf("swept %q", swept)
			}
			if got := left(); !slices.Equal(got, want) {
				t.Errorf("left by the sweep: %q", got)
			}
			if swept := sweepIngests(t, s, later, false); len(swept) != 0 {
				t.Errorf("swept again: %q", swept)
			}
			make()
			w, err := s.Writer(t.Context(), "torn", 5, "")
			if err != nil {
				t.Fatal(err)
			}
			if w.Offset() != 0 {
				t.Errorf("it believes %d bytes of another boot, or of none", w.Offset())
			}
			if _, err := w.Write([]byte("right")); err != nil {
				t.Fatal(err)
			}
			if err := w.Commit(t.Context(), 0, "", nil); err != nil {
				t.Fatal(err)
			}
			wantBlob(t, s, digest.FromString("right"), []byte("right"))
			if got := left(); !slices.Equal(got, want) {
				t.Errorf("left by the commit: %q", got)
			}
		})
	}
}

func TestSweepFilesWrittenAside(t *testing.T) {
	s := newStore(t)
	put(t, s, []byte("x"))
	for name, age := range map[string]time.Duration{"ingest/.tmp-old": 2 * time.Hour, "ingest/.tmp-young": time.Minute, "blobs/sha256/.tmp-put": 2 * time.Hour, "ingest/other": 2 * time.Hour} {
		path := filepath.Join(s.Root(), name)
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if at := time.Now().Add(-age); os.Chtimes(path, at, at) != nil {
			t.Fatal("can't change times")
		}
	}
	if got := sweepIngests(t, s, time.Now().Add(-3*time.Hour), false); len(got) != 0 {
		t.Errorf("within the grace: %q", got)
	}
	if got := sweepIngests(t, s, time.Now(), false); !slices.Equal(got, []string{"blobs/sha256/.tmp-put", "ingest/.tmp-old"}) {
		t.Errorf("%q", got)
	}
}

func TestSweepLabels(t *testing.T) {
	s := newStore(t)
	dgst := put(t, s, []byte("x"))
	if _, err := s.Update(t.Context(), content.Info{Digest: dgst, Labels: map[string]string{"a": "b"}}); err != nil {
		t.Fatal(err)
	}
	labels := filepath.Join(s.Root(), "labels", "sha256")
	for name, age := range map[string]time.Duration{dgst.Encoded(): 2 * time.Hour, strings.Repeat("0", 64): 2 * time.Hour, strings.Repeat("1", 64): time.Minute, "other": 2 * time.Hour} {
		path := filepath.Join(labels, name)
		if name != dgst.Encoded() {
			if err := os.WriteFile(path, []byte(`{"a":"b"}`), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if at := time.Now().Add(-age); os.Chtimes(path, at, at) != nil {
			t.Fatal("can't change times")
		}
	}
	for _, dryRun := range []bool{true, false} {
		var swept []string
		err := s.SweepLabels(t.Context(), time.Now(), dryRun, func(l content.Leftover) error {
			swept = append(swept, l.Path)
			return nil
		})
		if want := []string{"labels/sha256/" + strings.Repeat("0", 64)}; err != nil || !slices.Equal(swept, want) {
			t.Errorf("%q, not %q: %v", swept, want, err)
		}
	}
	if left, err := os.ReadDir(labels); err != nil || len(left) != 3 {
		t.Errorf("left: %v, %v", left, err)
	}
	if left, err := os.ReadDir(filepath.Join(s.Root(), "ingest")); err != nil || len(left) != 0 {
		t.Errorf("left in ingest: %v, %v", left, err)
	}
}

// A blob stays if it got a label after the sweep began, or if another caller works on it.
func TestUnusedSparesWhatIsWorkedOn(t *testing.T) {
	s := newStore(t)
	dgst := put(t, s, []byte("x"))
	began, later := time.Now(), time.Now().Add(time.Hour)
	if _, err := s.Update(t.Context(), content.Info{Digest: dgst, Labels: map[string]string{"a": "b"}}); err != nil {
		t.Fatal(err)
	}
	if err := deleteUnused(s, dgst, later, began); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("with a label: %v", err)
	}
	f, err := s.LockBlob(t.Context(), dgst, unix.LOCK_EX)
	if err != nil {
		t.Fatal(err)
	}
	if err := deleteUnused(s, dgst, later, later); !errdefs.IsUnavailable(err) {
		t.Errorf("locked: %v", err)
	}
	disk.Release(f)
	if err := deleteUnused(s, dgst, later, later); err != nil {
		t.Error(err)
	}
	if err := deleteUnused(s, dgst, later, later); !errdefs.IsNotFound(err) {
		t.Errorf("again: %v", err)
	}
}

// holdByAnother makes another process hold the store.
func holdByAnother(t *testing.T, s *content.Store) (release func()) {
	t.Helper()
	f, err := layout.OpenHold(s.Tree, layout.Hold)
	if err != nil {
		t.Fatal(err)
	}
	layout.Announce(f)
	_ = f.Close()
	c := exec.Command("flock", "-s", s.Tree.Path(layout.Hold), "cat")
	in, err := c.StdinPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		t.Skip(err)
	}
	release = sync.OnceFunc(func() {
		if err := errors.Join(in.Close(), c.Wait()); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(release)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if _, free, err := s.Holders(); err != nil || time.Now().After(deadline) {
			t.Fatalf("nobody holds it: %v", err)
		} else if !free {
			return release
		}
	}
}

// While a sweep waits for a holder, others can take the hold. The sweep notices a holder that comes and goes in the
// meantime.
func TestExcludeWaitsWithoutStandingInTheWay(t *testing.T) {
	t.Setenv(content.HoldEnv, "")
	s := newStore(t)
	if err := s.Init(); err != nil {
		t.Fatal(err)
	}
	before, free, err := s.Holders()
	if err != nil || !free {
		t.Fatal(before, free, err)
	}
	release := holdByAnother(t, s)
	if _, free, err := s.Holders(); err != nil || free {
		t.Errorf("it is held, and free is %t, %v", free, err)
	}
	if _, err := s.Exclude(t.Context(), 0); !errdefs.IsUnavailable(err) {
		t.Errorf("exclude: %v", err)
	}
	waits := make(chan struct{})
	got := make(chan error, 1)
	go func() {
		ctx := disk.WithNotice(t.Context(), func(string) { close(waits) })
		hold, err := s.Exclude(ctx, time.Minute)
		if err == nil {
			disk.Release(hold)
		}
		got <- err
	}()
	<-waits
	for range 3 {
		// This takes the hold as dist-hold does, through the gate.
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		env, err := s.Hold(ctx)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		var fd int
		if _, err := fmt.Sscanf(env, content.HoldEnv+"=%d:", &fd); err != nil || unix.Close(fd) != nil {
			t.Fatalf("%q: %v", env, err)
		}
	}
	select {
	case err := <-got:
		t.Errorf("it did not wait: %v", err)
	default:
	}
	release()
	if err := <-got; err != nil {
		t.Error(err)
	}
	if after, _, err := s.Holders(); err != nil || after == before {
		t.Errorf("%v, %v: nobody saw the holders", after, err)
	}
}
