// Package copygraph copies everything that a manifest refers to from one place to another: from a store or through a
// batch command (dist-batch(7)), and into a store or through one. It walks the graph by [image.Walker.Walk], whose limits
// hold here too, asks the target for all objects in one go, and moves what is missing, several objects at a time, each
// after what it refers to.
package copygraph

import (
	"context"
	"sync"

	"distkit/content"
	"distkit/errclass"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Outcome says what became of an object.
type Outcome string

// The outcomes of an object.
const (
	Stored  Outcome = "stored"  // it was moved
	Exists  Outcome = "exists"  // the target had it
	Mounted Outcome = "mounted" // the target took it from another of its repositories
	Foreign Outcome = "foreign" // a layer that registries must not distribute: it was left out
	Missing Outcome = "missing" // it would be moved if this was no dry run
)

// Object is an object and the name under which the target is to have it: a tag, or "" for its digest.
type Object struct {
	Tag string
	v1.Descriptor
}

// Progress is told how objects move. Its methods are called by several goroutines at a time.
type Progress interface {
	// Expect is called once with each object of the graph.
	Expect(d v1.Descriptor)
	// Move is called with how much of an object has come, also when it goes on with a part that was there.
	Move(dgst digest.Digest, offset int64)
	// Land is called once with each object when nothing more is to be done for it.
	Land(dgst digest.Digest, outcome Outcome)
}

// Copy describes a copy.
type Copy struct {
	// Documents is the store in which the graph is walked: it is the source, or the target, or keeps the indexes and
	// manifests that go from one remote to another.
	Documents *content.Store
	From      Source // of what is not in Documents; nil if that is the source
	To        Target
	Platforms []*image.Platform // of an index, the best manifest for each; none: all manifests
	Tags      []string          // under which the target is to have the root
	Jobs      int               // objects that move at the same time
	MaxBytes  int64             // of all objects that are to move; 0: no bound
	DryRun    bool              // move nothing but documents, into Documents
	// Mount, if set, returns the repository of the target that is said to have a blob, or "".
	Mount func(digest.Digest) string
	// Referrers, if set, lists the referrers of each document that is copied: they are copied too, and what they refer to, and
	// their own referrers.
	Referrers     ListReferrers
	ArtifactTypes []string // of those that are copied; none: all
	// Gate, if set, is called once all documents are in Documents, with the referrers and what they refer to, as far as that is small, and
	// before anything moves to a target other than Documents. If it fails, nothing does.
	Gate func(context.Context) error
	// Record, if set, is called with each object once, when it has landed; with the roots at the end, in their order.
	Record   func(v1.Descriptor, Outcome) error
	Progress Progress // may be nil

	objects []*object // in the order of the documents
	index   map[digest.Digest]*object
	types   map[string]string   // one string for each media type
	root    *object             // that is to have the tags
	roots   map[*object]Outcome // "" until they have landed
	// subjects are documents whose referrers are not planned yet.
	subjects []*object

	mu     sync.Mutex // of totals and calls of Record
	totals Totals
}

// Totals sums up the objects of a copy, as far as they are known.
type Totals struct {
	Objects, Landed    int
	Bytes, LandedBytes int64
}

// object is a node of the graph: small, since there may be many.
type object struct {
	digest    digest.Digest
	size      int64 // negative if it is not known
	mediaType string
	here      bool // in Documents
	wanted    bool // false if everything that refers to it has it as a foreign layer
	landed    bool // the target has it, or it is foreign
	subject   bool // its referrers are planned, or are to be
	pending   int32
	parents   []*object    // what refers to it, as a child or as the subject; each counts it as pending until it has landed
	check     func() error // if set, is called once it has landed
	turn      *turn        // to ask its source; nil if the order does not matter
	as        *referrer    // nil if it is not copied as one
}

// referrer is what makes an object one.
type referrer struct {
	to   digest.Digest // its subject, "" if tags alone attach it
	tags []string      // that attach it to subjects
}

func (o *object) descriptor() v1.Descriptor {
	return v1.Descriptor{MediaType: o.mediaType, Digest: o.digest, Size: o.size}
}

// Run copies the graphs of the roots; a root's size may be -1, and its media type empty. It stops at the first failure,
// and returns its error. The parts of objects that have come by then are kept if the target can resume them.
//
// Errors are those of [image.Walker.Walk], of the source and of the target. NotFound: an object is neither at the source
// nor at the target. FailedPrecondition: more than MaxBytes would move. DataLoss: what is listed as a referrer is none.
func (c *Copy) Run(ctx context.Context, roots ...v1.Descriptor) error {
	c.objects, c.index, c.types, c.totals = nil, map[digest.Digest]*object{}, map[string]string{}, Totals{}
	c.root, c.roots, c.subjects = nil, map[*object]Outcome{}, nil
	if len(c.Tags) > 0 && len(roots) != 1 {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "tags are for one root, not for %d", len(roots))
	}
	for _, root := range roots {
		if err := content.Validate(root.Digest); err != nil {
			return err
		}
		if err := c.plan(ctx, root); err != nil {
			return err
		}
		if len(c.Tags) > 0 {
			c.root = c.index[root.Digest]
		}
	}
	if err := c.planReferrers(ctx); err != nil {
		return c.blame(err)
	}
	if err := c.finish(ctx); err != nil || c.Record == nil {
		return err
	}
	for _, root := range roots {
		o := c.index[root.Digest]
		outcome, ok := c.roots[o]
		if !ok {
			continue // it was named twice
		}
		delete(c.roots, o)
		if err := c.Record(o.descriptor(), outcome); err != nil {
			return err
		}
	}
	return nil
}

// finish does what has been planned.
func (c *Copy) finish(ctx context.Context) error {
	if err := c.ask(ctx); err != nil {
		return err
	}
	if err := c.bound(); err != nil {
		return err
	}
	if c.DryRun {
		return c.report()
	}
	if c.Gate != nil {
		if err := c.Gate(ctx); err != nil {
			return err
		}
	}
	if err := c.mount(ctx); err != nil {
		return err
	}
	return c.move(ctx)
}

// Totals returns how far the copy is.
func (c *Copy) Totals() Totals {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.totals
}

// intoDocuments reports whether the target is the store in which the graph is walked.
func (c *Copy) intoDocuments() bool { return c.To == Target(IntoStore(c.Documents)) }

// intoStore reports whether the target is a store, which may resume an object.
func (c *Copy) intoStore() bool {
	_, ok := c.To.(intoStore)
	return ok
}
