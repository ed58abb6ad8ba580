// Package content is a store of blobs named by their digest, in a directory that is an OCI
// image layout, shared by any number of processes without a daemon.
//
// A blob enters through a [Writer], which holds a kernel lock on its ingest, can be resumed
// by another process, and publishes the blob by rename once its size and digest are
// verified. What a process leaves behind when it dies at any instant is either a complete
// blob or an ingest that resumes. The page distkit-layout(5), layout.5.md beside this file,
// specifies every file; comments cite its sections.
//
// Errors carry the classes of [github.com/containerd/errdefs]: NotFound, AlreadyExists,
// Unavailable (another writer holds it), InvalidArgument, NotImplemented (a digest algorithm
// other than sha256 and sha512). A wrong digest or size is DataLoss and FailedPrecondition.
package content

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"

	"distkit/disk"
	"distkit/disk/layout"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Store is a content store in a directory. It holds no state but the directory's path, and
// is safe for concurrent use by goroutines and processes.
type Store struct {
	layout.Dir        // the store's own, "."
	namespace  string // that its user's root is the directory of, if any
}

// Open opens the store at root, which need not exist: it is created by the first write, and
// reads as empty until then. The directory of a namespace opens the store that it is part of;
// see [Store.Namespace]. A layout version that is not known is FailedPrecondition.
//
// Blobs of the alternates that [layout.AlternatesEnv] names are read as the store's own. They are not listed, swept, deleted
// or labelled by it.
func Open(root string) (*Store, error) {
	d, err := layout.Open(root)
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", root, err)
	}
	s := &Store{Dir: layout.Dir{Tree: d.Tree, Name: ".", Alternates: d.Alternates}}
	if d.Name != "." {
		s.namespace = path.Base(d.Name)
	}
	if err := s.Check(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open store %s: %w", root, disk.Cause(err))
	}
	return s, nil
}

// Root is the store's directory, an absolute path.
func (s *Store) Root() string { return string(s.Tree) }

// Namespace is the namespace whose directory was opened in place of the store's; "" if it was
// the store's.
func (s *Store) Namespace() string { return s.namespace }

// Init makes the root an OCI image layout unless it is one: directories, an index.json
// without names, oci-layout last. Whoever writes into the store calls it first; writers do.
// FailedPrecondition if there is a layout that has lost its index.json.
func (s *Store) Init() error {
	if there, err := s.Exists(); err != nil {
		return err
	} else if there {
		return nil
	}
	for _, dir := range []string{ocispec.ImageBlobsDir, layout.Ingest} {
		if err := s.Tree.MakeDir(dir); err != nil {
			return fmt.Errorf("create store: %w", err)
		}
	}
	if err := s.Create(layout.Ingest); err != nil {
		return fmt.Errorf("create store: %w", err)
	}
	return nil
}

// discard removes a file of the store, if there is one.
func (s *Store) discard(name string) error {
	if err := s.Tree.Remove(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// mismatch is fmt.Errorf with the classes of every failed verification.
func mismatch(format string, a ...any) error {
	return errclass.As(fmt.Errorf(format, a...), errdefs.ErrDataLoss, errdefs.ErrFailedPrecondition)
}

// eachEntry calls f with the entries of a directory of the store, which it reads in portions. A directory that is not there has
// none.
func (s *Store) eachEntry(ctx context.Context, name string, f func(fs.DirEntry) error) error {
	return s.eachEntryIn(ctx, name, func(_ *os.File, e fs.DirEntry) error { return f(e) })
}

// eachEntryIn is eachEntry, and calls f with the open directory too.
func (s *Store) eachEntryIn(ctx context.Context, name string, f func(*os.File, fs.DirEntry) error) error {
	dir, err := s.Tree.OpenDir(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list %s: %w", name, disk.Cause(err))
	}
	defer dir.Close()
	for {
		entries, err := dir.ReadDir(512)
		for _, e := range entries {
			if err := f(dir, e); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("list %s: %w", name, disk.Cause(err))
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}
