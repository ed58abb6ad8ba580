package remotes

import (
	"context"
	"io"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"distkit/batch"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// helperBatch is one process of a helper that serves a batch: the verbs batch-fetch and batch-put of dist-remote(7). Requests
// go to it in the order in which they come. A helper that does not know the verb gets a process a request instead.
type helperBatch struct {
	*Helper
	process *process
	client  *batch.Client
	// answered is true once something has come from the process, and lacking if it has ended without, since it does not know the verb.
	answered, lacking atomic.Bool
}

func (h *Helper) startBatch(ctx context.Context, verb string) (*helperBatch, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p, err := h.start(ctx, r, verb)
	r.Close()
	if err != nil {
		w.Close()
		return nil, err
	}
	b := &helperBatch{Helper: h, process: p}
	b.client = batch.NewClient(b, w)
	b.client.Unverified = true // the verifiers here hash
	return b, nil
}

// Read reads the output of the process.
func (b *helperBatch) Read(p []byte) (int, error) {
	n, err := b.process.Read(p)
	if n > 0 {
		b.answered.Store(true)
	} else if errdefs.IsNotImplemented(err) && !b.answered.Load() {
		b.lacking.Store(true)
	}
	return n, err
}

// Close closes the input of the process and waits for its end. A process that does not end is told to stop.
func (b *helperBatch) Close() {
	b.client.Close()
	defer time.AfterFunc(helperGrace, b.process.cancel).Stop()
	_ = b.process.end()
}

// knowsVerb reports whether the process serves a batch. It asks for what no server knows if nothing has been answered yet.
func (b *helperBatch) knowsVerb(ctx context.Context) bool {
	if !b.answered.Load() {
		if p, err := b.client.Ask("probe", unnamed); err == nil {
			_, _ = p.Answer(ctx)
		}
	}
	return !b.lacking.Load()
}

const unnamed = "-"

// forward passes a request on. If the helper does not know the verb, plain deals with it.
func (b *helperBatch) forward(ctx context.Context, verb string, r *batch.Request, plain func() (batch.Answer, error), words ...string) func() (batch.Answer, error) {
	p, err := b.client.Ask(verb, r.Object, r.Hints...)
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

// get is forward for an object, which is verified.
func (b *helperBatch) get(ctx context.Context, r *batch.Request, plain func() (batch.Answer, error)) func() (batch.Answer, error) {
	wait := b.forward(ctx, "get", r, plain, "ok")
	return func() (batch.Answer, error) {
		a, err := wait()
		o, ok := a.Content.(*batch.Object)
		if err != nil || !ok { // it was plain
			return a, err
		}
		h := parseHints(r.Hints)
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
		v.mediaType = a.MediaType
		if b.options.Unverified && size > MaxManifest {
			v.hash = nil
		}
		return batch.Answer{Word: "ok", Descriptor: v.descriptor(), Content: v}, nil
	}
}

// put passes content on. It is aborted where it is not what its digest or size says.
func (b *helperBatch) put(ctx context.Context, id string, content io.Reader, h hints) (Pushed, error) {
	d, isDigest, err := b.object(id)
	if err != nil {
		return Pushed{}, err
	}
	desc := ocispec.Descriptor{MediaType: h.mediaType, Digest: d, Size: h.size}
	if !isDigest {
		var manifest []byte
		if manifest, desc, err = readTagged(content, h); err != nil {
			return Pushed{}, err
		}
		content = strings.NewReader(string(manifest))
		if has, err := b.hasTag(ctx, id, desc.Digest); has || err != nil {
			return Pushed{desc, Exists}, err
		}
	}
	h.size, h.mediaType, h.offset = desc.Size, desc.MediaType, 0
	in := &sized{newVerifier(ctx, io.NopCloser(content), desc.Digest, 0, 0, -1), 0, h.size}
	a, err := b.client.Put(ctx, id, in, h.arguments(id)[1:]...)
	if err != nil {
		return Pushed{}, err
	}
	if desc.Size < 0 {
		desc.Size = a.Size
	}
	return Pushed{desc, State(a.Word)}, nil
}
