package serve

import (
	"context"
	"errors"
	"io/fs"
	"net/http"
	"time"

	"distkit/content"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// sweepPatience is how long a delete waits for processes that hold the store.
const sweepPatience = 10 * time.Second

// deleteManifest deletes a tag, or a manifest with all tags of the repository that point at it. Its blob is deleted too
// if nothing in the store needs it; config and layers are left to a sweep. A signature attached by a tag exists in
// every repository, and is deleted from all of them.
func (s *Server) deleteManifest(w *reply, r *http.Request, t target) error {
	if t.digest == "" {
		img, err := s.lookup(t.repository, t.object, upstream(r))
		if err == nil {
			_, err = s.deleteNames(r.Context(), []string{img.Name}, s.Names.DeleteAll)
		}
		if errdefs.IsNotFound(err) {
			d, ok := s.tagged(t.object)
			if !ok {
				return notFound(codeManifestUnknown, "%s has no %s", t.repository, t.object)
			}
			_, err = s.deleteNames(r.Context(), []string{string(d.Digest)}, s.Names.DeleteUnnamed)
		}
		if err != nil {
			return err
		}
		return accept(w)
	}
	mediaType, _, err := s.inspect(r.Context(), t.digest)
	if errdefs.IsNotFound(err) {
		return notFound(codeManifestUnknown, "manifest %s is not stored here", t.digest)
	}
	if err != nil {
		return err
	}
	if mediaType == "" {
		return notFound(codeManifestUnknown, "%s is not a manifest", t.digest)
	}
	names, err := s.namesOf(t.digest, t.repository, upstream(r))
	if err != nil {
		return err
	}
	named, err := s.deleteNames(r.Context(), names, s.Names.DeleteAll)
	if err != nil {
		return err
	}
	listed, err := s.deleteNames(r.Context(), []string{string(t.digest)}, s.Names.DeleteUnnamed)
	if err != nil {
		return err
	}
	if deleted, err := s.sweep(r.Context(), t.digest); err != nil {
		return err
	} else if !deleted && !named && !listed {
		return refuse(http.StatusMethodNotAllowed, codeDenied, "%s is needed by another image, or by a container", t.digest)
	}
	return accept(w)
}

func (s *Server) deleteBlob(w *reply, r *http.Request, t target) error {
	tree, _, err := s.Store.FindBlob(t.digest)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return notFound(codeBlobUnknown, "blob %s is not stored here", t.digest)
	case err != nil:
		return err
	case tree != s.Store.Tree:
		return refuse(http.StatusMethodNotAllowed, codeDenied, "%s is in an alternate store, which is read-only", t.digest)
	}
	deleted, err := s.sweep(r.Context(), t.digest)
	if err != nil {
		return err
	}
	if !deleted {
		return refuse(http.StatusMethodNotAllowed, codeDenied, "%s is needed by an image or a container", t.digest)
	}
	return accept(w)
}

func accept(w *reply) error {
	w.Header().Set("Content-Length", "0")
	w.WriteHeader(http.StatusAccepted)
	return nil
}

// deleteNames reports whether any of the names existed.
func (s *Server) deleteNames(ctx context.Context, names []string, remove func(context.Context, []string) ([]error, error)) (any bool, err error) {
	if len(names) == 0 {
		return false, nil
	}
	errs, err := remove(ctx, names)
	for _, e := range errs {
		any = any || e == nil && err == nil
	}
	return any, err
}

// sweep deletes one blob unless a name, a container or a label needs it. It is a normal sweep with its rules and locks.
func (s *Server) sweep(ctx context.Context, dgst digest.Digest) (deleted bool, err error) {
	s.hold.Lock()
	defer s.hold.Unlock()
	sweep := image.Sweep{Store: s.Store, Before: time.Now(), Only: dgst, Wait: sweepPatience}
	_, err = sweep.Run(ctx, func(content.Info) error {
		deleted = true
		return nil
	})
	return deleted, err
}
