package content

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"distkit/disk"
	"distkit/disk/layout"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// HoldEnv tells a process which holds it has inherited: "FD:DEVICE:INODE", separated by spaces.
const HoldEnv = "DIST_HOLD"

// Hold takes the store's shared lock against the sweep and leaves it open in this process,
// for what it executes to inherit: the returned setting of [HoldEnv] must be in its
// environment. The lock lasts until the last process that has it ends. A process that has inherited one already gets it
// back at once. A store that this user can't write to, and that nobody has held before, is not held.
func (s *Store) Hold(ctx context.Context) (env string, err error) {
	if err := s.Init(); err != nil {
		return "", err
	}
	inherited := os.Getenv(HoldEnv)
	if open, _ := s.lookupHold(inherited); open {
		return HoldEnv + "=" + inherited, nil
	}
	hold, err := s.enter(ctx, inherited)
	if disk.Unwritable(err) {
		// Nobody has held this store yet, and this user can't make the file for it. The store is read without a hold:
		// whoever may delete there can do so at any time.
		return HoldEnv + "=" + inherited, nil
	}
	if err != nil {
		return "", fmt.Errorf("hold %s: %w", s.Root(), err)
	}
	// A descriptor of our own that survives exec, and that no finalizer closes.
	fd, err := unix.FcntlInt(hold.Fd(), unix.F_DUPFD, 10)
	_ = hold.Close()
	if err != nil {
		return "", fmt.Errorf("hold %s: %w", s.Root(), err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", fmt.Errorf("hold %s: %w", s.Root(), err)
	}
	return HoldEnv + "=" + strings.TrimSpace(fmt.Sprintf("%s %d:%d:%d", inherited, fd, st.Dev, st.Ino)), nil
}

// Enter takes the store's shared lock against the sweep, until release is called, for a process that brings in blobs now and then.
// A sweep that waits goes first.
func (s *Store) Enter(ctx context.Context) (release func(), err error) {
	hold, err := s.enter(ctx, os.Getenv(HoldEnv))
	if err != nil {
		return nil, fmt.Errorf("hold %s: %w", s.Root(), err)
	}
	return func() { disk.Release(hold) }, nil
}

// lookupHold looks for this store's hold among those of [HoldEnv]. named is true if there is one, and open if its descriptor is
// open too: programs between may have closed it, such as sudo.
func (s *Store) lookupHold(holds string) (open, named bool) {
	fi, err := s.Tree.Stat(layout.Hold)
	if err != nil {
		return false, false
	}
	want := fi.Sys().(*unix.Stat_t)
	inode := fmt.Sprintf("%d:%d", want.Dev, want.Ino)
	for _, h := range strings.Fields(holds) {
		word, id, _ := strings.Cut(h, ":")
		fd, err := strconv.Atoi(word)
		var st unix.Stat_t
		if err == nil && unix.Fstat(fd, &st) == nil && st.Dev == want.Dev && st.Ino == want.Ino {
			return true, true
		}
		named = named || id == inode
	}
	return false, named
}

// A sweeper that waits for holders stands at the gate for one turn, and stays away for ten. New holders wait only while it
// stands there. So holders who come and go all the time let the sweeper in, and one that hangs does not stop the others.
const (
	turn = 50 * time.Millisecond
	poll = 2 * time.Millisecond
)

// CheckSweep returns an error if the store can't be swept. FailedPrecondition: this process holds it; or the directory has blobs
// but is no layout, since they may be another tool's.
func (s *Store) CheckSweep(ctx context.Context) error {
	if err := s.Check(); errors.Is(err, fs.ErrNotExist) {
		err := s.Digests(ctx, func(digest.Digest) error {
			return errclass.Errorf(errdefs.ErrFailedPrecondition, "sweep %s: it has blobs but no %s: it is no store", s.Root(), ocispec.ImageLayoutFile)
		})
		if err != nil {
			return err
		}
	}
	if err := s.Init(); err != nil {
		return err
	}
	open, named := s.lookupHold(os.Getenv(HoldEnv))
	if named && !open {
		// A program between has closed the descriptor. If somebody holds the store, it is a process above this one.
		_, free, err := s.Holders()
		if err != nil {
			return err
		}
		open = !free
	}
	if open {
		return s.ownHold()
	}
	return nil
}

func (s *Store) ownHold() error {
	return errclass.Errorf(errdefs.ErrFailedPrecondition, "sweep %s: this process holds it against the sweep itself", s.Root())
}

// Exclude waits until nobody holds the store, no longer than wait, and returns the file hold, locked: new holders wait until it
// is released. It tells that it waits as [disk.Notice] does.
//
// Unavailable: somebody holds it for longer; the error names the processes. FailedPrecondition: this process holds it, or one above
// that waits for it.
func (s *Store) Exclude(ctx context.Context, wait time.Duration) (*os.File, error) {
	told := false
	for end := time.Now().Add(wait); ; {
		hold, err := s.exclude(ctx, min(turn, time.Until(end)))
		if err == nil {
			return hold, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("sweep %s: %w", s.Root(), err)
		}
		left := time.Until(end)
		if !told || left <= 0 {
			told = true
			if err := s.held(ctx, left); err != nil {
				return nil, err
			}
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("sweep %s: %w", s.Root(), ctx.Err())
		case <-time.After(min(10*turn, left)):
		}
	}
}

// held tells who holds the store, or returns an error if that is not to be waited for, or no time is left.
func (s *Store) held(ctx context.Context, left time.Duration) error {
	f, err := layout.OpenHold(s.Tree, layout.Hold)
	if err != nil {
		return fmt.Errorf("sweep %s: %w", s.Root(), err)
	}
	defer f.Close()
	_, named := s.lookupHold(os.Getenv(HoldEnv))
	if named || slices.ContainsFunc(disk.Holders(f), func(p disk.Process) bool { return isAncestor(p.PID) }) {
		return s.ownHold()
	}
	if left <= 0 {
		return fmt.Errorf("sweep %s: %w", s.Root(), disk.Busy(f))
	}
	disk.Notice(ctx, f)
	return nil
}

// isAncestor reports whether a process is this one or above it. Programs between, such as sudo, may have taken both the
// environment and the descriptor of a hold away.
func isAncestor(pid int) bool {
	for p := os.Getpid(); p > 1; {
		if p == pid {
			return true
		}
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p))
		if err != nil {
			return false
		}
		// "17 (name) S 4 …": the name may have any character in it.
		words := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if len(words) < 2 {
			return false
		}
		if p, err = strconv.Atoi(words[1]); err != nil {
			return false
		}
	}
	return false
}

// exclude stands at the gate for a while, and tries to take the hold alone. EWOULDBLOCK if it is still held then.
func (s *Store) exclude(ctx context.Context, while time.Duration) (*os.File, error) {
	end := time.Now().Add(while)
	gate, err := s.tryUntil(ctx, layout.Gate, end)
	if err != nil {
		return nil, err
	}
	defer disk.Release(gate)
	return s.tryUntil(ctx, layout.Hold, end)
}

// tryUntil opens one of the files of a hold and takes its exclusive lock, once at least. EWOULDBLOCK if another process still
// has it at the end.
func (s *Store) tryUntil(ctx context.Context, name string, end time.Time) (*os.File, error) {
	f, err := layout.OpenHold(s.Tree, name)
	if err != nil {
		return nil, err
	}
	for {
		if err = disk.Lock(f, unix.LOCK_EX|unix.LOCK_NB); err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || !time.Now().Before(end) {
			break
		}
		select {
		case <-ctx.Done():
			err = ctx.Err()
		case <-time.After(poll):
			continue
		}
		break
	}
	_ = f.Close()
	return nil, err
}

// Holders tells who has held the store so far. free is false if somebody does just now: then it does not tell what that holder
// will have done.
func (s *Store) Holders() (h layout.Holders, free bool, err error) {
	f, err := layout.OpenHold(s.Tree, layout.Hold)
	if err == nil {
		defer f.Close()
		switch err = disk.Lock(f, unix.LOCK_EX|unix.LOCK_NB); {
		case err == nil:
			free = true
			defer disk.Unlock(f)
		case errors.Is(err, unix.EWOULDBLOCK):
			err = nil
		}
	}
	if err == nil {
		h, err = layout.HoldersOf(f)
	}
	if err != nil {
		return h, false, fmt.Errorf("sweep %s: %w", s.Root(), err)
	}
	return h, free, nil
}

// enter takes the hold, shared, through the gate. A process below one that has it need not pass that: the sweeper which has the
// gate waits for the process above.
func (s *Store) enter(ctx context.Context, inherited string) (*os.File, error) {
	if _, named := s.lookupHold(inherited); named {
		hold, err := layout.OpenHold(s.Tree, layout.Hold)
		if err != nil {
			return nil, err
		}
		if disk.Lock(hold, unix.LOCK_SH|unix.LOCK_NB) == nil {
			layout.Announce(hold)
			return hold, nil
		}
		_ = hold.Close() // the environment outlived the hold
	}
	gate, err := layout.OpenHold(s.Tree, layout.Gate)
	if err != nil {
		return nil, err
	}
	if err := disk.LockContext(ctx, gate, unix.LOCK_SH); err != nil {
		return nil, err
	}
	defer disk.Release(gate)
	hold, err := layout.OpenHold(s.Tree, layout.Hold)
	if err != nil {
		return nil, err
	}
	if err := disk.LockContext(ctx, hold, unix.LOCK_SH); err != nil {
		return nil, err
	}
	layout.Announce(hold)
	return hold, nil
}
