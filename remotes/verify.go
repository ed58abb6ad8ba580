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
// filled, one is held back, and the others wait to be hashed. A piece that isn't full after fillTime is passed on as it
// is.
const (
	pieceSize = 1 << 20
	// shortPiece is for content that is in memory already, or comes in TLS records. Longer pieces would save no system
	// calls, and would leave the processor's cache before they are hashed.
	shortPiece = 256 << 10
	pieces     = 4
	fillTime   = 10 * time.Millisecond
	// minLongPiece is the length from which the first piece suggests a long stream.
	minLongPiece = 256 << 10
)

// verifier passes a stream on, one piece late: it returns the last piece only if the hash of the whole, or its length,
// is right (but see isDirect). If the context ends first it returns the context's error, so that no reader takes the
// beginning for the whole.
type verifier struct {
	ctx    context.Context
	rc     io.ReadCloser
	want   digest.Digest
	hash   hash.Hash // nil if only the length is checked: the stream doesn't begin at 0, or the caller hashes
	offset int64     // of the stream's next byte
	size   int64     // of the whole; -1 while it is unknown
	end    int64     // of the stream, or toEnd
	from   int64     // the first offset to pass on
	skip   int64     // number of bytes to hash but not to pass on
	// mediaType is the content's media type; "" if unknown.
	mediaType string
	// explain, if not nil, is called after a mismatch, and returns a possible reason.
	explain func() string

	isDirect    bool // the caller hashes, and Read returns what comes without holding anything back
	pieceLength int  // in bytes
	isWhole     bool // fill pieces however long it takes
	buffers     [pieces][]byte
	turn        int
	held        []byte
	// The goroutine that hashes a long stream, if there is one.
	work    chan []byte
	done    chan struct{}
	pending int    // pieces that it has yet to hash
	given   []byte // the rest of the piece that Read is returning
	err     error
}

// newVerifier returns a verifier for a stream that begins at offset begin of the content with digest want. It passes on
// the content from offset from on. size is that of the whole, or -1.
func newVerifier(ctx context.Context, rc io.ReadCloser, want digest.Digest, begin, from, size int64) *verifier {
	v := &verifier{ctx: ctx, rc: rc, want: want, offset: begin, size: size, end: toEnd, from: from, skip: from - begin, pieceLength: pieceSize}
	if begin == 0 {
		v.hash = want.Algorithm().Hash()
	}
	return v
}

// cut ends the stream at an offset, unless that is toEnd or not before the end of the whole. The rest is not read, and
// only the length is verified.
func (v *verifier) cut(end int64) {
	if end < 0 || v.size >= 0 && end >= v.size {
		return
	}
	v.rc, v.end, v.hash = &cutReader{v.rc, end - v.offset}, end, nil
}

// cutReader ends after left bytes.
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

// next returns the next piece, which is valid until the call after the next.
func (v *verifier) next() ([]byte, error) {
	for v.err == nil {
		for v.pending == pieces-1 {
			<-v.done
			v.pending--
		}
		buf := v.buffers[v.turn]
		if buf == nil {
			buf = make([]byte, v.pieceLength)
			v.buffers[v.turn] = buf
		}
		n, err := v.fill(buf)
		if cerr := context.Cause(v.ctx); cerr != nil {
			err = cerr
		}
		piece := buf[:n]
		v.offset += int64(n)
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

// fill reads what comes quickly. It avoids small pieces, because each one wakes up the hashing goroutine.
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

// sum hashes a piece, or passes it to the hashing goroutine. next doesn't overwrite it before that is done.
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

// verify checks hash and length at the end of the stream.
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
	if want >= 0 && v.offset != want {
		return classf(errdefs.ErrDataLoss, "size mismatch: got %s, not %d", sizeString(v.offset), want)
	}
	if v.skip > 0 || v.offset == v.from && v.end > v.from {
		return errPastEnd(v.from, v.offset)
	}
	return nil
}

// peek reads the first piece. If the stream is no longer than that, it is verified before anything is returned.
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

// readDirect is Read without buffers. Nothing is held back, because the caller hashes.
func (v *verifier) readDirect(p []byte) (n int, err error) {
	for n == 0 && v.err == nil {
		n, v.err = v.fill(p)
		if cerr := context.Cause(v.ctx); cerr != nil {
			v.err = cerr
		}
		v.offset += int64(n)
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

// writeError is an error of the writer that WriteTo copies to.
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
