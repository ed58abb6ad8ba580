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

// HoldEnv is the environment variable with the holds that a process has inherited: "FD:DEVICE:INODE", separated by
// spaces.
const HoldEnv = "DIST_HOLD"

// Hold takes the store's shared lock against sweeps, for this process and all that it executes: the lock's descriptor
// is inherited, and the returned setting of [HoldEnv] must be added to the environment. The lock lasts until the last
// process that has the descriptor exits. If this process has inherited a hold on the store, Hold returns at once. A
// store that was never held and that this user can't write to is not held.
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
		// The file hold doesn't exist, and this user can't create it. The store is read without a hold, so whoever may
		// delete blobs there can do so at any time.
		return HoldEnv + "=" + inherited, nil
	}
	if err != nil {
		return "", fmt.Errorf("hold %s: %w", s.Root(), err)
	}
	// Duplicate the descriptor: the copy survives exec, and no finalizer closes it.
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

// Enter takes the store's shared lock against sweeps until release is called. It is for a process that stores blobs now
// and then. A sweep that waits goes first.
func (s *Store) Enter(ctx context.Context) (release func(), err error) {
	hold, err := s.enter(ctx, os.Getenv(HoldEnv))
	if err != nil {
		return nil, fmt.Errorf("hold %s: %w", s.Root(), err)
	}
	return func() { disk.Release(hold) }, nil
}

// lookupHold looks for this store's hold in a value of [HoldEnv]. named reports whether the value lists it, and open
// whether its descriptor is open, too. A program such as sudo may have closed the descriptor on the way to this
// process.
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

// How a sweep waits for holders: it locks the gate for one turn, during which no new holder enters, and then stays away
// for ten turns. So it gets in between holders that come and go all the time, and a holder that never ends doesn't keep
// others out.
const (
	turn = 50 * time.Millisecond // how long a sweep locks the gate
	poll = 2 * time.Millisecond  // between two attempts to get a lock
)

// CheckSweep returns FailedPrecondition if the store can't be swept: because this process holds it, or because the
// directory has blobs but is not a layout, so that the blobs may be another tool's.
func (s *Store) CheckSweep(ctx context.Context) error {
	if err := s.Check(); errors.Is(err, fs.ErrNotExist) {
		err := s.Digests(ctx, func(digest.Digest) error {
			return errclass.Errorf(errdefs.ErrFailedPrecondition, "sweep %s: it has blobs but no %s, so it is not a store", s.Root(), ocispec.ImageLayoutFile)
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
		// A program on the way to this process closed the descriptor. If the store is held now, it is taken to be
		// held by an ancestor of this process.
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

// Exclude waits, no longer than wait, until no process holds the store. It returns the file hold, locked; new holders
// wait until that is released. While it waits it notifies as [disk.Notice] does.
//
// Unavailable: another process held the store for longer; the error names it. FailedPrecondition: this process holds
// the store, or one of its ancestors does and waits for it.
func (s *Store) Exclude(ctx context.Context, wait time.Duration) (*os.File, error) {
	notified := false
	for end := time.Now().Add(wait); ; {
		hold, err := s.exclude(ctx, min(turn, time.Until(end)))
		if err == nil {
			return hold, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("sweep %s: %w", s.Root(), err)
		}
		left := time.Until(end)
		if !notified || left <= 0 {
			notified = true
			if err := s.notifyHeld(ctx, left); err != nil {
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

// notifyHeld notifies the user which process holds the store. It returns an error if waiting is useless, because the
// holder is this process or its ancestor, or if no time is left.
func (s *Store) notifyHeld(ctx context.Context, left time.Duration) error {
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

// isAncestor reports whether pid is this process or one of its ancestors. It finds holders even if a program such as
// sudo has removed both the environment variable and the descriptor.
func isAncestor(pid int) bool {
	for p := os.Getpid(); p > 1; {
		if p == pid {
			return true
		}
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p))
		if err != nil {
			return false
		}
		// "17 (name) S 4 …", where the name may contain any character
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

// exclude locks the gate, and tries for the given time to lock the file hold exclusively. EWOULDBLOCK if it fails.
func (s *Store) exclude(ctx context.Context, d time.Duration) (*os.File, error) {
	end := time.Now().Add(d)
	gate, err := s.tryUntil(ctx, layout.Gate, end)
	if err != nil {
		return nil, err
	}
	defer disk.Release(gate)
	return s.tryUntil(ctx, layout.Hold, end)
}

// tryUntil opens a file of a hold and tries to lock it exclusively, at least once, until the time end. EWOULDBLOCK if
// another process still holds it.
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

// Holders returns the state of the file hold, to compare with a later one. free is false if a process holds the store
// at the moment: the state then doesn't include that holder's changes.
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

// enter locks the file hold, shared, after passing the gate. A descendant of a holder doesn't wait at the gate: the
// sweep that has locked the gate waits for that holder, which may wait for this process.
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
		_ = hold.Close() // HoldEnv is set, but the hold has ended
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
