package remotes

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"

	"distkit/disk"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"oras.land/oras-go/v2/registry/remote/auth"
)

const (
	// chunkSize is how much is sent at a time where a registry does not take a blob in one request: ghcr.io refuses more.
	chunkSize = 4 << 20
	// batchChunkSize replaces it where several uploads share the memory.
	batchChunkSize = 2 << 20
	// minChunkSize is the smallest chunk that is tried where something on the way limits the size of requests.
	minChunkSize = 64 << 10
	// maxChunkSize is the largest chunk that a registry may ask for. A chunk is kept in memory.
	maxChunkSize = 64 << 20
	// retained is how many chunks of a stream that is sent as a whole are kept in memory after that: the buffers of a
	// broken connection hold less, so that what was in them can be sent again.
	retained = 2
	// smallBlob is the size of the first buffer of a stream.
	smallBlob = 256 << 10
	// expectAbove is the size above which a registry is asked before it is sent what can be read only once.
	expectAbove = 1 << 20
)

// blobUpload sends one blob. Content whose size is known goes in one request. After a failure, and where a registry
// refuses that, it goes on in chunks. The last chunk goes with the request that closes the upload, because some
// registries fail if that has no body.
//
// The registry's account of what it has (Range) is believed only where it can be true: between what it has
// acknowledged and what was sent. Some tell the first or the last chunk for ever. Whatever is believed wrongly ends in a
// digest that the registry refuses.
type blobUpload struct {
	*push
	session
	// size is that of the content, -1 if it is not known.
	size int64
	// open reads and verifies the content from its start. It is nil for content that can be read only once.
	open   func() io.Reader
	window *window

	chunk    int64 // how much is sent at a time
	inChunks bool  // the registry has refused the content as a whole
	// acked is how many bytes the registry has acknowledged, sent how many it may have received.
	acked, sent int64
	most        int64 // the largest acked so far
	resumedAt   int64 // what was acked when this process began: another one had sent it
	// unsure: a reply was lost, so that the registry may have all of sent. assumed: acked rests on the registry's account,
	// or on that.
	unsure, assumed bool
	refused         int   // how often the chunk after acked was refused with 416
	closing         bool  // the last request was one that closes the upload
	bare            bool  // and it had no content: the registry had all of that
	failure         error // of the last request, until it is dealt with
	broken          bool  // the session is of no use to anybody
	done            bool
}

// session is an upload that the registry has begun.
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

// blob uploads one, having looked first whether it is there.
func (p *push) blob(content io.Reader, look bool) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: cmp.Or(p.hints.mediaType, mediaTypeOctets), Digest: p.object.digest}
	if look {
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

// beginOrMount opens an upload, unless the registry has mounted the blob from the hinted repository: then it sets the
// state and the size.
func (u *blobUpload) beginOrMount() (mounted bool, err error) {
	mounted, err = u.begin()
	if err != nil || !mounted {
		return false, err
	}
	size, err := u.exists()
	if errdefs.IsNotFound(err) { // it has not done what it said
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

// exists returns the size of the blob that the registry has, -1 where it does not tell.
func (p *push) exists() (int64, error) {
	return p.client.blobSize(p.ctx, p.request(http.MethodHead, "blobs", p.object.String()), p.object.digest, p.tries)
}

// begin opens an upload, or has the registry mount the blob from the hinted repository.
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
		// Some refuse the mount, or a token for the other repository, instead of opening an upload.
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
		return false, classf(errdefs.ErrNotImplemented, "the registry wants chunks of at least %s", sizeString(least))
	}
	u.session = session{least: max(least, 0)}
	u.chunk = max(u.chunk, u.least)
	u.acked, u.sent, u.resumedAt, u.refused = 0, 0, 0, 0
	u.unsure, u.assumed, u.closing = false, false, false
	return false, u.follow(resp)
}

// follow notes where the registry says that the upload goes on. The address is the registry's: nothing of it is changed.
func (u *blobUpload) follow(resp *http.Response) error {
	location := resp.Header.Get("Location")
	if location == "" {
		if u.url != nil {
			return nil
		}
		return classf(errdefs.ErrDataLoss, "%s began an upload without saying where", u.client.host)
	}
	to, err := resp.Request.URL.Parse(location)
	if err != nil || to.Scheme != "http" && to.Scheme != "https" || to.Host == "" || to.User != nil {
		return classf(errdefs.ErrDataLoss, "%s sent an upload to %q", u.client.host, printable(location))
	}
	if ours := u.client.currentScheme(); ours == "https" && to.Scheme == "http" {
		// Proxies that end TLS make registries think they speak HTTP.
		if !strings.EqualFold(to.Hostname(), resp.Request.URL.Hostname()) {
			return classf(errdefs.ErrDataLoss, "%s sent an upload from https to http://%s", u.client.host, printable(to.Host))
		}
		to.Scheme, to.Host = ours, resp.Request.URL.Host
	}
	to.Fragment = ""
	u.url = to
	u.saved.save(u.session)
	return nil
}

// to is a request to the session. The one that closes it names the digest after all that stands in the address.
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

// send sends the content. If that fails, the session is kept for the next process, unless that could not go on with it.
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
		err = u.failure // no retry cures it
	}
	if !isTemporary(err) || u.broken || u.resumedAt > 0 && u.most <= u.resumedAt {
		u.cancel()
		u.saved.forget()
	}
	return err
}

// try goes on until the blob is stored, or until a request fails. The next call finds out how to go on.
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
	if err := u.follow(resp); err != nil {
		return err
	}
	u.advance(end)
	return nil
}

// isWhole reports whether the content goes in one request. That request would not read content that should be empty.
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

// closed judges the reply to the request that closes the upload. Only 201 says that the blob is stored.
func (u *blobUpload) closed(resp *http.Response) error {
	if u.done = resp.StatusCode == http.StatusCreated || u.isThere(); u.done {
		u.sent = max(u.sent, u.acked)
		return nil
	}
	return classf(errdefs.ErrAborted, "%s does not have the blob after its upload (%d %s)", u.client.host, resp.StatusCode, http.StatusText(resp.StatusCode))
}

func (u *blobUpload) isThere() bool {
	_, err := u.exists()
	return err == nil
}

// advance notes that the registry has acknowledged the bytes before end.
func (u *blobUpload) advance(end int64) {
	u.acked, u.refused, u.unsure = end, 0, false
	if end > u.most {
		u.tries.progress(end - u.most)
		u.most = end
	}
}

// adapt changes how the content is sent, where the failure shows that it can be sent in another way.
func (u *blobUpload) adapt() (adapted bool, err error) {
	switch f := u.failure; {
	case u.isWhole() && isStatus(f, http.StatusRequestEntityTooLarge, http.StatusRequestedRangeNotSatisfiable, http.StatusMethodNotAllowed, http.StatusNotImplemented):
		u.inChunks = true
		return true, u.restart()
	case isStatus(f, http.StatusRequestEntityTooLarge) && u.chunk > max(minChunkSize, u.least):
		u.chunk, u.failure = max(u.chunk/4, minChunkSize, u.least), nil
		return true, nil
	case isStatus(f, http.StatusBadRequest) && (u.resumedAt > 0 || u.assumed):
		// What the registry has is of other content, or not as much as was believed.
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
		return classf(errdefs.ErrAborted, "the upload can't go on, and its content can be read only once: put it once more: %v", failure)
	}
	if !errdefs.IsNotFound(failure) {
		u.cancel()
	}
	_, err := u.begin()
	return err
}

// recover finds out how to go on after a failure.
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
		have = -1 // it does not tell
	}
	if isRefused {
		u.refused++
	}
	switch {
	case u.acked < have && have <= u.sent:
		u.advance(have)
		u.assumed = true
	case u.acked == 0:
		// Of nothing, and of a single byte, registries say the same.
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

// lostSession makes a temporary failure of a reply that says that the registry does not have the upload as far as
// was thought, or at all: where it runs as several that share their storage, one may not know yet what another has.
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

// status asks how much of an upload the registry has. It returns -1 if the registry does not tell.
func (u *blobUpload) status() (int64, error) {
	resp, err := u.client.do(u.ctx, u.to(http.MethodGet), u.tries)
	if err != nil {
		return -1, err
	}
	resp.Body.Close()
	if err := u.follow(resp); err != nil {
		return -1, err
	}
	return uploaded(resp.Header), nil
}

// uploaded reads a Range of "0-N", which is of N+1 bytes; of none, registries say 0-0 or nothing. It returns -1 for
// what is no such range.
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

// cancel has the registry forget the session, if it will.
func (u *blobUpload) cancel() {
	if resp, err := u.client.once(u.ctx, u.to(http.MethodDelete)); err == nil {
		resp.Body.Close()
	}
}

// read returns the chunk after acked, and whether it is the last.
func (u *blobUpload) read() (chunk []byte, last bool, err error) {
	if u.window == nil || u.window.start > u.acked {
		if u.open == nil {
			return nil, false, errReadOnce()
		}
		u.window = &window{content: u.open(), step: u.chunk}
	}
	w, end := u.window, u.acked+u.chunk
	w.keep = max(w.keep, u.chunk)
	for w.err == nil && w.end() <= end { // one byte more tells whether it is the last
		w.more()
	}
	switch {
	case w.err != nil && w.err != io.EOF:
		return nil, false, w.err
	case w.end() < u.acked:
		return nil, false, classf(errdefs.ErrDataLoss, "size mismatch: got %s, and the registry has %d already", sizeString(w.end()), u.acked)
	}
	chunk = w.buf[u.acked-w.start:]
	if int64(len(chunk)) > u.chunk {
		return chunk[:u.chunk], false, nil
	}
	return chunk, true, nil
}

func errReadOnce() error {
	return classf(errdefs.ErrAborted, "the registry wants again what can be read only once: put it once more")
}

// window reads content, and keeps the end of what it has read, at least keep bytes.
type window struct {
	content io.Reader
	keep    int64
	step    int64 // how much is thrown away at a time
	buf     []byte
	start   int64 // the offset of buf
	err     error // that reading has ended with
}

func (w *window) end() int64 { return w.start + int64(len(w.buf)) }

// more reads some bytes, or sets err.
func (w *window) more() {
	limit := int(w.keep + w.step)
	if len(w.buf) >= limit {
		w.buf = w.buf[:copy(w.buf, w.buf[w.step:])]
		w.start += w.step
	}
	if len(w.buf) == cap(w.buf) {
		size := limit // of which the system gives what is written to
		if cap(w.buf) == 0 {
			size = min(limit, smallBlob)
		}
		grown := make([]byte, len(w.buf), size)
		copy(grown, w.buf)
		w.buf = grown
	}
	n, err := w.content.Read(w.buf[len(w.buf):cap(w.buf)])
	w.buf, w.err = w.buf[:len(w.buf)+n], err
}

// windowReader reads content of a known size through a window. It gives the last byte when the content has ended there.
type windowReader struct {
	*window
	offset, size int64
}

func (r *windowReader) Read(p []byte) (int, error) {
	if r.offset < r.start {
		return 0, errReadOnce()
	}
	for r.err == nil && (r.end() == r.offset || r.end() == r.size) {
		r.more()
	}
	switch {
	case r.err != nil && r.err != io.EOF:
		return 0, r.err
	case r.end() > r.size || r.err == io.EOF && r.end() < r.size:
		return 0, classf(errdefs.ErrDataLoss, "size mismatch: got %s or more, not %d", sizeString(r.end()), r.size)
	case r.offset == r.size:
		return 0, io.EOF
	}
	n := copy(p, r.buf[r.offset-r.start:])
	r.offset += int64(n)
	return n, nil
}

// savedUpload keeps where an upload goes on, beside the tokens that processes share. The next process that puts the same
// blob into the same repository goes on with it after this one has died. The file is locked while an upload is under
// way; a process that finds it locked begins an upload of its own. A nil one keeps nothing.
type savedUpload struct{ f *os.File }

type uploadState struct {
	URL   string `json:"url"` // may hold what lets its bearer write
	Chunk int64  `json:"chunk"`
}

func (p *push) openSaved() *savedUpload {
	c := p.client
	if c.shared == "" {
		return nil
	}
	f, err := sharedFile(c.shared, "upload", os.O_RDWR|os.O_CREATE,
		c.currentScheme(), c.host, c.path, c.login.identity, p.locator.Name, p.object.digest.String())
	if err != nil {
		return nil
	}
	s := &savedUpload{f}
	if locked := disk.Lock(f, unix.LOCK_EX|unix.LOCK_NB) == nil; !locked || !disk.Names(f.Name(), f) {
		s.close()
		return nil
	}
	return s
}

func (s *savedUpload) close() {
	if s != nil {
		s.f.Close()
	}
}

// forget takes the file away, before its lock is given up.
func (s *savedUpload) forget() {
	if s != nil {
		os.Remove(s.f.Name())
	}
}

// save may fail, or be torn: then the next process begins an upload of its own.
func (s *savedUpload) save(at session) {
	if s == nil {
		return
	}
	if b, err := json.Marshal(uploadState{at.url.String(), at.least}); err == nil && len(b) < maxTokenFile && s.f.Truncate(0) == nil {
		_, _ = s.f.WriteAt(b, 0)
	}
}

func (s *savedUpload) load() (at session, ok bool) {
	if s == nil {
		return at, false
	}
	var state uploadState
	if json.NewDecoder(io.NewSectionReader(s.f, 0, maxTokenFile)).Decode(&state) != nil {
		return at, false
	}
	to, err := url.Parse(state.URL)
	if err != nil || to.Scheme != "http" && to.Scheme != "https" || to.User != nil || state.Chunk < 0 || state.Chunk > maxChunkSize {
		return at, false
	}
	return session{to, state.Chunk}, true
}

// resume goes on with an upload that another process has begun, if the registry has some of it.
func (u *blobUpload) resume() error {
	s, ok := u.saved.load()
	if !ok {
		return nil
	}
	u.session = s
	tries := u.tries
	u.tries = u.client.newTries(2)
	have, err := u.status()
	u.tries = tries
	if u.ctx.Err() != nil {
		return context.Cause(u.ctx)
	}
	if err != nil || have <= 0 || u.size >= 0 && have > u.size {
		return nil
	}
	u.acked, u.sent, u.most, u.resumedAt, u.chunk = have, have, have, have, max(u.chunk, s.least)
	if u.client.options.Debug != nil {
		u.client.options.Debug(fmt.Sprintf("the registry has %s of an upload that was begun before", sizeString(have)))
	}
	return nil
}
