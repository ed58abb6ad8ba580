package serve

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"distkit/content"
	"distkit/disk"
	"distkit/disk/layout"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// blob sends a blob. The kernel moves its bytes from the file to the connection. The file stays open, so a sweep or
// delete doesn't affect the reader.
func (s *Server) blob(w *reply, r *http.Request, t target) error {
	f, err := s.Store.File(t.digest)
	if errdefs.IsNotFound(err) {
		return notFound(codeBlobUnknown, "blob %s is not stored here", t.digest)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if s.Writable && r.Method == http.MethodHead {
		// A client that finds the blob here doesn't send it, and refers to it later: so retain it.
		if err := s.retain(r.Context(), v1.Descriptor{Digest: t.digest}); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	w.send(r, t.digest, "application/octet-stream", f.File)
	return nil
}

// send sends an object or a part of it, or tells the client that it has the object already (RFC 9110, 13 and 14).
func (p *reply) send(r *http.Request, dgst digest.Digest, mediaType string, body io.ReadSeeker) {
	h := p.Header()
	h.Set("Content-Type", mediaType)
	h.Set("Docker-Content-Digest", string(dgst))
	h.Set("Etag", `"`+string(dgst)+`"`)
	h.Set("X-Content-Type-Options", "nosniff")
	if strings.Contains(r.Header.Get("Range"), ",") {
		r.Header.Del("Range") // nobody needs several ranges in one reply, and the server may ignore them
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
	mediaType, parts, err := s.inspect(r.Context(), d.Digest)
	if errdefs.IsNotFound(err) {
		return notFound(codeManifestUnknown, "manifest %s is not stored here", d.Digest)
	}
	if err != nil {
		return err
	}
	if mediaType == "" && t.digest == "" {
		mediaType = d.MediaType // the name has the type that the document lacks
	}
	if mediaType == "" {
		return notFound(codeManifestUnknown, "%s is not a manifest", d.Digest)
	}
	if s.Writable && r.Method == http.MethodHead {
		// A client that finds the manifest here sends neither it nor its parts, and refers to it later: so retain them.
		if err := s.retain(r.Context(), append(parts, d)...); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	f, err := s.Store.File(d.Digest)
	if err != nil {
		return err
	}
	defer f.Close()
	w.send(r, d.Digest, mediaType, f.File)
	return nil
}

// inspect verifies a document. It returns the media type that the document states, or "" if it isn't a manifest, and
// its parts. It doesn't keep the document in memory, since a client may take a minute to read it.
func (s *Server) inspect(ctx context.Context, dgst digest.Digest) (mediaType string, parts []v1.Descriptor, err error) {
	err = s.document(ctx, dgst, func(b []byte) {
		mediaType, _ = image.TypeOf(b)
		parts = image.Parts(b)
	})
	return mediaType, parts, err
}

// resolve returns the descriptor for a tag or digest. NotFound if the tag doesn't exist.
func (s *Server) resolve(r *http.Request, t target) (v1.Descriptor, error) {
	if t.digest != "" {
		return v1.Descriptor{Digest: t.digest}, nil
	}
	img, err := s.lookup(t.repository, t.object, upstream(r))
	if errdefs.IsNotFound(err) {
		if d, ok := s.tagged(t.object); ok {
			return d, nil
		}
	}
	return img.Target, err
}

// document calls f with the content of a blob that may be a manifest, verified. f must not keep it.
func (s *Server) document(ctx context.Context, dgst digest.Digest, f func([]byte)) error {
	release, err := s.documents.take(ctx, maxDocuments)
	if err != nil {
		return err
	}
	defer release()
	file, err := s.Store.File(dgst)
	if err != nil {
		return err
	}
	defer file.Close()
	if file.Size() > image.MaxDocument {
		return notFound(codeManifestUnknown, "%s is too large for a manifest", dgst)
	}
	b := make([]byte, file.Size())
	if _, err := io.ReadFull(file, b); err != nil {
		return err
	}
	if dgst.Algorithm().FromBytes(b) != dgst {
		return refuse(http.StatusInternalServerError, codeDigestInvalid, "the stored blob %s is corrupt", dgst)
	}
	f(b)
	return nil
}

// retain marks blobs as used now, and makes their names durable. NotFound if one isn't stored; the others are still
// retained. It completes even if the client has closed its sending direction, because the client waits for the reply.
func (s *Server) retain(ctx context.Context, blobs ...v1.Descriptor) (err error) {
	ctx = context.WithoutCancel(ctx)
	for _, d := range blobs {
		switch ferr := s.Store.Freshen(ctx, d.Digest); {
		case errdefs.IsNotFound(ferr), errdefs.IsInvalidArgument(ferr), errdefs.IsNotImplemented(ferr):
			err = ferr // not stored, or no store can hold it
		case ferr != nil:
			return ferr
		}
	}
	return cmp.Or(s.settle(blobs), err)
}

// settle makes the names of blobs durable. Another process may have renamed a blob into place without having synced the
// directory yet.
func (s *Server) settle(blobs []v1.Descriptor) error {
	done := map[string]bool{}
	for _, d := range blobs {
		if content.Validate(d.Digest) != nil {
			continue
		}
		dir := path.Dir(layout.BlobName(d.Digest))
		if done[dir] {
			continue
		}
		done[dir] = true
		if err := s.Store.Tree.SyncDir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) && !disk.Unwritable(err) {
			return err
		}
	}
	return nil
}

// link adds a link to the next page of a list (RFC 8288).
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

// maxReferrers bounds a reply with referrers, which is in memory until the client has read it. maxRead bounds the
// documents that are read for it. Both are in bytes. The client asks for the rest.
const (
	maxReferrers = 256 << 10
	maxRead      = 64 << 20
)

func (s *Server) referrers(w *reply, r *http.Request, t target) error {
	// What is read is bounded, and what the first request reads is kept for others. So continue even if the client has
	// closed its sending direction.
	ctx := context.WithoutCancel(r.Context())
	all, err := s.referrersOf(ctx, t.digest)
	if err != nil {
		return err
	}
	q := r.URL.Query()
	wanted, last := q.Get("artifactType"), digest.Digest(q.Get("last"))
	list, size, left := []v1.Descriptor{}, 0, maxRead
	for _, d := range all {
		if wanted != "" && d.ArtifactType != wanted || d.Digest <= last {
			continue
		}
		if left < 0 {
			link(w, r, 0, string(last))
			break
		}
		err := s.document(ctx, d.Digest, func(b []byte) {
			left -= len(b)
			_, d.Annotations = layout.DescribeReferrer(b)
		})
		if err != nil {
			continue // deleted since, or corrupt
		}
		b, err := json.Marshal(d)
		if err != nil {
			return err
		}
		if size += len(b); size > maxReferrers && len(list) > 0 {
			link(w, r, 0, string(last))
			break
		}
		list, last = append(list, d), d.Digest
	}
	if wanted != "" {
		w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	return w.json(http.StatusOK, v1.MediaTypeImageIndex, v1.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: list,
	})
}
