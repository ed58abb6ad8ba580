package remotes

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"

	"distkit/batch"
	"distkit/disk"
	ondisk "distkit/disk/layout"
	"distkit/refname"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"
)

// OpenBatch is [Open] for a remote that FetchBatch or PutBatch serves.
func OpenBatch(locator string, o Options) (Remote, error) {
	o.Streams = batch.Ahead
	return Open(locator, o)
}

// FetchBatch serves the requests get, has and referrers of dist-batch(7) for a remote: it reads requests from in and
// writes answers to out. A failed request is an answer. FetchBatch itself fails with InvalidArgument if it can't parse
// the requests, and with Aborted if they end inside a request.
func FetchBatch(ctx context.Context, r Remote, in io.Reader, out io.Writer) error {
	b, err := newBatch(ctx, r, "batch-fetch")
	if err != nil {
		return err
	}
	defer b.close()
	if pipe, ok := out.(syscall.Conn); ok {
		disk.WidenPipe(pipe)
	}
	return batch.Serve(ctx, in, out, map[string]batch.Handler{"get": b.get, "has": b.has(false), "referrers": b.referrers})
}

// PutBatch is [FetchBatch] for the requests has, put and mount. It keeps sweeps of a store away until it returns.
func PutBatch(ctx context.Context, r Remote, in io.Reader, out io.Writer) error {
	b, err := newBatch(ctx, r, "batch-put")
	if err != nil {
		return err
	}
	defer b.close()
	if l, ok := r.(*Layout); ok {
		release, err := l.hold(ctx)
		if err != nil {
			return err
		}
		defer release()
	}
	return batch.Serve(ctx, in, out, map[string]batch.Handler{"has": b.has(true), "put": b.put, "mount": b.mount})
}

// requests answers the requests of one batch.
type requests struct {
	remote Remote
	helper *helperBatch  // nil unless the remote is a helper
	puts   chan struct{} // closed when all puts so far are done
	// memory limits the uploads in progress by shares of memory: an upload keeps what it may have to send again.
	memory *semaphore.Weighted
	mu     sync.Mutex
	absent map[string]bool // objects that the remote was found not to have
}

const (
	// uploadShares is the number of shares of memory, each of shareSize, for all uploads.
	uploadShares = 7
	shareSize    = 2 << 20
	// largeUpload is the number of shares of the largest upload. Two such uploads fit.
	largeUpload = (retained + 1) * batchChunkSize / shareSize
	// maxAbsent bounds the number of absent objects that are remembered.
	maxAbsent = 1 << 16
)

func newBatch(ctx context.Context, r Remote, verb string) (b *requests, err error) {
	b = &requests{remote: r, puts: make(chan struct{}), memory: semaphore.NewWeighted(uploadShares), absent: map[string]bool{}}
	close(b.puts)
	if h, ok := r.(*Helper); ok {
		b.helper, err = h.startBatch(ctx, verb)
	}
	return b, err
}

func (b *requests) close() {
	if b.helper != nil {
		b.helper.Close()
	}
}

// turnKey is the context key of batch.Request.Turn.
type turnKey struct{}

// maxAhead is the size of the largest reply that is read into memory before its turn.
const maxAhead = 256 << 10

// waitTurn waits until the answer to the context's request is the next one to be written, so that only one large
// document is in memory at a time. Outside a batch it returns at once.
func waitTurn(ctx context.Context) error {
	turn, ok := ctx.Value(turnKey{}).(<-chan struct{})
	if !ok {
		return nil
	}
	return waitFor(ctx, turn)
}

func (b *requests) get(ctx context.Context, r *batch.Request) func() (batch.Answer, error) {
	ctx = context.WithValue(ctx, turnKey{}, r.Turn)
	plain := func() (batch.Answer, error) {
		got, err := b.remote.Fetch(ctx, r.Object, r.Hints...)
		if err != nil {
			return batch.Answer{}, err
		}
		return batch.Answer{Word: "ok", Descriptor: got.(body).descriptor(), Content: got}, nil
	}
	if b.helper != nil {
		return b.helper.get(ctx, r, plain)
	}
	return plain
}

func (b *requests) has(forPut bool) batch.Handler {
	return func(ctx context.Context, r *batch.Request) func() (batch.Answer, error) {
		puts := b.puts
		plain := func() (batch.Answer, error) {
			if err := waitFor(ctx, puts); err != nil {
				return batch.Answer{}, err
			}
			desc, err := b.lookup(ctx, r.Object, parseHints(r.Hints), forPut)
			if errdefs.IsNotFound(err) {
				b.noteAbsent(r.Object)
				return b.part(ctx, r), nil
			}
			return batch.Answer{Word: "yes", Descriptor: desc}, err
		}
		if b.helper != nil {
			return b.helper.forward(ctx, "has", r, plain, "yes", "no", "part")
		}
		return plain
	}
}

// part returns the answer to a has for an object that the remote lacks. The remote may have its first bytes, from an
// interrupted put.
func (b *requests) part(ctx context.Context, r *batch.Request) batch.Answer {
	l, ok := b.remote.(*Layout)
	if dgst, isDigest, err := parseDigest(r.Object); ok && isDigest && err == nil && slices.Contains(r.Hints, batch.Resume) {
		if d, err := l.files(); err == nil {
			if size := d.PartSize(ctx, dgst); size > 0 {
				return batch.Answer{Word: "part", Descriptor: ocispec.Descriptor{Digest: dgst, Size: size}}
			}
		}
	}
	return batch.Answer{Word: "no"}
}

func (b *requests) noteAbsent(object string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.absent) < maxAbsent {
		b.absent[object] = true
	}
}

// takeAbsent reports whether an object was found to be absent, and forgets it.
func (b *requests) takeAbsent(object string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	was := b.absent[object]
	delete(b.absent, object)
	return was
}

// referrers answers with the descriptors as JSON, one per line.
func (b *requests) referrers(ctx context.Context, r *batch.Request) func() (batch.Answer, error) {
	plain := func() (batch.Answer, error) {
		subject, err := digest.Parse(r.Object)
		if err != nil {
			return batch.Answer{}, classf(errdefs.ErrInvalidArgument, "not a digest: %w", err)
		}
		var filter ReferrerFilter
		for _, hint := range r.Hints {
			if t, ok := strings.CutPrefix(hint, "artifacttype:"); ok {
				filter.ArtifactType = t
			}
		}
		lines, w := io.Pipe()
		go func() {
			out := bufio.NewWriterSize(w, shortPiece)
			encoder := json.NewEncoder(out)
			var err error
			for desc, lerr := range b.remote.Referrers(ctx, subject, filter) {
				if err = lerr; err == nil {
					err = encoder.Encode(desc)
				}
				if err != nil {
					break
				}
			}
			if err == nil {
				err = out.Flush()
			}
			w.CloseWithError(err)
		}()
		return batch.Answer{Word: "ok", Descriptor: ocispec.Descriptor{Size: -1}, Content: lines}, nil
	}
	if b.helper != nil {
		return b.helper.forward(ctx, "referrers", r, plain, "ok")
	}
	return plain
}

func (b *requests) put(ctx context.Context, r *batch.Request) func() (batch.Answer, error) {
	before, done, all := b.puts, make(chan struct{}), make(chan struct{})
	b.puts = all
	go func() {
		<-before
		<-done
		close(all)
	}()
	return func() (batch.Answer, error) {
		defer close(done)
		h := parseHints(r.Hints)
		shares := int64(largeUpload)
		if h.size >= 0 {
			shares = min(h.size/shareSize+1, largeUpload)
		}
		if _, isDigest, _ := parseDigest(r.Object); !isDigest || !h.isBlob() {
			// It may be a manifest, so everything before it must be stored first.
			if err := waitFor(ctx, before); err != nil {
				return batch.Answer{}, err
			}
		}
		if b.memory.Acquire(ctx, shares) != nil {
			return batch.Answer{}, context.Cause(ctx)
		}
		defer b.memory.Release(shares)
		pushed, err := b.push(ctx, r, h)
		return batch.Answer{Word: string(pushed.State), Descriptor: pushed.Descriptor}, err
	}
}

func waitFor(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (b *requests) push(ctx context.Context, r *batch.Request, h hints) (Pushed, error) {
	switch remote := b.remote.(type) {
	case *Layout:
		return remote.push(ctx, r.Object, r.Content, h)
	case *Registry:
		h.isAbsent = b.takeAbsent(r.Object)
		return remote.pushHinted(ctx, r.Object, r.Content, h)
	case *Helper:
		if b.helper.knowsVerb(ctx) {
			return b.helper.put(ctx, r.Object, r.Content, h)
		}
	}
	return b.remote.Push(ctx, r.Object, r.Content, r.Hints...)
}

func (b *requests) mount(ctx context.Context, r *batch.Request) func() (batch.Answer, error) {
	no := func() (batch.Answer, error) { return batch.Answer{Word: "no"}, nil }
	switch remote := b.remote.(type) {
	case *Helper:
		return b.helper.forward(ctx, "mount", r, no, "mounted", "exists", "no")
	case *Registry:
		return func() (batch.Answer, error) {
			pushed, err := remote.mount(ctx, r.Object, r.Hints[0])
			if err == nil && pushed.State != Mounted {
				b.noteAbsent(r.Object)
				return no()
			}
			return batch.Answer{Word: string(pushed.State), Descriptor: pushed.Descriptor}, err
		}
	}
	return no
}

// lookup returns the descriptor of an object, or NotFound. With forPut it asks the host that Push would use. If the
// hints say that the object is a blob, one request suffices.
func (b *requests) lookup(ctx context.Context, id string, h hints, forPut bool) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: h.mediaType, Size: -1}
	d, isDigest, err := parseDigest(id)
	if err != nil {
		return desc, err
	}
	desc.Digest = d
	isBlob := isDigest && h.isBlob()
	switch r := b.remote.(type) {
	case *Registry:
		if forPut {
			return r.hasForPut(ctx, id, h)
		}
		if isBlob {
			err = r.firstHost(ctx, canPull, func(c *client, t *tries) error {
				desc.Size, err = c.blobSize(ctx, r.request(c, http.MethodHead, "blobs", id), d, t)
				return err
			})
			return desc, err
		}
	case *Layout:
		if isBlob {
			desc.Size, err = r.blobSize(d)
			return desc, err
		}
	}
	return b.remote.Resolve(ctx, id)
}

// isBlob reports whether the hinted media type is not that of a manifest.
func (h hints) isBlob() bool {
	return h.mediaType != "" && !isIndex(h.mediaType) && !isManifest(h.mediaType)
}

// blobSize returns the size of a blob. NotFound if it doesn't exist.
func (l *Layout) blobSize(d digest.Digest) (int64, error) {
	files, err := l.files()
	if err != nil {
		return -1, err
	}
	f, size, err := openBlob(files, d)
	if err != nil {
		return -1, err
	}
	return size, f.Close()
}

// hold keeps sweeps of a store away until release is called. It does nothing for a layout that isn't a store or doesn't
// exist yet.
func (l *Layout) hold(ctx context.Context) (release func(), err error) {
	d, err := l.files()
	if err == nil && ondisk.IsStore(d.Tree) {
		return ondisk.Share(ctx, d.Tree)
	}
	if errdefs.IsNotFound(err) {
		err = nil
	}
	return func() {}, err
}

// hasForPut returns the descriptor of an object on the host that Push would use, or NotFound.
func (r *Registry) hasForPut(ctx context.Context, id string, h hints) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: h.mediaType, Size: -1}
	o, err := parseObject(id)
	if err != nil {
		return desc, err
	}
	p, err := r.newPush(ctx, o, h)
	if err != nil {
		return desc, err
	}
	desc.Digest = o.digest
	switch {
	case o.tag != "":
		resp, err := p.headManifest(o)
		if errdefs.IsNotFound(err) {
			return desc, err // if HEAD is wrong, the object is put once more
		}
		if err == nil {
			if got, ok, _ := headDescriptor(resp, o); ok {
				return got, nil
			}
		}
		return p.resolve(ctx, p.client, p.tries, o)
	case h.mediaType == "":
		return p.resolve(ctx, p.client, p.tries, o)
	case h.isBlob():
		desc.Size, err = p.exists()
		if isRefusedElsewhere(err) {
			err = errAbsent()
		}
	default:
		var there bool
		if there, err = p.isAlready(o.digest); err == nil && !there {
			err = errAbsent()
		}
	}
	if err == nil {
		desc.Size = p.knownSize(desc.Size)
	}
	return desc, err
}

func errAbsent() error { return classf(errdefs.ErrNotFound, "the remote doesn't have it") }

// mount asks the registry to take a blob from another of its repositories. State is Mounted if it did.
func (r *Registry) mount(ctx context.Context, id, from string) (Pushed, error) {
	o, err := parseObject(id)
	if err == nil && (o.digest == "" || !refname.IsRepository(from)) {
		err = classf(errdefs.ErrInvalidArgument, "need a digest and a repository")
	}
	if err != nil {
		return Pushed{}, err
	}
	p, err := r.newPush(ctx, o, hints{size: -1, mount: from})
	if err != nil {
		return Pushed{}, err
	}
	u := &blobUpload{push: p, size: -1, chunk: p.client.chunk}
	mounted, err := u.beginOrMount()
	if err == nil && !mounted {
		u.cancel()
	}
	return Pushed{ocispec.Descriptor{Digest: o.digest, Size: p.hints.size}, p.state}, err
}
