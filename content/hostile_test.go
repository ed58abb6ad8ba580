package content_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"distkit/content"
	"distkit/disk"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// outside is a directory with one file, outside the store. It reports whether that file was changed.
func outside(t *testing.T) (dir string, same func()) {
	t.Helper()
	dir = t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	return dir, func() {
		t.Helper()
		all, err := os.ReadDir(dir)
		b, ferr := os.ReadFile(file)
		after, serr := os.Stat(file)
		if err := errors.Join(err, ferr, serr); err != nil || len(all) != 1 || string(b) != "precious" || after.Mode() != before.Mode() || !after.ModTime().Equal(before.ModTime()) {
			t.Errorf("outside changed: %v, %q, %v, %v", all, b, after, err)
		}
	}
}

// Whatever replaces a file or directory of a store, the store changes nothing outside itself, and does not wait for
// anybody.
func TestHostileStore(t *testing.T) {
	blob, key := []byte("a blob"), digest.FromString("ref").Encoded()
	dgst := digest.FromBytes(blob)
	names := []string{"oci-layout", "index.json", "hold", "gate", "events", "events.1", "blobs", "blobs/sha256", "blobs/sha256/" + dgst.Encoded(),
		"labels", "labels/sha256", "labels/sha256/" + dgst.Encoded(), "ingest", "ingest/" + key, "locks", "locks/" + dgst.Encoded()[:2]}
	for _, f := range []string{"lock", "ref", "data", "expected", "total", "startedat", "updatedat", "state", "state.tmp"} {
		names = append(names, "ingest/"+key+"/"+f)
	}
	for _, name := range names {
		t.Run(strings.ReplaceAll(name, "/", "-"), func(t *testing.T) {
			t.Parallel()
			hostileStore(t, name, blob)
		})
	}
}

// hostileStore replaces one file of a store with each kind of file, and uses the store each time.
func hostileStore(t *testing.T, name string, blob []byte) {
	dgst := digest.FromBytes(blob)
	away, same := outside(t)
	kinds := map[string]func(path string) error{
		"a link to a file":       func(path string) error { return os.Symlink(filepath.Join(away, "file"), path) },
		"a link to a directory":  func(path string) error { return os.Symlink(away, path) },
		"a link to what is not":  func(path string) error { return os.Symlink(filepath.Join(away, "new"), path) },
		"a link to /":            func(path string) error { return os.Symlink("/", path) },
		"a link to itself":       func(path string) error { return os.Symlink(filepath.Base(path), path) },
		"a FIFO":                 func(path string) error { return unix.Mkfifo(path, 0o644) },
		"a directory":            func(path string) error { return os.Mkdir(path, 0o755) },
		"empty":                  func(path string) error { return os.WriteFile(path, nil, 0o644) },
		"garbage":                func(path string) error { return os.WriteFile(path, []byte("\x1b[2Jgarbage\x00"), 0o644) },
		"two gigabytes of zeros": func(path string) error { return errors.Join(os.WriteFile(path, nil, 0o644), os.Truncate(path, 2<<30)) },
	}
	if os.Getuid() == 0 {
		kinds["a device"] = func(path string) error { return unix.Mknod(path, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))) }
	}
	for kind, make := range kinds {
		if strings.HasPrefix(kind, "two") && strings.Contains(name, "blobs/sha256/") {
			continue // a blob of that size is hashed, and should be
		}
		s := newStore(t)
		put(t, s, blob)
		if _, err := s.Update(t.Context(), content.Info{Digest: dgst, Labels: map[string]string{"a": "1"}}); err != nil {
			t.Fatal(err)
		}
		leave(t, s, "ref", "ref")
		for _, f := range []string{"hold", "gate"} {
			if err := os.WriteFile(filepath.Join(s.Root(), f), nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		path := filepath.Join(s.Root(), name)
		if err := errors.Join(os.RemoveAll(path), make(path)); err != nil {
			t.Fatal(err)
		}
		useEverything(t.Context(), s.Root(), dgst)
		if same(); t.Failed() {
			t.Fatalf("%s is %s", name, kind)
		}
	}
}

// useEverything calls every operation of a store, and ignores failures.
func useEverything(ctx context.Context, root string, dgst digest.Digest) {
	s, err := content.Open(root)
	if err != nil {
		return
	}
	_, _ = s.Info(ctx, dgst)
	_ = s.Verify(ctx, dgst)
	_ = s.Walk(ctx, func(content.Info) error { return nil })
	_ = s.Strays(ctx, func(string) error { return nil })
	_, _ = s.ListStatuses(ctx)
	_, _ = s.Status(ctx, "ref")
	_ = s.Offset(dgst)
	if _, err := s.Update(ctx, content.Info{Digest: dgst, Labels: map[string]string{"b": "1"}}, "labels.b"); err == nil {
		_, _ = s.Info(ctx, dgst)
	}
	for _, ref := range []string{"ref", "other"} {
		if w, err := s.Writer(ctx, ref, 0, ""); err == nil {
			_, _ = w.Write([]byte(ref))
			if w.Commit(ctx, 0, "", map[string]string{"c": "1"}) != nil {
				_ = w.Close()
			}
		}
	}
	_, _ = content.WriteBlob(ctx, s, "third", strings.NewReader("third"), 5, digest.FromString("third"))
	if s.CheckSweep(ctx) == nil {
		if hold, err := s.Exclude(ctx, 0); err == nil {
			disk.Release(hold)
		}
	}
	_, _, _ = s.Holders()
	_ = s.SweepIngests(ctx, time.Now().Add(time.Hour), false, nil, func(content.Leftover) error { return nil })
	_ = s.SweepLabels(ctx, time.Now().Add(time.Hour), false, func(content.Leftover) error { return nil })
	_ = s.Labelled(ctx, "b", time.Time{}, func(digest.Digest) error { return nil })
	_ = deleteUnused(s, dgst, time.Now(), time.Now())
	_ = s.Abort(ctx, "ref")
	_ = s.DeleteCorrupt(ctx, dgst)
	_ = s.Delete(ctx, dgst)
}

// After a commit and a deletion of the damaged blob that the commit replaces, in any order, the store has the correct
// blob.
func TestDeleteCorruptSparesWhatReplacedIt(t *testing.T) {
	for range 5 {
		s := newStore(t)
		b, dgst := random(t, 1000)
		put(t, s, b)
		path, err := s.Path(dgst)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.Chmod(path, 0o644), os.Truncate(path, 128<<20)); err != nil { // large, so that hashing it takes some time
			t.Fatal(err)
		}
		deleted := make(chan error, 1)
		go func() { deleted <- s.DeleteCorrupt(t.Context(), dgst) }()
		for { // until the deletion has the lock
			f, err := os.Open(path)
			if err != nil {
				break // the deletion has ended already
			}
			err = disk.Lock(f, unix.LOCK_SH|unix.LOCK_NB)
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				break
			}
		}
		w, err := s.Writer(t.Context(), "ref", 0, "")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(b); err != nil {
			t.Fatal(err)
		}
		if err := w.Commit(t.Context(), int64(len(b)), dgst, nil); err != nil && !errdefs.IsAlreadyExists(err) {
			t.Fatal(err)
		}
		if err := <-deleted; err != nil && !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotFound(err) {
			t.Error(err)
		}
		wantBlob(t, s, dgst, b)
	}
}

func TestAbortWantsARef(t *testing.T) {
	s := newStore(t)
	leave(t, s, "a", "a")
	leave(t, s, "b", "b")
	for _, ref := range []string{"", "a\n", strings.Repeat("x", 5000)} {
		if err := s.Abort(t.Context(), ref); !errdefs.IsInvalidArgument(err) {
			t.Errorf("abort %.10q: %v", ref, err)
		}
	}
	if all, err := s.ListStatuses(t.Context()); err != nil || len(all) != 2 {
		t.Errorf("%v, %v", all, err)
	}
}

func TestInitDoesNotReplaceAnIndexThatIsGone(t *testing.T) {
	s := newStore(t)
	put(t, s, []byte("a blob"))
	index := filepath.Join(s.Root(), "index.json")
	if err := os.Remove(index); err != nil {
		t.Fatal(err)
	}
	_, err := s.Writer(t.Context(), "ref", 0, "")
	xerr := s.CheckSweep(t.Context())
	for _, err := range []error{s.Init(), open(t, s.Root()).Init(), err, xerr} {
		if !errdefs.IsFailedPrecondition(err) || !bytes.Contains([]byte(err.Error()), []byte(index)) {
			t.Errorf("%v", err)
		}
	}
	if _, err := os.Stat(index); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("made anew: %v", err)
	}
}
