package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"distkit/disk"
	"distkit/disk/layout"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// dirSink writes a directory: first the blobs, each as a temporary file that is renamed, and when all are on disk the
// documents, oci-layout last. So the directory becomes an image layout only when it is complete, and an interrupted
// export can be continued.
type dirSink struct {
	layout.Dir
	lock      *os.File // of the directory, against another export
	documents []namedDocument
}

type namedDocument struct {
	name string
	b    []byte
}

// newDirSink creates the directory, or accepts one that has nothing but blobs.
func newDirSink(dir string) (*dirSink, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := disk.MakeDir(abs); err != nil {
		return nil, err
	}
	s := &dirSink{Dir: layout.Dir{Tree: disk.Tree(abs), Name: "."}}
	if s.lock, err = os.Open(abs); err != nil {
		return nil, err
	}
	if err := disk.Lock(s.lock, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = errclass.Errorf(errdefs.ErrUnavailable, "%s is locked, as by another export: %w", dir, disk.Busy(s.lock))
		}
		s.close()
		return nil, err
	}
	if err := s.check(dir); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *dirSink) close() { _ = s.lock.Close() }

// check refuses a directory with anything but the files of an interrupted export.
func (s *dirSink) check(dir string) error {
	entries, err := s.lock.ReadDir(-1)
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := strings.TrimSuffix(e.Name(), ".new") // a document that was being written
		switch {
		case e.Name() == v1.ImageLayoutFile:
			return errclass.Errorf(errdefs.ErrAlreadyExists, "%s is an image layout already; dist-push adds images to one", dir)
		case e.Name() == v1.ImageBlobsDir && e.IsDir(), name == v1.ImageLayoutFile, name == v1.ImageIndexFile, name == dockerManifestsFile:
		default:
			return errclass.Errorf(errdefs.ErrFailedPrecondition, "%s is not empty: it has %q", dir, e.Name())
		}
	}
	return nil
}

func (s *dirSink) document(name string, b []byte) error {
	s.documents = append(s.documents, namedDocument{name, b})
	return nil
}

// directory creates a directory, and removes the temporary files of an interrupted export in it.
func (s *dirSink) directory(name string) error {
	if err := s.Tree.MakeDir(name); err != nil {
		return err
	}
	f, err := s.Tree.OpenDir(name)
	if err != nil {
		return err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	for _, n := range names {
		if err == nil && strings.HasPrefix(n, layout.TempPrefix) {
			err = s.Tree.Remove(path.Join(name, n))
		}
	}
	return err
}

func (s *dirSink) blob(ctx context.Context, d digest.Digest, size int64, write func(io.Writer) error) error {
	name := layout.BlobName(d)
	if fi, err := s.Tree.Stat(name); err == nil && fi.Mode().IsRegular() && fi.Size() == size {
		return s.Tree.SyncDir(path.Dir(name)) // from an interrupted export; no other process is here, so no lock is needed
	}
	_, _, err := s.PutBlob(ctx, d, size, 0, func(f *os.File) error { return write(f) })
	return err
}

func (s *dirSink) end() error {
	// oci-layout was added first, and must be written last.
	slices.Reverse(s.documents)
	for _, d := range s.documents {
		if err := s.Tree.Replace(d.name, d.b, 0o666, true); err != nil {
			return fmt.Errorf("write %s: %w", path.Base(d.name), err)
		}
	}
	return nil
}
