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

// Source gives objects.
type Source interface {
	// Open returns the bytes of an object from an offset on. Read returns io.EOF only after all of them, and ends when ctx
	// is done. A source that has to wait for the object's turn calls asked before that, when it has asked for the object.
	// NotFound if there is no such object; Aborted, DeadlineExceeded or ResourceExhausted if another attempt may succeed.
	Open(ctx context.Context, d v1.Descriptor, offset int64, asked func()) (io.ReadCloser, error)
}

// Target takes objects.
type Target interface {
	// Has reports for each object whether the target has it.
	Has(ctx context.Context, objects []Object) ([]bool, error)
	// Mount has the target take a blob from another of its repositories. It is false if the target can't.
	Mount(ctx context.Context, d v1.Descriptor, repository string) (bool, error)
	// Put stores what r holds. r is at the beginning of the object, and a target that has a part of the object may seek: but see
	// [Resumer]. The outcome is Stored or Exists. DataLoss if the bytes are not those of the descriptor.
	Put(ctx context.Context, o Object, r io.ReadSeeker) (Outcome, error)
}

// Resumer is a target that may have a part of an object and can be sent the rest.
type Resumer interface {
	// Part returns how many of the first bytes of an object the target has. If r is at that offset, the next Put of the object stores
	// them with what r holds. Aborted, if the target can't be asked.
	Part(ctx context.Context, o Object) (int64, error)
}

// FromStore is a store as a source.
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

// Either is several sources: an object comes from the first that has it.
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

// IntoStore is a store as a target.
func IntoStore(s *content.Store) Target { return intoStore{s} }

type intoStore struct{ *content.Store }

// Has implements Target. It freshens the blobs that are there.
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

// Mount implements Target: a store has no repositories.
func (s intoStore) Mount(context.Context, v1.Descriptor, string) (bool, error) { return false, nil }

// Put waits for another process that stores the same blob. The objects behind this one don't wait for that process.
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
	if at, err := r.Seek(0, io.SeekCurrent); err == nil && at == 0 && o.Size != 0 {
		return Exists, nil // nothing was read
	}
	return Stored, nil
}
