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

// helperBatch passes the requests of a batch, in their order, to one process of a helper: the verbs batch-fetch and batch-put of
// dist-remote(7). If the process fails for the time being, as when its connection breaks, its open requests fail and the client may
// ask again; the next request starts another process. If the helper does not know the verb, each request gets a process of its own.
type helperBatch struct {
	*Helper
	ctx  context.Context
	verb string

	mu      sync.Mutex
	current *batchProcess
	started time.Time
	failed  int // processes in a row that have not answered
	// lacking is set when a process has ended with NotImplemented before its first answer: the helper does not know the verb.
	lacking atomic.Bool
}

// batchProcess is a process that serves a batch.
type batchProcess struct {
	*program.Process
	client   *batch.Client
	lacking  *atomic.Bool
	answered atomic.Bool // something has come from it
}

// restartAfter is the least time between the start of a process that has not answered and that of the next one. It doubles with
// each such process in a row.
const restartAfter = 100 * time.Millisecond

func (h *Helper) startBatch(ctx context.Context, verb string) (*helperBatch, error) {
	b := &helperBatch{Helper: h, ctx: ctx, verb: verb}
	return b, b.start()
}

// start starts a process. The caller holds mu, except for the first process.
func (b *helperBatch) start() error {
	p, w, err := b.startFed(b.ctx, b.verb)
	if err != nil {
		return err
	}
	p.Patience = program.Grace
	b.current, b.started = &batchProcess{Process: p, lacking: &b.lacking}, time.Now()
	b.current.client = batch.NewClient(b.current, w)
	b.current.client.Unverified = true // the verifiers here hash
	return nil
}

// process returns the process to ask. It replaces one that has failed, unless it is too early for another one.
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

// close closes the input of the process and waits for its end. A process that does not end is told to stop.
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

// knowsVerb reports whether the helper serves a batch. Before the first answer it sends a request that no server knows, to see
// whether the process answers at all.
func (b *helperBatch) knowsVerb(ctx context.Context) bool {
	if p := b.process(); !p.answered.Load() {
		if answer, err := p.client.Ask("probe", unnamed); err == nil {
			_, _ = answer.Answer(ctx)
		}
	}
	return !b.lacking.Load()
}

const unnamed = "-"

// forward passes a request on; the answer must begin with one of the words. If the helper does not know the verb of the batch,
// plain deals with the request.
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

// get is forward for an object, whose content it verifies.
func (b *helperBatch) get(ctx context.Context, r *batch.Request, plain func() (batch.Answer, error)) func() (batch.Answer, error) {
	h := parseHints(r.Hints)
	asked := *r
	if h.end >= 0 { // the helper may know no ranges
		asked.Hints = append(slices.Clone(r.Hints), fmt.Sprint("offset:", h.offset))
	}
	wait := b.forward(ctx, "get", &asked, plain, "ok")
	return func() (batch.Answer, error) {
		a, err := wait()
		o, ok := a.Content.(*batch.Object)
		if err != nil || !ok { // the answer is plain's, which has verified it
			return a, err
		}
		d, isDigest, err := b.object(r.Object)
		if !isDigest {
			d = a.Digest
		}
		size := max(a.Size, h.size)
		if err == nil && d == "" {
			err = classf(errdefs.ErrDataLoss, "dist-remote-%s told no digest of %s", b.name, r.Object)
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

// put passes content on, which begins at the hinted offset. The put is aborted if the content is not what its digest or size says.
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
