package remotes

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// Push uploads a manifest or blob. An interrupted upload of a blob resumes at the offset that the registry has (see
// blobUpload).
func (r *Registry) Push(ctx context.Context, id string, content io.Reader, hintList ...string) (Pushed, error) {
	return r.pushHinted(ctx, id, content, parseHints(hintList))
}

func (r *Registry) pushHinted(ctx context.Context, id string, content io.Reader, h hints) (Pushed, error) {
	o, err := parseObject(id)
	if err != nil {
		return Pushed{}, err
	}
	p, err := r.newPush(ctx, o, h)
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
	if asManifest && o.tag != "" {
		return p.manifest(content, false)
	}
	if asManifest {
		there := false
		if !h.isAbsent {
			var err error
			if there, err = p.isAlready(o.digest); err != nil {
				return ocispec.Descriptor{}, err
			}
		}
		return p.manifest(content, there)
	}
	if h.mediaType == "" {
		// Only a digest is given. If the registry has it, the type isn't needed.
		if desc, err := p.resolve(p.ctx, p.client, p.tries, o); err == nil {
			if isIndex(desc.MediaType) || isManifest(desc.MediaType) {
				p.hints.mediaType = desc.MediaType
				return p.manifest(content, true)
			}
			p.state, desc.Size = Exists, p.knownSize(desc.Size)
			return desc, nil
		} else if !errdefs.IsNotFound(err) && !isRefusedElsewhere(err) {
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
	return p.blob(content, !h.isAbsent)
}

// newPush selects the host to push to: the first one configured for that.
func (r *Registry) newPush(ctx context.Context, o object, h hints) (*push, error) {
	for _, c := range r.clients {
		if c.capabilities&canPush != 0 {
			return &push{Registry: r, client: c, ctx: ctx, object: o, hints: h, tries: c.newTries(maxTries), state: Stored}, nil
		}
	}
	return nil, r.errNoHost()
}

// push is the upload of one object.
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

// knownSize returns the size of an object that the registry has: the caller's or else the one that the registry states,
// -1 if neither. The registry's is not compared with the caller's: some registries send a wrong Content-Length without
// a body.
func (p *push) knownSize(stated int64) int64 {
	if p.hints.size >= 0 {
		return p.hints.size
	}
	return stated
}

// peekManifest reads the whole content if it could be a manifest. rest yields the content from its start.
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

// section returns content that can be read repeatedly: a regular file from its current offset.
func section(content io.Reader) (*io.SectionReader, int64, bool) {
	f, ok := content.(*os.File)
	if !ok {
		return nil, 0, false
	}
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return nil, 0, false
	}
	offset, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return nil, 0, false
	}
	size := max(info.Size()-offset, 0)
	return io.NewSectionReader(f, offset, size), size, true
}

func (p *push) request(method, kind, object string) request {
	r := p.Registry.request(p.client, method, kind, object)
	r.query = nil
	r.scopes = []string{auth.ScopeRepository(p.locator.Name, auth.ActionPull, auth.ActionPush)}
	return r
}

// hasManifest reports whether the registry has a manifest.
func (p *push) hasManifest(o object) (bool, error) {
	resp, err := p.headManifest(o)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return resp != nil, err
}

func (p *push) headManifest(o object) (*http.Response, error) {
	req := p.request(http.MethodHead, "manifests", o.String())
	req.header.Set("Accept", accept(p.hints.mediaType))
	resp, err := p.client.do(p.ctx, req, p.tries)
	if err == nil {
		resp.Body.Close()
	}
	return resp, err
}

// isAlready reports whether the registry confirms, by its digest, that it has the manifest under the digest or tag to
// put. A bare success isn't enough, because some gateways reply so to any request; then the manifest is put. With
// Options.IfAbsent, another manifest under the tag is AlreadyExists.
func (p *push) isAlready(want digest.Digest) (bool, error) {
	resp, err := p.headManifest(p.object)
	var got digest.Digest
	switch ifAbsent := p.client.options.IfAbsent && p.object.tag != ""; {
	case errdefs.IsNotFound(err):
		return false, nil
	case err == nil:
		got = contentDigest(resp)
		if ifAbsent && (got == "" || got.Algorithm() != want.Algorithm()) {
			m, err := p.Registry.manifest(p.ctx, p.client, p.tries, p.object, accept(p.hints.mediaType))
			if err != nil {
				return false, err
			}
			got = want.Algorithm().FromBytes(m.content)
		}
		if ifAbsent && got != want {
			return false, errTagged(got)
		}
	case ifAbsent, isTemporary(err), p.ctx.Err() != nil:
		return false, err
	}
	return got == want, nil
}

// errTagged reports that a tag or name belongs to another manifest.
func errTagged(other digest.Digest) error {
	return classf(errdefs.ErrAlreadyExists, "it exists, and points at %s", other)
}

// manifest uploads a manifest, unless the registry has it. A manifest with a subject is put in any case: the process
// that put it before may have died before updating the list of referrers, and only the reply shows who maintains that
// list. A tag that already has the manifest is not put again, because registries with immutable tags refuse that.
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
		if len(b) == 0 { // the caller relied on that
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
		return desc, classf(errdefs.ErrInvalidArgument, "the content doesn't state its media type: give the hint mediatype:TYPE")
	}
	o := p.object
	if o.tag != "" && (!p.hints.isAbsent || p.client.options.IfAbsent) {
		if there, err = p.isAlready(desc.Digest); err != nil {
			return desc, err
		}
		if there {
			p.state, o = Exists, object{digest: desc.Digest}
		}
	}
	if there && head.Subject == nil {
		return desc, nil
	}
	resp, err := p.putManifest(o, desc, b, "")
	if o.tag != "" && isStatus(err, http.StatusBadRequest, http.StatusForbidden, http.StatusConflict, http.StatusPreconditionFailed) {
		// This is also how a registry refuses to change an immutable tag. Another process, or an earlier try whose
		// reply was lost, may have put this manifest.
		if there, herr := p.isAlready(desc.Digest); herr == nil && there {
			p.state = Exists
			if head.Subject == nil {
				return desc, nil
			}
			resp, err = p.putManifest(object{digest: desc.Digest}, desc, b, "")
		}
	}
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

// putManifest stores a manifest. With an entity tag, it replaces only the version that has it.
func (p *push) putManifest(o object, desc ocispec.Descriptor, b []byte, etag string) (*http.Response, error) {
	req := p.request(http.MethodPut, "manifests", o.String())
	req.header.Set("Content-Type", desc.MediaType)
	if etag != "" {
		req.header.Set("If-Match", etag)
	}
	mayExist := o != p.object || o.tag == "" || !p.client.options.IfAbsent
	if !mayExist {
		req.header.Set("If-None-Match", "*")
	}
	req.body, req.size = func() io.Reader { return bytes.NewReader(b) }, int64(len(b))
	resp, err := p.client.do(p.ctx, req, p.tries)
	if !mayExist && isStatus(err, http.StatusPreconditionFailed) {
		err = errclass.As(err, errdefs.ErrAlreadyExists)
	}
	if err != nil {
		return nil, err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		if there, err := p.hasManifest(object{digest: desc.Digest}); err != nil || !there {
			return nil, classf(errdefs.ErrAborted, "%s doesn't have the manifest after the put (%d %s)", p.client.host, resp.StatusCode, http.StatusText(resp.StatusCode))
		}
	}
	if got := contentDigest(resp); got != "" && got.Algorithm() == desc.Digest.Algorithm() && got != desc.Digest {
		return nil, classf(errdefs.ErrDataLoss, "the registry stored %s, not %s", got, desc.Digest)
	}
	return resp, nil
}
