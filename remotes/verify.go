package remotes

import (
	"cmp"
	"context"
	"fmt"
	"hash"
	"io"
	"runtime"
	"syscall"
	"time"

	"distkit/disk"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// pieceSize is how much is read, hashed and written at a time. There are as many buffers as pieces: one is being
// filled, one is held back, and the rest wait to be hashed. A piece that is not full after fillTime goes on as
// it is.
const (
	pieceSize = 1 << 20
	// shortPiece is for what is in memory already, or comes in TLS records: longer pieces spare no system calls then, and
	// leave the processor's cache before they are hashed.
	shortPiece = 256 << 10
	pieces     = 4
	fillTime   = 10 * time.Millisecond
	// minLongPiece is the length of a first piece that promises a long stream.
	minLongPiece = 256 << 10
)

// verifier passes a stream on, one piece late: the last piece goes out when the hash of the
// whole, or its length, is right, and never otherwise, unless isDirect. It ends with the context's error once that is
// done: no consumer takes what came before for the whole.
type verifier struct {
	ctx  context.Context
	rc   io.ReadCloser
	want digest.Digest
	hash hash.Hash // nil: the stream does not begin at 0, or the caller hashes; its length is checked
	at   int64     // the offset that the next byte of the stream has
	size int64     // of the whole, -1 while unknown
	end  int64     // of the stream, or toEnd
	from int64     // the first offset that is passed on
	skip int64     // bytes to hash but not to pass on
	// mediaType is that of the content, empty if it is not known.
	mediaType string
	// explain, where set, is called for a mismatch, and says what could be the reason.
	explain func() string

	isDirect bool // the caller hashes, and Read hands over what has come as it is
	piece    int  // how long pieces are
	isWhole  bool // pieces are filled whatever the time
	buffers  [pieces][]byte
	turn     int
	held     []byte
	// A long stream is hashed beside the reading of it.
	work    chan []byte
	done    chan struct{}
	pending int    // pieces at work
	given   []byte // what is left of the piece that Read gives
	err     error
}

// newVerifier reads a stream that begins at offset begin of what has the digest, and passes
// it on from offset from on. The size is that of the whole, -1 where it is not known.
func newVerifier(ctx context.Context, rc io.ReadCloser, want digest.Digest, begin, from, size int64) *verifier {
	v := &verifier{ctx: ctx, rc: rc, want: want, at: begin, size: size, end: toEnd, from: from, skip: from - begin, piece: pieceSize}
	if begin == 0 {
		v.hash = want.Algorithm().Hash()
	}
	return v
}

// cut has the stream end at an offset, unless that is toEnd or not before the end of the whole. What the remote sends behind it is
// not read, and the length alone is verified.
func (v *verifier) cut(end int64) {
	if end < 0 || v.size >= 0 && end >= v.size {
		return
	}
	v.rc, v.end, v.hash = &cutReader{v.rc, end - v.at}, end, nil
}

// cutReader ends after so many bytes.
type cutReader struct {
	io.ReadCloser
	left int64
}

func (c *cutReader) Read(b []byte) (int, error) {
	if c.left <= 0 {
		return 0, io.EOF
	}
	n, err := c.ReadCloser.Read(b[:min(int64(len(b)), c.left)])
	c.left -= int64(n)
	return n, err
}

// next gives the next piece, which is good until the call after.
func (v *verifier) next() ([]byte, error) {
	for v.err == nil {
		for v.pending == pieces-1 {
			<-v.done
			v.pending--
		}
		buf := v.buffers[v.turn]
		if buf == nil {
			buf = make([]byte, v.piece)
			v.buffers[v.turn] = buf
		}
		n, err := v.fill(buf)
		if cerr := context.Cause(v.ctx); cerr != nil {
			err = cerr
		}
		piece := buf[:n]
		v.at += int64(n)
		if n > 0 {
			v.sum(piece)
			v.turn = (v.turn + 1) % pieces
		}
		s := min(v.skip, int64(n))
		v.skip, piece = v.skip-s, piece[s:]
		if err != nil {
			if v.err = err; err == io.EOF {
				if err := v.verify(); err != nil {
					v.err = err
				}
			}
			if v.err != io.EOF {
				return nil, v.err
			}
		}
		give := v.held
		if len(piece) > 0 {
			v.held = piece
			if give != nil {
				return give, nil
			}
		}
	}
	give := v.held
	v.held = nil
	if v.err != io.EOF || give == nil {
		return nil, v.err
	}
	return give, nil
}

// fill reads as much as comes fast: each piece costs the hashing goroutine a turn.
func (v *verifier) fill(buf []byte) (n int, err error) {
	var begun time.Time
	for {
		k, err := v.rc.Read(buf[n:])
		if n += k; err != nil || n == len(buf) {
			return n, err
		}
		if v.isWhole {
			continue
		}
		if begun.IsZero() {
			begun = time.Now()
		} else if time.Since(begun) > fillTime {
			return n, nil
		}
	}
}

// sum hashes a piece, which is not overwritten before that is done.
func (v *verifier) sum(piece []byte) {
	switch {
	case v.hash == nil:
	case v.work != nil:
		v.work <- piece
		v.pending++
	default:
		v.hash.Write(piece)
		if len(piece) < minLongPiece || runtime.GOMAXPROCS(0) == 1 {
			break
		}
		work, done, hash := make(chan []byte, pieces), make(chan struct{}, pieces), v.hash
		v.work, v.done = work, done
		go func() {
			for piece := range work {
				hash.Write(piece)
				done <- struct{}{}
			}
		}()
	}
}

// verify is called at the end of the stream.
func (v *verifier) verify() error {
	for ; v.pending > 0; v.pending-- {
		<-v.done
	}
	if v.hash != nil {
		if got := digest.NewDigest(v.want.Algorithm(), v.hash); got != v.want {
			err := mismatch(v.want, got)
			if v.explain != nil {
				err = fmt.Errorf("%w%s", err, v.explain())
			}
			return err
		}
	}
	want := v.size
	if want >= 0 && v.end >= 0 {
		want = min(want, v.end)
	}
	if want >= 0 && v.at != want {
		return classf(errdefs.ErrDataLoss, "size mismatch: got %s, not %d", sizeString(v.at), want)
	}
	if v.skip > 0 || v.at == v.from && v.end > v.from {
		return errPastEnd(v.from, v.at)
	}
	return nil
}

// peek reads the first piece. A stream that is no longer has been verified then, and nothing of it was given.
func (v *verifier) peek() (err error) {
	v.isWhole = true
	v.given, err = v.next()
	v.isWhole = false
	if err == io.EOF {
		return nil
	}
	return err
}

func (v *verifier) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if v.isDirect {
		return v.readDirect(p)
	}
	if len(v.given) == 0 {
		var err error
		if v.given, err = v.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, v.given)
	v.given = v.given[n:]
	return n, nil
}

// readDirect is Read without a buffer between. Nothing is held back: a caller that hashes takes nothing for the whole before the end.
func (v *verifier) readDirect(p []byte) (n int, err error) {
	for n == 0 && v.err == nil {
		n, v.err = v.fill(p)
		if cerr := context.Cause(v.ctx); cerr != nil {
			v.err = cerr
		}
		v.at += int64(n)
		s := min(v.skip, int64(n))
		v.skip -= s
		n = copy(p, p[s:n])
		if v.err == io.EOF {
			v.err = cmp.Or(v.verify(), io.EOF)
		}
	}
	if n > 0 {
		return n, nil
	}
	return 0, v.err
}

// writeError is of the writer that a body was copied to.
type writeError struct{ error }

func (e *writeError) Unwrap() error { return e.error }

func (v *verifier) WriteTo(w io.Writer) (int64, error) {
	pipe, _ := w.(syscall.Conn)
	var total int64
	for {
		piece := v.given
		if v.given = nil; len(piece) == 0 {
			var err error
			if piece, err = v.next(); err == io.EOF {
				return total, nil
			} else if err != nil {
				return total, err
			}
		}
		if pipe != nil && len(piece) >= minLongPiece {
			disk.WidenPipe(pipe)
			pipe = nil
		}
		n, err := w.Write(piece)
		total += int64(n)
		if err != nil {
			return total, &writeError{err}
		}
	}
}

func (v *verifier) descriptor() ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: v.mediaType, Digest: v.want, Size: v.size}
}

func (v *verifier) Close() error {
	if v.work != nil {
		close(v.work)
		v.work = nil
	}
	return v.rc.Close()
}
