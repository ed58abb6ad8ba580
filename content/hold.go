package content

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

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

// The files of a hold: distkit-layout(5), HOLDS.
const (
	holdFile = layout.Hold
	gateFile = "gate"
)

// Hold takes the store's shared lock against the sweep and leaves it open in this process,
// for what it executes to inherit: the returned setting of [HoldEnv] must be in its
// environment. The lock lasts until the last process that has it ends. A process that has
// inherited one already gets it back at once.
func (s *Store) Hold(ctx context.Context) (env string, err error) {
	if err := s.Init(); err != nil {
		return "", err
	}
	inherited := os.Getenv(HoldEnv)
	if s.inherits(inherited) {
		return HoldEnv + "=" + inherited, nil
	}
	hold, err := s.enter(ctx, unix.LOCK_SH)
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

// inherits tells whether one of the holds is this store's, and really open.
func (s *Store) inherits(holds string) bool {
	fi, err := s.Tree.Stat(holdFile)
	if err != nil {
		return false
	}
	want := fi.Sys().(*unix.Stat_t)
	for _, h := range strings.Fields(holds) {
		word, _, _ := strings.Cut(h, ":")
		fd, err := strconv.Atoi(word)
		var st unix.Stat_t
		if err == nil && unix.Fstat(fd, &st) == nil && st.Dev == want.Dev && st.Ino == want.Ino {
			return true
		}
	}
	return false
}

// Exclude waits until nobody holds the store, keeps new holders out meanwhile and until the
// returned function is called. FailedPrecondition for a process that has inherited a hold, and
// for a directory that has blobs but is no layout: they may be another tool's.
func (s *Store) Exclude(ctx context.Context) (release func(), err error) {
	if err := s.Check(); errors.Is(err, fs.ErrNotExist) {
		err := s.Digests(ctx, func(digest.Digest) error {
			return errclass.Errorf(errdefs.ErrFailedPrecondition, "sweep %s: it has blobs but no %s: it is no store", s.Root(), ocispec.ImageLayoutFile)
		})
		if err != nil {
			return nil, err
		}
	}
	if err := s.Init(); err != nil {
		return nil, err
	}
	if s.inherits(os.Getenv(HoldEnv)) {
		return nil, errclass.As(fmt.Errorf("sweep %s: this process holds it against the sweep itself", s.Root()), errdefs.ErrFailedPrecondition)
	}
	hold, err := s.enter(ctx, unix.LOCK_EX)
	if err != nil {
		return nil, fmt.Errorf("sweep %s: %w", s.Root(), err)
	}
	return func() { disk.Release(hold) }, nil
}

// enter takes the hold through the gate. A sweeper waits for the holders with the gate in its
// hand, so that those who come later can't starve it.
func (s *Store) enter(ctx context.Context, how int) (*os.File, error) {
	gate, err := s.Tree.OpenFile(gateFile, os.O_RDWR|os.O_CREATE, 0o666)
	if err != nil {
		return nil, err
	}
	if err := disk.LockContext(ctx, gate, unix.LOCK_EX); err != nil {
		return nil, err
	}
	defer gate.Close()
	defer disk.Unlock(gate)
	hold, err := s.Tree.OpenFile(holdFile, os.O_RDWR|os.O_CREATE, 0o666)
	if err != nil {
		return nil, err
	}
	if err := disk.LockContext(ctx, hold, how); err != nil {
		return nil, err
	}
	return hold, nil
}
