package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"distkit/disk"
	"distkit/disk/layout"
	"distkit/errclass"
)

// alone calls f in a phase; in a dry run, without one.
func (s *sweeper) alone(ctx context.Context, f func() error) error {
	if s.DryRun {
		return f()
	}
	for try := 1; ; try++ {
		began := time.Now()
		unlock, current, err := s.lock(ctx)
		if err != nil {
			return err
		}
		locked := time.Now()
		if current {
			err := f()
			unlock()
			pause(ctx, min(time.Since(locked), phaseTime)) // lets waiting processes go on
			return cmp.Or(err, ctx.Err())
		}
		unlock()
		if err := s.mark(ctx); err != nil {
			return err
		}
		if try > freeMarks {
			if s.waited += time.Since(began); s.waited > s.Wait {
				return errclass.Errorf(errdefs.ErrUnavailable, "sweep %s: busy: names, containers or blobs keep changing", s.Store.Root())
			}
		}
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// nameWait is how long to wait for processes that change the names of a namespace.
const nameWait = 30 * time.Second

// lock begins a phase. current is false if something must be marked first. While it waits for one lock it holds no
// other.
func (s *sweeper) lock(ctx context.Context) (unlock func(), current bool, err error) {
	for end := time.Now().Add(nameWait); ; {
		began := time.Now()
		hold, err := s.Store.Exclude(ctx, s.Wait-s.waited)
		if d := time.Since(began); d > phaseTime {
			s.waited += d
		}
		if err != nil {
			return nil, false, err
		}
		unlockNames, current, err := s.lockNames()
		unlock := func() {
			unlockNames()
			disk.Release(hold)
		}
		if err == nil && current {
			current, err = s.unheld(ctx, hold)
		}
		if err == nil {
			return unlock, current, nil
		}
		unlock()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, false, fmt.Errorf("sweep %s: %w", s.Store.Root(), err)
		}
		if time.Now().After(end) {
			return nil, false, errclass.Errorf(errdefs.ErrUnavailable, "sweep %s: busy: %w", s.Store.Root(), err)
		}
		pause(ctx, phaseTime)
		if err := ctx.Err(); err != nil {
			return nil, false, err
		}
	}
}

// unheld reports whether no process has held the store since containers, labels and arrivals were marked.
func (s *sweeper) unheld(ctx context.Context, hold *os.File) (bool, error) {
	holders, err := layout.HoldersOf(hold)
	if err != nil {
		return false, err
	}
	if holders.Blind {
		// Holds can't be detected. The hold is locked now, so mark under it.
		return true, s.markHeld(ctx)
	}
	return !s.held && holders == s.holders, nil
}

// lockNames locks the names of all namespaces, so that none is created or changed until unlock is called. current is
// false if they are not the marked ones. EWOULDBLOCK if another process is changing them.
func (s *sweeper) lockNames() (unlock func(), current bool, err error) {
	var locked []*os.File
	unlock = func() {
		for _, f := range locked {
			disk.Unlock(f)
		}
	}
	all, err := lockNamespaces(context.Background(), s.Store, unix.LOCK_EX|unix.LOCK_NB)
	if err != nil {
		return unlock, false, err
	}
	unlockNames := unlock
	unlock = func() {
		unlockNames()
		disk.Release(all)
	}
	for namespace, m := range s.names {
		if err := disk.Lock(m.file, unix.LOCK_SH|unix.LOCK_NB); err != nil {
			return unlock, false, fmt.Errorf("lock names of namespace %s: %w", namespace, err)
		}
		locked = append(locked, m.file)
		if !m.current() {
			return unlock, false, nil
		}
	}
	dirs, err := subdirs(s.Store, layout.Namespaces)
	if err != nil {
		return unlock, false, err
	}
	for _, name := range append(dirs, DefaultNamespace) {
		if s.names[name] == nil && identifier(name) {
			if exists, err := OpenNamespaces(s.Store).exists(name); err != nil || exists {
				return unlock, false, err
			}
		}
	}
	return unlock, true, nil
}
