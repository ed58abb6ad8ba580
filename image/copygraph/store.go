package copygraph

import (
	"context"
	"fmt"
	"io"

	"distkit/content"
	"distkit/disk"

	"github.com/containerd/errdefs"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Source provides objects.
type Source interface {
	// Open returns the content of an object from an offset on. Read returns io.EOF only after all of it, and fails when
	// ctx is done. A source that queues requests calls asked when it has requested the object, before it waits for it.
	// NotFound if the source doesn't have the object; Aborted, DeadlineExceeded or ResourceExhausted if another attempt
	// may succeed.
	Open(ctx context.Context, d v1.Descriptor, offset int64, asked func()) (io.ReadCloser, error)
}

// Target receives objects.
type Target interface {
	// Has reports for each object whether the target has it.
	Has(ctx context.Context, objects []Object) ([]bool, error)
	// Mount makes the target take a blob from another of its repositories. It returns false if the target can't.
	Mount(ctx context.Context, d v1.Descriptor, repository string) (bool, error)
	// Put stores the content of r. r is at the beginning of the object, unless [Resumer] says otherwise; a target that
	// has a part of the object may seek. The outcome is Stored or Exists. DataLoss if the content doesn't match the
	// descriptor.
	Put(ctx context.Context, o Object, r io.ReadSeeker) (Outcome, error)
}

// Resumer is a target that may have a part of an object, and accepts the rest.
type Resumer interface {
	// Part returns how many bytes at the beginning of an object the target has. The next Put of the object may then get
	// an r at that offset. Aborted if the target can't be asked.
	Part(ctx context.Context, o Object) (int64, error)
}

// FromStore returns a store as a source.
func FromStore(s *content.Store) Source { return fromStore{s} }

type fromStore struct{ *content.Store }

func (s fromStore) Open(_ context.Context, d v1.Descriptor, offset int64, _ func()) (io.ReadCloser, error) {
	f, err := s.File(d.Digest)
	if err != nil {
		return nil, err
	}
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("read %s: %w", d.Digest, disk.Cause(err))
	}
	return f, nil
}

// Either combines sources: an object comes from the first one that has it.
type Either []Source

// Open implements Source.
func (list Either) Open(ctx context.Context, d v1.Descriptor, offset int64, asked func()) (r io.ReadCloser, err error) {
	for _, from := range list {
		if r, err = from.Open(ctx, d, offset, asked); !errdefs.IsNotFound(err) {
			break
		}
	}
	return r, err
}

// IntoStore returns a store as a target.
func IntoStore(s *content.Store) Target { return intoStore{s} }

type intoStore struct{ *content.Store }

// Has implements Target. It freshens the blobs that exist.
func (s intoStore) Has(ctx context.Context, objects []Object) ([]bool, error) {
	has := make([]bool, len(objects))
	for i, o := range objects {
		err := s.Freshen(ctx, o.Digest)
		if err != nil && !errdefs.IsNotFound(err) {
			return nil, err
		}
		has[i] = err == nil
	}
	return has, nil
}

// Mount implements Target. A store has no repositories.
func (s intoStore) Mount(context.Context, v1.Descriptor, string) (bool, error) { return false, nil }

// Put implements Target. It waits for another process that stores the same blob. Objects after this one don't wait for
// that process.
func (s intoStore) Put(ctx context.Context, o Object, r io.ReadSeeker) (Outcome, error) {
	ref, size := string(o.Digest), max(o.Size, 0)
	w, err := s.Writer(ctx, ref, size, o.Digest)
	if errdefs.IsUnavailable(err) {
		if r, ok := r.(*reader); ok {
			r.o.pass()
		}
		w, err = s.Writer(ctx, ref, size, o.Digest, content.Wait)
	}
	switch {
	case errdefs.IsAlreadyExists(err):
		return Exists, nil
	case err != nil:
		return "", err
	}
	if _, err := w.Fill(ctx, r, size, o.Digest); err != nil {
		return "", err
	}
	if n, err := r.Seek(0, io.SeekCurrent); err == nil && n == 0 && o.Size != 0 {
		return Exists, nil // nothing was read
	}
	return Stored, nil
}
