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

// Request is one that a server has read.
type Request struct {
	// Object is a tag or digest, not yet checked.
	Object string
	// Hints are the words behind Object. A mount has one: the place to take the blob from.
	Hints []string
	// Content is that of a put, nil for every other request. It ends in io.EOF only if the sender had all of it.
	Content io.Reader
	// Turn is closed when every request before this one has been answered.
	Turn <-chan struct{}
}

// Answer is what a server says to a request.
type Answer struct {
	// Word is ok, yes, no, part, stored, exists or mounted.
	Word string
	// Descriptor says what is known of the object: Size is -1 if it is not known.
	ocispec.Descriptor
	// Content is that of an object, behind ok.
	Content io.ReadCloser
}

// Handler begins to deal with a request. It is called in the order of the requests and must not block; the function that
// it returns does the work. Several of those run at the same time.
type Handler func(ctx context.Context, r *Request) func() (Answer, error)

// wants has the least and the greatest number of words of each verb's requests.
var wants = map[string]struct{ least, most int }{
	"get": {2, maxWords}, "has": {2, maxWords}, "referrers": {2, maxWords}, "put": {2, maxWords}, "mount": {3, 3},
}

const maxWords = 32

// job is a request and, once done is closed, the answer to it.
type job struct {
	request Request
	turn    chan struct{}
	body    *body
	done    chan struct{}
	answer  Answer
	err     error
}

// Serve reads requests and writes the answers in their order. A verb without a handler is answered with an error of
// class NotImplemented. The failure of one request is an answer, not an error of Serve: it returns an error if it can't
// read or write, if the client is not understood (InvalidArgument), or if the client is cut off (Aborted). Requests
// that were read before are answered in any case.
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
	err      error // of reading; good once jobs is closed
}

// read begins a job for each request.
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
			<-j.body.ended // the next request follows the content
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
	want, known := wants[verb]
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

// do does the work, and then reads the rest of the content.
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

// receive returns the next value of a channel, the zero value if it is closed. If it has to wait, it flushes the answers first.
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

// write writes one answer. It returns an error of the output, or the context's.
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

// body is the content of a put. A reader may go on in the background after the put has been dealt with, as an HTTP client
// does. Read then takes nothing from the stream.
type body struct {
	mu sync.Mutex
	content
	over  bool
	ended chan struct{} // closed at the end of the content, also when nobody wanted it
}

var errOver = errors.New("the put is over")

func newBody(r *bufio.Reader) *body {
	return &body{content: content{r: r, trailer: parseAbort}, ended: make(chan struct{})}
}

// parseAbort reads the trailer of a sender that can't go on.
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

// finish reads what is left.
func (b *body) finish() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.over {
		_ = b.drain()
		b.err = errOver
		b.end()
	}
}

func (b *body) end() {
	if !b.over {
		b.over = true
		close(b.ended)
	}
}
