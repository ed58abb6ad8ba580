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

// Lock takes the lock of an open file, unix.LOCK_EX or LOCK_SH, and waits for it. With LOCK_NB it doesn't wait: it fails with
// EWOULDBLOCK if another process has the lock. NotImplemented if the file system has no locks.
//
// The kernel releases a lock when the last process that shares the open file has ended. Two open files of one process
// exclude each other as well. NFS locks a file exclusively only if it is open for writing (flock(2)): [Tree.OpenLock] opens it
// so. PermissionDenied if it is not.
//
// A wait can't be called off: [LockContext] is for locks that others may keep.
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

// Unlock releases the lock also where a child between fork and exec still shares the file.
func Unlock(f *os.File) { _ = unix.Flock(int(f.Fd()), unix.LOCK_UN) }

// Release is Unlock, and closes the file.
func Release(f *os.File) {
	Unlock(f)
	_ = f.Close()
}

// Process is a process that has a lock.
type Process struct {
	PID     int
	Command string // as /proc/PID/comm has it, with "?" for what isn't printable
}

func (p Process) String() string { return fmt.Sprintf("process %d (%s)", p.PID, p.Command) }

// holder describes who has the lock of an open file: "process 17 (dist-gc) has it".
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

// maxHolders bounds how many processes a message names.
const maxHolders = 3

// Busy is the error for an open file whose lock another process has: Unavailable, and EWOULDBLOCK. It names the process.
func Busy(f *os.File) error { return busy("busy: " + holder(f)) }

type busy string

func (b busy) Error() string { return string(b) }
func (busy) Is(target error) bool {
	return target == errdefs.ErrUnavailable || target == unix.EWOULDBLOCK
}

// patience is how long a lock is waited for before that is told.
const patience = time.Second

type noticeKey struct{}

// WithNotice returns a context with which [LockContext] calls tell when it has waited for a second. The text says which lock it
// waits for, and who has that.
func WithNotice(ctx context.Context, tell func(text string)) context.Context {
	return context.WithValue(ctx, noticeKey{}, tell)
}

// Notice tells, as [WithNotice] says, that the caller waits for the lock of an open file.
func Notice(ctx context.Context, f *os.File) {
	if tell, ok := ctx.Value(noticeKey{}).(func(string)); ok {
		tell(fmt.Sprintf("waiting for the lock of %s: %s", f.Name(), holder(f)))
	}
}

// LockContext waits for the lock until ctx is done. It owns f where it fails.
func LockContext(ctx context.Context, f *os.File, how int) error {
	err := Lock(f, how|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) && how&unix.LOCK_NB == 0 {
		got := make(chan error, 1)
		go func() { got <- Lock(f, how) }()
		var cancelled bool
		if err, cancelled = await(ctx, f, got); cancelled {
			// A wait in the kernel can't be called off: what it brings is given back.
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

// LockFile opens and locks a file or directory that others may replace or remove: what it returns is what the name leads
// to. A symbolic link is not followed, and a FIFO is not waited for. With LOCK_NB it fails as [Busy] does.
func LockFile(ctx context.Context, name string, flag int, perm fs.FileMode, how int) (*os.File, error) {
	return lockNamed(ctx, how,
		func() (*os.File, error) { return os.OpenFile(name, flag|openFlags, perm) },
		func(f *os.File) bool { return Names(name, f) })
}

// lockNamed opens a file and locks it, again if the name has come to lead to another one meanwhile.
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

// Names tells whether a name still leads to the open file.
func Names(name string, f *os.File) bool {
	opened, err := f.Stat()
	if err != nil {
		return false
	}
	named, err := os.Stat(name)
	return err == nil && os.SameFile(opened, named)
}
