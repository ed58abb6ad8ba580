package serve

import (
	"context"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"distkit/disk/layout"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// blob sends a blob. The kernel moves its bytes from the file to the connection. The file stays open, so a sweep or a delete
// takes nothing from a reader.
func (s *Server) blob(w *reply, r *http.Request, t target) error {
	f, err := s.Store.File(t.digest)
	if errdefs.IsNotFound(err) {
		return notFound(codeBlobUnknown, "blob %s is not here", t.digest)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if s.Writable && r.Method == http.MethodHead {
		// Whoever finds the blob here does not send it, and names it later.
		if err := s.Store.Freshen(r.Context(), t.digest); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	w.send(r, t.digest, "application/octet-stream", f.File)
	return nil
}

// send answers with an object, or with a part of it, or says that the client has it already (RFC 9110, 13 and 14).
func (p *reply) send(r *http.Request, dgst digest.Digest, mediaType string, body io.ReadSeeker) {
	h := p.Header()
	h.Set("Content-Type", mediaType)
	h.Set("Docker-Content-Digest", string(dgst))
	h.Set("Etag", `"`+string(dgst)+`"`)
	h.Set("X-Content-Type-Options", "nosniff")
	if strings.Contains(r.Header.Get("Range"), ",") {
		r.Header.Del("Range") // several ranges in one reply help nobody, and may be ignored
	}
	http.ServeContent(p, r, "", time.Time{}, body)
}

// manifest sends a manifest or index.
func (s *Server) manifest(w *reply, r *http.Request, t target) error {
	d, err := s.resolve(r, t)
	if errdefs.IsNotFound(err) {
		return notFound(codeManifestUnknown, "%s has no %s", t.repository, t.object)
	}
	if err != nil {
		return err
	}
	mediaType, err := s.typeOf(r.Context(), d.Digest)
	if errdefs.IsNotFound(err) {
		return notFound(codeManifestUnknown, "manifest %s is not here", d.Digest)
	}
	if err != nil {
		return err
	}
	if mediaType == "" && t.digest == "" {
		mediaType = d.MediaType // the name tells what the document does not
	}
	if mediaType == "" {
		return notFound(codeManifestUnknown, "%s is no manifest", d.Digest)
	}
	f, err := s.Store.File(d.Digest)
	if err != nil {
		return err
	}
	defer f.Close()
	w.send(r, d.Digest, mediaType, f.File)
	return nil
}

// typeOf verifies a document, and returns the media type that it tells, "" for what is no manifest. It is not kept in memory: a
// client may take a minute to read it.
func (s *Server) typeOf(ctx context.Context, dgst digest.Digest) (mediaType string, err error) {
	release, err := s.documents.take(ctx, maxDocuments)
	if err != nil {
		return "", err
	}
	defer release()
	b, err := s.document(dgst)
	if err == nil {
		mediaType, _ = image.TypeOf(b)
	}
	return mediaType, err
}

// resolve returns what a tag or digest means. NotFound if there is no such tag.
func (s *Server) resolve(r *http.Request, t target) (v1.Descriptor, error) {
	if t.digest != "" {
		return v1.Descriptor{Digest: t.digest}, nil
	}
	img, err := s.lookup(t.repository, t.object, upstream(r))
	return img.Target, err
}

// document reads a blob that is small enough to be a manifest, and verifies it.
func (s *Server) document(dgst digest.Digest) ([]byte, error) {
	f, err := s.Store.File(dgst)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if f.Size() > image.MaxDocument {
		return nil, notFound(codeManifestUnknown, "%s is too large for a manifest", dgst)
	}
	b := make([]byte, f.Size())
	if _, err := io.ReadFull(f, b); err != nil {
		return nil, err
	}
	if dgst.Algorithm().FromBytes(b) != dgst {
		return nil, refuse(http.StatusInternalServerError, codeDigestInvalid, "blob %s is corrupt here", dgst)
	}
	return b, nil
}

// link tells the client where a list goes on (RFC 8288).
func link(w *reply, r *http.Request, n int, last string) {
	q := url.Values{"last": {last}}
	if text := r.URL.Query().Get("n"); text != "" {
		q.Set("n", strconv.Itoa(n))
	}
	for _, key := range []string{"ns", "artifactType"} {
		if text := r.URL.Query().Get(key); text != "" {
			q.Set(key, text)
		}
	}
	w.Header().Set("Link", "<"+(&url.URL{Path: r.URL.Path, RawQuery: q.Encode()}).String()+`>; rel="next"`)
}

func (s *Server) tags(w *reply, r *http.Request, t target) error {
	n, last, err := page(r)
	if err != nil {
		return err
	}
	all, ok, err := s.tagsOf(t.repository, upstream(r))
	if err != nil {
		return err
	}
	if !ok {
		return notFound(codeNameUnknown, "no image is named %s", t.repository)
	}
	part, more := after(all, last, n)
	if more && n > 0 {
		link(w, r, n, part[n-1])
	}
	return w.json(http.StatusOK, "application/json", struct {
		Name string   `json:"name"`
		Tags []string `json:"tags"`
	}{t.repository, emptyNotNull(part)})
}

func (s *Server) catalog(w *reply, r *http.Request) error {
	n, last, err := page(r)
	if err != nil {
		return err
	}
	all, err := s.list()
	if err != nil {
		return err
	}
	part, more := after(slices.Sorted(maps.Keys(all)), last, n)
	if more && n > 0 {
		link(w, r, n, part[n-1])
	}
	return w.json(http.StatusOK, "application/json", struct {
		Repositories []string `json:"repositories"`
	}{emptyNotNull(part)})
}

func emptyNotNull(list []string) []string {
	if list == nil {
		return []string{}
	}
	return list
}

// maxReferrers bounds a reply with referrers, in bytes: clients take no larger manifest.
const maxReferrers = 4 << 20

func (s *Server) referrers(w *reply, r *http.Request, t target) error {
	all, err := s.referrersOf(t.digest)
	if err != nil {
		return err
	}
	q := r.URL.Query()
	wanted, last := q.Get("artifactType"), digest.Digest(q.Get("last"))
	list, size := []v1.Descriptor{}, 0
	for _, d := range all {
		if wanted != "" && d.ArtifactType != wanted || d.Digest <= last {
			continue
		}
		document, err := s.document(d.Digest)
		if err != nil {
			continue // deleted since, or corrupt: nobody can have it
		}
		_, d.Annotations = layout.DescribeReferrer(document)
		b, err := json.Marshal(d)
		if err != nil {
			return err
		}
		if size += len(b); size > maxReferrers && len(list) > 0 {
			link(w, r, 0, string(list[len(list)-1].Digest))
			break
		}
		list = append(list, d)
	}
	if wanted != "" {
		w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	return w.json(http.StatusOK, v1.MediaTypeImageIndex, v1.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: list,
	})
}
