// Package content_test runs containerd's suite for content stores on distkit's store.
package content_test

import (
	"context"
	"errors"
	"testing"

	"distkit/content"

	containerd "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/testsuite"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestContentSuite(t *testing.T) {
	testsuite.ContentSuite(t, "distkit", func(ctx context.Context, root string) (context.Context, containerd.Store, func() error, error) {
		s, err := content.Open(root)
		return ctx, store{s}, func() error { return nil }, err
	})
}

// store adapts distkit's store to containerd's interfaces.
type store struct{ *content.Store }

func (s store) ReaderAt(_ context.Context, desc ocispec.Descriptor) (containerd.ReaderAt, error) {
	return s.File(desc.Digest)
}

func (s store) Info(ctx context.Context, dgst digest.Digest) (containerd.Info, error) {
	i, err := s.Store.Info(ctx, dgst)
	return containerd.Info(i), err
}

func (s store) Update(ctx context.Context, info containerd.Info, fieldpaths ...string) (containerd.Info, error) {
	i, err := s.Store.Update(ctx, content.Info(info), fieldpaths...)
	return containerd.Info(i), err
}

func (s store) Walk(ctx context.Context, f containerd.WalkFunc, fs ...string) error {
	filter, err := filters.ParseAll(fs...)
	if err != nil {
		return err
	}
	return s.Store.Walk(ctx, func(i content.Info) error {
		info := containerd.Info(i)
		if !filter.Match(containerd.AdaptInfo(info)) {
			return nil
		}
		return f(info)
	})
}

func status(st content.Status) containerd.Status {
	return containerd.Status{
		Ref: st.Ref, Offset: st.Offset, Total: st.Total, Expected: st.Expected,
		StartedAt: st.StartedAt, UpdatedAt: st.UpdatedAt,
	}
}

func (s store) Status(ctx context.Context, ref string) (containerd.Status, error) {
	st, err := s.Store.Status(ctx, ref)
	return status(st), err
}

func (s store) ListStatuses(ctx context.Context, _ ...string) ([]containerd.Status, error) {
	list, err := s.Store.ListStatuses(ctx)
	var all []containerd.Status
	for _, st := range list {
		all = append(all, status(st))
	}
	return all, err
}

func (s store) Writer(ctx context.Context, opts ...containerd.WriterOpt) (containerd.Writer, error) {
	var o containerd.WriterOpts
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return nil, err
		}
	}
	w, err := s.Store.Writer(ctx, o.Ref, o.Desc.Size, o.Desc.Digest)
	if err != nil {
		return nil, err
	}
	return writer{w}, nil
}

type writer struct{ *content.Writer }

func (w writer) Status() (containerd.Status, error) {
	st, err := w.Writer.Status()
	return status(st), err
}

// Commit closes the writer even if it fails, as containerd's writers do. distkit's writer stays open, so that the
// caller can start again under the same lock.
func (w writer) Commit(ctx context.Context, size int64, expected digest.Digest, opts ...containerd.Opt) error {
	var info containerd.Info
	for _, opt := range opts {
		if err := opt(&info); err != nil {
			return err
		}
	}
	err := w.Writer.Commit(ctx, size, expected, info.Labels)
	if err != nil && !errdefs.IsAlreadyExists(err) {
		err = errors.Join(err, w.Close())
	}
	return err
}
