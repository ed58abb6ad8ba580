package archive

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"

	"distkit/errclass"
	"distkit/layer"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Whiteouts selects what Apply does with the whiteouts of a layer.
type Whiteouts int

const (
	// Remove deletes from the target what a whiteout hides.
	Remove Whiteouts = iota
	// Overlay keeps whiteouts in the form that overlayfs reads in an upper directory: character devices 0:0 and the
	// attribute trusted.overlay.opaque.
	Overlay
	// OverlayUser is Overlay with user.overlay.opaque, for mounts with the option userxattr.
	OverlayUser
)

// Options modify what Apply does. The zero value is the usual case.
type Options struct {
	// ExpectDiffID is the diff ID that the layer must have; "" accepts any.
	ExpectDiffID digest.Digest
	Whiteouts    Whiteouts
	// Strict makes it an error if an owner, device or attribute can't be set. Without it Apply counts such failures in
	// the Result, and a file whose owner an unprivileged user can't set gets it in the attribute
	// user.rootlesscontainers, unless the owner is 0:0.
	Strict bool
	// UIDs and GIDs map the owners in the layer to those of the files. An owner that isn't mapped can't be set.
	UIDs, GIDs IDMap
	// Only, if not empty, selects the entries with these paths, below them, and on the way to them. Exclude leaves out
	// those with its paths and below them. Both match names as they are in the layer. Neither may be used with
	// Unresolved.
	Only, Exclude []string
	// Below is the directory of root to which names in the layer are relative; "" is root itself. Links are still
	// confined to root, not to Below.
	Below string
	// Archive says that the input is a plain tar archive, not a layer: whiteout names are ordinary names, and an entry
	// for the top directory is ignored.
	Archive bool
	// MaxBytes bounds the size of the uncompressed archive, and the total size of its sparse files with their holes.
	// MaxEntries bounds the number of entries plus that of directories created without an entry. MaxDepth bounds the
	// number of names in a path. 0 means no bound. Exceeding one is ErrFailedPrecondition.
	MaxBytes, MaxEntries int64
	MaxDepth             int
	// Workers is the number of goroutines that write small files. The default is the number of processors, but at most
	// four.
	Workers int
	// Turn, if not nil, is called before a large zstd window is used.
	Turn layer.Turn
	// Unresolved, if not nil, receives a record of everything that depends on the layer's parents, for a process that
	// supplies them later: directories that the layer adds to without an entry for them, hard links to files that it
	// doesn't hold, and whiteouts. dist-apply(1) specifies the form. It needs an overlay form of whiteouts, and an
	// empty root.
	Unresolved io.Writer
}

// Result describes an applied layer.
type Result struct {
	DiffID    digest.Digest `json:"diffID"`
	Size      int64         `json:"size"`      // size of the uncompressed archive in bytes
	Entries   int64         `json:"entries"`   // number of entries, including whiteouts
	Whiteouts int64         `json:"whiteouts"` // number of whiteouts, including opaque markers

	// Unset counts what could not be set by its kind, such as "owners" or "security attributes".
	Unset map[string]int64 `json:"unset,omitempty"`
}

const (
	smallFile  = 64 << 10  // largest file that a worker writes
	batchBytes = 256 << 10 // content of small files that goes to a worker at once
	batchFiles = 16
)

// Apply writes a layer into the directory root, as "Applying Changesets" in the image specification defines it. r is
// the layer, plain or compressed with gzip or zstd; Apply reads it to its end.
//
// Error classes: ErrDataLoss for a layer that is corrupt, ends early or has another diff ID than expected;
// ErrInvalidArgument for an entry that no layer may have, or if root is not a directory; ErrFailedPrecondition for a
// layer that exceeds a bound of opts; ErrNotImplemented for a compression or whiteout that is not supported. After an
// error the directory holds a part of the layer. Nothing is synced to disk: that is the task of the caller, who gives
// the directory its name.
//
// A directory that the layer adds to without an entry for it keeps its times; a missing one is created with mode 0755.
// The umask has no effect. When ctx is done Apply returns as soon as the current Read of r returns. If r has
// SetReadDeadline, Apply uses it to end that Read.
func Apply(ctx context.Context, root string, r io.Reader, opts Options) (Result, error) {
	if opts.ExpectDiffID != "" {
		if err := opts.ExpectDiffID.Validate(); err != nil {
			return Result{}, invalid("expected diff ID %q: %w", opts.ExpectDiffID, err)
		}
		if a := opts.ExpectDiffID.Algorithm(); a != digest.SHA256 {
			return Result{}, errclass.As(fmt.Errorf("expected diff ID: algorithm %s is not supported", a), errdefs.ErrNotImplemented)
		}
	}
	t, err := newTree(root)
	switch {
	case errors.Is(err, unix.ENOTDIR):
		return Result{}, invalid("open %s: %w", root, err)
	case err != nil:
		return Result{}, fmt.Errorf("open %s: %w", root, err)
	}
	switch opts.Whiteouts {
	case Overlay:
		t.opaque = "trusted.overlay.opaque"
	case OverlayUser:
		t.opaque = "user.overlay.opaque"
	}
	t.maxDepth = opts.MaxDepth
	if opts.Unresolved != nil {
		if err := t.reportTo(opts.Unresolved); err != nil {
			t.abandon()
			return Result{}, fmt.Errorf("apply to %s: %w", root, err)
		}
	}
	if opts.Workers <= 0 {
		opts.Workers = min(4, runtime.GOMAXPROCS(0))
	}
	opts.Below = layer.Clean(opts.Below)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	a := &applier{
		ctx: ctx, cancel: cancel, opts: opts, selected: newSelection(opts.Only, opts.Exclude), tree: t,
		in:     layer.NewReaderInTurn(ctx, r, opts.MaxBytes, nil, opts.Turn),
		work:   make(chan *batch, 2),
		spare:  make(chan *batch, opts.Workers+3),
		buffer: make([]byte, 256<<10),
	}
	for range cap(a.spare) {
		a.spare <- &batch{}
	}
	for range opts.Workers {
		a.workers.Go(a.worker)
	}

	err = a.run()
	if err != nil {
		cancel(err)
	}
	if a.batch != nil {
		a.send()
	}
	close(a.work)
	a.workers.Wait()
	if werr := a.workerErr(); werr != nil && (err == nil || errors.Is(err, context.Canceled)) {
		err = werr
	}
	a.in.Close()
	if err != nil {
		t.abandon()
		return Result{}, err
	}
	if err := t.finish(); err != nil {
		return Result{}, fmt.Errorf("set times of directories: %w", err)
	}
	if err := t.flushReport(); err != nil {
		return Result{}, err
	}
	a.result.DiffID, a.result.Size = a.in.DiffID(), a.in.Size()
	a.result.Unset = a.unset
	return a.result, nil
}

// An applier applies the entries of a layer one by one. run alone creates, links and removes names, in the order of the
// archive; workers only write to files that are open already. So the result doesn't depend on the number of workers.
type applier struct {
	ctx      context.Context
	cancel   context.CancelCauseFunc
	opts     Options
	selected selection
	tree     *tree
	in       *layer.Reader
	buffer   []byte
	result   Result
	sparse   int64 // total size of the sparse files so far, with their holes

	batch       *batch
	work, spare chan *batch
	workers     sync.WaitGroup

	mu     sync.Mutex
	failed error // the first error of a worker
	unset  map[string]int64
}

func (a *applier) run() error {
	for {
		if err := a.ctx.Err(); err != nil {
			return err
		}
		h, err := a.in.Next()
		if err == io.EOF {
			return a.end()
		}
		if err != nil {
			return err
		}
		a.result.Entries++
		a.tree.allow(a.in.Offset())
		if n := a.opts.MaxEntries; n > 0 && a.result.Entries+a.tree.made > n {
			return overLimit("layer has more than %d entries", n)
		}
		if !a.tree.needsReapply() {
			if err := a.entry(h); err != nil && !a.tree.mayResolve(h, err) {
				return fmt.Errorf("entry %s: %w", quote(h.Name), err)
			}
		}
	}
}

// end handles the end of the archive.
func (a *applier) end() error {
	if a.batch != nil { // don't wait for the bytes after the archive
		a.send()
	}
	return a.in.End(a.opts.ExpectDiffID)
}
