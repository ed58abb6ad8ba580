package image

import (
	"context"
	"errors"
	"io/fs"
	"time"

	"distkit/content"
	"distkit/disk/layout"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Reason is a reason for which a sweep keeps a blob, or a snapshot named by a chain ID.
type Reason struct {
	// Reason is image, container, label, hold or grace.
	Reason    string        `json:"reason"`
	Namespace string        `json:"namespace,omitempty"` // of the image or container
	Name      string        `json:"name,omitempty"`      // of the image, or ID of the container; "" for an entry without a name
	Target    digest.Digest `json:"target,omitempty"`    // what the name points at, the container was created from, or the blob with the label
	StoredAt  *time.Time    `json:"storedAt,omitempty"`  // for grace: when the blob was stored, or last found stored
}

const reasonImage = "image"

// Explain calls f with each reason for which a sweep would keep a blob or snapshot. NotFound if the blob doesn't exist
// and nothing refers to it. Corrupt documents are treated as in a sweep.
func (s Sweep) Explain(ctx context.Context, dgst digest.Digest, f func(Reason) error) error {
	if err := dgst.Validate(); err != nil {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "digest %.80q: %w", dgst, err)
	}
	e := explanation{sweeper: newSweeper(s), dgst: dgst, f: f}
	if err := e.roots(ctx, func(r root) error { return e.root(ctx, r) }); err != nil {
		return err
	}
	for _, step := range []func(context.Context) error{e.holders, e.grace} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	if !e.known {
		return errclass.Errorf(errdefs.ErrNotFound, "%s: no such blob, and nothing refers to it", dgst)
	}
	return nil
}

type explanation struct {
	*sweeper
	dgst  digest.Digest
	f     func(Reason) error
	known bool
}

// root calls f if a root is or leads to the explained blob or snapshot.
func (e *explanation) root(ctx context.Context, r root) error {
	if r.snapshot != string(e.dgst) {
		if err := e.reach(ctx, v1.Descriptor{Digest: r.Target}, false, r.what); err != nil {
			return err
		}
		if !e.marked.Has(e.dgst) && !e.missing.Has(e.dgst) && !e.chains.Has(e.dgst) {
			return nil // what is marked doesn't lead to it, so it need not be read again
		}
		e.marked, e.missing, e.chains = Set{}, Set{}, Set{}
	}
	e.known = true
	return e.f(r.Reason)
}

// root is a reason for which a sweep keeps its target and everything that this leads to.
type root struct {
	Reason
	snapshot string        // key of a container's snapshot
	what     func() string // for messages
}

// roots calls f with each root of the sweep: the entries in the indexes of all namespaces, containers, and blobs with
// [LabelRoot]. An entry of a referrer is not a root: it is recorded as a dependent of its subject before f is called.
func (s *sweeper) roots(ctx context.Context, f func(root) error) error {
	namespaces, err := OpenNamespaces(s.Store).List()
	if err != nil {
		return err
	}
	var images []root
	for _, namespace := range namespaces {
		names, err := openNames(s.Store, namespace)
		if err != nil {
			return err
		}
		ix, err := names.read()
		if err != nil {
			return err
		}
		for _, entry := range ix.Entries {
			d, ok := reference(entry.Raw)
			if subject := entry.DependsOn(); ok && subject != "" {
				s.depend(subject, d)
			} else if ok {
				what := func() string { return nameOf(entry, d, namespace) }
				images = append(images, root{Reason{Reason: reasonImage, Namespace: namespace, Name: entry.Name, Target: d.Digest}, "", what})
			}
		}
	}
	for _, r := range images {
		if err := f(r); err != nil {
			return err
		}
	}
	pins, err := Pins(s.Store)
	if err != nil {
		return err
	}
	for _, p := range pins {
		r := Reason{Reason: "container", Namespace: p.Namespace, Name: p.ID, Target: p.Image}
		if err := f(root{r, p.Snapshot, func() string { return imageOf(p) }}); err != nil {
			return err
		}
	}
	return s.Store.Labelled(ctx, LabelRoot, time.Time{}, func(dgst digest.Digest) error {
		return f(root{Reason{Reason: "label", Target: dgst}, "", func() string { return string(dgst) }})
	})
}

func (e *explanation) holders(context.Context) error {
	if _, err := e.Store.Tree.Stat(layout.Hold); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	_, free, err := e.Store.Holders()
	if err != nil || free {
		return err
	}
	return e.f(Reason{Reason: "hold"})
}

func (e *explanation) grace(context.Context) error {
	if content.Validate(e.dgst) != nil {
		return nil
	}
	fi, err := e.Store.Tree.Stat(layout.BlobName(e.dgst))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	e.known = true
	if stored := fi.ModTime(); !stored.Before(e.Before) {
		return e.f(Reason{Reason: "grace", StoredAt: &stored})
	}
	return nil
}
