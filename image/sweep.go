package image

import (
	"context"
	"encoding/json"
	"strings"
	"time"

	"distkit/content"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Sweep deletes the blobs that no name of any namespace reaches and that were stored, or found
// stored by an ingest, before a time. It waits until nobody holds the store, and keeps holders
// out while it works; ingests under way are not blobs and stay.
//
// Entries of an index.json that have no name, as other tools write them, count as names. When
// any of it can't be read nothing is deleted.
type Sweep struct {
	Store  *content.Store
	Before time.Time
	DryRun bool // report, and delete nothing
}

// Run calls f with every blob once it is deleted, or would be.
func (s Sweep) Run(ctx context.Context, f func(content.Info) error) error {
	release, err := s.Store.Exclude(ctx)
	if err != nil {
		return err
	}
	defer release()
	marked, err := s.mark(ctx)
	if err != nil {
		return err
	}
	return s.Store.Walk(ctx, func(info content.Info) error {
		if marked[info.Digest] || !info.CreatedAt.Before(s.Before) {
			return nil
		}
		if !s.DryRun {
			err := s.Store.DeleteBefore(ctx, info.Digest, s.Before)
			if errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) {
				return nil // gone, or freshened, since it was looked at
			}
			if err != nil {
				return err
			}
		}
		return f(info)
	})
}

// mark returns the digests that names reach, whatever the platform.
func (s Sweep) mark(ctx context.Context) (map[digest.Digest]bool, error) {
	namespaces, err := OpenNamespaces(s.Store).List()
	if err != nil {
		return nil, err
	}
	marked := map[digest.Digest]bool{}
	for _, namespace := range namespaces {
		names, err := OpenNames(s.Store, namespace)
		if err != nil {
			return nil, err
		}
		ix, err := names.read()
		if err != nil {
			return nil, err
		}
		for _, e := range ix.entries {
			var d v1.Descriptor
			if err := json.Unmarshal(e.raw, &d); err != nil {
				return nil, errclass.Errorf(errdefs.ErrFailedPrecondition, "read image %s of namespace %s: %w", e.name, namespace, err)
			}
			if err := s.reach(ctx, marked, d); err != nil {
				return nil, err
			}
		}
	}
	return marked, nil
}

// reach marks a blob and all that it refers to. What isn't in the store, or is no JSON, refers
// to nothing. It takes every descriptor that it finds, also in documents that are no proper
// manifests: here a doubt means that something stays.
func (s Sweep) reach(ctx context.Context, marked map[digest.Digest]bool, d v1.Descriptor) error {
	if marked[d.Digest] {
		return nil
	}
	marked[d.Digest] = true
	if !strings.HasSuffix(d.MediaType, "+json") {
		return nil
	}
	b, err := Walker{Store: s.Store}.read(ctx, d)
	if errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) {
		return nil
	}
	if err != nil {
		return err
	}
	var doc document
	if json.Unmarshal(b, &doc) != nil {
		return nil
	}
	children := append(doc.Manifests, doc.Layers...)
	for _, c := range []*v1.Descriptor{doc.Config, doc.Subject} {
		if c != nil {
			children = append(children, *c)
		}
	}
	for _, c := range children {
		if err := s.reach(ctx, marked, c); err != nil {
			return err
		}
	}
	return nil
}
