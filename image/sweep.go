package image

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"distkit/content"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Sweep deletes the blobs that no name of any namespace reaches, and no container, and that were
// stored, or found stored by an ingest, before a time. It waits until nobody holds the store, and
// keeps holders out while it works; ingests under way are never touched.
//
// Entries of an index.json that have no name, as other tools write them, count as names. When
// any of it can't be read nothing is deleted.
type Sweep struct {
	Store  *content.Store
	Before time.Time
	DryRun bool // report, and delete nothing
	// Snapshots, if set, is called before blobs are deleted, with what names and containers
	// need of the snapshots; it may delete the others.
	Snapshots func(context.Context, Needed) error
	// Leftovers, if set, is called with what processes that died have left of ingests, once it is
	// deleted or would be.
	Leftovers func(content.Leftover) error
}

// Needed is what the images with names, and containers, need of the snapshots.
type Needed struct {
	Chains     map[digest.Digest]bool // chain IDs, by all configs that are in the store
	Containers []Pin
}

// Run calls f with every blob once it is deleted, or would be.
func (s Sweep) Run(ctx context.Context, f func(content.Info) error) error {
	release, err := s.Store.Exclude(ctx)
	if err != nil {
		return err
	}
	defer release()
	m, err := s.mark(ctx)
	if err != nil {
		return err
	}
	if s.Snapshots != nil {
		if err := s.Snapshots(ctx, m.Needed); err != nil {
			return err
		}
	}
	err = s.Store.Walk(ctx, func(info content.Info) error {
		if m.blobs[info.Digest] || !info.CreatedAt.Before(s.Before) {
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
	if err == nil && s.Leftovers != nil {
		err = s.Store.SweepIngests(ctx, s.Before, s.DryRun, s.Leftovers)
	}
	return err
}

// marks is what stays.
type marks struct {
	blobs map[digest.Digest]bool
	Needed
}

// mark finds what names and containers reach, whatever the platform.
func (s Sweep) mark(ctx context.Context) (*marks, error) {
	namespaces, err := OpenNamespaces(s.Store).List()
	if err != nil {
		return nil, err
	}
	m := &marks{blobs: map[digest.Digest]bool{}, Needed: Needed{Chains: map[digest.Digest]bool{}}}
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
			if err := s.reach(ctx, m, d); err != nil {
				return nil, err
			}
		}
	}
	if m.Containers, err = Pins(s.Store); err != nil {
		return nil, err
	}
	for _, p := range m.Containers {
		if p.Image == "" {
			continue
		}
		d, err := Walker{Store: s.Store}.Describe(ctx, p.Image)
		if errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) {
			continue
		}
		if err == nil {
			err = s.reach(ctx, m, d)
		}
		if err != nil {
			return nil, fmt.Errorf("image of container %s of namespace %s: %w", p.ID, p.Namespace, err)
		}
	}
	return m, nil
}

// reach marks a blob and all that it refers to. What isn't in the store, or is no JSON, refers
// to nothing. It takes every descriptor that it finds, also in documents that are no proper
// manifests: here a doubt means that something stays.
func (s Sweep) reach(ctx context.Context, m *marks, d v1.Descriptor) error {
	if m.blobs[d.Digest] {
		return nil
	}
	m.blobs[d.Digest] = true
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
	var config struct {
		RootFS struct {
			DiffIDs []digest.Digest `json:"diff_ids"`
		} `json:"rootfs"`
	}
	if json.Unmarshal(b, &config) == nil {
		for _, id := range identity.ChainIDs(config.RootFS.DiffIDs) {
			m.Chains[id] = true
		}
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
		if err := s.reach(ctx, m, c); err != nil {
			return err
		}
	}
	return nil
}
