package create

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"distkit/archive"
	"distkit/cmd/internal/cli"
	"distkit/errclass"
	"distkit/runtime"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// bindVolumes replaces mounts of volumes by bind mounts of the volumes' directories.
func bindVolumes(mounts []specs.Mount, dir func(specs.Mount) (string, error)) ([]specs.Mount, error) {
	mounts = slices.Clone(mounts)
	for i, m := range mounts {
		if m.Type != spec.VolumeType {
			continue
		}
		path, err := dir(m)
		if err != nil {
			return nil, err
		}
		mounts[i].Type, mounts[i].Source = "bind", path
	}
	return mounts, nil
}

// volume returns the directory of a volume. A new one gets what the container has where it is to be mounted: the files, and the
// directory's owner and mode. rootfs is "" for the container's own. What could not be set is told.
func (q *Request) volume(ctx context.Context, all *runtime.Containers, c *runtime.Container, m specs.Mount, rootfs string) (string, error) {
	return all.Volume(ctx, m.Source, func(dir *os.File) error {
		open := c.OpenRoot
		if rootfs != "" {
			open = func() (*os.File, error) { return os.OpenFile(rootfs, os.O_RDONLY|unix.O_DIRECTORY, 0) }
		}
		root, err := open()
		if err != nil {
			return err
		}
		defer root.Close()
		from, err := spec.OpenInRoot(root, m.Destination)
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s in the container: %w", m.Destination, err)
		}
		defer from.Close()
		var st unix.Stat_t
		if err := unix.Fstat(int(from.Fd()), &st); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return errclass.Errorf(errdefs.ErrInvalidArgument, "%s in the container: %w", m.Destination, unix.ENOTDIR)
		}
		unset, err := copyFiles(ctx, from, dir)
		if err != nil {
			return err
		}
		if len(unset) > 0 {
			q.Warn(fmt.Errorf("volume %s: could not set %s", m.Source, cli.Counts(unset)))
		}
		return errors.Join(dir.Chown(int(st.Uid), int(st.Gid)), unix.Fchmod(int(dir.Fd()), st.Mode&0o7777))
	})
}

// copyFiles copies what is in one directory into another, which is empty, and counts what could not be set of the copies.
func copyFiles(ctx context.Context, from, to *os.File) (unset map[string]int64, err error) {
	path := func(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }
	out, in := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, err := archive.Diff(ctx, in, "", path(from), archive.DiffOptions{Archive: true, Compression: archive.Uncompressed})
		_ = in.CloseWithError(err)
	}()
	r, err := archive.Apply(ctx, path(to), out, archive.Options{Archive: true})
	_ = out.CloseWithError(err)
	<-done // it reads from a directory that the caller closes
	return r.Unset, err
}
