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

// span is the part of a blob from begin up to, but not including, end. A negative end means the blob's end.
type span struct{ begin, end int64 }

// toEnd is the end of a span that goes up to the blob's end.
const toEnd = -1

// blobSource is a blob on one host.
type blobSource struct {
	client   *client
	request  request
	size     int64 // of the whole blob; -1 while it is unknown
	noRanges bool  // the host doesn't support ranges: request everything, and skip
}

// stream is the body of a reply.
type stream struct {
	io.ReadCloser
	offset  int64  // of the next byte
	isRange bool   // the reply is a range
	coding  string // the Content-Encoding of the reply, although the request declined any
}

// open sends one request for a span. If the host sends the whole blob, the stream begins at 0.
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
			return stream{ReadCloser: http.NoBody, offset: want.begin}, nil
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
			err = fmt.Errorf("asked for the bytes from %d on, and got those from %d on", want.begin, begin)
		}
		if err == nil && size < 0 && s.size < 0 {
			err = errors.New("the reply doesn't state the size of the blob")
		}
		if err != nil {
			resp.Body.Close()
			if !asked {
				return stream{}, classf(errdefs.ErrDataLoss, "%s doesn't support ranges: %w", s.client.host, err)
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

// parseContentRange parses "bytes 5-9/10", or "bytes 5-9/*" with size -1.
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

// skip discards the bytes before an offset, which the host sent without being asked for.
func (s *stream) skip(to int64) error {
	if s.offset >= to {
		return nil
	}
	n, err := io.CopyN(io.Discard, s.ReadCloser, to-s.offset)
	s.offset += n
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if err != nil && !isTemporary(err) {
		err = errclass.As(err, errdefs.ErrAborted)
	}
	return err
}

// rangeReader reads a span of a blob, over several connections if they break.
type rangeReader struct {
	ctx    context.Context
	cancel context.CancelFunc // nil if the context is the caller's
	source blobSource
	tries  *tries
	end    int64 // of the span
	stream stream
}

// connect opens the span from an offset on. A host may send the whole blob instead; the stream then begins earlier or,
// with isExact, connect skips the bytes before the offset. cause is the error that ended the previous stream, or nil.
// It counts as a try.
func (r *rangeReader) connect(offset int64, isExact bool, cause error) error {
	return r.source.client.retry(r.ctx, r.tries, func() error {
		if err := cause; err != nil {
			cause = nil
			return err
		}
		s, err := r.source.open(r.ctx, span{offset, r.end})
		if err != nil {
			return err
		}
		if isExact {
			if err := s.skip(offset); err != nil {
				s.Close()
				return err
			}
		}
		r.stream = s
		return nil
	})
}

// Read returns the next bytes. It returns io.EOF only at the span's end, as far as that is known.
func (r *rangeReader) Read(p []byte) (int, error) {
	if r.end >= 0 {
		if r.stream.offset >= r.end {
			return 0, io.EOF
		}
		p = p[:min(int64(len(p)), r.end-r.stream.offset)]
	}
	for {
		n, err := r.stream.Read(p)
		r.stream.offset += int64(n)
		r.tries.progress(int64(n))
		offset, size := r.stream.offset, r.source.size
		switch {
		case r.end >= 0 && offset == r.end:
			return n, nil
		case size >= 0 && offset > size:
			return n, classf(errdefs.ErrDataLoss, "got more than %s", sizeString(size))
		case err == nil:
			return n, nil
		case offset == size || size < 0 && err == io.EOF:
			return n, io.EOF
		case err == io.EOF:
			err = classf(errdefs.ErrAborted, "the connection ended after %d of %s", offset, sizeString(size))
		}
		r.stream.Close()
		if err := r.connect(offset, true, err); err != nil {
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
