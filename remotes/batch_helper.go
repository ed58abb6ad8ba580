package remotes

import (
	"context"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"distkit/batch"
	"distkit/disk/program"

	"github.com/containerd/errdefs"
)

// helperBatch passes the requests of a batch in order to one process of a helper, with the verb batch-fetch or
// batch-put of dist-remote(7). If the process fails temporarily, for example because its connection breaks, its open
// requests fail, the client may repeat them, and the next request starts another process. If the helper doesn't support
// the verb, each request gets its own process.
type helperBatch struct {
	*Helper
	ctx  context.Context
	verb string

	mu      sync.Mutex
	current *batchProcess
	started time.Time
	failed  int // number of consecutive processes without an answer
	// lacking is set if a process exits with NotImplemented before its first answer: the helper doesn't support the
	// verb.
	lacking atomic.Bool
}

// batchProcess is a process that serves a batch.
type batchProcess struct {
	*program.Process
	client   *batch.Client
	lacking  *atomic.Bool
	answered atomic.Bool // it has written something
}

// restartAfter is the minimum time between the starts of two processes if the first one hasn't answered. It doubles
// with each consecutive process without an answer.
const restartAfter = 100 * time.Millisecond

func (h *Helper) startBatch(ctx context.Context, verb string) (*helperBatch, error) {
	b := &helperBatch{Helper: h, ctx: ctx, verb: verb}
	return b, b.start()
}

// start starts a process. The caller holds mu, except for the first one.
func (b *helperBatch) start() error {
	p, w, err := b.startFed(b.ctx, b.verb)
	if err != nil {
		return err
	}
	p.Patience = program.Grace
	b.current, b.started = &batchProcess{Process: p, lacking: &b.lacking}, time.Now()
	b.current.client = batch.NewClient(b.current, w)
	b.current.client.Unverified = true // the verifiers of this package hash
	return nil
}

// process returns the process to use. It replaces one that has failed, unless it is too early for that.
func (b *helperBatch) process() *batchProcess {
	b.mu.Lock()
	defer b.mu.Unlock()
	old := b.current
	if !errdefs.IsAborted(old.client.Err()) || b.ctx.Err() != nil {
		return old
	}
	if old.answered.Load() {
		b.failed = 0
	} else if time.Since(b.started) < restartAfter<<min(b.failed, 10) {
		return old
	} else {
		b.failed++
	}
	if b.start() == nil {
		old.close()
	}
	return b.current
}

// Read reads the output of the process.
func (p *batchProcess) Read(b []byte) (int, error) {
	n, err := p.Process.Read(b)
	if n > 0 {
		p.answered.Store(true)
	} else if errdefs.IsNotImplemented(err) && !p.answered.Load() {
		p.lacking.Store(true)
	}
	return n, err
}

// close closes the process's input and waits for its exit. A process that doesn't exit is terminated.
func (p *batchProcess) close() {
	p.client.Close()
	defer p.StopAfter(program.Grace).Stop()
	_ = p.End()
	_ = p.CloseOutput()
}

// Close ends the process.
func (b *helperBatch) Close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.current.close()
}

// knowsVerb reports whether the helper supports the batch verb. Before the first answer it sends an unknown request, to
// see whether the process answers at all.
func (b *helperBatch) knowsVerb(ctx context.Context) bool {
	if p := b.process(); !p.answered.Load() {
		if answer, err := p.client.Ask("probe", unnamed); err == nil {
			_, _ = answer.Answer(ctx)
		}
	}
	return !b.lacking.Load()
}

const unnamed = "-"

// forward passes a request on. The answer must begin with one of the words. If the helper doesn't support the verb,
// plain handles the request.
func (b *helperBatch) forward(ctx context.Context, verb string, r *batch.Request, plain func() (batch.Answer, error), words ...string) func() (batch.Answer, error) {
	p, err := b.process().client.Ask(verb, r.Object, r.Hints...)
	return func() (batch.Answer, error) {
		var a batch.Answer
		if err == nil {
			a, err = p.Answer(ctx, words...)
		}
		if err != nil && b.lacking.Load() {
			return plain()
		}
		return a, err
	}
}

// get forwards a request for an object, and verifies the content.
func (b *helperBatch) get(ctx context.Context, r *batch.Request, plain func() (batch.Answer, error)) func() (batch.Answer, error) {
	h := parseHints(r.Hints)
	asked := *r
	if h.end >= 0 { // the helper may not support ranges
		asked.Hints = append(slices.Clone(r.Hints), fmt.Sprint("offset:", h.offset))
	}
	wait := b.forward(ctx, "get", &asked, plain, "ok")
	return func() (batch.Answer, error) {
		a, err := wait()
		o, ok := a.Content.(*batch.Object)
		if err != nil || !ok { // plain answered, with verified content
			return a, err
		}
		d, isDigest, err := b.object(r.Object)
		if !isDigest {
			d = a.Digest
		}
		size := max(a.Size, h.size)
		if err == nil && d == "" {
			err = classf(errdefs.ErrDataLoss, "dist-remote-%s stated no digest of %s", b.name, r.Object)
		}
		if err == nil && size >= 0 {
			err = h.check(size)
		}
		if err != nil {
			o.Close()
			return batch.Answer{}, err
		}
		v := newVerifier(ctx, &sized{o, h.offset, size}, d, h.offset, h.offset, size)
		v.cut(h.end)
		v.mediaType = a.MediaType
		if b.options.Unverified && size > MaxManifest {
			v.hash = nil
		}
		return batch.Answer{Word: "ok", Descriptor: v.descriptor(), Content: v}, nil
	}
}

// put passes on content that begins at the hinted offset. The put is aborted if the content doesn't match its digest or
// size.
func (b *helperBatch) put(ctx context.Context, id string, content io.Reader, h hints) (Pushed, error) {
	in, desc, exists, err := b.outgoing(ctx, id, content, h)
	if err != nil {
		return Pushed{}, err
	}
	if exists {
		return Pushed{desc, Exists}, nil
	}
	a, err := b.process().client.Put(ctx, id, in, hints{mediaType: desc.MediaType, size: desc.Size, offset: h.offset}.list()...)
	if err != nil {
		return Pushed{}, err
	}
	if desc.Size < 0 {
		desc.Size = a.Size
	}
	return Pushed{desc, State(a.Word)}, nil
}
