// Package copygraph copies everything that a manifest refers to from one place to another: from a store or through a
// batch command (dist-batch(7)), into a store or through such a command.
//
// A [Copy] has a [Source] (FromStore, FromCommand, FromServer) and a [Target] (IntoStore, IntoCommand, IntoServer).
// [Copy.Run] works in steps: it plans, that is it walks the graph with [image.Walker.Walk], and fetches the documents
// that it needs for that; it asks the target which objects it has; it lets the target mount blobs from other
// repositories; and it moves the missing objects, several at a time, each after everything that it refers to. Transfers
// resume after temporary failures.
//
// Sources are untrusted. Every object is verified by the source or the target, and the limits of image.Walker bound the
// graph. Errors have the class of what failed; see [Copy.Run].
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

// Outcome says what happened to an object.
type Outcome string

// The outcomes of an object.
const (
	Stored  Outcome = "stored"  // it was moved
	Exists  Outcome = "exists"  // the target had it
	Mounted Outcome = "mounted" // the target took it from another of its repositories
	Foreign Outcome = "foreign" // a layer that registries must not distribute was left out
	Missing Outcome = "missing" // in a dry run: it would be moved
)

// Object is an object and the tag under which the target is to have it; "" means its digest.
type Object struct {
	Tag string
	v1.Descriptor
}

// Progress receives the progress of a copy. Its methods are called concurrently.
type Progress interface {
	// Expect is called once for each object of the graph.
	Expect(d v1.Descriptor)
	// Move is called with the number of bytes of an object that have arrived, including a part that was there before.
	Move(dgst digest.Digest, offset int64)
	// Land is called once for each object, when it is done.
	Land(dgst digest.Digest, outcome Outcome)
}

// Copy describes a copy.
type Copy struct {
	// Documents is the store in which the graph is walked. It is the source, or the target, or holds only the documents
	// of a copy between two remotes.
	Documents *content.Store
	From      Source // of what is not in Documents; nil if Documents is the source
	To        Target
	Platforms []*image.Platform // selects the best manifest of an index for each; none means all manifests
	Tags      []string          // for the root at the target
	Jobs      int               // number of objects that move concurrently
	MaxBytes  int64             // limit for all objects to move; 0 means none
	DryRun    bool              // move nothing but documents, into Documents
	// Mount, if set, returns the repository of the target that probably has a blob, or "".
	Mount func(digest.Digest) string
	// Referrers, if set, lists the referrers of each copied document. They are copied too, with everything that they
	// refer to and their own referrers.
	Referrers     ListReferrers
	ArtifactTypes []string // of the referrers to copy; none means all
	// Gate, if set, is called when all documents are in Documents, including referrers and the small objects that these
	// refer to, before anything moves to a target other than Documents. If it fails, nothing moves.
	Gate func(context.Context) error
	// Record, if set, is called once for each object when it is done, and for the roots at the end, in their order.
	Record   func(v1.Descriptor, Outcome) error
	Progress Progress // may be nil

	objects []*object // in the order of the documents
	index   map[digest.Digest]*object
	types   map[string]string   // shares the strings of media types
	root    *object             // the object that gets the tags
	roots   map[*object]Outcome // their outcomes; "" until they are done
	// subjects are the documents whose referrers are still to be planned.
	subjects []*object

	mu     sync.Mutex // guards totals, and calls of Record
	totals Totals
}

// Totals counts the objects of a copy, as far as they are known.
type Totals struct {
	Objects, Landed    int
	Bytes, LandedBytes int64
}

// object is a node of the graph. It is small, because there may be many.
type object struct {
	digest    digest.Digest
	size      int64 // negative if unknown
	mediaType string
	stored    bool         // it is in Documents
	wanted    bool         // false if everything that refers to it refers to a foreign layer
	landed    bool         // the target has it, or it is foreign
	subject   bool         // its referrers are planned or to be planned
	pending   int32        // how many objects it waits for
	parents   []*object    // what refers to it, as a child or as the subject: they wait for it
	check     func() error // if set, called when it has landed
	turn      *turn        // when to request it from its source; nil if the order doesn't matter
	referrer  *referrer    // nil unless it is copied as a referrer
}

// referrer says to what an object refers, and how.
type referrer struct {
	to   digest.Digest // its subject; "" if only tags attach it
	tags []string      // that attach it to subjects
}

func (o *object) descriptor() v1.Descriptor {
	return v1.Descriptor{MediaType: o.mediaType, Digest: o.digest, Size: o.size}
}

// Run copies the graphs of the roots. A root's size may be -1 and its media type empty. Run stops at the first failure
// and returns its error. Parts of objects that have arrived are kept if the target can resume them.
//
// Errors are those of [image.Walker.Walk], of the source and of the target. NotFound: neither the source nor the target
// has an object. FailedPrecondition: more than MaxBytes would move. DataLoss: something is listed as a referrer but
// isn't one.
func (c *Copy) Run(ctx context.Context, roots ...v1.Descriptor) error {
	c.objects, c.index, c.types, c.totals = nil, map[digest.Digest]*object{}, map[string]string{}, Totals{}
	c.root, c.roots, c.subjects = nil, map[*object]Outcome{}, nil
	if len(c.Tags) > 0 && len(roots) != 1 {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "tags need exactly one root, not %d", len(roots))
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
			continue // it was given twice
		}
		delete(c.roots, o)
		if err := c.Record(o.descriptor(), outcome); err != nil {
			return err
		}
	}
	return nil
}

// finish executes the plan.
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

// Totals returns the progress of the copy.
func (c *Copy) Totals() Totals {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.totals
}

// intoDocuments reports whether the target is the store in which the graph is walked.
func (c *Copy) intoDocuments() bool { return c.To == Target(IntoStore(c.Documents)) }

// intoStore reports whether the target is a store, which can resume an object.
func (c *Copy) intoStore() bool {
	_, ok := c.To.(intoStore)
	return ok
}
