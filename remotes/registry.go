package remotes

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// Registry is one repository of a registry. It is accessed through the hosts that serve it: mirrors in order, then the
// registry itself.
type Registry struct {
	locator Locator
	clients []*client
}

func openRegistry(l Locator, o Options, hosts []endpoint) *Registry {
	r := &Registry{locator: l}
	keys := newKeyring(configFiles(o))
	for i, e := range hosts {
		o := o
		if i < len(hosts)-1 {
			o.Timeout = cmp.Or(o.Timeout, mirrorTimeout)
		}
		r.clients = append(r.clients, newClient(e, o, keys.login(e.scheme, e.host, l.Name)))
	}
	return r
}

// Resolve returns the descriptor of a tag or digest: that of a manifest or, if a digest is not a manifest's, of a blob.
func (r *Registry) Resolve(ctx context.Context, object string) (ocispec.Descriptor, error) {
	o, err := parseObject(object)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var desc ocispec.Descriptor
	err = r.firstHost(ctx, canPull|canResolve, func(c *client, t *tries) error {
		desc, err = r.resolve(ctx, c, t, o)
		if err == nil && desc.Size < 0 {
			err = fmt.Errorf("%s doesn't state the size of the blob", c.host)
		}
		return err
	})
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("resolve %s: %w", o.join(r.locator.String()), err)
	}
	return desc, nil
}

// Fetch returns the content of a manifest by its tag or digest, or of a blob by its digest.
func (r *Registry) Fetch(ctx context.Context, id string, hintList ...string) (io.ReadCloser, error) {
	o, err := parseObject(id)
	if err != nil {
		return nil, err
	}
	name := o.join(r.locator.String())
	body, err := r.fetch(ctx, o, parseHints(hintList))
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", name, err)
	}
	return namedBody{body, "fetch " + name}, nil
}

// body is the result of a fetch inside this package. It can write itself in large pieces.
type body interface {
	io.ReadCloser
	io.WriterTo
	// descriptor returns the descriptor of the whole object as far as it is known; an unknown Size is -1.
	descriptor() ocispec.Descriptor
}

// namedBody adds to errors what was being read.
type namedBody struct {
	body
	what string
}

func (n namedBody) Read(p []byte) (int, error) {
	k, err := n.body.Read(p)
	if err != nil && err != io.EOF {
		err = fmt.Errorf("%s: %w", n.what, err)
	}
	return k, err
}

func (n namedBody) WriteTo(w io.Writer) (int64, error) {
	k, err := n.body.WriteTo(w)
	var werr *writeError
	switch {
	case errors.As(err, &werr):
		err = werr.error
	case err != nil:
		err = fmt.Errorf("%s: %w", n.what, err)
	}
	return k, err
}

// query names the registry that a mirror is asked for.
func (r *Registry) query(c *client) url.Values {
	if hostPort(c.scheme, c.host) == hostPort(c.scheme, r.locator.Host) || r.locator.Host == "docker.io" && c.host == "registry-1.docker.io" {
		return nil
	}
	return url.Values{"ns": {r.locator.Host}}
}

func (r *Registry) request(c *client, method, kind, object string) request {
	return request{
		method: method,
		isBlob: kind == "blobs" && digest.Digest(object).Validate() == nil && (method == http.MethodGet || method == http.MethodHead),
		path:   "/" + r.locator.Name + "/" + kind + "/" + object,
		query:  r.query(c),
		header: http.Header{},
		scopes: []string{auth.ScopeRepository(r.locator.Name, auth.ActionPull)},
	}
}

// accept returns an Accept header with all types of manifests, the hinted one first.
func accept(hint string) string {
	types := manifestTypes
	if hint != "" {
		types = append([]string{hint}, types...)
	}
	return strings.Join(types, ", ") + ", */*"
}

func (r *Registry) resolve(ctx context.Context, c *client, t *tries, o object) (ocispec.Descriptor, error) {
	req := r.request(c, http.MethodHead, "manifests", o.String())
	req.header.Set("Accept", accept(""))
	var resp *http.Response
	var blob *ocispec.Descriptor
	err := c.retry(ctx, t, func() (err error) {
		resp, err = c.once(ctx, req)
		if o.digest != "" && isStatus(err, http.StatusInternalServerError) {
			// The reference registry replies so if the digest is that of a blob.
			if desc, berr := r.resolveBlob(ctx, c, t, o, err); berr == nil {
				blob, err = &desc, nil
			}
		}
		return err
	})
	switch {
	case blob != nil:
		return *blob, nil
	case err == nil:
		resp.Body.Close()
		if desc, ok, err := headDescriptor(resp, o); ok || err != nil {
			return desc, err
		}
	case errdefs.IsNotFound(err) && o.digest != "":
		return r.resolveBlob(ctx, c, t, o, err)
	case !isHeadRefused(err):
		return ocispec.Descriptor{}, err
	}
	// HEAD gave too little, or was refused. GET may still work.
	m, err := r.manifest(ctx, c, t, o, accept(""))
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return m.descriptor, nil
}

func (r *Registry) resolveBlob(ctx context.Context, c *client, t *tries, o object, notFound error) (ocispec.Descriptor, error) {
	size, err := c.blobSize(ctx, r.request(c, http.MethodHead, "blobs", o.String()), o.digest, t)
	if errdefs.IsNotFound(err) {
		err = notFound
	}
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return ocispec.Descriptor{MediaType: mediaTypeOctets, Digest: o.digest, Size: size}, nil
}

// isHeadRefused reports whether a host refused HEAD in a way that says nothing about GET: by a redirect that leads
// nowhere, or with a status that is not about the object, the user or a temporary condition.
func isHeadRefused(err error) bool {
	var status *statusError
	switch {
	case isTemporary(err):
		return false
	case errors.Is(err, errRedirect):
		return true
	case !errors.As(err, &status):
		return false
	}
	return status.elsewhere || !errdefs.IsUnauthorized(err)
}

// blobSize returns the size of the blob that req asks for by HEAD, or -1 if the registry has the blob but doesn't state
// its size. If HEAD is refused or gives no size, it requests the first byte. A size of 0 is not trusted: some
// registries mean "unknown".
func (c *client) blobSize(ctx context.Context, req request, d digest.Digest, t *tries) (int64, error) {
	resp, err := c.do(ctx, req, t)
	switch {
	case err == nil:
		resp.Body.Close()
		if resp.ContentLength > 0 || resp.ContentLength == 0 && d == d.Algorithm().FromBytes(nil) {
			return resp.ContentLength, nil
		}
	case errdefs.IsNotFound(err) || !isHeadRefused(err):
		return -1, err
	}
	req.method = http.MethodGet
	first := &rangeReader{ctx: ctx, source: blobSource{client: c, request: req, size: -1}, tries: t, end: 1}
	gerr := first.connect(0, false, nil)
	first.Close()
	switch {
	case gerr == nil:
		return first.source.size, nil
	case ctx.Err() != nil || errdefs.IsNotFound(gerr):
		return -1, gerr
	}
	return -1, err
}

// headDescriptor takes a descriptor from the header of a reply; ok is false if it is incomplete.
func headDescriptor(resp *http.Response, o object) (desc ocispec.Descriptor, ok bool, err error) {
	desc.MediaType = mediaTypeOf(resp)
	if isSchema1(desc.MediaType) {
		return desc, false, errSchema1()
	}
	desc.Size = resp.ContentLength
	desc.Digest = contentDigest(resp)
	if o.digest != "" {
		if desc.Digest != "" && desc.Digest.Algorithm() == o.digest.Algorithm() && desc.Digest != o.digest {
			return desc, false, nil // decided by the content
		}
		desc.Digest = o.digest
	}
	if desc.Digest == "" {
		return desc, false, nil
	}
	return desc, desc.Size > 0 && desc.Size <= MaxManifest && (isIndex(desc.MediaType) || isManifest(desc.MediaType)), nil
}

// contentDigest returns Docker-Content-Digest, which is only a hint. It is "" if it is malformed or has an unsupported
// algorithm.
func contentDigest(resp *http.Response) digest.Digest {
	d, err := digest.Parse(resp.Header.Get("Docker-Content-Digest"))
	if err != nil {
		return "" // Parse returns a refused digest too
	}
	return d
}

func mediaTypeOf(resp *http.Response) string {
	t, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	if t = strings.TrimSpace(t); !isMediaType(t) {
		return ""
	}
	return t
}

func errSchema1() error {
	return classf(errdefs.ErrNotImplemented, "a manifest of docker's obsolete schema 1: push the image again with a current tool")
}

// manifest is a manifest that was read and verified.
type manifest struct {
	descriptor ocispec.Descriptor
	content    []byte
	etag       string // for a conditional replacement; "" if the registry gives none
}

// manifest reads a manifest. If it breaks off it is read again from the start.
func (r *Registry) manifest(ctx context.Context, c *client, t *tries, o object, accept string) (m *manifest, err error) {
	req := r.request(c, http.MethodGet, "manifests", o.String())
	req.header.Set("Accept", accept)
	err = c.retry(ctx, t, func() (err error) {
		m, err = readManifest(ctx, c, req, o)
		return err
	})
	return m, err
}

func readManifest(ctx context.Context, c *client, req request, o object) (*manifest, error) {
	resp, b, err := c.readAll(ctx, req)
	if err != nil {
		return nil, err
	}
	want := o.digest
	if want == "" {
		want = contentDigest(resp)
	}
	if resp.Header.Get("Content-Encoding") == "gzip" && (want == "" || want.Algorithm().FromBytes(b) != want) {
		// Compressed on the way, although the request declined that.
		if b, err = gunzip(b); err != nil {
			return nil, err
		}
	}
	mediaType := mediaTypeOf(resp)
	switch {
	case isSchema1(mediaType):
		return nil, errSchema1()
	case mediaType == "text/html" || bytes.HasPrefix(bytes.TrimSpace(b), []byte("<")):
		return nil, classf(errdefs.ErrDataLoss, "%s sent a web page instead of a manifest: is it a registry?", resp.Request.URL.Host)
	case want == "":
		want = digest.FromBytes(b)
	default:
		if got := want.Algorithm().FromBytes(b); got != want {
			return nil, mismatch(want, got)
		}
	}
	var head struct {
		MediaType     string            `json:"mediaType"`
		SchemaVersion int               `json:"schemaVersion"`
		FSLayers      []json.RawMessage `json:"fsLayers"`
	}
	if err := decode(b, &head); err != nil && o.tag != "" {
		return nil, classf(errdefs.ErrDataLoss, "%s sent something else than a manifest: %s", resp.Request.URL.Host, printable(err.Error()))
	}
	if head.SchemaVersion == 1 && head.FSLayers != nil {
		return nil, errSchema1()
	}
	if !isIndex(mediaType) && !isManifest(mediaType) {
		if t := sniff(b); t != mediaTypeOctets {
			mediaType = t
		} else if isMediaType(head.MediaType) {
			mediaType = head.MediaType
		}
	}
	mediaType = cmp.Or(mediaType, mediaTypeOctets)
	etag := resp.Header.Get("ETag")
	if !strings.HasPrefix(etag, `"`) || resp.Header.Get("Content-Encoding") != "" {
		etag = "" // weak, or of a compressed form
	}
	return &manifest{ocispec.Descriptor{MediaType: mediaType, Digest: want, Size: int64(len(b))}, b, etag}, nil
}

// decode decodes an untrusted document.
func decode(b []byte, v any) error {
	if bytes.Count(b, []byte("{")) > maxObjects || bytes.Count(b, []byte(",")) > maxMembers {
		return errors.New("it has too many members")
	}
	return json.Unmarshal(b, v)
}

// readAll sends a request once and reads the whole reply, of at most MaxManifest bytes.
func (c *client) readAll(ctx context.Context, req request) (*http.Response, []byte, error) {
	resp, err := c.once(ctx, req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	if resp.ContentLength > MaxManifest {
		return nil, nil, errTooLarge()
	}
	if resp.ContentLength < 0 || resp.ContentLength > maxAhead {
		if err := waitTurn(ctx); err != nil {
			return nil, nil, err
		}
	}
	var buf bytes.Buffer
	if resp.ContentLength > 0 {
		buf.Grow(int(resp.ContentLength) + bytes.MinRead)
	}
	if body, ok := resp.Body.(*guardedBody); ok {
		// Bound the total time too: a body that trickles never stalls.
		defer body.limit(2 * body.stall)()
	}
	n, err := buf.ReadFrom(io.LimitReader(resp.Body, MaxManifest+1))
	if err == nil && n > MaxManifest {
		err = errTooLarge()
	}
	return resp, buf.Bytes(), err
}

func gunzip(b []byte) ([]byte, error) {
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err == nil {
		b, err = io.ReadAll(io.LimitReader(z, MaxManifest+1))
	}
	if err != nil {
		return nil, classf(errdefs.ErrDataLoss, "the reply claims to be compressed: %w", err)
	}
	if len(b) > MaxManifest {
		return nil, errTooLarge()
	}
	return b, nil
}

func errTooLarge() error {
	return classf(errdefs.ErrDataLoss, "the reply is larger than a manifest may be (%s)", sizeString(MaxManifest))
}

func mismatch(want, got digest.Digest) error {
	return classf(errdefs.ErrDataLoss, "digest mismatch: got %s, not %s", got, want)
}

func (r *Registry) fetch(ctx context.Context, o object, h hints) (body, error) {
	var got body
	asManifest := func(accept string) func(*client, *tries) error {
		return func(c *client, t *tries) error {
			m, err := r.manifest(ctx, c, t, o, accept)
			if err != nil {
				return err
			}
			got, err = m.body(h)
			return err
		}
	}
	switch {
	case o.tag != "":
		// Only the hinted type is requested at first, so that the registry can convert the manifest. If it can't, any
		// type will do.
		if h.mediaType != "" {
			err := r.firstHost(ctx, canPull|canResolve, asManifest(h.mediaType))
			if err == nil || !errdefs.IsNotFound(err) && !isStatus(err, http.StatusNotAcceptable) {
				return got, err
			}
		}
		err := r.firstHost(ctx, canPull|canResolve, asManifest(accept(h.mediaType)))
		return got, err
	}
	// Some registries keep manifests among the blobs, and some hints are wrong: so both places are tried.
	asBlob := func(c *client, t *tries) error {
		var err error
		got, err = c.blob(ctx, r.request(c, http.MethodGet, "blobs", o.String()), t, o, h)
		return err
	}
	first, second := asBlob, asManifest(accept(h.mediaType))
	if isIndex(h.mediaType) || isManifest(h.mediaType) {
		first, second = second, first
	}
	err := r.firstHost(ctx, canPull, func(c *client, t *tries) error {
		err := first(c, t)
		if isAbsent(err) {
			if serr := second(c, t); serr == nil || !isAbsent(serr) {
				return serr
			}
		}
		return err
	})
	if c := r.own(); isAbsent(err) && c.options.FollowURLs {
		for _, address := range h.urls {
			if got, err = r.blobAt(ctx, c, o, h, address); err == nil || ctx.Err() != nil {
				break
			}
		}
	}
	return got, err
}

// blobAt opens a blob at an address outside the registry. As after a redirect, another origin gets neither credentials
// nor configured headers.
func (r *Registry) blobAt(ctx context.Context, c *client, o object, h hints, address string) (body, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil {
		return nil, classf(errdefs.ErrInvalidArgument, "%q is not an address to fetch a blob from", printable(address))
	}
	u.Fragment = ""
	req := r.request(c, http.MethodGet, "blobs", o.String())
	req.url = u
	b, err := c.blob(ctx, req, c.newTries(maxTries), o, h)
	if err != nil {
		return nil, fmt.Errorf("from %s: %w", printable(origin(u)), err)
	}
	return b, nil
}

// isAbsent reports whether an error is one by which registries say that a digest is not a blob's, or not a manifest's.
func isAbsent(err error) bool {
	return isStatus(err, http.StatusNotFound, http.StatusBadRequest, http.StatusMethodNotAllowed)
}

// body returns the manifest's content from the hinted offset to the hinted end.
func (m *manifest) body(h hints) (body, error) {
	if err := h.check(int64(len(m.content))); err != nil {
		return nil, err
	}
	content := m.content
	if h.end >= 0 {
		content = content[:min(h.end, int64(len(content)))]
	}
	return &manifestBody{*bytes.NewReader(content[h.offset:]), m.descriptor}, nil
}

// check compares the size that the caller gave with the actual one.
func (h hints) check(size int64) error {
	if h.size >= 0 && h.size != size {
		return classf(errdefs.ErrDataLoss, "size mismatch: got %s, not %d", sizeString(size), h.size)
	}
	if h.offset > size || h.end > h.offset && h.offset == size {
		return errPastEnd(h.offset, size)
	}
	return nil
}

func errPastEnd(offset, size int64) error {
	return classf(errdefs.ErrInvalidArgument, "offset %d is past the end (%s)", offset, sizeString(size))
}

// manifestBody is the body of a manifest in memory.
type manifestBody struct {
	bytes.Reader
	what ocispec.Descriptor
}

func (m *manifestBody) descriptor() ocispec.Descriptor { return m.what }

func (m *manifestBody) WriteTo(w io.Writer) (int64, error) {
	n, err := m.Reader.WriteTo(w)
	if err != nil {
		err = &writeError{err}
	}
	return n, err
}

func (*manifestBody) Close() error { return nil }

// blob opens a blob at the hinted offset. Content from a mirror, or from an address outside the registry, is verified
// even with Options.Unverified, and its first piece before blob returns.
func (c *client) blob(ctx context.Context, req request, t *tries, o object, h hints) (body, error) {
	if t.hasNext && c.isCorrupt(o) {
		return nil, classf(errdefs.ErrDataLoss, "%s sent wrong bytes before", c.host)
	}
	d := &rangeReader{ctx: ctx, source: blobSource{client: c, request: req, size: h.size}, tries: t, end: h.end}
	length := int64(0) // of a part
	if c.options.Parts > 1 {
		length = max(partsMemory/int64(c.options.Parts), 1)
		if d.end < 0 || d.end > h.offset+length {
			d.end = h.offset + length
		}
		d.ctx, d.cancel = context.WithCancel(ctx)
	}
	err := d.connect(h.offset, false, nil)
	size := d.source.size
	if err == nil && size >= 0 {
		err = h.check(size)
	}
	if err != nil {
		d.Close()
		return nil, err
	}
	begin, coding := d.stream.offset, d.stream.coding
	end := size
	if h.end >= 0 {
		end = min(end, h.end)
	}
	isParallel := c.options.Parts > 1 && d.stream.isRange && end > d.end
	var v *verifier
	if isParallel {
		v = newVerifier(ctx, newParallel(d, length, c.options.Parts, end), o.digest, begin, h.offset, size)
	} else {
		d.end = h.end
		v = newVerifier(ctx, d, o.digest, begin, h.offset, size)
	}
	v.cut(h.end)
	if isParallel || c.options.Streams > 1 || c.currentScheme() == "https" {
		v.pieceLength = shortPiece
	}
	v.mediaType = h.mediaType
	v.explain = func() (why string) {
		if coding != "" && coding != "identity" {
			why = " (it came with Content-Encoding " + printable(coding) + ", which was declined)"
		}
		if t.hasNext {
			c.markCorrupt(o)
			why += fmt.Sprintf(" from %s, which is skipped for this blob for %v: fetch it again", c.host, corruptTime)
		}
		return why
	}
	if t.hasNext || req.url != nil {
		err = v.peek()
	} else if c.options.Unverified && size >= 0 { // without a known length, only the digest shows the end
		v.hash, v.isDirect = nil, true
	}
	if err != nil {
		v.Close()
		return nil, err
	}
	// A download that has begun gets all tries, whichever host it is from.
	if !isParallel {
		d.tries = c.newTries(maxTries)
	}
	return v, nil
}
