package batch

import (
	"bufio"
	"context"
	_ "crypto/sha256" // register the algorithms of digests
	_ "crypto/sha512"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Client sends requests to a server and reads its answers. Several goroutines may use it at the same time. Requests are
// sent at once, and answers come in the order of the requests. While the object of one answer is open, the next answers
// are not read.
//
// An error has the class that the server sent. If the server is gone, the class is Aborted. If an answer can't be
// parsed, the class is DataLoss. Both end the batch: all pending requests and all later ones fail with the same error.
// A request after Close fails with FailedPrecondition.
type Client struct {
	// Unverified is for a caller that verifies digests itself: of an object whose size is known, the client then
	// checks the length only.
	Unverified bool

	sending sync.Mutex
	w       *bufio.Writer
	closeW  func() error

	r       *bufio.Reader
	mu      sync.Mutex
	changed *sync.Cond // signalled when waiting or closed changes
	waiting []*Pending // requests without an answer, the oldest first
	closed  bool
	err     error // the error that ended the batch
}

// NewClient returns a client that reads a server's output and writes its input.
func NewClient(output io.Reader, input io.WriteCloser) *Client {
	c := &Client{r: bufio.NewReaderSize(output, bufferSize), w: bufio.NewWriterSize(input, bufferSize), closeW: sync.OnceValue(input.Close)}
	c.changed = sync.NewCond(&c.mu)
	go c.read()
	return c
}

// Close closes the server's input. The pending requests still get their answers: the server exits after the last one.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closed = true
	c.changed.Broadcast()
	c.mu.Unlock()
	return c.closeW()
}

// Abort is for a caller that stops the server early: all pending requests and all later ones fail with Aborted. It
// closes the server's input.
func (c *Client) Abort() {
	c.fail(errclass.Errorf(errdefs.ErrAborted, "the batch was given up"))
}

// Err returns the error that ended the batch, or nil.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Pending is a request whose answer has not been taken yet.
type Pending struct {
	client   *Client
	object   string
	hints    requestHints
	answered chan struct{} // closed when answer and err are set
	answer   Answer
	err      error
	consumed chan struct{} // closed when all of the answer has been read
}

// requestHints is what a request's hints say: the size of the object, and the offsets of the first byte wanted and of the byte
// after the last. size and end are -1 if no hint gives them.
type requestHints struct{ size, begin, end int64 }

func parseHints(list []string) requestHints {
	k := requestHints{size: -1, end: -1}
	for _, s := range list {
		kind, value, _ := strings.Cut(s, ":")
		n, err := ParseNumber(value)
		switch {
		case kind == "range":
			if begin, end, err := ParseRange(value); err == nil {
				k.begin, k.end = max(k.begin, begin), end
			}
		case err != nil:
		case kind == "size":
			k.size = n
		case kind == "offset":
			k.begin = max(k.begin, n)
		}
	}
	return k
}

// send writes a request and then its content, if that is not nil. source is an error of reading the content. isLast is
// false if the caller sends another request right away.
func (c *Client) send(ctx context.Context, isLast bool, verb string, content io.Reader, object string, hints ...string) (p *Pending, source, err error) {
	line := strings.Join(append([]string{verb, object}, hints...), " ")
	if err := checkRequest(line, len(hints)+2); err != nil {
		return nil, nil, err
	}
	c.sending.Lock()
	defer c.sending.Unlock()
	p = &Pending{client: c, object: object, hints: parseHints(hints), answered: make(chan struct{}), consumed: make(chan struct{})}
	if err := c.enqueue(p); err != nil {
		return nil, nil, err
	}
	_, err = c.w.WriteString(line + "\n")
	if err == nil && content != nil {
		out := &chunks{w: c.w}
		trailer := "end"
		if source = out.readFrom(contextReader{ctx, content}); source != nil {
			trailer = "abort"
		}
		err = out.end(trailer)
	}
	if err == nil && isLast {
		err = c.w.Flush()
	}
	if err != nil {
		c.w = bufio.NewWriter(io.Discard) // The server is gone, or will be. read finds the cause at the end of its output.
	}
	return p, source, nil
}

// checkRequest returns an error if no server would accept the line, which the caller made of n words.
func checkRequest(line string, n int) error {
	list, err := words(line)
	if err == nil && (len(line) >= MaxLine || len(list) != n || n > maxWords || !isText(line)) {
		err = malformed("a request must be text, of at most %d bytes and %d words", MaxLine, maxWords)
	}
	return err
}

type contextReader struct {
	ctx context.Context
	io.Reader
}

func (r contextReader) Read(p []byte) (int, error) {
	if err := context.Cause(r.ctx); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}

func (c *Client) enqueue(p *Pending) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	if c.closed {
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "the batch is closed")
	}
	c.waiting = append(c.waiting, p)
	c.changed.Broadcast()
	return nil
}

// fail makes all pending requests and all later ones fail with err. The first call decides the error. The server's
// input is closed too, since a goroutine may be blocked in a write to a server that no longer reads.
func (c *Client) fail(err error) {
	defer c.closeW()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
	}
	for _, p := range c.waiting {
		p.err = c.err
		close(p.answered)
	}
	c.waiting = nil
	c.changed.Broadcast()
}

// take removes the oldest request from waiting, after waiting for one if need be. It returns nil when no more will
// come.
func (c *Client) take() *Pending {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.waiting) == 0 {
		if c.closed || c.err != nil {
			return nil
		}
		c.changed.Wait()
	}
	p := c.waiting[0]
	c.waiting = c.waiting[1:]
	return p
}

// read reads the answer of each request, then waits until the answer's content has been consumed.
func (c *Client) read() {
	for p := c.take(); p != nil; p = c.take() {
		line, err := readLine(c.r)
		if err == nil {
			err = p.parse(line)
		}
		if err != nil {
			p.err = broken(err)
			c.fail(p.err) // before answered is closed: the caller then sees by Err that the whole batch has failed
			close(p.answered)
			return
		}
		close(p.answered)
		if p.answer.Content == nil {
			continue
		}
		<-p.consumed
		if err := c.Err(); err != nil { // Object.Close could not read the rest
			c.fail(err)
			return
		}
	}
}

// broken gives a class to the error that ended the stream. An error that has a class already, such as that of the
// server's exit status, keeps it.
func broken(err error) error {
	switch {
	case err == io.EOF:
		return errEnd()
	case errors.As(err, new(malformedError)):
		return errclass.Errorf(errdefs.ErrDataLoss, "the answer is %w", err)
	case errclass.Status(err) == 1:
		return errclass.Errorf(errdefs.ErrAborted, "read answers: %w", err)
	}
	return err
}

// Resume is a hint of the verb has. It allows the answer "part": the server has the first bytes of the object, as many
// as the answer's size. A put with the hint offset: of that number may send the rest alone.
const Resume = "resume:yes"

// answerWords maps the first word of an answer to the number of words that follow it: of digest, size and type, in this
// order.
var answerWords = map[string]int{"ok": 3, "yes": 3, "no": 0, "part": 2, "stored": 2, "exists": 2, "mounted": 2}

// parse reads the line of an answer. It returns an error if the line breaks the protocol. An error that the server
// reports is stored in p.err.
func (p *Pending) parse(line string) error {
	if err, ok := parseFailure(line); ok {
		p.err = err
		return nil
	}
	list, err := words(line)
	if err != nil {
		return err
	}
	word, list := list[0], list[1:]
	if n, ok := answerWords[word]; !ok || n != len(list) {
		return malformed("%.60q", line)
	}
	p.answer = Answer{Word: word, Descriptor: ocispec.Descriptor{Size: -1}}
	if len(list) == 0 {
		return nil
	}
	if p.answer.Descriptor, err = parseDescriptor(list); err != nil {
		return err
	}
	if word == "ok" {
		p.answer.Content = &Object{Descriptor: p.answer.Descriptor, pending: p,
			in: content{r: p.client.r, trailer: parseFailure}, left: -1}
	}
	return nil
}

// Answer waits for the answer, whose first word must be one of allowed. Its content, if any, is an *[Object]. If ctx is
// done first, the answer is read and discarded when it comes.
func (p *Pending) Answer(ctx context.Context, allowed ...string) (Answer, error) {
	select {
	case <-p.answered:
	case <-ctx.Done():
		go func() {
			if <-p.answered; p.answer.Content != nil {
				p.answer.Content.Close()
			}
		}()
		return Answer{}, context.Cause(ctx)
	}
	if p.err != nil {
		return Answer{}, p.err
	}
	err := p.check(allowed)
	if err != nil {
		if p.answer.Content != nil {
			go p.answer.Content.Close() // in the background: the content may never come
		}
		return Answer{}, err
	}
	return p.answer, nil
}

// check compares the answer with the request.
func (p *Pending) check(allowed []string) error {
	a := p.answer
	want, isDigest := asDigest(p.object)
	switch {
	case !slices.Contains(allowed, a.Word):
		return errclass.Errorf(errdefs.ErrDataLoss, "the answer is %.24q", a.Word)
	case isDigest && a.Digest != "" && a.Digest != want:
		return errclass.Errorf(errdefs.ErrDataLoss, "digest mismatch: got %s, not %s", a.Digest, want)
	case a.Word != "part" && p.hints.size >= 0 && a.Size >= 0 && a.Size != p.hints.size:
		return errclass.Errorf(errdefs.ErrDataLoss, "size mismatch: got %d bytes, not %d", a.Size, p.hints.size)
	}
	return nil
}

func asDigest(s string) (digest.Digest, bool) {
	d, err := digest.Parse(s)
	return d, err == nil
}

// Fetch returns the bytes of a manifest or blob. object is a tag or digest. Hints are as in dist-batch(7).
func (c *Client) Fetch(ctx context.Context, object string, hints ...string) (*Object, error) {
	p, err := c.Request(object, hints...)
	if err != nil {
		return nil, err
	}
	return p.Wait(ctx)
}

// Request asks for an object and returns at once, so that one goroutine can have several requests under way. The caller
// must call Wait on each.
func (c *Client) Request(object string, hints ...string) (*Pending, error) {
	return c.Ask("get", object, hints...)
}

// Ask sends a request, of any verb but put, and returns at once.
func (c *Client) Ask(verb, object string, hints ...string) (*Pending, error) {
	p, _, err := c.send(context.Background(), true, verb, nil, object, hints...)
	return p, err
}

// Wait waits for the object. Its answer comes after all objects requested before it have been closed.
func (p *Pending) Wait(ctx context.Context) (*Object, error) {
	a, err := p.Answer(ctx, "ok")
	if err != nil {
		return nil, err
	}
	o := a.Content.(*Object)
	size, end := max(o.Size, p.hints.size), p.hints.end
	o.isCut = end >= 0 && (size < 0 || end < size)
	switch {
	case o.isCut:
		o.left, o.mayEndEarly = max(end-p.hints.begin, 0), size < 0
	case size >= 0:
		o.left = max(size-p.hints.begin, 0)
	}
	if want, ok := asDigest(p.object); ok && p.hints.begin == 0 && o.Digest == "" {
		o.Digest = want
	}
	if p.hints.begin == 0 && !o.isCut && o.Digest != "" && (o.left < 0 || !p.client.Unverified) {
		o.hash = o.Digest.Algorithm().Hash()
	}
	return o, nil
}

// Object is the content of an answer. Read returns io.EOF only if the server sent all of it, with the right length.
// Unless the client is [Client.Unverified], a whole object must also match its digest: one that begins at offset 0 and
// is not cut short by a range. Bytes that the server sends after the end of the range are discarded.
type Object struct {
	ocispec.Descriptor // Size is -1 if the server does not know it
	pending            *Pending
	in                 content
	left               int64     // bytes still due, -1 if unknown
	isCut              bool      // the requested range ends before the object, as far as is known
	mayEndEarly        bool      // with isCut: the object's size is unknown, so it may end first
	hash               hash.Hash // nil if the digest is not verified
	err                error
	closed             sync.Once
}

func (o *Object) Read(b []byte) (int, error) {
	if o.err != nil {
		return 0, o.err
	}
	if o.isCut && o.left == 0 {
		_ = o.in.drain()
		b = nil // only the trailer is left to read
	} else if o.isCut {
		b = b[:min(int64(len(b)), o.left)]
	}
	n, err := o.in.Read(b)
	if o.hash != nil {
		o.hash.Write(b[:n])
	}
	if o.left >= 0 {
		if o.left -= int64(n); o.left < 0 {
			err = errclass.Errorf(errdefs.ErrDataLoss, "size mismatch: more than %d bytes came", o.Size)
		}
	}
	switch {
	case err == nil:
	case o.in.broken != nil:
		err = broken(o.in.broken)
	case err == io.EOF && o.left > 0 && !o.mayEndEarly:
		err = errclass.Errorf(errdefs.ErrDataLoss, "size mismatch: %d bytes are missing", o.left)
	case err == io.EOF && o.hash != nil:
		if got := digest.NewDigest(o.Digest.Algorithm(), o.hash); got != o.Digest {
			err = errclass.Errorf(errdefs.ErrDataLoss, "digest mismatch: got %s, not %s", got, o.Digest)
		}
	}
	o.err = err
	return n, err
}

// Close reads and discards the rest, so that the next answer can be read. If that fails, the batch ends with that
// error: see [Client.Err].
func (o *Object) Close() error {
	o.closed.Do(func() {
		if err := o.in.drain(); err != nil {
			o.pending.client.fail(broken(err))
		}
		if o.err == nil {
			o.err = errClosed
		}
		close(o.pending.consumed)
	})
	return nil
}

// Referrers returns the descriptors of the manifests whose subject is the given digest: JSON, one descriptor a line.
func (c *Client) Referrers(ctx context.Context, subject digest.Digest, hints ...string) (io.ReadCloser, error) {
	p, err := c.Ask("referrers", string(subject), hints...)
	if err != nil {
		return nil, err
	}
	a, err := p.Answer(ctx, "ok")
	if err != nil {
		return nil, err
	}
	return a.Content, nil
}

// Has reports whether the server has an object, and returns its descriptor.
func (c *Client) Has(ctx context.Context, object string, hints ...string) (ocispec.Descriptor, bool, error) {
	p, err := c.Ask("has", object, hints...)
	if err != nil {
		return ocispec.Descriptor{}, false, err
	}
	a, err := p.Answer(ctx, "yes", "no")
	return a.Descriptor, err == nil && a.Word == "yes", err
}

// HasAll asks which of the descriptors' objects the server has. The answers' words are yes, no and, with the hint
// [Resume], part. HasAll sends all requests before it reads an answer, so the caller must bound the list. The size in
// an answer yes must not be relied on: some registries report a wrong one.
func (c *Client) HasAll(ctx context.Context, list []ocispec.Descriptor, more ...string) ([]Answer, error) {
	var err error
	pending := make([]*Pending, len(list))
	for i, d := range list {
		hints := append(Hints(ocispec.Descriptor{MediaType: d.MediaType, Size: -1}), more...)
		if pending[i], _, err = c.send(ctx, i == len(list)-1, "has", nil, string(d.Digest), hints...); err != nil {
			return nil, err
		}
	}
	words := []string{"yes", "no"}
	if slices.Contains(more, Resume) {
		words = append(words, "part")
	}
	answers := make([]Answer, len(list))
	for i, p := range pending {
		if answers[i], err = p.Answer(ctx, words...); err != nil {
			return nil, fmt.Errorf("%s: %w", list[i].Digest, err)
		}
	}
	return answers, nil
}

// Hints returns a descriptor's media type and size as hints. A negative size means unknown.
func Hints(d ocispec.Descriptor) (hints []string) {
	if typeWord(d.MediaType) != unknown {
		hints = append(hints, "mediatype:"+d.MediaType)
	}
	if d.Size >= 0 {
		hints = append(hints, "size:"+strconv.FormatInt(d.Size, 10))
	}
	return hints
}

// Put sends content to be stored under a digest or, for a manifest, a tag. With the hint offset:, content is the part
// that begins at that offset. The answer's word is stored, exists or mounted.
//
// If reading content fails, nothing is stored and Put returns that error. Put reads all of content even if the server
// has the object already: ask with [Client.Has] first.
func (c *Client) Put(ctx context.Context, object string, content io.Reader, hints ...string) (Answer, error) {
	p, source, err := c.send(ctx, true, "put", content, object, hints...)
	if err != nil {
		return Answer{}, err
	}
	if source != nil {
		ctx, cancel := context.WithCancel(ctx)
		cancel() // the server's answer says only that we aborted
		_, _ = p.Answer(ctx)
		return Answer{}, source
	}
	return p.Answer(ctx, "stored", "exists", "mounted")
}

// Mount asks the server to take a blob from another place that it can reach, such as another repository of the same
// registry. It reports false if the server can't. Otherwise the answer's word is mounted or exists.
func (c *Client) Mount(ctx context.Context, d digest.Digest, from string) (Answer, bool, error) {
	p, err := c.Ask("mount", string(d), from)
	if err != nil {
		return Answer{}, false, err
	}
	a, err := p.Answer(ctx, "mounted", "exists", "no")
	return a, err == nil && a.Word != "no", err
}
