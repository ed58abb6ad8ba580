package serve

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"distkit/content"
	"distkit/disk/layout"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// change serves a request that may write. net/http cancels a request's context when the client closes its sending
// direction, which may be right after the request. The change continues nevertheless; bodies have their own deadlines.
func (s *Server) change(w *reply, r *http.Request, t target) error {
	r = r.WithContext(context.WithoutCancel(r.Context()))
	if s.Writable {
		switch {
		case t.kind == kindUploads && r.Method == http.MethodPost && t.object == "":
			return s.beginUpload(w, r, t)
		case t.kind == kindUploads && r.Method == http.MethodPatch && t.object != "":
			return s.continueUpload(w, r, t)
		case t.kind == kindUploads && r.Method == http.MethodPut && t.object != "":
			return s.endUpload(w, r, t)
		case t.kind == kindUploads && r.Method == http.MethodDelete && t.object != "":
			return s.cancelUpload(w, r, t)
		case t.kind == kindManifests && r.Method == http.MethodPut:
			return s.putManifest(w, r, t)
		}
	}
	if s.Deletable && r.Method == http.MethodDelete {
		ctx, cancel := context.WithTimeout(r.Context(), stall) // another process may hold the lock of the names
		defer cancel()
		r = r.WithContext(ctx)
		switch t.kind {
		case kindManifests:
			return s.deleteManifest(w, r, t)
		case kindBlobs:
			return s.deleteBlob(w, r, t)
		}
	}
	w.Header().Set("Allow", "GET, HEAD")
	return refuse(http.StatusMethodNotAllowed, codeUnsupported, "this registry does not allow %s here", printable(r.Method))
}

// The ref of an upload is upload:REPOSITORY/ID, so that dist-active(1) shows what it is, and an upload belongs to its
// repository.
const uploadPrefix = "upload:"

func (t target) ref() string { return uploadPrefix + t.repository + "/" + t.object }

const (
	// maxUploads bounds unfinished uploads. abandoned is how long an upload may be idle before it may be removed.
	maxUploads = 512
	abandoned  = time.Hour
)

// uploads makes checking maxUploads and beginning an upload a single step.
type uploads struct{ mu sync.Mutex }

func (s *Server) beginUpload(w *reply, r *http.Request, t target) error {
	q := r.URL.Query()
	if mount := digest.Digest(q.Get("mount")); mount != "" {
		if err := checkDigest(mount); err != nil {
			return err
		}
		// All repositories share the store's blobs, so it doesn't matter from which one the blob is mounted.
		switch err := s.retain(r.Context(), v1.Descriptor{Digest: mount}); {
		case err == nil:
			return s.created(w, t.path(kindBlobs, string(mount)), mount)
		case !errdefs.IsNotFound(err):
			return err
		}
	}
	want := digest.Digest(q.Get("digest"))
	if want != "" {
		if err := checkDigest(want); err != nil {
			return err
		}
	}
	if err := s.admitUpload(r.Context(), &t); err != nil {
		return err
	}
	if want != "" {
		err := s.finish(w, r, t, want)
		if err != nil {
			_ = s.Store.Abort(r.Context(), t.ref()) // the client doesn't know its ID
		}
		return err
	}
	w.Header().Set("Docker-Upload-UUID", t.object)
	s.accepted(w, t, 0)
	return nil
}

// admitUpload generates the ID of an upload, and begins its ingest.
func (s *Server) admitUpload(ctx context.Context, t *target) error {
	s.uploads.mu.Lock()
	defer s.uploads.mu.Unlock()
	all, err := s.Store.ListStatuses(ctx)
	if err != nil {
		return err
	}
	n := 0
	for _, st := range all {
		if !strings.HasPrefix(st.Ref, uploadPrefix) {
			continue
		}
		if !st.Active && time.Since(st.UpdatedAt) > abandoned && s.Store.Abort(ctx, st.Ref) == nil {
			continue
		}
		n++
	}
	if n >= maxUploads {
		e := refuse(http.StatusTooManyRequests, codeTooManyRequests, "there are %d unfinished uploads", n)
		e.headers = http.Header{"Retry-After": {"60"}}
		return e
	}
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails
	t.object = hex.EncodeToString(id)
	upload, err := s.Store.Writer(ctx, t.ref(), 0, "")
	if err != nil {
		return err
	}
	return upload.Close()
}

// openUpload opens an upload that has begun.
func (s *Server) openUpload(ctx context.Context, t target) (*content.Writer, error) {
	if _, err := s.status(ctx, t); err != nil {
		return nil, err
	}
	return s.Store.Writer(ctx, t.ref(), 0, "")
}

func (s *Server) status(ctx context.Context, t target) (content.Status, error) {
	st, err := s.Store.Status(ctx, t.ref())
	if errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) {
		err = notFound(codeUploadUnknown, "%s has no such upload", t.repository)
	}
	return st, err
}

// progress tells the client how much of an upload is stored, and where to continue.
func progress(w *reply, t target, offset int64) {
	w.Header().Set("Location", t.path(kindBlobs, kindUploads+"/"+t.object))
	w.Header().Set("Range", "0-"+strconv.FormatInt(max(offset-1, 0), 10))
	w.Header().Set("Content-Length", "0")
}

func (s *Server) accepted(w *reply, t target, offset int64) {
	progress(w, t, offset)
	w.WriteHeader(http.StatusAccepted)
}

func (s *Server) uploadStatus(w *reply, r *http.Request, t target) error {
	if !s.Writable || t.object == "" {
		return notFound(codeUploadUnknown, "%s has no such upload", t.repository)
	}
	st, err := s.status(r.Context(), t)
	if err != nil {
		return err
	}
	progress(w, t, st.Offset)
	w.Header().Del("Content-Length")
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// continueUpload stores a chunk or a stream. If that is interrupted, the received part is kept, and the client can ask
// how much it is.
func (s *Server) continueUpload(w *reply, r *http.Request, t target) error {
	upload, err := s.openUpload(r.Context(), t)
	if err != nil {
		return err
	}
	if err = s.receive(w, r, t, upload); err != nil {
		return s.giveUp(upload, err)
	}
	offset := upload.Offset()
	if err := upload.Close(); err != nil {
		return err
	}
	s.accepted(w, t, offset)
	return nil
}

func (s *Server) endUpload(w *reply, r *http.Request, t target) error {
	want := digest.Digest(r.URL.Query().Get("digest"))
	if err := checkDigest(want); err != nil {
		return err
	}
	return s.finish(w, r, t, want)
}

// finish stores the rest of an upload, which may be everything or nothing, and publishes the blob.
func (s *Server) finish(w *reply, r *http.Request, t target, want digest.Digest) error {
	upload, err := s.openUpload(r.Context(), t)
	if err != nil {
		return err
	}
	if err = s.receive(w, r, t, upload); err != nil {
		return s.giveUp(upload, err)
	}
	err = upload.Commit(r.Context(), 0, want, nil)
	switch {
	case errdefs.IsDataLoss(err):
		return cmp.Or(upload.Abort(), error(refuse(http.StatusBadRequest, codeDigestInvalid, "the content doesn't hash to %s", want)))
	case err != nil && !errdefs.IsAlreadyExists(err):
		return s.giveUp(upload, err)
	}
	return s.created(w, t.path(kindBlobs, string(want)), want)
}

// giveUp closes an upload after an error. It keeps what was received unless the disk is full.
func (s *Server) giveUp(upload *content.Writer, err error) error {
	if refusalOf(err).status == http.StatusInsufficientStorage {
		_ = upload.Abort()
	} else if cerr := upload.Close(); cerr != nil {
		return errors.Join(err, cerr)
	}
	return err
}

func (s *Server) created(w *reply, location string, dgst digest.Digest) error {
	w.Header().Set("Location", location)
	w.Header().Set("Docker-Content-Digest", string(dgst))
	w.Header().Set("Content-Length", "0")
	w.WriteHeader(http.StatusCreated)
	return nil
}

// receive appends a request's body to an upload, if the body begins where the upload ends.
func (s *Server) receive(w *reply, r *http.Request, t target, upload *content.Writer) error {
	if text := r.Header.Get("Content-Range"); text != "" {
		first, last, ok := parseRange(text)
		if !ok {
			return refuse(http.StatusRequestedRangeNotSatisfiable, codeUploadInvalid, "Content-Range %s is not of the form FIRST-LAST", printable(text))
		}
		if first != upload.Offset() {
			progress(w, t, upload.Offset())
			return refuse(http.StatusRequestedRangeNotSatisfiable, codeUploadInvalid, "the upload continues at byte %d, not at %d", upload.Offset(), first)
		}
		if r.ContentLength >= 0 && last-first+1 != r.ContentLength {
			return refuse(http.StatusBadRequest, codeSizeInvalid, "Content-Range %s and Content-Length %d differ", printable(text), r.ContentLength)
		}
	}
	before := upload.Offset()
	body := &body{r.Body, w.control, 0}
	if err := content.Copy(r.Context(), upload, body); err != nil {
		if errors.As(err, new(*cutError)) {
			err = refuse(http.StatusBadRequest, codeUploadInvalid, "the body ended early, after %d bytes", upload.Offset()-before)
		}
		return err
	}
	if n := upload.Offset() - before; r.ContentLength >= 0 && n != r.ContentLength {
		return refuse(http.StatusBadRequest, codeSizeInvalid, "got %d bytes, not %d", n, r.ContentLength)
	}
	return nil
}

// parseRange parses the Content-Range of a chunk: FIRST-LAST, both included (distribution-spec, "Pushing a blob in
// chunks").
func parseRange(s string) (first, last int64, ok bool) {
	a, b, ok := strings.Cut(strings.TrimPrefix(s, "bytes "), "-")
	b, _, _ = strings.Cut(b, "/")
	first, err1 := strconv.ParseInt(a, 10, 64)
	last, err2 := strconv.ParseInt(b, 10, 64)
	return first, last, ok && err1 == nil && err2 == nil && first >= 0 && last >= first
}

// body is a request's body. Each piece of it has its own deadline, so its sender can't stall.
type body struct {
	io.Reader
	control *http.ResponseController
	left    int // bytes until the deadline is extended
}

func (b *body) Read(p []byte) (int, error) {
	if b.left <= 0 {
		_ = b.control.SetReadDeadline(time.Now().Add(stall))
		b.left = piece / 16
	}
	n, err := b.Reader.Read(p)
	b.left -= n
	if err != nil && err != io.EOF {
		err = &cutError{err}
	}
	return n, err
}

// cutError is the error of a body that ends early.
type cutError struct{ error }

func (e *cutError) Unwrap() error { return e.error }

func (s *Server) cancelUpload(w *reply, r *http.Request, t target) error {
	if _, err := s.status(r.Context(), t); err != nil {
		return err
	}
	if err := s.Store.Abort(r.Context(), t.ref()); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// putManifest stores a manifest or index, and makes the tag's name point at it.
func (s *Server) putManifest(w *reply, r *http.Request, t target) error {
	b, release, err := s.receiveManifest(r)
	if err != nil {
		return err
	}
	defer release()
	decoded, err := s.documents.take(r.Context(), maxDocuments)
	if err != nil {
		return err
	}
	d, parts, err := describe(b, r.Header.Get("Content-Type"), t.digest)
	decoded()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), stall)
	defer cancel()
	if err := s.keep(ctx, t, upstream(r), d, parts, b); err != nil {
		return err
	}
	if subject := layout.Subject(b); subject != "" {
		w.Header().Set("OCI-Subject", string(subject))
	}
	return s.created(w, t.path(kindManifests, string(d.Digest)), d.Digest)
}

// receiveManifest reads a body, which must arrive completely within the time for a piece. A large one needs a slot, so
// clients that send large ones slowly don't block small ones. The caller must call release when it is done with the
// body.
func (s *Server) receiveManifest(r *http.Request) (b []byte, release func(), err error) {
	release = func() {}
	b, err = io.ReadAll(io.LimitReader(r.Body, small))
	if err == nil && len(b) == small {
		if release, err = s.arriving.take(r.Context(), maxDocuments); err != nil {
			return nil, nil, err
		}
		var rest []byte
		rest, err = io.ReadAll(io.LimitReader(r.Body, image.MaxDocument+1-small))
		b = append(b, rest...)
	}
	switch {
	case err != nil:
		err = refuse(http.StatusBadRequest, codeManifestInvalid, "the body ended early")
	case len(b) > image.MaxDocument:
		err = refuse(http.StatusRequestEntityTooLarge, codeManifestInvalid, "a manifest has at most %d bytes", image.MaxDocument)
	default:
		return b, release, nil
	}
	release()
	return nil, nil, err
}

// describe checks a pushed manifest, and returns the blobs that must be stored before it.
func describe(b []byte, contentType string, want digest.Digest) (d v1.Descriptor, parts []v1.Descriptor, err error) {
	d = v1.Descriptor{Digest: cmp.Or(want, digest.FromBytes(b)), Size: int64(len(b))}
	if d.Digest.Algorithm().FromBytes(b) != d.Digest {
		return d, nil, refuse(http.StatusBadRequest, codeDigestInvalid, "the manifest doesn't hash to %s", want)
	}
	var ok bool
	if d.MediaType, ok = image.TypeOf(b); !ok {
		return d, nil, refuse(http.StatusBadRequest, codeManifestInvalid, "the body is not a manifest or index")
	}
	if image.IsManifest(d.MediaType) || image.IsIndex(d.MediaType) {
		if err := image.Validate(b); err != nil {
			return d, nil, refuse(http.StatusBadRequest, codeManifestInvalid, "%s", err)
		}
	}
	if contentType != "" {
		if declared, _, err := mime.ParseMediaType(contentType); err != nil || declared != strings.ToLower(d.MediaType) {
			return d, nil, refuse(http.StatusBadRequest, codeManifestInvalid, "Content-Type is %s, but the manifest's own type is %s", printable(contentType), printable(d.MediaType))
		}
	}
	return d, image.Parts(b), nil
}

// keep stores a manifest and its name. It keeps sweeps away from the check of the parts until the name exists.
func (s *Server) keep(ctx context.Context, t target, upstream string, d v1.Descriptor, parts []v1.Descriptor, b []byte) error {
	if err := s.Store.Init(); err != nil {
		return err
	}
	s.hold.RLock()
	defer s.hold.RUnlock()
	release, err := s.Store.Enter(ctx)
	if err != nil {
		return err
	}
	defer release()
	for _, part := range parts {
		if err := checkDigest(part.Digest); err != nil {
			return err
		}
		size, err := s.Store.Size(part.Digest)
		if errdefs.IsNotFound(err) || err == nil && size != part.Size {
			e := refuse(http.StatusNotFound, codeManifestBlobUnknown, "the manifest needs %s (%d bytes), which is not stored here: push it first", part.Digest, part.Size)
			e.detail = map[string]string{"digest": string(part.Digest)}
			return e
		}
		if err != nil {
			return err
		}
	}
	if err := s.settle(parts); err != nil {
		return err
	}
	if _, err := content.WriteBlob(ctx, s.Store, "manifest:"+string(d.Digest), strings.NewReader(string(b)), d.Size, d.Digest); err != nil {
		return err
	}
	subject := layout.Subject(b)
	if subject != "" {
		defer s.forgetReferrers() // after its entry is written
	}
	if t.digest != "" {
		if subject == "" {
			return nil
		}
		return s.Names.AddReferrers(ctx, []layout.Referrer{{Descriptor: d, Subject: subject}})
	}
	_, err = s.Names.Replace(ctx, s.nameFor(t, upstream), d)
	return err
}

// nameFor returns the name for a push. A name that is only a tag, by another tool, is kept as it is.
func (s *Server) nameFor(t target, upstream string) string {
	name := s.candidates(t.repository, t.object, upstream)[0]
	if upstream == "" && t.repository == s.Bare {
		if _, err := s.Names.Get(name); errdefs.IsNotFound(err) {
			if _, err := s.Names.Get(t.object); err == nil {
				return t.object
			}
		}
	}
	return name
}
