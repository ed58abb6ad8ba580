package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"distkit/snapshot"
	"distkit/snapshot/snapshottest"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// commit makes a committed snapshot that all namespaces share.
func commit(t *testing.T, s *snapshot.Snapshotter, text, parent string) string {
	t.Helper()
	name := string(digest.FromString(text))
	if err := prepare(s, text, parent); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), name, text, snapshot.CommitOptions{}); err != nil {
		t.Fatal(err)
	}
	return name
}

// sweep runs Sweep, calls f after each deletion, and returns the keys deleted.
func sweep(ctx context.Context, s *snapshot.Snapshotter, needed func(string, snapshot.Info) bool, f func(n int)) (gone []string, err error) {
	var failed []error
	o := snapshot.Sweep{
		Before: time.Now().Add(time.Hour),
		Alone:  func(f func(func(string, snapshot.Info) bool) error) error { return f(needed) },
		Failed: func(err error) { failed = append(failed, err) },
	}
	err = s.Sweep(ctx, o,
		func(i snapshot.Info, _ snapshot.Usage) error {
			gone = append(gone, i.Key)
			f(len(gone))
			return nil
		})
	return gone, errors.Join(append(failed, err)...)
}

func nothing(string, snapshot.Info) bool { return false }

// A sweep reads each record once, however many snapshots it deletes. To show it, the record of a kept snapshot is
// damaged after the first deletion.
func TestASweepReadsRecordsOnce(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	s := open(t, root, drivers["overlayfs"])
	stays := commit(t, s, "stays", "")
	const chains, depth = 20, 3
	for c := range chains {
		parent := ""
		for d := range depth {
			parent = commit(t, s, fmt.Sprintf("%d-%d", c, d), parent)
		}
	}
	damage := func(n int) {
		if n == 1 {
			if err := os.WriteFile(filepath.Join(root, "snapshots", "overlayfs", "1", "info"), []byte("{"), 0o600); err != nil {
				t.Error(err)
			}
		}
	}
	gone, err := sweep(t.Context(), s, func(_ string, i snapshot.Info) bool { return i.Key == stays }, damage)
	if err != nil || len(gone) != chains*depth {
		t.Errorf("%d are deleted of %d: %v", len(gone), chains*depth, err)
	}
}

// A Remover reads each record once too, in whatever order it removes. When a removal is refused because of a child, it
// reads only that child again.
func TestARemoverReadsRecordsOnce(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	s := open(t, root, drivers["overlayfs"])
	commit(t, s, "stays", "")
	var names []string
	parent := ""
	for d := range 6 {
		parent = commit(t, s, fmt.Sprint(d), parent)
		names = append(names, parent)
	}
	r := s.Remover()
	for i, name := range names[:5] {
		if err := r.Remove(t.Context(), name); !errdefs.IsFailedPrecondition(err) || !strings.HasSuffix(err.Error(), ": "+names[i+1]) {
			t.Errorf("with a child: %v", err)
		}
		if err := os.WriteFile(filepath.Join(root, "snapshots", "overlayfs", "1", "info"), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// New snapshots are noticed, and so is a removal by another process.
	if err := prepare(s, "late", names[5]); err != nil {
		t.Fatal(err)
	}
	if err := r.Remove(t.Context(), names[5]); !errdefs.IsFailedPrecondition(err) || !strings.HasSuffix(err.Error(), ": late") {
		t.Errorf("with a late child: %v", err)
	}
	if err := open(t, root, drivers["overlayfs"]).Remove(t.Context(), "late"); err != nil {
		t.Error(err)
	}
	for _, name := range slices.Backward(names) {
		if err := r.Remove(t.Context(), name); err != nil {
			t.Error(err)
		}
	}
}

// A snapshot that gets a child during the sweep is kept, whether the child is new or existed without a parent.
func TestASweepSparesNewParents(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir(), drivers["overlayfs"])
	if err := prepare(s, "alone", ""); err != nil {
		t.Fatal(err)
	}
	var names []string
	for i := range 6 {
		names = append(names, commit(t, s, fmt.Sprint("base ", i), ""))
	}
	first, calls := names[5], 0
	o := snapshot.Sweep{Before: time.Now().Add(time.Hour), Failed: func(err error) { t.Error(err) }}
	o.Alone = func(f func(func(string, snapshot.Info) bool) error) error {
		if calls++; calls == 2 { // all have been looked at, and none was needed
			if err := prepare(s, "child", first); err != nil {
				t.Error(err)
			}
			if err := s.Commit(t.Context(), "top", "alone", snapshot.CommitOptions{Parent: names[4]}); err != nil {
				t.Error(err)
			}
		}
		return f(nothing)
	}
	var gone []string
	err := s.Sweep(t.Context(), o, func(i snapshot.Info, _ snapshot.Usage) error { gone = append(gone, i.Key); return nil })
	names = names[4:]
	if err != nil || len(gone) != 4 {
		t.Errorf("deleted: %q, %v", gone, err)
	}
	for _, name := range names {
		if _, err := s.Stat(t.Context(), name); err != nil {
			t.Errorf("a snapshot with a child was removed: %v", err)
		}
	}
	// A child that another process has removed no longer keeps its parent.
	if err := s.Remove(t.Context(), "child"); err != nil {
		t.Error(err)
	}
	if gone, err := sweep(t.Context(), s, nothing, func(int) {}); err != nil || !slices.Equal(gone, []string{first}) {
		t.Errorf("deleted: %q, %v", gone, err)
	}
}

// broken is a driver that fails to measure and to remove one directory, and has no permission for another.
type broken struct {
	snapshot.Driver
	id, private string
}

func (b broken) Usage(ctx context.Context, t snapshot.Tree) (snapshot.Usage, error) {
	switch filepath.Base(t.Dir) {
	case b.id:
		return snapshot.Usage{}, errors.New("can't be measured")
	case b.private:
		return snapshot.Usage{}, &os.PathError{Op: "open", Path: "fs", Err: os.ErrPermission}
	}
	return b.Driver.Usage(ctx, t)
}

func (b broken) Remove(ctx context.Context, dir string) error {
	if filepath.Base(dir) == b.id {
		return errors.New("can't be removed")
	}
	return b.Driver.Remove(ctx, dir)
}

// A sweep continues after snapshots that it can't measure, remove or read, and reports them.
func TestASweepGoesOn(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	s := open(t, root, broken{drivers["native"], "2", "6"})
	var names []string
	for i := range 6 {
		names = append(names, commit(t, s, fmt.Sprint(i), ""))
	}
	dir := filepath.Join(root, "snapshots", "native")
	if err := os.WriteFile(filepath.Join(dir, "4", "info"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "5", "info")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "5", "info"), 0o700); err != nil { // not a record
		t.Fatal(err)
	}
	gone, err := sweep(t.Context(), s, nothing, func(int) {})
	if want := []string{names[0], names[2]}; !slices.Equal(gone, want) {
		t.Errorf("deleted: %q, not %q", gone, want)
	}
	// Without permission to read the files, they can't be deleted. The snapshot keeps its name, for a user who has
	// permission.
	if _, err := s.Stat(t.Context(), names[5]); err != nil {
		t.Errorf("a snapshot with private files: %v", err)
	}
	for _, says := range []string{"dist-userns -- COMMAND", "remove " + names[1] + ": can't be removed", "snapshot 4 is damaged", "snapshot 5 is damaged"} {
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("the failures do not say %q: %v", says, err)
		}
	}
	// Its files stay in tmp, and every sweep reports them.
	if _, err := sweep(t.Context(), s, nothing, func(int) {}); err == nil || !strings.Contains(err.Error(), "can't be removed") {
		t.Errorf("the next sweep: %v", err)
	}
	seen := 0
	err = s.Walk(t.Context(), func(context.Context, snapshot.Info) error { seen++; return nil })
	if !errdefs.IsDataLoss(err) || seen != 1 {
		t.Errorf("Walk sees %d, and %v", seen, err)
	}
}

// stuck is a driver that fails to remove the directory of one id.
type stuck struct {
	snapshot.Driver
	id  string
	err error
}

func (d stuck) Remove(ctx context.Context, dir string) error {
	if filepath.Base(dir) == d.id {
		return d.err
	}
	return d.Driver.Remove(ctx, dir)
}

// A snapshot in use is kept silently. But if the driver can't delete the files of a removed one, that is reported,
// whatever the class of the error.
func TestASweepTellsFailuresFromUse(t *testing.T) {
	t.Parallel()
	for _, class := range []error{errdefs.ErrUnavailable, errdefs.ErrFailedPrecondition} {
		s := open(t, t.TempDir(), stuck{drivers["native"], "1", fmt.Errorf("pool is down: %w", class)})
		name := commit(t, s, "base", "")
		gone, err := sweep(t.Context(), s, nothing, func(int) {})
		if len(gone) != 0 || err == nil || !strings.Contains(err.Error(), "remove "+name+": pool is down") {
			t.Errorf("%v: deleted %q, and %v", class, gone, err)
		}
	}
}

// A Remover that could not list the snapshots removes no parent afterwards.
func TestARemoverThatCanNotListRemovesNoParent(t *testing.T) {
	t.Parallel()
	snapshottest.Root(t)
	const user = 65534
	root := t.TempDir()
	if err := os.Chmod(filepath.Dir(root), 0o755); err != nil {
		t.Fatal(err)
	}
	s := open(t, root, drivers["native"])
	base, other := commit(t, s, "base", ""), commit(t, s, "other", "")
	if err := prepare(s, "child", base); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == "info" {
			var b []byte
			if b, err = os.ReadFile(name); err == nil && strings.Contains(string(b), `"child"`) {
				err = os.Chmod(name, 0)
			}
		}
		return errors.Join(err, os.Lchown(name, user, user))
	})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		if _, err := unix.SetfsuidRetUid(user); err != nil {
			ended <- err
			return
		}
		r := s.Remover()
		if err := r.Remove(t.Context(), other); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("the snapshots could be listed: %v", err)
		}
		ended <- r.Remove(t.Context(), base)
	}()
	if err := <-ended; err == nil {
		t.Error("a snapshot with a child is removed")
	}
}
