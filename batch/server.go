package batch

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Request is a request that a server has read.
type Request struct {
	// Object is a tag or digest, not yet validated.
	Object string
	// Hints are the words after Object. For mount it is one word: the place to take the blob from.
	Hints []string
	// Content is the content of a put, nil for every other verb. It ends with io.EOF only if the sender sent all of it.
	Content io.Reader
	// Turn is closed when all requests before this one have been answered.
	Turn <-chan struct{}
}

// Answer is a server's answer to a request.
type Answer struct {
	// Word is ok, yes, no, part, stored, exists or mounted.
	Word string
	// Descriptor describes the object. Size is -1 if unknown.
	ocispec.Descriptor
	// Content is the object, after the word ok.
	Content io.ReadCloser
}

// Handler begins the work on a request. It is called in the order of the requests and must not block. The function that
// it returns does the work; several of these run at the same time.
type Handler func(ctx context.Context, r *Request) func() (Answer, error)

// wordCounts gives the least and the greatest number of words in a request, by verb.
var wordCounts = map[string]struct{ least, most int }{
	"get": {2, maxWords}, "has": {2, maxWords}, "referrers": {2, maxWords}, "put": {2, maxWords}, "mount": {3, 3},
}

const maxWords = 32

// job is a request and, once done is closed, its answer.
type job struct {
	request Request
	turn    chan struct{}
	body    *body
	done    chan struct{}
	answer  Answer
	err     error
}

// Serve reads requests and writes their answers in the same order. A verb without a handler is answered with
// NotImplemented. A request that fails gets an answer too. Serve itself returns an error only if it can't read or
// write, if the client breaks the protocol (InvalidArgument), or if the client's stream is cut (Aborted). It first
// answers the requests that it has read by then.
func Serve(ctx context.Context, in io.Reader, out io.Writer, handlers map[string]Handler) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := &server{ctx: ctx, r: bufio.NewReaderSize(in, bufferSize), w: bufio.NewWriterSize(out, bufferSize),
		handlers: handlers, jobs: make(chan *job, Ahead-2)}
	go s.read()
	err := s.answerAll()
	cancel()
	if err != nil {
		go s.discard()
		return err
	}
	if s.err != nil {
		return fmt.Errorf("read requests: %w", s.err)
	}
	return nil
}

type server struct {
	ctx      context.Context
	r        *bufio.Reader
	w        *bufio.Writer
	handlers map[string]Handler
	jobs     chan *job
	err      error // an error of reading; valid after jobs is closed
}

// read starts a job for each request.
func (s *server) read() {
	defer close(s.jobs)
	for s.ctx.Err() == nil {
		line, err := readLine(s.r)
		if err == io.EOF {
			return
		}
		var j *job
		var work func() (Answer, error)
		if err == nil {
			j, work, err = s.begin(line)
		}
		if err != nil {
			s.err = err
			return
		}
		go j.do(work)
		select {
		case s.jobs <- j:
		case <-s.ctx.Done():
			return
		}
		if j.body != nil {
			<-j.body.ended // the next request follows this content
			if s.err = j.body.broken; s.err != nil {
				return
			}
		}
	}
}

func (s *server) begin(line string) (*job, func() (Answer, error), error) {
	list, err := words(line)
	if err != nil {
		return nil, nil, err
	}
	verb := list[0]
	j := &job{turn: make(chan struct{}), done: make(chan struct{})}
	j.request.Turn = j.turn
	if verb == "put" {
		j.body = newBody(s.r)
		j.request.Content = j.body
	}
	fail := func(err error) (*job, func() (Answer, error), error) {
		return j, func() (Answer, error) { return Answer{}, err }, nil
	}
	want, known := wordCounts[verb]
	switch handler := s.handlers[verb]; {
	case known && (len(list) < want.least || len(list) > want.most):
		return nil, nil, malformed("%s with %d words", verb, len(list)-1)
	case handler == nil:
		return fail(errclass.Errorf(errdefs.ErrNotImplemented, "no request %.24q here", verb))
	default:
		j.request.Object, j.request.Hints = list[1], list[2:]
		return j, handler(s.ctx, &j.request), nil
	}
}

// do does the work, then reads the rest of the content.
func (j *job) do(work func() (Answer, error)) {
	j.answer, j.err = work()
	if j.body != nil {
		j.body.finish()
	}
	close(j.done)
}

// answerAll writes the answers until there are no more requests.
func (s *server) answerAll() error {
	for {
		j, err := receive(s, s.jobs)
		if err != nil {
			return err
		}
		if j == nil {
			return s.flush()
		}
		close(j.turn)
		if _, err := receive(s, j.done); err != nil {
			go closeWhenDone(j)
			return err
		}
		if err := s.write(j); err != nil {
			return fmt.Errorf("write answers: %w", err)
		}
	}
}

// receive returns the next value of a channel, or the zero value if the channel is closed. Before it blocks, it flushes
// the answers.
func receive[T any](s *server, from <-chan T) (v T, err error) {
	select {
	case v = <-from:
		return v, nil
	default:
	}
	if err := s.flush(); err != nil {
		return v, err
	}
	select {
	case v = <-from:
		return v, nil
	case <-s.ctx.Done():
		return v, context.Cause(s.ctx)
	}
}

func (s *server) flush() error {
	if err := s.w.Flush(); err != nil {
		return fmt.Errorf("write answers: %w", err)
	}
	return nil
}

// write writes one answer. The errors that it returns are those of the output and of the context.
func (s *server) write(j *job) error {
	if j.answer.Content != nil {
		defer j.answer.Content.Close()
	}
	line := ""
	switch a := j.answer; {
	case j.err != nil:
		line = failure(j.err)
	case a.Word == "no":
		line = a.Word
	case a.Word == "ok" || a.Word == "yes":
		line = a.Word + " " + describe(a.Digest, a.Size) + " " + typeWord(a.MediaType)
	default:
		line = a.Word + " " + describe(a.Digest, a.Size)
	}
	if _, err := s.w.WriteString(line + "\n"); err != nil || j.err != nil || j.answer.Word != "ok" {
		return err
	}
	c := &chunks{w: s.w}
	trailer := "end"
	if err := c.readFrom(j.answer.Content); err != nil {
		if cerr := context.Cause(s.ctx); cerr != nil {
			return cerr
		}
		trailer = failure(err)
	}
	return c.end(trailer)
}

// discard closes the content of answers that will not be written.
func (s *server) discard() {
	for j := range s.jobs {
		closeWhenDone(j)
	}
}

func closeWhenDone(j *job) {
	if <-j.done; j.answer.Content != nil {
		j.answer.Content.Close()
	}
}

// body is the content of a put. A handler's reader, such as an HTTP client, may still call Read in the background after
// the put has been answered. Read then takes nothing from the stream.
type body struct {
	mu sync.Mutex
	content
	atEnd bool
	ended chan struct{} // closed at the end of the content, even if the handler has not read it
}

// errClosed is returned by Read after an object was closed or a put was answered.
var errClosed = errors.New("read of content that is closed")

func newBody(r *bufio.Reader) *body {
	return &body{content: content{r: r, trailer: parseAbort}, ended: make(chan struct{})}
}

// parseAbort parses the trailer of a sender that could not read its content.
func parseAbort(line string) (error, bool) {
	return errclass.Errorf(errdefs.ErrAborted, "the sender has aborted it"), line == "abort"
}

func (b *body) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n, err := b.content.Read(p)
	if err != nil {
		b.end()
	}
	return n, err
}

// finish reads and discards what is left.
func (b *body) finish() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.atEnd {
		_ = b.drain()
		b.err = errClosed
		b.end()
	}
}

func (b *body) end() {
	if !b.atEnd {
		b.atEnd = true
		close(b.ended)
	}
}
