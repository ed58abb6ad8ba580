package batch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// store answers requests from a map of blobs.
type store struct {
	mu    sync.Mutex
	blobs map[string][]byte
	// fault, if not nil, returns the content to send instead of the object's.
	fault func(object string, b []byte) io.Reader
}

func newStore(blobs ...[]byte) *store {
	s := &store{blobs: map[string][]byte{}}
	for _, b := range blobs {
		s.blobs[digest.FromBytes(b).String()] = b
	}
	return s
}

func (s *store) lookup(object string) ([]byte, ocispec.Descriptor, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.blobs[object]
	if !ok {
		return nil, ocispec.Descriptor{}, errclass.Errorf(errdefs.ErrNotFound, "no such blob")
	}
	return b, ocispec.Descriptor{Digest: digest.FromBytes(b), Size: int64(len(b)), MediaType: "text/plain"}, nil
}

func (s *store) get(_ context.Context, r *Request) func() (Answer, error) {
	return func() (Answer, error) {
		b, desc, err := s.lookup(r.Object)
		if err != nil {
			return Answer{}, err
		}
		begin := parseHints(r.Hints).begin
		if begin > int64(len(b)) {
			return Answer{}, errclass.Errorf(errdefs.ErrInvalidArgument, "%d is behind the end", begin)
		}
		var in io.Reader = bytes.NewReader(b[begin:])
		if s.fault != nil {
			in = s.fault(r.Object, b)
		}
		return Answer{Word: "ok", Descriptor: desc, Content: io.NopCloser(in)}, nil
	}
}

func (s *store) has(_ context.Context, r *Request) func() (Answer, error) {
	return func() (Answer, error) {
		_, desc, err := s.lookup(r.Object)
		if errdefs.IsNotFound(err) {
			return Answer{Word: "no"}, nil
		}
		return Answer{Word: "yes", Descriptor: desc}, err
	}
}

func (s *store) put(_ context.Context, r *Request) func() (Answer, error) {
	return func() (Answer, error) {
		if strings.HasPrefix(r.Object, "refused") {
			return Answer{}, errclass.Errorf(errdefs.ErrPermissionDenied, "not\nhere")
		}
		b, err := io.ReadAll(r.Content)
		if err != nil {
			return Answer{}, err
		}
		d := digest.FromBytes(b)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.blobs[d.String()] = b
		return Answer{Word: "stored", Descriptor: ocispec.Descriptor{Digest: d, Size: int64(len(b))}}, nil
	}
}

func (s *store) handlers() map[string]Handler {
	return map[string]Handler{"get": s.get, "has": s.has, "put": s.put}
}

// start serves a store. It returns a client, and a channel of what Serve returns after the client is closed.
func start(t *testing.T, s *store) (*Client, <-chan error) {
	t.Helper()
	inR, inW := io.Pipe()
	outR, outW := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := Serve(t.Context(), inR, outW, s.handlers())
		inR.CloseWithError(io.ErrClosedPipe)
		outW.Close()
		done <- err
	}()
	c := NewClient(outR, inW)
	t.Cleanup(func() { c.Close() })
	return c, done
}

func text(n int) []byte { return bytes.Repeat([]byte("0123456789abcdef"), n/16+1)[:n] }

func TestObjectsComeInOrderAndWhole(t *testing.T) {
	t.Parallel()
	var blobs [][]byte
	for i := range 50 {
		blobs = append(blobs, append(text(i*20_011), byte(i)))
	}
	c, done := start(t, newStore(blobs...))
	var pending []*Pending
	for _, b := range blobs[:Ahead] {
		p, err := c.Request(digest.FromBytes(b).String())
		if err != nil {
			t.Fatal(err)
		}
		pending = append(pending, p)
	}
	for i, p := range pending {
		o, err := p.Wait(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(o); err != nil || !bytes.Equal(b, blobs[i]) {
			t.Errorf("object %d: %d bytes, %v", i, len(b), err)
		}
		o.Close()
	}
	var all sync.WaitGroup
	for _, b := range blobs {
		all.Go(func() {
			o, err := c.Fetch(t.Context(), digest.FromBytes(b).String(), "offset:1")
			if err != nil {
				t.Error(err)
				return
			}
			defer o.Close()
			if got, err := io.ReadAll(o); err != nil || !bytes.Equal(got, b[1:]) {
				t.Errorf("%d bytes, not %d: %v", len(got), len(b)-1, err)
			}
		})
	}
	all.Wait()
	c.Close()
	if err := <-done; err != nil {
		t.Errorf("the server: %v", err)
	}
}

func TestAFailureIsAnAnswer(t *testing.T) {
	t.Parallel()
	good, long := []byte("good"), text(3<<20)
	s := newStore(good, long)
	s.fault = func(object string, b []byte) io.Reader {
		if len(b) < 1<<20 {
			return bytes.NewReader(b)
		}
		return io.MultiReader(bytes.NewReader(b[:2<<20]), errReader{errclass.Errorf(errdefs.ErrAborted, "cut\x1b[31m\nhere")})
	}
	c, _ := start(t, s)
	fetch := func(object string) ([]byte, error) {
		o, err := c.Fetch(t.Context(), object)
		if err != nil {
			return nil, err
		}
		defer o.Close()
		return io.ReadAll(o)
	}
	if _, err := fetch(digest.FromString("absent").String()); !errdefs.IsNotFound(err) {
		t.Errorf("an absent object: %v", err)
	}
	b, err := fetch(digest.FromBytes(long).String())
	if !errdefs.IsAborted(err) || err.Error() != `cut\x1b[31m; here` || len(b) != 2<<20 {
		t.Errorf("an object that was cut: %d bytes, %q", len(b), err)
	}
	if b, err := fetch(digest.FromBytes(good).String()); err != nil || string(b) != "good" {
		t.Errorf("the object behind it: %q, %v", b, err)
	}
	if _, _, err := c.Mount(t.Context(), digest.FromBytes(good), "x"); !errdefs.IsNotImplemented(err) {
		t.Errorf("a request that the server has no handler for: %v", err)
	}
	for _, object := range []string{"", "a b", "a\nb", strings.Repeat("a", MaxLine)} {
		if _, err := fetch(object); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.10q: %v", object, err)
		}
	}
}

type errReader struct{ error }

func (e errReader) Read([]byte) (int, error) { return 0, e.error }

func TestClosedObjectsAreSkipped(t *testing.T) {
	t.Parallel()
	a, b := text(5<<20), []byte("next")
	c, _ := start(t, newStore(a, b))
	o, err := c.Fetch(t.Context(), digest.FromBytes(a).String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(o, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	waits, err := c.Request(digest.FromBytes(a).String())
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := waits.Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("a request that was called off: %v", err)
	}
	o.Close()
	if _, err := o.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("reading a closed object: %v", err)
	}
	o, err = c.Fetch(t.Context(), digest.FromBytes(b).String())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(o); err != nil || string(got) != "next" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestPutsAndQuestions(t *testing.T) {
	t.Parallel()
	s := newStore()
	c, done := start(t, s)
	var list []ocispec.Descriptor
	var all sync.WaitGroup
	for i := range 20 {
		b := append(text(i*20_000), byte(i))
		list = append(list, ocispec.Descriptor{Digest: digest.FromBytes(b), Size: int64(len(b))})
		all.Go(func() {
			got, err := c.Put(t.Context(), digest.FromBytes(b).String(), bytes.NewReader(b))
			if err != nil || got.Word != "stored" || got.Size != int64(len(b)) {
				t.Errorf("put: %v, %v", got, err)
			}
		})
	}
	all.Wait()
	for range 150 {
		list = append(list, ocispec.Descriptor{Digest: digest.FromString(fmt.Sprint(len(list)))})
	}
	for range 4 {
		list = append(list, list...)
	}
	has, err := c.HasAll(t.Context(), list)
	if err != nil {
		t.Fatal(err)
	}
	for i := range has {
		if want := i%170 < 20; (has[i].Word == "yes") != want {
			t.Fatalf("has %d: %v", i, has[i].Word)
		}
	}
	broken := errors.New("the disk is gone")
	if _, err := c.Put(t.Context(), "x", io.MultiReader(bytes.NewReader(text(3<<20)), errReader{broken})); !errors.Is(err, broken) {
		t.Errorf("a put whose content can't be read: %v", err)
	}
	if _, err := c.Put(t.Context(), "refused", bytes.NewReader(text(3<<20))); !errdefs.IsUnauthorized(err) || err.Error() != "not; here" {
		t.Errorf("a put that is refused: %v", err)
	}
	if len(s.blobs) != 20 {
		t.Errorf("%d blobs are stored", len(s.blobs))
	}
	c.Close()
	if err := <-done; err != nil {
		t.Errorf("the server: %v", err)
	}
}

// The client's stream is cut at every byte. The server answers the requests that came whole, and reports the cut.
func TestServerOfAClientThatIsCut(t *testing.T) {
	t.Parallel()
	a := []byte("some content")
	whole := "get " + digest.FromBytes(a).String() + "\nput x\n3\nabc4\ndefg0\nend\nput y\n2\nab0\nabort\nnothing here\n"
	for cut := range len(whole) {
		s := newStore(a)
		var out bytes.Buffer
		err := Serve(t.Context(), strings.NewReader(whole[:cut]), &out, s.handlers())
		atEnd := cut == 0 || whole[cut-1] == '\n' && strings.HasSuffix(strings.TrimSuffix(whole[:cut], "\n"), "end") ||
			strings.HasSuffix(whole[:cut], "abort\n") || cut == strings.Index(whole, "put x")
		if atEnd != (err == nil) || err != nil && !errdefs.IsAborted(err) {
			t.Errorf("cut at %d (%q): %v", cut, whole[max(0, cut-8):cut], err)
		}
		if stored := len(s.blobs) == 2; stored != (cut >= strings.Index(whole, "put y")) {
			t.Errorf("cut at %d: %d blobs", cut, len(s.blobs))
		}
	}
}

// The server's stream is cut at every byte. The client's request fails with Aborted, and so does the next one.
func TestClientOfAServerThatIsCut(t *testing.T) {
	t.Parallel()
	a := []byte("some content")
	d := digest.FromBytes(a).String()
	whole := "ok " + d + " 12 text/plain\n5\nsome 7\ncontent0\nend\n"
	for cut := range len(whole) + 1 {
		c := NewClient(strings.NewReader(whole[:cut]), nopCloser{io.Discard})
		o, err := c.Fetch(t.Context(), d)
		var b []byte
		if err == nil {
			b, err = io.ReadAll(o)
			o.Close()
		}
		if cut == len(whole) {
			if err != nil || string(b) != string(a) {
				t.Errorf("%q, %v", b, err)
			}
		} else if !errdefs.IsAborted(err) {
			t.Errorf("cut at %d: %v", cut, err)
		}
		if _, err := c.Fetch(t.Context(), d); !errdefs.IsAborted(err) {
			t.Errorf("cut at %d, the next request: %v", cut, err)
		}
	}
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

func TestWrongAnswersAreRefused(t *testing.T) {
	t.Parallel()
	d := digest.FromString("some content").String()
	other := digest.FromString("other").String()
	for answer, class := range map[string]error{
		"ok " + d + " 12 text/plain\n12\nsome cOntent0\nend\n":             errdefs.ErrDataLoss,
		"ok " + other + " 5 text/plain\n5\nother0\nend\n":                  errdefs.ErrDataLoss,
		"ok " + d + " 13 text/plain\n12\nsome content0\nend\n":             errdefs.ErrDataLoss,
		"ok " + d + " 11 text/plain\n12\nsome content0\nend\n":             errdefs.ErrDataLoss,
		"ok " + d + " - -\n11\nsome conten0\nend\n":                        errdefs.ErrDataLoss,
		"ok " + d + " 012 -\n12\nsome content0\nend\n":                     errdefs.ErrDataLoss,
		"ok " + d + " +12 -\n12\nsome content0\nend\n":                     errdefs.ErrDataLoss,
		"ok " + d + " 99999999999999999999 -\n12\nsome content0\nend\n":    errdefs.ErrDataLoss,
		"ok " + d + " 12\n12\nsome content0\nend\n":                        errdefs.ErrDataLoss,
		"ok " + d + " 12 - \n12\nsome content0\nend\n":                     errdefs.ErrDataLoss,
		"ok  " + d + " 12 -\n12\nsome content0\nend\n":                     errdefs.ErrDataLoss,
		"ok " + d + " 12 -\n1048577\n" + strings.Repeat("x", 1<<20) + "\n": errdefs.ErrDataLoss,
		"ok " + d + " 12 -\n12\nsome content0\nok\n":                       errdefs.ErrDataLoss,
		"ok " + d + " 12 -\n12\nsome content00\nend\n":                     errdefs.ErrDataLoss,
		"ok " + d + " 12 -\n-12\nsome content0\nend\n":                     errdefs.ErrDataLoss,
		"ok " + d + " 12 -\n12\nsome content0\nerror 6 cut\n":              errdefs.ErrAborted,
		"ok " + d + " 12 -\n12\nsome content0\nerror 0 cut\n":              errdefs.ErrDataLoss,
		"yes " + d + " 12 -\n":                                             errdefs.ErrDataLoss,
		"no\n":                                                             errdefs.ErrDataLoss,
		"error 3 not here\n":                                               errdefs.ErrNotFound,
		"error x\n":                                                        errdefs.ErrDataLoss,
		"Welcome to this host!\n":                                          errdefs.ErrDataLoss,
		strings.Repeat("x", 1<<20) + "\n":                                  errdefs.ErrDataLoss,
		"\n":                                                               errdefs.ErrDataLoss,
		"error 9 \x1b]0;x\x07\n":                                           errdefs.ErrDataLoss,
	} {
		c := NewClient(strings.NewReader(answer), nopCloser{io.Discard})
		o, err := c.Fetch(t.Context(), d)
		if err == nil {
			_, err = io.ReadAll(o)
			o.Close()
		}
		if !errors.Is(err, class) {
			t.Errorf("%.120q: %v", answer, err)
		}
	}
}

func TestWrongRequestsEndTheBatch(t *testing.T) {
	t.Parallel()
	a := []byte("some content")
	good := "get " + digest.FromBytes(a).String() + "\n"
	for _, bad := range []string{
		"get\n", "\n", " get x\n", "get  x\n", "get x \n", "get \x00\n", "get \xff\n", "mount x\n", "mount x y z\n",
		"get " + strings.Repeat("x", MaxLine) + "\n", strings.Repeat("x", 1<<20), "get " + strings.Repeat("x ", 40) + "x\n",
		"put x\n03\nabc0\nend\n", "put x\n3\nabcd0\nend\n", "put x\n3\nabc0\nstop\n", "put x\n1048577\n", "put x\n-1\n", "put x\n\n",
	} {
		var out bytes.Buffer
		s := newStore(a)
		err := Serve(t.Context(), strings.NewReader(good+bad+good), &out, s.handlers())
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.40q: %v", bad, err)
		}
		if n := strings.Count(out.String(), "some content"); n != 1 || len(s.blobs) != 1 {
			t.Errorf("%.40q: %d answers, %d blobs", bad, n, len(s.blobs))
		}
	}
	var out bytes.Buffer
	if err := Serve(t.Context(), strings.NewReader("frobnicate x y\n"+good), &out, newStore(a).handlers()); err != nil ||
		!strings.HasPrefix(out.String(), "error 10 ") || !strings.Contains(out.String(), "some content") {
		t.Errorf("an unknown request: %v, %q", err, out.String())
	}
}

// A server works on a bounded number of requests at a time, however many are sent.
func TestRequestsAheadAreBounded(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	open, most := 0, 0
	get := func(context.Context, *Request) func() (Answer, error) {
		mu.Lock()
		defer mu.Unlock()
		open++
		most = max(most, open)
		return func() (Answer, error) {
			return Answer{Word: "ok", Descriptor: ocispec.Descriptor{Size: -1}, Content: &counted{strings.NewReader("x"), func() { mu.Lock(); open--; mu.Unlock() }}}, nil
		}
	}
	var out bytes.Buffer
	if err := Serve(t.Context(), strings.NewReader(strings.Repeat("get x\n", 1000)), &out, map[string]Handler{"get": get}); err != nil {
		t.Fatal(err)
	}
	if most > Ahead || open != 0 || strings.Count(out.String(), "end\n") != 1000 {
		t.Errorf("%d at the same time, %d open, %d answers", most, open, strings.Count(out.String(), "end\n"))
	}
}

type counted struct {
	io.Reader
	closed func()
}

func (c *counted) Close() error { c.closed(); return nil }
