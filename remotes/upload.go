package remotes

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry/remote/auth"
)

const (
	// chunkSize is how much is sent per request if a registry doesn't accept a blob in one request: ghcr.io refuses
	// more.
	chunkSize = 4 << 20
	// batchChunkSize replaces chunkSize when several uploads share the memory.
	batchChunkSize = 2 << 20
	// minChunkSize is the smallest chunk that is tried if something on the way limits the size of requests.
	minChunkSize = 64 << 10
	// maxChunkSize is the largest minimum for a chunk that a registry may demand. A chunk is kept in memory.
	maxChunkSize = 64 << 20
	// retained is how many chunks of a stream are kept in memory while it is sent in one request. The buffers of a
	// connection hold less, so whatever is lost in them when it breaks can be sent again.
	retained = 2
	// expectAbove is the size from which content that can be read only once is announced (Expect: 100-continue) before
	// it is sent.
	smallBlob = 256 << 10
	// expectAbove is the size above which a registry is asked before it is sent what can be read only once.
	expectAbove = 1 << 20
)

// blobUpload is the upload of a blob. Content of known size is sent in one request. After a failure, or if the registry
// refuses that, it continues in chunks. The last chunk is sent with the request that closes the upload, because some
// registries fail if that has no body.
//
// The registry states how much it has (Range), and this is believed only if it is plausible: between what it
// acknowledged and what was sent. Some registries always state the first or the last chunk. A wrong belief leads to a
// digest mismatch, which the registry refuses.
type blobUpload struct {
	*push
	session
	// size is that of the content; -1 if it is unknown.
	size int64
	// open returns a verifying reader of the content from its start. It is nil for content that can be read only once.
	open   func() io.Reader
	window *window

	chunk    int64 // how much is sent per request
	inChunks bool  // the registry refused the content in one request
	// acked is how many bytes the registry acknowledged, sent is how many it may have received.
	acked, sent int64
	most        int64 // the largest value of acked so far
	resumedAt   int64 // the value of acked when this process took over the upload of another one
	// unsure: a reply was lost, so the registry may have everything sent. assumed: acked is based on the registry's
	// statement, or on that.
	unsure, assumed bool
	refused         int   // how often the chunk at acked was refused with 416
	closing         bool  // the last request was to close the upload
	bare            bool  // and it had no content, because the registry had all of it
	failure         error // the error of the last request, until it is handled
	broken          bool  // the session can't be resumed by any process
	done            bool
}

// session is an upload session at the registry.
type session struct {
	url   *url.URL
	least int64 // OCI-Chunk-Min-Length: only the last chunk may be smaller
}

func (p *push) newUpload(content io.Reader) (*blobUpload, error) {
	u := &blobUpload{push: p, size: p.hints.size, chunk: p.client.chunk}
	verified := func(r io.Reader) io.Reader {
		v := newVerifier(p.ctx, io.NopCloser(r), p.object.digest, 0, 0, -1)
		if p.client.options.Streams > 1 {
			v.pieceLength = shortPiece
		}
		return v
	}
	f, size, ok := section(content)
	if !ok {
		u.window = &window{content: verified(content), step: u.chunk}
		if u.size >= 0 {
			u.window.keep = retained * u.chunk
		}
		return u, nil
	}
	if u.size >= 0 && u.size != size {
		return nil, classf(errdefs.ErrDataLoss, "size mismatch: got %s, not %d", sizeString(size), u.size)
	}
	u.size, u.open = size, func() io.Reader { return verified(io.NewSectionReader(f, 0, size)) }
	return u, nil
}

// blob uploads a blob. With check it first asks whether the registry has it.
func (p *push) blob(content io.Reader, check bool) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: cmp.Or(p.hints.mediaType, mediaTypeOctets), Digest: p.object.digest}
	if check {
		size, err := p.exists()
		if err == nil {
			desc.Size, p.state = p.knownSize(size), Exists
			return desc, nil
		}
		if !errdefs.IsNotFound(err) && !isRefusedElsewhere(err) {
			return desc, err
		}
	}
	u, err := p.newUpload(content)
	if err != nil {
		return desc, err
	}
	p.saved = p.openSaved()
	defer p.saved.close()
	if err := u.resume(); err != nil {
		return desc, err
	}
	if u.acked == 0 {
		mounted, err := u.beginOrMount()
		if err != nil || mounted {
			desc.Size = p.hints.size
			return desc, err
		}
	}
	err = u.send()
	desc.Size = u.sent
	return desc, err
}

// beginOrMount opens an upload, unless the registry mounts the blob from the hinted repository. If it does,
// beginOrMount sets the state and the size.
func (u *blobUpload) beginOrMount() (mounted bool, err error) {
	mounted, err = u.begin()
	if err != nil || !mounted {
		return false, err
	}
	size, err := u.exists()
	if errdefs.IsNotFound(err) { // it didn't do what it said
		_, err = u.begin()
		return false, err
	}
	if isRefusedElsewhere(err) {
		size, err = -1, nil
	}
	u.saved.forget()
	u.state, u.hints.size = Mounted, u.knownSize(size)
	return true, err
}

// exists returns the size of the blob in the registry; -1 if the registry doesn't state it. NotFound if it doesn't have
// the blob.
func (p *push) exists() (int64, error) {
	return p.client.blobSize(p.ctx, p.request(http.MethodHead, "blobs", p.object.String()), p.object.digest, p.tries)
}

// begin opens an upload, or makes the registry mount the blob from the hinted repository.
func (u *blobUpload) begin() (mounted bool, err error) {
	req := u.request(http.MethodPost, "blobs", "uploads/")
	req.body = func() io.Reader { return http.NoBody }
	plain := req
	from := u.hints.mount
	if u.hints.mount = ""; from != "" {
		req.query = url.Values{"mount": {u.object.digest.String()}, "from": {from}}
		req.scopes = append(req.scopes, auth.ScopeRepository(from, auth.ActionPull))
	}
	resp, err := u.client.do(u.ctx, req, u.tries)
	if err != nil && from != "" && !isTemporary(err) && u.ctx.Err() == nil {
		// Some registries refuse the mount, or a token for the other repository, instead of opening an upload.
		from = ""
		resp, err = u.client.do(u.ctx, plain, u.tries)
	}
	if err != nil {
		return false, err
	}
	resp.Body.Close()
	if resp.StatusCode == http.StatusCreated && from != "" {
		return true, nil
	}
	least, _ := strconv.ParseInt(resp.Header.Get("OCI-Chunk-Min-Length"), 10, 64)
	if least > maxChunkSize {
		return false, classf(errdefs.ErrNotImplemented, "the registry demands chunks of at least %s", sizeString(least))
	}
	u.session = session{least: max(least, 0)}
	u.chunk = max(u.chunk, u.least)
	u.acked, u.sent, u.resumedAt, u.refused = 0, 0, 0, 0
	u.unsure, u.assumed, u.closing = false, false, false
	return false, u.followLocation(resp)
}

// followLocation updates the session's URL from a reply. The URL is used unchanged, because its form is the registry's
// business.
func (u *blobUpload) followLocation(resp *http.Response) error {
	location := resp.Header.Get("Location")
	if location == "" {
		if u.url != nil {
			return nil
		}
		return classf(errdefs.ErrDataLoss, "%s began an upload without a Location", u.client.host)
	}
	to, err := resp.Request.URL.Parse(location)
	if err != nil || to.Scheme != "http" && to.Scheme != "https" || to.Host == "" || to.User != nil {
		return classf(errdefs.ErrDataLoss, "%s sent the upload to %q", u.client.host, printable(location))
	}
	if ours := u.client.currentScheme(); ours == "https" && to.Scheme == "http" {
		// Behind a proxy that ends TLS, a registry may think that it speaks HTTP.
		if !strings.EqualFold(to.Hostname(), resp.Request.URL.Hostname()) {
			return classf(errdefs.ErrDataLoss, "%s sent the upload from https to http://%s", u.client.host, printable(to.Host))
		}
		to.Scheme, to.Host = ours, resp.Request.URL.Host
	}
	to.Fragment = ""
	u.url = to
	u.saved.save(u.session)
	return nil
}

// to returns a request to the session. The request that closes it appends the digest to the query of the URL.
func (u *blobUpload) to(method string) request {
	req := u.request(method, "blobs", "uploads/")
	req.url = u.url
	if method == http.MethodPut {
		closing := *u.url
		if closing.RawQuery != "" {
			closing.RawQuery += "&"
		}
		closing.RawQuery += "digest=" + url.QueryEscape(u.object.digest.String())
		req.url = &closing
	}
	return req
}

// send sends the content. If that fails the session is kept for another process, unless it can't be resumed.
func (u *blobUpload) send() error {
	err := u.client.retry(u.ctx, u.tries, u.try)
	switch {
	case err == nil:
		u.saved.forget()
		return nil
	case u.ctx.Err() != nil:
		return err
	case isStatus(u.failure, http.StatusRequestedRangeNotSatisfiable) && (u.assumed || u.unsure):
		u.broken = true
	case isStatus(u.failure, http.StatusRequestedRangeNotSatisfiable):
		err = u.failure // a retry doesn't help
	}
	if !isTemporary(err) || u.broken || u.resumedAt > 0 && u.most <= u.resumedAt {
		u.cancel()
		u.saved.forget()
	}
	return err
}

// try sends until the blob is stored or a request fails. The next call finds out how to continue.
func (u *blobUpload) try() error {
	for {
		if err := u.recover(); err != nil || u.done {
			return err
		}
		if u.failure = u.next(); u.failure == nil {
			continue
		}
		if adapted, err := u.adapt(); err != nil {
			return err
		} else if !adapted {
			return lostSession(u.failure)
		}
	}
}

// next sends the content, or its next chunk.
func (u *blobUpload) next() error {
	if u.isWhole() {
		return u.sendWhole()
	}
	chunk, last, err := u.read()
	if err != nil {
		return err
	}
	end := u.acked + int64(len(chunk))
	if u.size >= 0 && (end > u.size || last && end != u.size) {
		return classf(errdefs.ErrDataLoss, "size mismatch: got %s or more, not %d", sizeString(end), u.size)
	}
	method := http.MethodPatch
	if last {
		method = http.MethodPut
	}
	req := u.to(method)
	req.body, req.size = func() io.Reader { return bytes.NewReader(chunk) }, int64(len(chunk))
	req.header.Set("Content-Type", mediaTypeOctets)
	if len(chunk) > 0 && (u.acked > 0 || !last) {
		req.header.Set("Content-Range", fmt.Sprintf("%d-%d", u.acked, end-1))
	}
	u.closing, u.bare, u.sent = last, last && len(chunk) == 0 && end > 0, max(u.sent, end)
	resp, err := u.client.once(u.ctx, req)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if last {
		return u.closed(resp)
	}
	if err := u.followLocation(resp); err != nil {
		return err
	}
	u.advance(end)
	return nil
}

// isWhole reports whether to send the content in one request. Empty content of size 0 is not, since that request
// wouldn't read the content and so wouldn't verify it.
func (u *blobUpload) isWhole() bool {
	return u.acked == 0 && !u.inChunks && (u.size > 0 || u.open != nil)
}

func (u *blobUpload) sendWhole() error {
	req := u.to(http.MethodPut)
	req.body, req.size = u.open, u.size
	req.header.Set("Content-Type", mediaTypeOctets)
	if u.open == nil {
		req.body = func() io.Reader { return &windowReader{u.window, 0, u.size} }
		if u.size > expectAbove {
			req.header.Set("Expect", "100-continue")
		}
	}
	u.closing, u.bare = true, false
	resp, err := u.client.once(u.ctx, req)
	if u.sent = u.size; u.open == nil {
		u.sent = min(u.size, u.window.end())
	}
	if err != nil {
		return err
	}
	resp.Body.Close()
	return u.closed(resp)
}

// closed evaluates the reply to the request that closes the upload. Only 201 means that the blob is stored.
func (u *blobUpload) closed(resp *http.Response) error {
	if u.done = resp.StatusCode == http.StatusCreated || u.isThere(); u.done {
		u.sent = max(u.sent, u.acked)
		return nil
	}
	return classf(errdefs.ErrAborted, "%s doesn't have the blob after its upload (%d %s)", u.client.host, resp.StatusCode, http.StatusText(resp.StatusCode))
}

func (u *blobUpload) isThere() bool {
	_, err := u.exists()
	return err == nil
}

// advance records that the registry has acknowledged the bytes before end.
func (u *blobUpload) advance(end int64) {
	u.acked, u.refused, u.unsure = end, 0, false
	if end > u.most {
		u.tries.progress(end - u.most)
		u.most = end
	}
}

// adapt changes how the content is sent, if the failure suggests another way.
func (u *blobUpload) adapt() (adapted bool, err error) {
	switch f := u.failure; {
	case u.isWhole() && isStatus(f, http.StatusRequestEntityTooLarge, http.StatusRequestedRangeNotSatisfiable, http.StatusMethodNotAllowed, http.StatusNotImplemented):
		u.inChunks = true
		return true, u.restart()
	case isStatus(f, http.StatusRequestEntityTooLarge) && u.chunk > max(minChunkSize, u.least):
		u.chunk, u.failure = max(u.chunk/4, minChunkSize, u.least), nil
		return true, nil
	case isStatus(f, http.StatusBadRequest) && (u.resumedAt > 0 || u.assumed):
		// The registry has a part of other content, or less than was assumed.
		return true, u.restart()
	}
	return false, nil
}

// restart sends the content from its start, in a new session.
func (u *blobUpload) restart() error {
	failure := u.failure
	u.failure = nil
	if u.open == nil && u.window.start > 0 {
		u.broken, u.tries.left = true, 0
		return classf(errdefs.ErrAborted, "the upload can't be resumed, and its content can be read only once: put it again: %v", failure)
	}
	if !errdefs.IsNotFound(failure) {
		u.cancel()
	}
	_, err := u.begin()
	return err
}

// recover finds out how to continue after a failure.
func (u *blobUpload) recover() error {
	failure := u.failure
	if failure == nil {
		return nil
	}
	isRefused := isStatus(failure, http.StatusRequestedRangeNotSatisfiable)
	var status *statusError
	isReply := errors.As(failure, &status)
	if u.closing && !isRefused {
		if u.done = u.isThere(); u.done {
			return nil
		}
		if isReply && u.bare {
			return u.restart()
		}
	}
	have, err := u.status()
	switch {
	case err != nil && (isTemporary(err) || u.ctx.Err() != nil):
		return err
	case errdefs.IsNotFound(err):
		return u.restart()
	case err != nil:
		have = -1 // not stated
	}
	if isRefused {
		u.refused++
	}
	switch {
	case u.acked < have && have <= u.sent:
		u.advance(have)
		u.assumed = true
	case u.acked == 0:
		// Registries state the same for no byte and for one byte.
		return u.restart()
	case isRefused && u.unsure:
		u.acked, u.refused, u.unsure, u.assumed = u.sent, 0, false, true
	case isRefused && (u.assumed || u.resumedAt > 0 || u.refused > 1 && u.open != nil):
		return u.restart()
	}
	u.unsure = u.unsure || !isRefused
	u.failure = nil
	return nil
}

// lostSession makes an error temporary if it means that the registry doesn't know the upload, or less of it than
// assumed. A registry of several instances with shared storage may reply so for a moment.
func lostSession(err error) error {
	var e *statusError
	if !errors.As(err, &e) {
		return err
	}
	isUnknown := e.status == http.StatusNotFound && e.text == "" || strings.Contains(e.text, "BLOB_UPLOAD_UNKNOWN")
	if isUnknown || e.status == http.StatusRequestedRangeNotSatisfiable {
		return classf(errdefs.ErrAborted, "%v", err)
	}
	return err
}

// status asks how much of an upload the registry has; -1 if it doesn't say.
func (u *blobUpload) status() (int64, error) {
	resp, err := u.client.do(u.ctx, u.to(http.MethodGet), u.tries)
	if err != nil {
		return -1, err
	}
	resp.Body.Close()
	if err := u.followLocation(resp); err != nil {
		return -1, err
	}
	return uploaded(resp.Header), nil
}

// uploaded parses the Range of a status reply: "0-N" means N+1 bytes. For no bytes registries send "0-0" or nothing. It
// returns -1 for anything else.
func uploaded(h http.Header) int64 {
	v := strings.TrimPrefix(h.Get("Range"), "bytes=")
	if v == "" {
		return 0
	}
	first, last, _ := strings.Cut(v, "-")
	n, err := strconv.ParseInt(last, 10, 64)
	switch {
	case first != "0" || err != nil || n < -1 || n == math.MaxInt64:
		return -1
	case n <= 0:
		return 0
	}
	return n + 1
}

// cancel asks the registry to drop the session.
func (u *blobUpload) cancel() {
	if resp, err := u.client.once(u.ctx, u.to(http.MethodDelete)); err == nil {
		resp.Body.Close()
	}
}

// read returns the chunk at acked; last reports whether it is the last one.
func (u *blobUpload) read() (chunk []byte, last bool, err error) {
	if u.window == nil || u.window.start > u.acked {
		if u.open == nil {
			return nil, false, errReadOnce()
		}
		u.window = &window{content: u.open(), step: u.chunk}
	}
	w, end := u.window, u.acked+u.chunk
	w.keep = max(w.keep, u.chunk)
	for w.err == nil && w.end() <= end { // one more byte shows whether this chunk is the last
		w.more()
	}
	switch {
	case w.err != nil && w.err != io.EOF:
		return nil, false, w.err
	case w.end() < u.acked:
		return nil, false, classf(errdefs.ErrDataLoss, "size mismatch: got %s, but the registry already has %d", sizeString(w.end()), u.acked)
	}
	chunk = w.buf[u.acked-w.start:]
	if int64(len(chunk)) > u.chunk {
		return chunk[:u.chunk], false, nil
	}
	return chunk, true, nil
}
