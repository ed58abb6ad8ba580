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

// dirSink writes a directory: blobs first, each aside and then renamed, and the documents when all blobs are on disk,
// oci-layout last. So the directory is an image layout once it is complete, and an export that was killed is gone on
// with.
type dirSink struct {
	layout.Dir
	lock      *os.File // the directory: two exports must not meet in one
	documents []namedDocument
}

type namedDocument struct {
	name string
	b    []byte
}

// newDirSink makes the directory, or takes one that holds nothing but blobs.
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

// check refuses a directory that has other things than an export that was broken off.
func (s *dirSink) check(dir string) error {
	entries, err := s.lock.ReadDir(-1)
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := strings.TrimSuffix(e.Name(), ".new") // where a document was being written
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

// directory also removes what an export that was killed has been writing there.
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
		return s.Tree.SyncDir(path.Dir(name)) // from an export that was killed. Nobody else is here, so no lock file is made for it.
	}
	_, _, err := s.PutBlob(ctx, d, size, 0, func(f *os.File) error { return write(f) })
	return err
}

func (s *dirSink) end() error {
	// oci-layout came first.
	slices.Reverse(s.documents)
	for _, d := range s.documents {
		if err := s.Tree.Replace(d.name, d.b, 0o666, true); err != nil {
			return fmt.Errorf("write %s: %w", path.Base(d.name), err)
		}
	}
	return nil
}
