// Package content is a store of blobs that are named by their digests. The store is a directory, which is also an OCI
// image layout, and any number of processes share it without a daemon.
//
// [Open] opens a [Store]. A blob is written in steps, each of which another process can take over after a crash:
//
//   - [Store.Writer] locks an ingest, the place of a blob that is not complete, and opens or resumes it.
//   - [Writer.Write] appends to it and hashes.
//   - [Writer.Commit] verifies size and digest, makes the data durable and publishes the blob by rename.
//
// [WriteBlob] does all three. Stored blobs are read with [Store.File], listed with [Store.Walk], labelled with
// [Store.Update] and checked with [Store.Verify]. [Store.Follow] reads a blob while another process still writes it.
// [Store.Hold] keeps sweeps away; [Store.Exclude], [Store.Unused] and [Store.SweepIngests] are the parts of a sweep.
//
// Two guarantees hold after a crash at any moment: a blob that has its name is complete and hashes to it, and an ingest
// either resumes or starts over. The page distkit-layout(5), layout.5.md beside this file, specifies every file;
// comments cite its sections.
//
// Errors have the classes of [github.com/containerd/errdefs]: NotFound, AlreadyExists, Unavailable (another process
// holds the lock), InvalidArgument, NotImplemented (an algorithm other than sha256 and sha512), FailedPrecondition
// (such as a layout of an unknown version). A wrong digest or size is both DataLoss and FailedPrecondition.
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

// Store is a content store in a directory. It keeps nothing in memory but paths, and is safe for concurrent use by
// goroutines and processes.
type Store struct {
	layout.Dir        // of the store itself: its Name is "."
	namespace  string // the namespace whose directory was opened, or ""
}

// Open opens the store at root, which need not exist: the first write creates it, and until then it reads as empty. If
// root is the directory of a namespace, Open opens the store that it is part of; see [Store.Namespace].
// FailedPrecondition if the layout's version is unknown.
//
// Blobs of the alternates in [layout.AlternatesEnv] are read as if they were the store's own. They are not listed,
// swept, deleted or labelled.
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

// Root returns the absolute path of the store's directory.
func (s *Store) Root() string { return string(s.Tree) }

// Namespace returns the namespace whose directory was opened as the store, or "".
func (s *Store) Namespace() string { return s.namespace }

// Init makes the root an OCI image layout, unless it is one: first the directories, then an index.json without names,
// and oci-layout last. It must be called before anything is written; [Store.Writer] does so. FailedPrecondition if the
// layout has lost its index.json.
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

// discard removes a file of the store, if it exists.
func (s *Store) discard(name string) error {
	if err := s.Tree.Remove(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// mismatch returns an error with the classes of a failed verification.
func mismatch(format string, a ...any) error {
	return errclass.As(fmt.Errorf(format, a...), errdefs.ErrDataLoss, errdefs.ErrFailedPrecondition)
}

// eachEntry calls f with each entry of a directory of the store. It reads the directory in portions. A directory that
// doesn't exist counts as empty.
func (s *Store) eachEntry(ctx context.Context, name string, f func(fs.DirEntry) error) error {
	return s.eachEntryIn(ctx, name, func(_ *os.File, e fs.DirEntry) error { return f(e) })
}

// eachEntryIn is eachEntry with a function that also gets the open directory.
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
