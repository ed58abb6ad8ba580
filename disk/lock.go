package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Lock takes the lock of an open file, shared or exclusive: how is unix.LOCK_SH or LOCK_EX. It waits for the lock; with
// LOCK_NB it fails with EWOULDBLOCK if another process holds it. The error is NotImplemented if the file system has no
// locks.
//
// The kernel releases a lock when the last process that shares the open file has closed it or exited. Two open files of
// one process exclude each other as well. On NFS an exclusive lock needs a file that is open for writing (flock(2)), as
// [Tree.OpenLock] opens it; else the error is PermissionDenied.
//
// The wait can't be cancelled. Use [LockContext] for a lock that another process may keep.
func Lock(f *os.File, how int) error {
	return lockFailed(f.Name(), retry(func() error { return unix.Flock(int(f.Fd()), how) }))
}

func lockFailed(name string, err error) error {
	switch {
	case errors.Is(err, unix.EBADF):
		return readOnly{name}
	case errors.Is(err, unix.ENOLCK), errors.Is(err, unix.ENOSYS),
		errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTSUP):
		return noLocks{name, err}
	}
	return err
}

// noLocks is the error of a file system without locks.
type noLocks struct {
	name string
	err  error
}

func (e noLocks) Error() string {
	return fmt.Sprintf("the file system of %s has no locks that processes share (flock: %v)", e.name, e.err)
}

func (e noLocks) Unwrap() []error { return []error{e.err, errdefs.ErrNotImplemented} }

// readOnly is the error of an exclusive lock on a file of NFS that is open for reading only.
type readOnly struct{ name string }

func (e readOnly) Error() string {
	return fmt.Sprintf("lock %s: %v: its file system locks only files that can be written to", e.name, fs.ErrPermission)
}

func (e readOnly) Unwrap() []error { return []error{unix.EBADF, fs.ErrPermission} }

// Unlock releases the lock even if a child process that is between fork and exec still shares the file.
func Unlock(f *os.File) { _ = unix.Flock(int(f.Fd()), unix.LOCK_UN) }

// Release unlocks and closes the file.
func Release(f *os.File) {
	Unlock(f)
	_ = f.Close()
}

// Process is a process that holds a lock.
type Process struct {
	PID     int
	Command string // from /proc/PID/comm, with "?" for unprintable characters
}

func (p Process) String() string { return fmt.Sprintf("process %d (%s)", p.PID, p.Command) }

// holder describes the processes that hold the lock of an open file, such as "process 17 (dist-gc) has it".
func holder(f *os.File) string {
	var all []string
	for _, p := range Holders(f) {
		all = append(all, p.String())
	}
	switch n := len(all); {
	case n == 0:
		return "another process has it"
	case n == 1:
		return all[0] + " has it"
	case n > maxHolders:
		return fmt.Sprintf("%s and %d others have it", strings.Join(all[:maxHolders], ", "), n-maxHolders)
	default:
		return strings.Join(all[:n-1], ", ") + " and " + all[n-1] + " have it"
	}
}

// maxHolders is the largest number of processes that a message names.
const maxHolders = 3

// Busy returns the error for an open file that another process has locked. It names the process, and is both
// Unavailable and EWOULDBLOCK.
func Busy(f *os.File) error { return busy("busy: " + holder(f)) }

type busy string

func (b busy) Error() string { return string(b) }
func (busy) Is(target error) bool {
	return target == errdefs.ErrUnavailable || target == unix.EWOULDBLOCK
}

// patience is how long [LockContext] waits for a lock before it calls the context's notice function.
const patience = time.Second

type noticeKey struct{}

// WithNotice returns a context that makes [LockContext] call notify when it has waited for a second. The text names the
// lock and the process that holds it.
func WithNotice(ctx context.Context, notify func(text string)) context.Context {
	return context.WithValue(ctx, noticeKey{}, notify)
}

// Notice calls the context's function of [WithNotice], if any, for a caller that waits for the lock of f by other means
// than LockContext.
func Notice(ctx context.Context, f *os.File) {
	if notify, ok := ctx.Value(noticeKey{}).(func(string)); ok {
		notify(fmt.Sprintf("waiting for the lock of %s: %s", f.Name(), holder(f)))
	}
}

// LockContext locks f as [Lock] does, and waits no longer than until ctx is done. If it fails it closes f.
func LockContext(ctx context.Context, f *os.File, how int) error {
	err := Lock(f, how|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) && how&unix.LOCK_NB == 0 {
		got := make(chan error, 1)
		go func() { got <- Lock(f, how) }()
		var cancelled bool
		if err, cancelled = await(ctx, f, got); cancelled {
			// flock(2) can't be cancelled. Close the file, and with it the lock, as soon as the call returns.
			go func() { <-got; _ = f.Close() }()
			return err
		}
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = Busy(f)
	}
	if err != nil {
		_ = f.Close()
	}
	return err
}

func await(ctx context.Context, f *os.File, got <-chan error) (err error, cancelled bool) {
	late := time.NewTimer(patience)
	defer late.Stop()
	for {
		select {
		case err := <-got:
			return err, false
		case <-late.C:
			Notice(ctx, f)
		case <-ctx.Done():
			return ctx.Err(), true
		}
	}
}

// LockFile opens and locks a file or directory that other processes may replace or remove. The file that it returns is
// the one that the name leads to while the lock is held. It follows no symbolic link at name, and doesn't wait for a
// FIFO. With LOCK_NB it fails as [Busy] says.
func LockFile(ctx context.Context, name string, flag int, perm fs.FileMode, how int) (*os.File, error) {
	return lockNamed(ctx, how,
		func() (*os.File, error) { return os.OpenFile(name, flag|openFlags, perm) },
		func(f *os.File) bool { return Names(name, f) })
}

// lockNamed opens and locks a file. It starts over if the name leads to another file by the time it has the lock.
func lockNamed(ctx context.Context, how int, open func() (*os.File, error), named func(*os.File) bool) (*os.File, error) {
	for {
		f, err := open()
		if err != nil {
			return nil, err
		}
		if err := LockContext(ctx, f, how); err != nil {
			return nil, err
		}
		if named(f) {
			return f, nil
		}
		_ = f.Close()
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
}

// Names reports whether a name still leads to the open file.
func Names(name string, f *os.File) bool {
	opened, err := f.Stat()
	if err != nil {
		return false
	}
	named, err := os.Stat(name)
	return err == nil && os.SameFile(opened, named)
}
