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
	"strconv"
	"strings"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// Registry is one repository of a registry, asked through the hosts that serve it: its
// mirrors in order, then itself.
type Registry struct {
	locator Locator
	clients []*client
}

func openRegistry(l Locator, o Options, hosts []endpoint) *Registry {
	r := &Registry{locator: l}
	keys := newKeyring(configFiles(o))
	for _, e := range hosts {
		r.clients = append(r.clients, newClient(e, o, keys.login(e.scheme, e.host, l.Name)))
	}
	return r
}

// Resolve gives the descriptor of a tag or digest: of a manifest or, where a digest names
// none, of a blob.
func (r *Registry) Resolve(ctx context.Context, object string) (ocispec.Descriptor, error) {
	o, err := parseObject(object)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var desc ocispec.Descriptor
	err = r.each(ctx, canPull|canResolve, func(c *client, t *tries) error {
		desc, err = r.resolve(ctx, c, t, o)
		if err == nil && desc.Size < 0 {
			err = fmt.Errorf("%s does not tell the size of the blob", c.host)
		}
		return err
	})
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("resolve %s: %w", o.join(r.locator.String()), err)
	}
	return desc, nil
}

// Fetch gives the bytes of a tag's manifest, or of the manifest or blob of a digest.
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
	return named{body, "fetch " + name}, nil
}

// body is what fetches give inside this package: it can copy itself out in large pieces.
type body interface {
	io.ReadCloser
	io.WriterTo
}

// named says of what an error while reading is.
type named struct {
	body
	what string
}

func (n named) Read(p []byte) (int, error) {
	k, err := n.body.Read(p)
	if err != nil && err != io.EOF {
		err = fmt.Errorf("%s: %w", n.what, err)
	}
	return k, err
}

func (n named) WriteTo(w io.Writer) (int64, error) {
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

// final is an error after which no other host is asked.
type final struct{ error }

// each asks the hosts in order until one answers. Those before the last get one try, and
// none while they want to be left alone: the next host is their second.
func (r *Registry) each(ctx context.Context, need capability, f func(*client, *tries) error) error {
	var able []*client
	for _, c := range r.clients {
		if c.capabilities&need == need {
			able = append(able, c)
		}
	}
	err := r.nobody()
	for i, c := range able {
		n := maxTries
		if i < len(able)-1 {
			if wait := c.sharedWait(); wait > 0 {
				err = c.toldToWait(wait)
				continue
			}
			n = 1
		}
		err = f(c, c.newTries(n))
		if fin, ok := err.(final); ok {
			return fin.error
		}
		if err == nil || ctx.Err() != nil {
			return err
		}
	}
	return err
}

func (r *Registry) nobody() error {
	return classf(errdefs.ErrFailedPrecondition, "no host of %s is configured for this", r.locator.Host)
}

// query names the registry that a mirror is asked to stand in for.
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

// accept lists every type of manifest, the hinted one first.
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
	resp, err := c.once(ctx, req)
	if o.digest != "" && isStatus(err, http.StatusInternalServerError) {
		// The reference registry fails so when the digest is of a blob.
		if desc, err := r.resolveBlob(ctx, c, t, o, err); err == nil {
			return desc, nil
		}
	}
	if err != nil {
		if err = c.again(ctx, t, err); err == nil {
			resp, err = c.do(ctx, req, t)
		}
	}
	if err == nil {
		resp.Body.Close()
		desc, ok, err := headDescriptor(resp, o)
		if ok || err != nil {
			return desc, err
		}
	} else {
		var status *statusError
		switch {
		case errdefs.IsNotFound(err) && o.digest != "":
			return r.resolveBlob(ctx, c, t, o, err)
		case !errors.As(err, &status), errdefs.IsNotFound(err), errdefs.IsUnauthorized(err), isTemporary(err):
			return ocispec.Descriptor{}, err
		}
	}
	m, err := r.manifest(ctx, c, t, o, accept(""))
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return m.descriptor, nil
}

func (r *Registry) resolveBlob(ctx context.Context, c *client, t *tries, o object, notFound error) (ocispec.Descriptor, error) {
	size, err := c.blobSize(ctx, r.request(c, http.MethodHead, "blobs", o.String()), t)
	if err != nil {
		if isTemporary(err) || isRefusedElsewhere(err) {
			return ocispec.Descriptor{}, err
		}
		return ocispec.Descriptor{}, notFound
	}
	return ocispec.Descriptor{MediaType: mediaTypeOctets, Digest: o.digest, Size: size}, nil
}

// blobSize returns the size of a blob that req asks for by HEAD, -1 where the registry has the blob and does
// not tell. Where HEAD tells no size, or is refused by a place that it was redirected to and that may have
// been told of GET alone, the first byte is asked for.
func (c *client) blobSize(ctx context.Context, req request, t *tries) (int64, error) {
	resp, err := c.do(ctx, req, t)
	switch {
	case err == nil:
		resp.Body.Close()
		if resp.ContentLength >= 0 {
			return resp.ContentLength, nil
		}
	case !isRefusedElsewhere(err):
		return -1, err
	}
	req.method = http.MethodGet
	d := &download{ctx: ctx, client: c, tries: t, request: req, size: -1, end: 1}
	defer d.Close()
	if gerr := d.open(0); gerr == nil {
		return d.size, nil
	} else if ctx.Err() != nil {
		return -1, gerr
	}
	return -1, err
}

// headDescriptor reads a descriptor out of a reply's header; ok is false where something of
// it is missing.
func headDescriptor(resp *http.Response, o object) (desc ocispec.Descriptor, ok bool, err error) {
	desc.MediaType = mediaTypeOf(resp)
	if isSchema1(desc.MediaType) {
		return desc, false, errSchema1()
	}
	desc.Size = resp.ContentLength
	desc.Digest = contentDigest(resp)
	if o.digest != "" {
		if desc.Digest != "" && desc.Digest.Algorithm() == o.digest.Algorithm() && desc.Digest != o.digest {
			return desc, false, nil // the bytes will tell
		}
		desc.Digest = o.digest
	}
	if desc.Digest == "" {
		return desc, false, nil
	}
	return desc, desc.Size > 0 && desc.Size <= MaxManifest && (isIndex(desc.MediaType) || isManifest(desc.MediaType)), nil
}

// contentDigest reads Docker-Content-Digest, which is a hint: a value that is not a digest, or has an
// algorithm that this build does not know, counts as none.
func contentDigest(resp *http.Response) digest.Digest {
	d, err := digest.Parse(resp.Header.Get("Docker-Content-Digest"))
	if err != nil {
		return "" // Parse returns what it has refused, too
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

// manifest is one that was read and verified.
type manifest struct {
	descriptor ocispec.Descriptor
	content    []byte
	etag       string // to compare with when it is replaced; empty where the registry tells none
}

// manifest reads one, whole: again from the start where it was cut.
func (r *Registry) manifest(ctx context.Context, c *client, t *tries, o object, accept string) (*manifest, error) {
	req := r.request(c, http.MethodGet, "manifests", o.String())
	req.header.Set("Accept", accept)
	for {
		m, err := r.readManifest(ctx, c, t, req, o)
		if err == nil {
			return m, nil
		}
		var status *statusError
		if errors.As(err, &status) || !isTemporary(err) {
			return nil, err // do has tried again
		}
		if err := c.again(ctx, t, err); err != nil {
			return nil, err
		}
	}
}

func (r *Registry) readManifest(ctx context.Context, c *client, t *tries, req request, o object) (*manifest, error) {
	resp, err := c.do(ctx, req, t)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := readBounded(resp)
	if err != nil {
		return nil, err
	}
	want := o.digest
	if want == "" {
		want = contentDigest(resp)
	}
	if resp.Header.Get("Content-Encoding") == "gzip" && (want == "" || want.Algorithm().FromBytes(b) != want) {
		// Compressed on the way, though that was declined.
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
		return nil, classf(errdefs.ErrDataLoss, "what %s sent is not a manifest: %s", resp.Request.URL.Host, printable(err.Error()))
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
		etag = "" // a weak one, or one of another form of it
	}
	return &manifest{ocispec.Descriptor{MediaType: mediaType, Digest: want, Size: int64(len(b))}, b, etag}, nil
}

// decode reads a document of a remote, whatever that sent.
func decode(b []byte, v any) error {
	if bytes.Count(b, []byte("{")) > maxObjects || bytes.Count(b, []byte(",")) > maxMembers {
		return errors.New("it has too many members")
	}
	return json.Unmarshal(b, v)
}

// readBounded reads a whole reply of at most MaxManifest.
func readBounded(resp *http.Response) ([]byte, error) {
	if resp.ContentLength > MaxManifest {
		return nil, errTooLarge()
	}
	var buf bytes.Buffer
	if resp.ContentLength > 0 {
		buf.Grow(int(resp.ContentLength) + bytes.MinRead)
	}
	if body, ok := resp.Body.(*stalling); ok {
		// One that drips does not stall.
		defer body.within(2 * body.after)()
	}
	n, err := buf.ReadFrom(io.LimitReader(resp.Body, MaxManifest+1))
	switch {
	case err != nil:
		return nil, err
	case n > MaxManifest:
		return nil, errTooLarge()
	}
	return buf.Bytes(), nil
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
		// A hinted type is asked for alone, so that a registry can convert to it; where it
		// has none such, anything will do.
		if h.mediaType != "" {
			err := r.each(ctx, canPull|canResolve, asManifest(h.mediaType))
			if err == nil || !errdefs.IsNotFound(err) && !isStatus(err, http.StatusNotAcceptable) {
				return got, err
			}
		}
		err := r.each(ctx, canPull|canResolve, asManifest(accept(h.mediaType)))
		return got, err
	}
	// Some keep manifests among the blobs, and some hints are wrong: what is not at the one
	// place may be at the other.
	asBlob := func(c *client, t *tries) error {
		var err error
		got, err = r.blob(ctx, c, t, o, h)
		return err
	}
	first, second := asBlob, asManifest(accept(h.mediaType))
	if isIndex(h.mediaType) || isManifest(h.mediaType) {
		first, second = second, first
	}
	err := r.each(ctx, canPull, func(c *client, t *tries) error {
		err := first(c, t)
		if isAbsent(err) {
			if serr := second(c, t); serr == nil || !isAbsent(serr) {
				return serr
			}
		}
		return err
	})
	return got, err
}

// isAbsent is how registries say that a digest is not of a blob, or not of a manifest.
func isAbsent(err error) bool {
	return isStatus(err, http.StatusNotFound, http.StatusBadRequest, http.StatusMethodNotAllowed)
}

// body is the manifest from the hinted offset on.
func (m *manifest) body(h hints) (body, error) {
	if err := h.check(int64(len(m.content))); err != nil {
		return nil, err
	}
	return &memory{*bytes.NewReader(m.content[h.offset:])}, nil
}

// check compares the size that the caller knows with the one that the remote tells.
func (h hints) check(size int64) error {
	if h.size >= 0 && h.size != size {
		return classf(errdefs.ErrDataLoss, "size mismatch: got %s, not %d", sizeString(size), h.size)
	}
	if h.offset > size {
		return classf(errdefs.ErrInvalidArgument, "offset %d is past the end (%s)", h.offset, sizeString(size))
	}
	return nil
}

type memory struct{ bytes.Reader }

func (m *memory) WriteTo(w io.Writer) (int64, error) {
	n, err := m.Reader.WriteTo(w)
	if err != nil {
		err = &writeError{err}
	}
	return n, err
}

func (*memory) Close() error { return nil }

// blob opens a blob at the hinted offset.
func (r *Registry) blob(ctx context.Context, c *client, t *tries, o object, h hints) (body, error) {
	d := &download{ctx: ctx, client: c, tries: t, request: r.request(c, http.MethodGet, "blobs", o.String()), size: h.size, end: -1}
	chunk := int64(0)
	if c.options.Parts > 1 {
		chunk = max(partsMemory/int64(c.options.Parts), 1)
		d.end = h.offset + chunk
		d.ctx, d.cancel = context.WithCancel(ctx)
	}
	err := d.open(h.offset)
	if err == nil && d.size >= 0 {
		err = h.check(d.size)
	}
	if err != nil {
		d.Close()
		return nil, err
	}
	// The download proper, once begun, has all tries whichever host it is from.
	d.tries = c.newTries(maxTries)
	begin, size, rc := d.at, d.size, io.ReadCloser(d) // before others read from it
	if d.end >= 0 && d.ranged && d.size > d.end {
		rc = newParallel(d, chunk, c.options.Parts)
	} else {
		d.end = -1
	}
	v := newVerifier(ctx, rc, o.digest, begin, h.offset, size)
	if rc != d {
		v.piece = beside // what waits is in memory already
	}
	if c.options.Unverified && size >= 0 { // of an unknown length, the digest alone shows the end
		v.hash = nil
		if rc == d && begin == h.offset {
			v.unseen = d
		}
	}
	v.blame = func() string {
		if d.coding == "" || d.coding == "identity" {
			return ""
		}
		return " (it came with Content-Encoding " + printable(d.coding) + ", which was declined)"
	}
	return v, nil
}

// download is the body of a blob from an offset on, opened again where it was cut.
type download struct {
	ctx     context.Context
	cancel  context.CancelFunc // nil where ctx is the caller's
	client  *client
	tries   *tries
	request request

	rc     io.ReadCloser
	at     int64   // the offset that the next byte has
	end    int64   // where to stop, -1 for the blob's end
	size   int64   // of the whole blob, -1 while unknown
	marked int64   // where tries were last renewed
	whole  bool    // ranges are not understood: ask for all and skip
	ranged bool    // the last reply was a range
	coding string  // Content-Encoding, though it was declined
	direct *direct // where the bytes come from, if they could pass unseen
	until  int64   // the offset at which they end
	past   bool    // what was read of them together with the reply's header is out of the buffer
}

// open asks for the bytes from offset on. Where the server sends all, it begins at 0: at
// tells.
func (d *download) open(offset int64) error {
	req := d.request
	if (offset > 0 || d.end >= 0) && !d.whole {
		span := "bytes=" + strconv.FormatInt(offset, 10) + "-"
		if d.end >= 0 {
			span += strconv.FormatInt(d.end-1, 10)
		}
		req.header = req.header.Clone()
		req.header.Set("Range", span)
	}
	d.direct = nil
	resp, err := d.client.do(traceDirect(d.ctx, &d.direct), req, d.tries)
	if err != nil {
		var status *statusError
		if errors.As(err, &status) && req.header.Get("Range") != "" {
			switch status.status {
			case http.StatusRequestedRangeNotSatisfiable:
				if d.size == offset {
					d.rc, d.at = io.NopCloser(strings.NewReader("")), offset
					return nil
				}
				fallthrough
			case http.StatusBadRequest, http.StatusNotImplemented:
				d.whole = true
				return d.open(offset)
			}
		}
		return err
	}
	begin, size := int64(0), resp.ContentLength
	if resp.StatusCode == http.StatusPartialContent {
		begin, size, err = parseContentRange(resp.Header.Get("Content-Range"))
		if err == nil && begin != offset {
			err = fmt.Errorf("bytes from %d on were asked for, and came from %d on", offset, begin)
		}
		if err == nil && size < 0 && d.size < 0 {
			err = errors.New("the reply does not tell the size of the whole")
		}
		if err != nil {
			resp.Body.Close()
			if req.header.Get("Range") == "" {
				return classf(errdefs.ErrDataLoss, "%s does not understand ranges: %w", d.client.host, err)
			}
			d.whole = true
			return d.open(offset)
		}
	}
	if d.size >= 0 && size >= 0 && size != d.size {
		resp.Body.Close()
		return classf(errdefs.ErrDataLoss, "size mismatch: got %s, not %d", sizeString(size), d.size)
	}
	if size >= 0 {
		d.size = size
	}
	d.rc, d.at, d.marked = resp.Body, begin, max(d.marked, begin)
	d.ranged = resp.StatusCode == http.StatusPartialContent
	d.coding = resp.Header.Get("Content-Encoding")
	if d.until, d.past = begin+resp.ContentLength, false; resp.ContentLength < 0 {
		d.direct = nil
	}
	return nil
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

// Read gives the next bytes. io.EOF comes at the blob's end alone, as far as that is known.
func (d *download) Read(p []byte) (int, error) {
	if d.end >= 0 {
		if d.at >= d.end {
			return 0, io.EOF
		}
		p = p[:min(int64(len(p)), d.end-d.at)]
	}
	for {
		n, err := d.rc.Read(p)
		d.at += int64(n)
		d.past = d.past || len(p) >= readBuffer
		if d.end >= 0 && d.at == d.end {
			return n, nil
		}
		if d.size >= 0 && d.at > d.size {
			return n, classf(errdefs.ErrDataLoss, "more than %s came", sizeString(d.size))
		}
		if d.at-d.marked >= renewAfter {
			d.marked, d.tries = d.at, d.client.newTries(maxTries)
		}
		if err == nil || err == io.EOF && (d.size < 0 || d.at == d.size) {
			return n, err
		}
		if d.at == d.size && err != io.EOF {
			return n, io.EOF
		}
		if err == io.EOF {
			err = classf(errdefs.ErrAborted, "the connection ended after %d of %s", d.at, sizeString(d.size))
		}
		if err := d.reopen(err); err != nil {
			return n, err
		}
		if n > 0 {
			return n, nil
		}
	}
}

// reopen goes on where the body was cut.
func (d *download) reopen(cause error) error {
	at := d.at
	d.direct.seen()
	d.rc.Close()
	for {
		if err := d.client.again(d.ctx, d.tries, cause); err != nil {
			return err
		}
		if err := d.open(at); err != nil {
			return err
		}
		err := d.skip(at)
		if err == nil {
			return nil
		}
		d.rc.Close()
		cause = err
	}
}

// skip reads up to an offset what the server sent though it was not asked for.
func (d *download) skip(to int64) error {
	if d.at >= to {
		return nil
	}
	_, err := io.CopyN(io.Discard, d.rc, to-d.at)
	switch {
	case err == nil:
		d.at = to
		return nil
	case err == io.EOF:
		err = io.ErrUnexpectedEOF
	}
	if !isTemporary(err) {
		err = errclass.As(err, errdefs.ErrAborted)
	}
	return err
}

func (d *download) Close() error {
	if d.cancel != nil {
		d.cancel()
	}
	if d.rc == nil {
		return nil
	}
	d.direct.seen()
	return d.rc.Close()
}
