// Package look reads the layers of an image without unpacking them: their entries, the files that result from all
// layers together, and the contents of single files.
//
// Layers are read through a [Source]. [Stored] reads the layers of a store. Any code that can list the entries of a
// layer, and return the contents of some of them, can be a Source, such as an index of a layer in a registry that is
// read in ranges.
package look

import (
	"archive/tar"
	"context"
	"fmt"
	"hash"
	"io"
	"slices"
	"strconv"

	"distkit/content"
	"distkit/errclass"
	"distkit/image"
	"distkit/layer"
	"distkit/layer/tree"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// A Source returns the entries of a layer.
type Source interface {
	// Walk calls f with the entries of a layer in the order of the archive. n counts all entries from 0 on. If only is
	// not nil, f is called only for the entries with these numbers, which ascend, and once for each. content is valid
	// until f returns. It may be Unread if only is nil. A nil error means that everything passed to f has been
	// verified.
	Walk(ctx context.Context, only []int64, f func(n int64, h *tar.Header, content io.Reader) error) error
}

// Unread is the content of an entry if a Source lists the layer without contents. Reading it fails with NotImplemented.
var Unread io.Reader = unread{}

type unread struct{}

func (unread) Read([]byte) (int, error) {
	return 0, errclass.Errorf(errdefs.ErrNotImplemented, "the layer is listed without contents")
}

// A Layer is a layer of an image, with the source of its entries.
type Layer struct {
	image.Layer
	Source
}

// Layers returns the layers of the platform's manifest, the lowest first, which read their entries from the store.
// Errors are those of [image.Walker.Layers].
func Layers(ctx context.Context, w image.Walker, img image.Image) ([]Layer, error) {
	list, err := w.Layers(ctx, img.Target)
	if err != nil {
		return nil, err
	}
	return Of(w.Store, list), nil
}

// Of returns the layers, which read their entries from the store.
func Of(store *content.Store, list []image.Layer) []Layer {
	layers := make([]Layer, len(list))
	for i, l := range list {
		layers[i] = Layer{l, Stored(store, l)}
	}
	return layers
}

// Stored is a Source that reads the layer's blob in a store. The blob must have the layer's diff ID, or its digest if
// no diff ID is known. Every Walk reads the whole blob, since only its end shows whether it is correct.
func Stored(store *content.Store, l image.Layer) Source { return stored{store, l} }

type stored struct {
	store *content.Store
	layer image.Layer
}

func (s stored) Walk(ctx context.Context, only []int64, f func(n int64, h *tar.Header, content io.Reader) error) error {
	file, err := s.store.File(s.layer.Digest)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := Stream(ctx, file, s.layer.Digest, s.layer.DiffID, only, f); err != nil {
		return fmt.Errorf("layer %s: %w", s.layer.Digest, err)
	}
	return nil
}

// Stream implements a Source's Walk for a layer that is read from r to its end. The layer may be plain, or compressed
// with gzip or zstd. It must have the diff ID, if one is given, or else the digest, if one is given. DataLoss: the
// layer is corrupt, or is another layer. Errors of f are returned as they are.
func Stream(ctx context.Context, r io.Reader, dgst, diffID digest.Digest, only []int64, f func(n int64, h *tar.Header, content io.Reader) error) error {
	sum := verifier{r: r}
	if diffID == "" && dgst != "" {
		sum.hash = dgst.Algorithm().Hash()
		r = &sum
	}
	in := layer.NewReader(ctx, r, 0, nil)
	defer in.Close()
	for n := int64(0); ; n++ {
		h, err := in.Next()
		if err == io.EOF {
			break
		} else if err != nil {
			return err
		}
		if only != nil && (len(only) == 0 || only[0] != n) {
			continue
		} else if only != nil {
			only = only[1:]
		}
		if err := f(n, h, in); err != nil {
			return err
		}
	}
	if err := in.End(diffID); err != nil {
		return err
	}
	if sum.hash == nil {
		return nil
	}
	in.Close()
	return sum.verify(dgst)
}

// A verifier hashes the bytes that are read.
type verifier struct {
	r    io.Reader
	hash hash.Hash
}

func (v *verifier) Read(p []byte) (int, error) {
	n, err := v.r.Read(p)
	v.hash.Write(p[:n])
	return n, err
}

// verify reads the bytes after the compressed data, and compares the digest of all bytes.
func (v *verifier) verify(want digest.Digest) error {
	if _, err := io.Copy(io.Discard, v); err != nil {
		return err
	}
	if got := digest.NewDigest(want.Algorithm(), v.hash); got != want {
		return errclass.Errorf(errdefs.ErrDataLoss, "digest mismatch: got %s", got)
	}
	return nil
}

// Choose returns the number of a layer, from 0 on. The user may name it by a number from 1 on, the lowest first, or
// from -1 on, the highest first, or by its digest or diff ID. NotFound: there is no such layer. InvalidArgument: the
// name is neither a number nor a digest.
func Choose(layers []Layer, name string) (int, error) {
	if n, err := strconv.Atoi(name); err == nil {
		if n < 0 {
			n += len(layers) + 1
		}
		if n < 1 || n > len(layers) {
			return 0, errclass.Errorf(errdefs.ErrNotFound, "layer %s: the image has %d layers", name, len(layers))
		}
		return n - 1, nil
	}
	dgst := digest.Digest(name)
	if err := dgst.Validate(); err != nil {
		return 0, errclass.Errorf(errdefs.ErrInvalidArgument, "layer %.80q is neither a number nor a digest", name)
	}
	i := slices.IndexFunc(layers, func(l Layer) bool { return l.Digest == dgst || l.DiffID == dgst })
	if i < 0 {
		return 0, errclass.Errorf(errdefs.ErrNotFound, "the image has no layer %s", dgst)
	}
	return i, nil
}

// Merge applies layers to a tree, the lowest first. It calls f with each entry and the change that it made, and end
// after each layer. Both get the layer's number, from 0 on. Errors are those of the layers' sources and of
// [tree.Tree.Apply].
func Merge[F any](ctx context.Context, layers []Layer, t *tree.Tree[F],
	f func(l int, n int64, c tree.Change, h *tar.Header, content io.Reader) error, end func(l int) error) error {
	for i, l := range layers {
		t.NextLayer()
		err := l.Walk(ctx, nil, func(n int64, h *tar.Header, content io.Reader) error {
			c, err := t.Apply(h)
			if err == nil {
				err = f(i, n, c, h, content)
			}
			if err != nil {
				return fmt.Errorf("entry %.200q: %w", h.Name, err)
			}
			return nil
		})
		if err != nil {
			return err
		}
		if end != nil {
			if err := end(i); err != nil {
				return err
			}
		}
	}
	return nil
}
