package batch

import (
	"bufio"
	"context"
	_ "crypto/sha256" // for digests
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

// Client sends requests to a server and reads its answers. Several goroutines may use it at the same time. Requests are sent
// at once, and the answers come in the order of the requests. While an answer's object is open, the answers behind it wait.
//
// An error has the class that the server sent. If the server is gone, the class is Aborted. If an answer can't be understood,
// it is DataLoss. In both cases all requests that wait, and all later ones, fail with the same error. A request after Close fails
// with FailedPrecondition.
type Client struct {
	// Unverified is set if the caller hashes what it asks for by digest. The client then checks the length alone.
	Unverified bool

	sending sync.Mutex
	w       *bufio.Writer
	closeW  func() error

	r       *bufio.Reader
	mu      sync.Mutex
	more    *sync.Cond // signalled when waiting or closed changes
	waiting []*Pending // for their answers, the oldest first
	closed  bool
	err     error // after which nothing can be asked or read
}

// NewClient returns a client that reads a server's output and writes its input.
func NewClient(output io.Reader, input io.WriteCloser) *Client {
	c := &Client{r: bufio.NewReaderSize(output, bufferSize), w: bufio.NewWriterSize(input, bufferSize), closeW: sync.OnceValue(input.Close)}
	c.more = sync.NewCond(&c.mu)
	go c.read()
	return c
}

// Close closes the server's input. The server ends once it has answered all requests, and those that wait still get their
// answers.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closed = true
	c.more.Broadcast()
	c.mu.Unlock()
	return c.closeW()
}

// Abort is for a caller that ends the server before it has answered: all requests that wait, and all later ones, fail with an
// error of class Aborted. It closes the server's input.
func (c *Client) Abort() {
	c.fail(errclass.Errorf(errdefs.ErrAborted, "the batch was given up"))
}

// Err returns the error after which nothing can be asked or read, nil as long as there is none.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Pending is a request that was sent and whose answer has not been taken.
type Pending struct {
	client   *Client
	object   string
	hints    known
	answered chan struct{} // closed when answer and err are good
	answer   Answer
	err      error
	over     chan struct{} // closed when all of the answer has been read
}

// known is what hints say about an object: its size, and the offsets of the first byte that is wanted and of the end of those. Size and
// end are -1 if the hints don't say them.
type known struct{ size, begin, end int64 }

func parseHints(list []string) known {
	k := known{size: -1, end: -1}
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

// send writes a request and, behind it, content, if that is not nil. source is the error of reading the content. isLast is false
// if another request follows at once.
func (c *Client) send(ctx context.Context, isLast bool, verb string, content io.Reader, object string, hints ...string) (p *Pending, source, err error) {
	line := strings.Join(append([]string{verb, object}, hints...), " ")
	if err := checkRequest(line, len(hints)+2); err != nil {
		return nil, nil, err
	}
	c.sending.Lock()
	defer c.sending.Unlock()
	p = &Pending{client: c, object: object, hints: parseHints(hints), answered: make(chan struct{}), over: make(chan struct{})}
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
		c.w = bufio.NewWriter(io.Discard) // the server is gone, or will be: the end of its output says why
	}
	return p, source, nil
}

// checkRequest returns an error if a line of n words is not one that a server would understand.
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
	c.more.Broadcast()
	return nil
}

// fail ends all requests that wait, and all later ones, with an error. Of several calls, the first one's error stays. The server's
// input is closed, because a goroutine that writes to it may wait for a reader that is gone.
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
	c.more.Broadcast()
}

// take waits for a request, and returns the oldest that waits for an answer. It returns nil once there will be none.
func (c *Client) take() *Pending {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.waiting) == 0 {
		if c.closed || c.err != nil {
			return nil
		}
		c.more.Wait()
	}
	p := c.waiting[0]
	c.waiting = c.waiting[1:]
	return p
}

// read gives each request its answer, and waits until the answer's content has been read.
func (c *Client) read() {
	for p := c.take(); p != nil; p = c.take() {
		line, err := readLine(c.r)
		if err == nil {
			err = p.parse(line)
		}
		if err != nil {
			p.err = broken(err)
			c.fail(p.err) // first, so that whoever gets the error finds out by Err that it is not of the request alone
			close(p.answered)
			return
		}
		close(p.answered)
		if p.answer.Content == nil {
			continue
		}
		<-p.over
		if err := c.Err(); err != nil { // the object's Close could not read the rest
			c.fail(err)
			return
		}
	}
}

// broken gives a class to the error that ended a stream. An error that has one already, such as that of a server's exit
// status, keeps it.
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

// Resume is the hint of a has that allows the answer part: the server has as many of the first bytes as the answer's size says, and
// a put with the hint offset: of that number may bring the rest alone.
const Resume = "resume:yes"

// answerWords are the first words of answers, and how many follow them: digest, size and type.
var answerWords = map[string]int{"ok": 3, "yes": 3, "no": 0, "part": 2, "stored": 2, "exists": 2, "mounted": 2}

// parse reads the line of an answer. It returns an error if the stream can't be understood. An error that the server reports is
// in p.err.
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

// Answer waits for the answer, which must begin with one of the words. Its content, if there is some, is an *[Object]. If ctx
// is done before the answer comes, it is read and thrown away later.
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

// check compares an answer with what was asked for.
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

// Fetch returns the bytes of a manifest or blob. object is a tag or digest. See [Client.Request].
func (c *Client) Fetch(ctx context.Context, object string, hints ...string) (*Object, error) {
	p, err := c.Request(object, hints...)
	if err != nil {
		return nil, err
	}
	return p.Wait(ctx)
}

// Request asks for an object without waiting for it, so that one goroutine can ask for several. Each must be waited for.
func (c *Client) Request(object string, hints ...string) (*Pending, error) {
	return c.Ask("get", object, hints...)
}

// Ask sends a request of a verb, other than put, without waiting for the answer.
func (c *Client) Ask(verb, object string, hints ...string) (*Pending, error) {
	p, _, err := c.send(context.Background(), true, verb, nil, object, hints...)
	return p, err
}

// Wait waits for the object, whose answer comes once all objects that were asked for before it have been closed.
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
		o.left, o.mayEnd = max(end-p.hints.begin, 0), size < 0
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

// Object is the content of an answer. Read returns io.EOF only if the server had all of it and its length is right. If it
// begins at offset 0 and is not the range before a later end, it must also hash to the digest, but see [Client.Unverified]. What a server
// sends behind the end of a range is thrown away.
type Object struct {
	ocispec.Descriptor // Size is -1 where the server does not tell
	pending            *Pending
	in                 content
	left               int64     // -1 if it is not known
	isCut              bool      // the end of a range comes before the object's
	mayEnd             bool      // or after it: the object's size is not known
	hash               hash.Hash // nil: it is not verified
	err                error
	closed             sync.Once
}

func (o *Object) Read(b []byte) (int, error) {
	if o.err != nil {
		return 0, o.err
	}
	if o.isCut && o.left == 0 {
		_ = o.in.drain()
		b = nil // the trailer alone is of interest
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
	case err == io.EOF && o.left > 0 && !o.mayEnd:
		err = errclass.Errorf(errdefs.ErrDataLoss, "size mismatch: %d bytes are missing", o.left)
	case err == io.EOF && o.hash != nil:
		if got := digest.NewDigest(o.Digest.Algorithm(), o.hash); got != o.Digest {
			err = errclass.Errorf(errdefs.ErrDataLoss, "digest mismatch: got %s, not %s", got, o.Digest)
		}
	}
	o.err = err
	return n, err
}

// Close reads the rest, so that the next answer can be read. If that fails, the client's Err returns the error from then on.
func (o *Object) Close() error {
	o.closed.Do(func() {
		if err := o.in.drain(); err != nil {
			o.pending.client.fail(broken(err))
		}
		if o.err == nil {
			o.err = errOver
		}
		close(o.pending.over)
	})
	return nil
}

// Referrers returns the descriptors of the manifests that have a subject, as JSON, one a line.
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

// Has returns the descriptor of an object that the server has, and whether it has it.
func (c *Client) Has(ctx context.Context, object string, hints ...string) (ocispec.Descriptor, bool, error) {
	p, err := c.Ask("has", object, hints...)
	if err != nil {
		return ocispec.Descriptor{}, false, err
	}
	a, err := p.Answer(ctx, "yes", "no")
	return a.Descriptor, err == nil && a.Word == "yes", err
}

// HasAll asks which of the descriptors' objects the server has. The word of an answer is yes, no or, with the hint [Resume], part. All
// requests are sent before an answer is waited for, so the caller bounds the list. The size that the server tells of an object is of
// no use: some registries tell a wrong one.
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

// Hints returns the hints that say what a descriptor does. A negative size is not known.
func Hints(d ocispec.Descriptor) (hints []string) {
	if typeWord(d.MediaType) != unknown {
		hints = append(hints, "mediatype:"+d.MediaType)
	}
	if d.Size >= 0 {
		hints = append(hints, "size:"+strconv.FormatInt(d.Size, 10))
	}
	return hints
}

// Put sends content to be stored under a digest or, of a manifest, a tag. With the hint offset:, it is what follows that offset. The
// word of the answer is stored, exists or mounted.
//
// Content that ends in another error than io.EOF is not stored, and Put returns that error. All of it is read, even if the
// server has the object: see [Client.Has].
func (c *Client) Put(ctx context.Context, object string, content io.Reader, hints ...string) (Answer, error) {
	p, source, err := c.send(ctx, true, "put", content, object, hints...)
	if err != nil {
		return Answer{}, err
	}
	if source != nil {
		ctx, cancel := context.WithCancel(ctx)
		cancel() // the answer is that it was aborted
		_, _ = p.Answer(ctx)
		return Answer{}, source
	}
	return p.Answer(ctx, "stored", "exists", "mounted")
}

// Mount has the server take a blob from another place that it can reach, such as another repository of the same registry. It
// reports false if the server does not. Otherwise the word of the answer is mounted or exists.
func (c *Client) Mount(ctx context.Context, d digest.Digest, from string) (Answer, bool, error) {
	p, err := c.Ask("mount", string(d), from)
	if err != nil {
		return Answer{}, false, err
	}
	a, err := p.Answer(ctx, "mounted", "exists", "no")
	return a, err == nil && a.Word != "no", err
}
