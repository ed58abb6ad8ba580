package image

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"time"

	"distkit/content"
	"distkit/disk"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Sweep deletes the blobs that no name of any namespace reaches, and no container, and that were
// stored, or found stored by an ingest, before a time. It waits until nobody holds the store, and
// keeps holders out while it works; ingests under way are never touched.
//
// What a name reaches is told by the documents themselves, whatever media types their descriptors have: a doubt means that
// something stays. What is missing, is no document, or has a digest of an unknown algorithm refers to nothing. Entries of an
// index.json that have no name, as other tools write them, count as names. When any of it can't be read nothing is deleted.
//
// While a sweep works no name is made or changed, in any namespace.
type Sweep struct {
	Store  *content.Store
	Before time.Time
	DryRun bool          // report, and delete nothing
	Wait   time.Duration // for those who hold the store; Unavailable after that
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
	release, err := s.Store.Exclude(ctx, s.Wait)
	if err != nil {
		return err
	}
	defer release()
	thaw, err := s.freeze(ctx)
	if err != nil {
		return fmt.Errorf("sweep %s: %w", s.Store.Root(), err)
	}
	defer thaw()
	m, err := s.mark(ctx)
	if err != nil {
		return err
	}
	if s.Snapshots != nil {
		if err := s.Snapshots(ctx, m.Needed); err != nil {
			return err
		}
	}
	err = s.Store.WalkSizes(ctx, func(info content.Info) error {
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

// freeze locks the names of all namespaces, so that none is made or changed until thaw is called.
func (s Sweep) freeze(ctx context.Context) (thaw func(), err error) {
	var locks []*os.File
	thaw = func() {
		for _, f := range locks {
			disk.Release(f)
		}
	}
	all, err := lockNamespaces(s.Store, unix.LOCK_EX)
	if err != nil {
		return nil, err
	}
	locks = append(locks, all)
	namespaces, err := OpenNamespaces(s.Store).List()
	for _, namespace := range namespaces {
		var names *Names
		if names, err = openNames(s.Store, namespace); err != nil {
			break
		}
		var f *os.File
		if f, err = names.dir.LockIndex(ctx, unix.LOCK_SH); err != nil {
			err = fmt.Errorf("lock names of namespace %s: %w", namespace, err)
			break
		}
		locks = append(locks, f)
	}
	if err != nil {
		thaw()
		return nil, err
	}
	return thaw, nil
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
	m := &marks{map[digest.Digest]bool{}, Needed{Chains: map[digest.Digest]bool{}}}
	for _, namespace := range namespaces {
		names, err := openNames(s.Store, namespace)
		if err != nil {
			return nil, err
		}
		ix, err := names.read()
		if err != nil {
			return nil, err
		}
		for _, e := range ix.Entries {
			d, ok := reference(e.Raw)
			if !ok {
				continue
			}
			if err := s.reach(ctx, m, d); err != nil {
				return nil, unreadable(fmt.Sprintf("image %s of namespace %s", cmp.Or(e.Name, string(d.Digest)), namespace), err)
			}
		}
	}
	if m.Containers, err = Pins(s.Store); err != nil {
		return nil, err
	}
	for _, p := range m.Containers {
		if err := s.reach(ctx, m, v1.Descriptor{Digest: p.Image}); err != nil {
			return nil, unreadable(fmt.Sprintf("image of container %s of namespace %s", p.ID, p.Namespace), err)
		}
	}
	return m, nil
}

// unreadable says what to do about an image because of which nothing is deleted.
func unreadable(what string, err error) error {
	if errdefs.IsDataLoss(err) {
		return fmt.Errorf("%s: %w; nothing is deleted before it is fetched again after dist-verify --delete, or its name removed", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// reach marks a blob and all that it refers to.
func (s Sweep) reach(ctx context.Context, m *marks, d v1.Descriptor) error {
	return documents(ctx, s.Store, d, m.blobs, func(_ digest.Digest, b []byte) error {
		for _, id := range chains(b) {
			m.Chains[id] = true
		}
		return nil
	})
}
