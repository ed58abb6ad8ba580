package remotes

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"distkit/errclass"

	"github.com/containerd/errdefs"
)

// span is the bytes of a blob from begin on, up to end: to the blob's end where end is negative.
type span struct{ begin, end int64 }

// toEnd is the end of a span that goes to the blob's end.
const toEnd = -1

// blobSource is a blob at one host.
type blobSource struct {
	client   *client
	request  request
	size     int64 // of the whole blob, -1 while unknown
	noRanges bool  // the host does not understand ranges: ask for all, and skip
}

// stream is the body of one reply.
type stream struct {
	io.ReadCloser
	at      int64  // the offset of the next byte
	isRange bool   // the reply was a range
	coding  string // Content-Encoding, though it was declined
}

// open sends one request for a span. Where the host sends all of the blob, the stream begins at 0.
func (s *blobSource) open(ctx context.Context, want span) (stream, error) {
	req := s.request
	if (want.begin > 0 || want.end >= 0) && !s.noRanges {
		value := "bytes=" + strconv.FormatInt(want.begin, 10) + "-"
		if want.end > want.begin {
			value += strconv.FormatInt(want.end-1, 10)
		}
		req.header = req.header.Clone()
		req.header.Set("Range", value)
	}
	asked := req.header.Get("Range") != ""
	resp, err := s.client.once(ctx, req)
	if err != nil {
		if asked && isStatus(err, http.StatusRequestedRangeNotSatisfiable) && s.size == want.begin {
			return stream{ReadCloser: http.NoBody, at: want.begin}, nil
		}
		if asked && isStatus(err, http.StatusRequestedRangeNotSatisfiable, http.StatusBadRequest, http.StatusNotImplemented) {
			s.noRanges = true
			return s.open(ctx, want)
		}
		return stream{}, err
	}
	begin, size := int64(0), resp.ContentLength
	isRange := resp.StatusCode == http.StatusPartialContent
	switch resp.StatusCode {
	case http.StatusOK, http.StatusNonAuthoritativeInfo:
	case http.StatusPartialContent:
		begin, size, err = parseContentRange(resp.Header.Get("Content-Range"))
		if err == nil && begin != want.begin {
			err = fmt.Errorf("bytes from %d on were asked for, and came from %d on", want.begin, begin)
		}
		if err == nil && size < 0 && s.size < 0 {
			err = errors.New("the reply does not tell the size of the whole")
		}
		if err != nil {
			resp.Body.Close()
			if !asked {
				return stream{}, classf(errdefs.ErrDataLoss, "%s does not understand ranges: %w", s.client.host, err)
			}
			s.noRanges = true
			return s.open(ctx, want)
		}
	default:
		resp.Body.Close()
		return stream{}, classf(errdefs.ErrDataLoss, "%s sent no content: %s", s.client.host, printable(resp.Status))
	}
	if s.size >= 0 && size >= 0 && size != s.size {
		resp.Body.Close()
		return stream{}, classf(errdefs.ErrDataLoss, "size mismatch: got %s, not %d", sizeString(size), s.size)
	}
	if size >= 0 {
		s.size = size
	}
	return stream{resp.Body, begin, isRange, resp.Header.Get("Content-Encoding")}, nil
}

// parseContentRange reads "bytes 5-9/10" and "bytes 5-9/*"; size is -1 for the latter.
func parseContentRange(s string) (begin, size int64, err error) {
	bad := fmt.Errorf("the reply has Content-Range %q", printable(s))
	rest, ok := strings.CutPrefix(s, "bytes ")
	if !ok {
		return 0, 0, bad
	}
	span, total, ok1 := strings.Cut(rest, "/")
	first, last, ok2 := strings.Cut(span, "-")
	if !ok1 || !ok2 {
		return 0, 0, bad
	}
	begin, err1 := strconv.ParseInt(strings.TrimSpace(first), 10, 64)
	end, err2 := strconv.ParseInt(strings.TrimSpace(last), 10, 64)
	size = -1
	var err3 error
	if total = strings.TrimSpace(total); total != "*" {
		size, err3 = strconv.ParseInt(total, 10, 64)
	}
	if err1 != nil || err2 != nil || err3 != nil || begin < 0 || end < begin || size >= 0 && end >= size {
		return 0, 0, bad
	}
	return begin, size, nil
}

// skip reads up to an offset what the host sent though it was not asked for.
func (s *stream) skip(to int64) error {
	if s.at >= to {
		return nil
	}
	n, err := io.CopyN(io.Discard, s.ReadCloser, to-s.at)
	s.at += n
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if err != nil && !isTemporary(err) {
		err = errclass.As(err, errdefs.ErrAborted)
	}
	return err
}

// rangeReader reads a span of a blob over as many connections as it takes.
type rangeReader struct {
	ctx    context.Context
	cancel context.CancelFunc // nil where ctx is the caller's
	source blobSource
	tries  *tries
	end    int64 // of the span
	stream stream
}

// connect opens the span from an offset on. A host may send the whole blob instead: the stream then begins earlier or, with
// isExact, the bytes before the offset are skipped. cause is the error that ended the last stream, or
// nil. It counts as a try.
func (r *rangeReader) connect(at int64, isExact bool, cause error) error {
	return r.source.client.retry(r.ctx, r.tries, func() error {
		if err := cause; err != nil {
			cause = nil
			return err
		}
		s, err := r.source.open(r.ctx, span{at, r.end})
		if err != nil {
			return err
		}
		if isExact {
			if err := s.skip(at); err != nil {
				s.Close()
				return err
			}
		}
		r.stream = s
		return nil
	})
}

// Read returns the next bytes. io.EOF comes at the span's end alone, as far as that is known.
func (r *rangeReader) Read(p []byte) (int, error) {
	if r.end >= 0 {
		if r.stream.at >= r.end {
			return 0, io.EOF
		}
		p = p[:min(int64(len(p)), r.end-r.stream.at)]
	}
	for {
		n, err := r.stream.Read(p)
		r.stream.at += int64(n)
		r.tries.progress(int64(n))
		at, size := r.stream.at, r.source.size
		switch {
		case r.end >= 0 && at == r.end:
			return n, nil
		case size >= 0 && at > size:
			return n, classf(errdefs.ErrDataLoss, "more than %s came", sizeString(size))
		case err == nil:
			return n, nil
		case at == size || size < 0 && err == io.EOF:
			return n, io.EOF
		case err == io.EOF:
			err = classf(errdefs.ErrAborted, "the connection ended after %d of %s", at, sizeString(size))
		}
		r.stream.Close()
		if err := r.connect(at, true, err); err != nil {
			return n, err
		}
		if n > 0 {
			return n, nil
		}
	}
}

func (r *rangeReader) Close() error {
	if r.cancel != nil {
		r.cancel()
	}
	if r.stream.ReadCloser == nil {
		return nil
	}
	return r.stream.Close()
}
