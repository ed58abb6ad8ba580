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

// Whiteouts is what becomes of a layer's marks of deletion.
type Whiteouts int

const (
	// Remove deletes what the target has of lower layers.
	Remove Whiteouts = iota
	// Overlay keeps the marks in the form that overlayfs reads in an upper directory: character
	// devices 0:0 and the attribute trusted.overlay.opaque.
	Overlay
	// OverlayUser is Overlay with user.overlay.opaque, for mounts with the userxattr option.
	OverlayUser
)

// Options change what Apply does. The zero value is the usual.
type Options struct {
	// ExpectDiffID is the diff ID that the layer must have, if any.
	ExpectDiffID digest.Digest
	Whiteouts    Whiteouts
	// Strict refuses a layer of which an owner, device or attribute can't be set, instead of
	// counting it in the Result. Without it an ordinary user's files and directories get the
	// attribute user.rootlesscontainers for the owner that they should have, unless that is 0:0.
	Strict bool
	// UIDs and GIDs map the owners of the layer to those that files get. An owner that is not mapped can't be set.
	UIDs, GIDs IDMap
	// Only, if not empty, leaves out all entries but those of these paths, below them, and on the way to them; Exclude leaves
	// out those of its paths and below them. Both go by names in the layer, and are nothing for one with Unresolved.
	Only, Exclude []string
	// Below is the directory of root, "" for root itself, that the names of the layer begin from; root is still what no link leads out of.
	Below string
	// Archive says that the input is an archive of tar(1), not a layer: names that are marks of deletion are names like any other,
	// and an entry for the directory that the names begin from changes nothing.
	Archive bool
	// MaxBytes bounds the bytes of the uncompressed archive, and those of its sparse files, holes and all; MaxEntries its entries
	// and the directories that it does not name together; MaxDepth the names in a path. 0 is no bound. A layer that exceeds one is
	// ErrFailedPrecondition.
	MaxBytes, MaxEntries int64
	MaxDepth             int
	// Workers is the number of goroutines that fill small files, by default as many as there
	// are processors, up to four.
	Workers int
	// Turn is asked before a large zstd window is used. It may be nil.
	Turn layer.Turn
	// Unresolved gets a record of all that the layer alone can't tell, for whoever gives it its
	// parents later: directories that it adds to but does not name, hard links to what it does
	// not hold, whiteouts. The form is that of dist-apply(1). It wants an overlay form of
	// whiteouts and an empty root.
	Unresolved io.Writer
}

// Result tells what a layer was.
type Result struct {
	DiffID    digest.Digest `json:"diffID"`
	Size      int64         `json:"size"`      // bytes of the uncompressed archive
	Entries   int64         `json:"entries"`   // whiteouts among them
	Whiteouts int64         `json:"whiteouts"` // opaque directories among them

	// Unset counts what could not be set, by kind, as in "owners" or "security attributes".
	Unset map[string]int64 `json:"unset,omitempty"`
}

const (
	smallFile  = 64 << 10  // most bytes that are left to a worker
	batchBytes = 256 << 10 // of small files that go to a worker together
	batchFiles = 16
)

// Apply writes the layer in r, plain or compressed with gzip or zstd, into the directory root,
// as the image specification's "Applying Changesets" says, and reads r to its end.
//
// A layer that is corrupt, ends too early or has another diff ID than the one expected is
// ErrDataLoss; one with entries that no layer may have is ErrInvalidArgument, as is a root
// that is no directory; a compression or a whiteout that can't be had is ErrNotImplemented.
// After an error the directory holds a part of the layer. Nothing is synced to disk: that is up
// to who gives the directory a name that promises its content.
//
// A directory that the layer adds to without naming it keeps its times; one that is missing
// gets mode 0755. The umask plays no role. Apply returns after ctx is done as soon as a read
// of r that is under way returns; to let Apply end such a read, r may have SetReadDeadline.
func Apply(ctx context.Context, root string, r io.Reader, opts Options) (Result, error) {
	if opts.ExpectDiffID != "" {
		if err := opts.ExpectDiffID.Validate(); err != nil {
			return Result{}, refused("expected diff ID %q: %w", opts.ExpectDiffID, err)
		}
		if a := opts.ExpectDiffID.Algorithm(); a != digest.SHA256 {
			return Result{}, errclass.As(fmt.Errorf("expected diff ID: algorithm %s is not supported", a), errdefs.ErrNotImplemented)
		}
	}
	t, err := newTree(root)
	switch {
	case errors.Is(err, unix.ENOTDIR):
		return Result{}, refused("open %s: %w", root, err)
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

// An applier takes the entries of a layer one by one. Whatever has a name is created, linked
// and removed by run alone and in the order of the archive; workers only fill files that are
// open. So the order means the same for any number of workers.
type applier struct {
	ctx      context.Context
	cancel   context.CancelCauseFunc
	opts     Options
	selected selection
	tree     *tree
	in       *layer.Reader
	buffer   []byte
	result   Result
	sparse   int64 // bytes that sparse files have had so far, holes and all

	batch       *batch
	work, spare chan *batch
	workers     sync.WaitGroup

	mu     sync.Mutex
	failed error // of a worker
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
			return tooMuch("layer has more than %d entries", n)
		}
		if !a.tree.isToApplyAgain() {
			if err := a.entry(h); err != nil && !a.tree.mayBeWell(h, err) {
				return fmt.Errorf("entry %s: %w", quote(h.Name), err)
			}
		}
	}
}

// end is the end of the archive.
func (a *applier) end() error {
	if a.batch != nil { // it need not wait for what trails the archive
		a.send()
	}
	return a.in.End(a.opts.ExpectDiffID)
}
