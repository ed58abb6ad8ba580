package remotes

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// Sizes of the pieces in which a stream that can't be read twice is uploaded: one is kept
// in memory until the registry has it.
const (
	chunkSize    = 8 << 20
	maxChunkSize = 64 << 20 // that a registry may ask for
)

// Push uploads a manifest or blob. A blob whose upload is cut goes on where the registry has
// it: content that is a file is sent in one piece, of which the rest is sent again; another
// stream in pieces of 8 MiB.
func (r *Registry) Push(ctx context.Context, id string, content io.Reader, hintList ...string) (Pushed, error) {
	o, err := parseObject(id)
	if err != nil {
		return Pushed{}, err
	}
	p, err := r.newPush(ctx, o, parseHints(hintList))
	if err != nil {
		return Pushed{}, fmt.Errorf("put %s: %w", o.join(r.locator.String()), err)
	}
	desc, err := p.push(content)
	if err != nil {
		return Pushed{}, fmt.Errorf("put %s: %w", o.join(r.locator.String()), err)
	}
	return Pushed{desc, p.state}, nil
}

func (p *push) push(content io.Reader) (ocispec.Descriptor, error) {
	o, h := p.object, p.hints
	asManifest := o.tag != "" || isIndex(h.mediaType) || isManifest(h.mediaType)
	if asManifest {
		there := false
		if o.digest != "" {
			var err error
			if there, err = p.hasManifest(o); err != nil {
				return ocispec.Descriptor{}, err
			}
		}
		return p.manifest(content, there)
	}
	if h.mediaType == "" {
		// A digest alone: where it is there already it need not be told what it is.
		if desc, err := p.resolve(p.ctx, p.client, p.tries, o); err == nil {
			if isIndex(desc.MediaType) || isManifest(desc.MediaType) {
				p.hints.mediaType = desc.MediaType
				return p.manifest(content, true)
			}
			p.state, desc.Size = Exists, p.knownSize(desc.Size)
			return desc, nil
		} else if !errdefs.IsNotFound(err) {
			return ocispec.Descriptor{}, err
		}
		b, rest, err := peekManifest(content)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		if sniff(b) != mediaTypeOctets {
			return p.manifest(bytes.NewReader(b), false)
		}
		return p.blob(rest, false)
	}
	return p.blob(content, true)
}

// newPush picks the host: the first that is configured for it.
func (r *Registry) newPush(ctx context.Context, o object, h hints) (*push, error) {
	for _, c := range r.clients {
		if c.capabilities&canPush != 0 {
			return &push{Registry: r, client: c, ctx: ctx, object: o, hints: h, tries: c.newTries(maxTries), state: Stored}, nil
		}
	}
	return nil, r.errNoHost()
}

// push is one upload.
type push struct {
	*Registry
	client *client
	ctx    context.Context
	object object
	hints  hints
	tries  *tries
	state  State
	saved  *savedUpload
}

// knownSize is the size of what the registry has: what the caller knows of it, else what the
// registry tells, -1 for nothing. A Content-Length that came with no bytes refuses nothing: some
// registries tell a wrong one.
func (p *push) knownSize(told int64) int64 {
	if p.hints.size >= 0 {
		return p.hints.size
	}
	return told
}

// peekManifest reads what could be a manifest whole; rest gives the content from its start.
func peekManifest(content io.Reader) (b []byte, rest io.Reader, err error) {
	if f, size, ok := section(content); ok {
		if size > MaxManifest {
			return nil, content, nil
		}
		b = make([]byte, size)
		if _, err := f.ReadAt(b, 0); err != nil && err != io.EOF {
			return nil, nil, err
		}
		return b, content, nil
	}
	var first [1]byte
	if n, err := io.ReadFull(content, first[:]); n == 0 {
		if err == io.EOF {
			err = nil
		}
		return nil, bytes.NewReader(nil), err
	}
	all := io.MultiReader(bytes.NewReader(first[:]), content)
	if first[0] != '{' {
		return nil, all, nil
	}
	b, err = io.ReadAll(io.LimitReader(all, MaxManifest+1))
	if err != nil {
		return nil, nil, err
	}
	rest = io.MultiReader(bytes.NewReader(b), content)
	if len(b) > MaxManifest {
		return nil, rest, nil
	}
	return b, rest, nil
}

// section is content that can be read again: a regular file from where it stands.
func section(content io.Reader) (*io.SectionReader, int64, bool) {
	f, ok := content.(*os.File)
	if !ok {
		return nil, 0, false
	}
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return nil, 0, false
	}
	at, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return nil, 0, false
	}
	size := max(info.Size()-at, 0)
	return io.NewSectionReader(f, at, size), size, true
}

func (p *push) request(method, kind, object string) request {
	r := p.Registry.request(p.client, method, kind, object)
	r.query = nil
	r.scopes = []string{auth.ScopeRepository(p.locator.Name, auth.ActionPull, auth.ActionPush)}
	return r
}

// hasManifest reports whether the registry has a manifest.
func (p *push) hasManifest(o object) (bool, error) {
	req := p.request(http.MethodHead, "manifests", o.String())
	req.header.Set("Accept", accept(p.hints.mediaType))
	resp, err := p.client.do(p.ctx, req, p.tries)
	if err != nil {
		if errdefs.IsNotFound(err) {
			err = nil
		}
		return false, err
	}
	return true, resp.Body.Close()
}

// manifest uploads one, unless it is there. One with a subject is put in any case: whoever put it
// first may have died before the list of referrers had it, and the reply says who keeps that list.
func (p *push) manifest(content io.Reader, there bool) (ocispec.Descriptor, error) {
	b, err := io.ReadAll(io.LimitReader(content, MaxManifest+1))
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if len(b) > MaxManifest {
		return ocispec.Descriptor{}, classf(errdefs.ErrInvalidArgument, "the content is larger than a manifest may be (%s)", sizeString(MaxManifest))
	}
	if there {
		p.state = Exists
		if len(b) == 0 { // and who puts it knows so
			return ocispec.Descriptor{MediaType: p.hints.mediaType, Digest: p.object.digest, Size: p.knownSize(-1)}, nil
		}
	}
	desc := ocispec.Descriptor{MediaType: p.hints.mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	if p.hints.size >= 0 && p.hints.size != desc.Size {
		return desc, classf(errdefs.ErrDataLoss, "size mismatch: got %s, not %d", sizeString(desc.Size), p.hints.size)
	}
	if want := p.object.digest; want != "" {
		if desc.Digest = want.Algorithm().FromBytes(b); desc.Digest != want {
			return desc, mismatch(want, desc.Digest)
		}
	}
	var head struct {
		MediaType string              `json:"mediaType"`
		Subject   *ocispec.Descriptor `json:"subject"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return desc, classf(errdefs.ErrInvalidArgument, "the content is not a manifest: %s", printable(err.Error()))
	}
	if desc.MediaType = manifestType(desc.MediaType, b); desc.MediaType == mediaTypeOctets {
		return desc, classf(errdefs.ErrInvalidArgument, "the content does not tell its type: give the hint mediatype:TYPE")
	}
	if there && head.Subject == nil {
		return desc, nil
	}
	resp, err := p.putManifest(p.object, desc, b, "")
	if err != nil {
		return desc, err
	}
	if head.Subject != nil && resp.Header.Get("OCI-Subject") == "" {
		if err := p.linkReferrer(head.Subject.Digest, desc, b); err != nil {
			return desc, fmt.Errorf("link to subject %s: %w", head.Subject.Digest, err)
		}
	}
	return desc, nil
}

// putManifest stores a manifest. With an entity tag, it replaces only what has that.
func (p *push) putManifest(o object, desc ocispec.Descriptor, b []byte, etag string) (*http.Response, error) {
	req := p.request(http.MethodPut, "manifests", o.String())
	req.header.Set("Content-Type", desc.MediaType)
	if etag != "" {
		req.header.Set("If-Match", etag)
	}
	req.body, req.size = func() io.Reader { return bytes.NewReader(b) }, int64(len(b))
	resp, err := p.client.do(p.ctx, req, p.tries)
	if err != nil {
		return nil, err
	}
	resp.Body.Close()
	if got := contentDigest(resp); got != "" && got.Algorithm() == desc.Digest.Algorithm() && got != desc.Digest {
		return nil, classf(errdefs.ErrDataLoss, "the registry stored %s, not %s", got, desc.Digest)
	}
	return resp, nil
}

// blob uploads one, having looked first whether it is there.
func (p *push) blob(content io.Reader, look bool) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: p.hints.mediaType, Digest: p.object.digest}
	if desc.MediaType == "" {
		desc.MediaType = mediaTypeOctets
	}
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
	p.saved = p.openSaved()
	defer p.saved.close()
	session, offset, err := p.resume()
	if err != nil {
		return desc, err
	}
	if offset == 0 {
		var mounted bool
		if session, mounted, err = p.begin(); err != nil {
			return desc, err
		}
		if mounted {
			p.saved.forget()
			p.state = Mounted
			size, err := p.exists()
			if isRefusedElsewhere(err) {
				size, err = -1, nil
			}
			desc.Size = p.knownSize(size)
			return desc, err
		}
	}
	desc.Size, err = p.send(session, offset, content)
	return desc, err
}

// send uploads content, of which the registry has the bytes before offset, in the way that it
// allows, and gives its size.
func (p *push) send(s session, offset int64, content io.Reader) (size int64, err error) {
	defer func() {
		switch {
		case err == nil:
			p.saved.forget()
		case p.ctx.Err() == nil && !isTemporary(err):
			p.cancel(s)
			p.saved.forget()
		}
	}()
	if f, size, ok := section(content); ok {
		if p.hints.size >= 0 && p.hints.size != size {
			return 0, classf(errdefs.ErrDataLoss, "size mismatch: got %s, not %d", sizeString(size), p.hints.size)
		}
		whole := func(offset int64) io.Reader {
			return newVerifier(p.ctx, io.NopCloser(io.NewSectionReader(f, 0, size)), p.object.digest, 0, offset, size)
		}
		err := p.sendFile(s, offset, whole, size)
		if offset > 0 && isStatus(err, http.StatusBadRequest) {
			// What another process sent was something else.
			if s, _, err = p.begin(); err != nil {
				return 0, err
			}
			err = p.sendFile(s, 0, whole, size)
		}
		if !isStatus(err, http.StatusRequestEntityTooLarge) {
			return size, err
		}
		// A proxy on the way limits the size of a request.
		if s, _, err = p.begin(); err != nil {
			return 0, err
		}
		content, offset = io.NewSectionReader(f, 0, size), 0
	}
	size, err = p.sendStream(s, offset, newVerifier(p.ctx, io.NopCloser(content), p.object.digest, 0, 0, -1))
	if offset > 0 && isStatus(err, http.StatusBadRequest) {
		p.cancel(s)
		p.saved.forget()
		err = classf(errdefs.ErrAborted, "what was sent before is not of this content, and is thrown away: put it once more: %v", err)
	}
	return size, err
}

// cancel has the registry forget an upload, if it will.
func (p *push) cancel(s session) {
	resp, err := p.client.once(p.ctx, p.put(http.MethodDelete, &s, nil, 0))
	if err == nil {
		resp.Body.Close()
	}
}

// exists returns the size of the blob that the registry has, -1 where it does not tell.
func (p *push) exists() (int64, error) {
	return p.client.blobSize(p.ctx, p.request(http.MethodHead, "blobs", p.object.String()), p.tries)
}

// session is an upload that the registry has begun.
type session struct {
	url   *url.URL
	chunk int64 // the least that it takes at a time
}

// begin opens an upload, or mounts the blob from the hinted repository.
func (p *push) begin() (s session, mounted bool, err error) {
	req := p.request(http.MethodPost, "blobs", "uploads/")
	if p.hints.mount != "" {
		req.query = url.Values{"mount": {p.object.digest.String()}, "from": {p.hints.mount}}
		req.scopes = append(req.scopes, auth.ScopeRepository(p.hints.mount, auth.ActionPull))
	}
	req.body = func() io.Reader { return http.NoBody }
	resp, err := p.client.do(p.ctx, req, p.tries)
	if err != nil && p.hints.mount != "" && !isTemporary(err) {
		// Some refuse a mount instead of beginning an upload.
		p.hints.mount = ""
		return p.begin()
	}
	if err != nil {
		return s, false, err
	}
	resp.Body.Close()
	if resp.StatusCode == http.StatusCreated && p.hints.mount != "" {
		return s, true, nil
	}
	if s.chunk, _ = strconv.ParseInt(resp.Header.Get("OCI-Chunk-Min-Length"), 10, 64); s.chunk > maxChunkSize {
		return s, false, classf(errdefs.ErrNotImplemented, "the registry wants chunks of at least %s", sizeString(s.chunk))
	}
	return s, false, p.move(&s, resp)
}

// move follows an upload to where the registry says that it goes on.
func (p *push) move(s *session, resp *http.Response) error {
	location := resp.Header.Get("Location")
	if location == "" {
		if s.url != nil {
			return nil
		}
		return classf(errdefs.ErrDataLoss, "%s began an upload without saying where", p.client.host)
	}
	u, err := resp.Request.URL.Parse(location)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.User != nil {
		return classf(errdefs.ErrDataLoss, "%s sent an upload to %q", p.client.host, printable(location))
	}
	if ours := p.client.currentScheme(); ours == "https" && u.Scheme == "http" {
		// Proxies that end TLS make registries think they speak HTTP.
		if !strings.EqualFold(u.Hostname(), resp.Request.URL.Hostname()) {
			return classf(errdefs.ErrDataLoss, "%s sent an upload from https to http://%s", p.client.host, printable(u.Host))
		}
		u.Scheme, u.Host = ours, resp.Request.URL.Host
	}
	u.Fragment = ""
	s.url = u
	p.saved.save(*s)
	return nil
}

// put is a request of an upload.
func (p *push) put(method string, s *session, body func() io.Reader, size int64) request {
	req := p.request(method, "blobs", "uploads/")
	req.url, req.body, req.size = s.url, body, size
	if method == http.MethodPut {
		u := *s.url
		q := u.Query()
		q.Set("digest", p.object.digest.String())
		u.RawQuery = q.Encode()
		req.url = &u
	}
	if body != nil {
		req.header.Set("Content-Type", mediaTypeOctets)
	}
	return req
}

func (p *push) finish(s *session) error {
	resp, err := p.client.do(p.ctx, p.put(http.MethodPut, s, func() io.Reader { return http.NoBody }, 0), p.tries)
	if err == nil {
		resp.Body.Close()
	}
	return err
}

// sendFile uploads what can be read from any offset in one piece, and what is missing of it
// after each cut.
func (p *push) sendFile(s session, offset int64, from func(offset int64) io.Reader, size int64) (err error) {
	if offset > size {
		offset = 0
		if s, _, err = p.begin(); err != nil {
			return err
		}
	}
	for {
		var resp *http.Response
		if offset == 0 {
			req := p.put(http.MethodPut, &s, func() io.Reader { return from(0) }, size)
			resp, err = p.client.once(p.ctx, req)
			if err == nil {
				resp.Body.Close()
				return nil
			}
		} else {
			if offset < size {
				req := p.put(http.MethodPatch, &s, func() io.Reader { return from(offset) }, size-offset)
				req.header.Set("Content-Range", fmt.Sprintf("%d-%d", offset, size-1))
				if resp, err = p.client.once(p.ctx, req); err == nil {
					resp.Body.Close()
					err = p.move(&s, resp)
				}
			}
			if err == nil {
				return p.finish(&s)
			}
		}
		err = lostSession(err)
		if err := p.client.again(p.ctx, p.tries, err); err != nil {
			return err
		}
		had := offset
		if offset, err = p.status(&s); err != nil {
			if p.there() {
				return nil // its reply was lost
			}
			if isTemporary(err) {
				return err
			}
			offset = 0
		}
		if offset == 0 {
			// Of nothing, and of a single byte, a registry says the same.
			if s, _, err = p.begin(); err != nil {
				return err
			}
		}
		if offset > size {
			return classf(errdefs.ErrDataLoss, "the registry says it has %s of %d", sizeString(offset), size)
		}
		if offset-had >= renewAfter {
			p.tries = p.client.newTries(maxTries)
		}
	}
}

// lostSession makes a failure for now of a reply that says that the registry does not have the
// upload as far as was thought, or at all: where it runs as several that share their storage,
// one may not know yet what another has.
func lostSession(err error) error {
	var e *statusError
	if !errors.As(err, &e) {
		return err
	}
	unknown := strings.Contains(e.text, "BLOB_UPLOAD_UNKNOWN")
	if unknown || e.status == http.StatusRequestedRangeNotSatisfiable || e.status == http.StatusNotFound && e.text == "" {
		return classf(errdefs.ErrAborted, "%v", err)
	}
	return err
}

// status asks how much of an upload the registry has.
func (p *push) status(s *session) (int64, error) {
	resp, err := p.client.do(p.ctx, p.put(http.MethodGet, s, nil, 0), p.tries)
	if err != nil {
		return 0, err
	}
	resp.Body.Close()
	if err := p.move(s, resp); err != nil {
		return 0, err
	}
	return uploaded(resp)
}

// uploaded reads a Range of "0-N", which is of N+1 bytes; of none, registries say 0-0 or
// nothing.
func uploaded(resp *http.Response) (int64, error) {
	v := strings.TrimPrefix(resp.Header.Get("Range"), "bytes=")
	if v == "" {
		return 0, nil
	}
	first, last, _ := strings.Cut(v, "-")
	n, err := strconv.ParseInt(last, 10, 64)
	if first != "0" || err != nil || n < -1 {
		return 0, classf(errdefs.ErrDataLoss, "the registry says it has the range %q", printable(v))
	}
	if n <= 0 {
		return 0, nil
	}
	return n + 1, nil
}

// sendStream uploads what can be read once, a piece at a time, and gives its size. What the
// registry has of it is read, and not sent.
func (p *push) sendStream(s session, offset int64, content io.Reader) (int64, error) {
	if n, err := io.CopyN(io.Discard, content, offset); err == io.EOF {
		return n, classf(errdefs.ErrDataLoss, "size mismatch: got %s, and the registry has %d already", sizeString(n), offset)
	} else if err != nil {
		return n, err
	}
	buf := make([]byte, max(chunkSize, s.chunk)) // from offset on
	for {
		n, err := io.ReadFull(content, buf)
		piece, end := buf[:n], offset+int64(n)
		last := err == io.EOF || err == io.ErrUnexpectedEOF
		if err != nil && !last {
			return 0, err
		}
		if p.hints.size >= 0 && (end > p.hints.size || last && end != p.hints.size) {
			return 0, classf(errdefs.ErrDataLoss, "size mismatch: got %s or more, not %d", sizeString(end), p.hints.size)
		}
		if err := p.sendPiece(&s, piece, offset, last); err != nil {
			return 0, err
		}
		if last {
			return end, nil
		}
		offset = end
		p.tries = p.client.newTries(maxTries)
	}
}

// sendPiece has one piece arrive, the last by the request that ends the upload. A session
// whose only piece it is can be begun again.
func (p *push) sendPiece(s *session, piece []byte, offset int64, last bool) error {
	end := offset + int64(len(piece))
	at := offset
	for {
		rest := piece[at-offset:]
		method := http.MethodPatch
		if last {
			method = http.MethodPut
		}
		req := p.put(method, s, func() io.Reader { return bytes.NewReader(rest) }, int64(len(rest)))
		if len(rest) > 0 && (at > 0 || !last) {
			req.header.Set("Content-Range", fmt.Sprintf("%d-%d", at, end-1))
		}
		resp, err := p.client.once(p.ctx, req)
		if err == nil {
			resp.Body.Close()
			if last {
				return nil
			}
			return p.move(s, resp)
		}
		err = lostSession(err)
		if err := p.client.again(p.ctx, p.tries, err); err != nil {
			return err
		}
		have, err := p.status(s)
		switch {
		case err != nil && last && p.there():
			return nil
		case offset == 0 && have == 0 && !isTemporary(err):
			// The session is gone, or has nothing or a single byte: that is said alike.
			if *s, _, err = p.begin(); err != nil {
				return err
			}
		case err != nil:
			return lostSession(err)
		}
		if have < offset || have > end {
			return classf(errdefs.ErrDataLoss, "the registry says it has %s, where %d were sent", sizeString(have), end)
		}
		if at = have; at == end && !last {
			return nil
		}
	}
}

func (p *push) there() bool {
	_, err := p.exists()
	return err == nil
}
