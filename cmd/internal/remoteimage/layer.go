package remoteimage

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"net/http"

	"distkit/errclass"
	"distkit/image/look"
	"distkit/layer"
	"distkit/layer/index"
	"distkit/layer/toc"

	"github.com/containerd/errdefs"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// gap is how many unneeded bytes of a layer are fetched to save a request.
const gap = 512 << 10

// remoteLayer is a layer at a remote.
type remoteLayer struct {
	v1.Descriptor
	image  *remoteImage
	number int
	index  *index.Index // nil if there is none yet
	toc    *toc.Table   // the layer's own table of contents, where it is believed and there is no index
}

// Walk calls f with the layer's entries: see [look.Source].
func (l *remoteLayer) Walk(ctx context.Context, only []int64, f func(n int64, h *tar.Header, content io.Reader) error) error {
	var err error
	switch {
	case l.toc != nil:
		err = l.byTable(ctx, only, f)
	case l.index == nil:
		err = l.stream(ctx, only, f)
	case only == nil:
		err = l.list(ctx, f)
	default:
		err = l.files(ctx, only, f)
	}
	if err == nil {
		return nil
	}
	if errdefs.IsDataLoss(err) {
		l.image.cache.remove(l.Descriptor) // the index may be what is damaged
	}
	return fmt.Errorf("layer %s: %w", l.Digest, err)
}

// Listed reports whether the layer has an index or a table of contents.
func (l *remoteLayer) Listed() bool { return l.index != nil || l.toc != nil }

// stream fetches the whole layer, and makes its index at the same time.
func (l *remoteLayer) stream(ctx context.Context, only []int64, f func(n int64, h *tar.Header, content io.Reader) error) error {
	body, err := l.image.remote.Fetch(ctx, string(l.Digest), "mediatype:"+l.MediaType, fmt.Sprintf("size:%d", l.Size))
	if err != nil {
		return err
	}
	defer body.Close()
	b, err := index.NewBuilder(ctx, body, l.Digest, "")
	if err != nil {
		return err
	}
	defer b.Close()
	for n := int64(0); ; n++ {
		h, err := b.Next()
		if err == io.EOF {
			break
		} else if err != nil {
			return err
		}
		if only != nil {
			if len(only) == 0 || only[0] != n {
				continue
			}
			only = only[1:]
		}
		if err := f(n, h, b); err != nil {
			return err
		}
	}
	if err := b.End(l.image.diffID(l.number)); err != nil {
		return err
	}
	l.index = l.image.cache.add(l.Descriptor, b.Write)
	return nil
}

// byTable calls f with entries of the layer's own table of contents.
func (l *remoteLayer) byTable(ctx context.Context, only []int64, f func(n int64, h *tar.Header, content io.Reader) error) error {
	e, err := l.toc.Entries(ctx)
	if err != nil {
		return err
	}
	defer e.Close()
	contents := l.toc.Contents(ctx, l.bytes)
	defer contents.Close()
	for n := int64(0); only == nil || len(only) > 0; n++ {
		h, chunks, err := e.Next()
		switch {
		case err == io.EOF && only == nil:
			return nil
		case err == io.EOF:
			return errclass.Errorf(errdefs.ErrDataLoss, "table of contents: there is no entry %d", only[0])
		case err != nil:
			return err
		case only == nil:
			err = f(n, h, look.Unread)
		case only[0] == n:
			only = only[1:]
			contents.Open(chunks, len(only) > 0)
			err = f(n, h, contents)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// list calls f with all entries in the index, without their contents.
func (l *remoteLayer) list(ctx context.Context, f func(n int64, h *tar.Header, content io.Reader) error) error {
	e, err := l.index.Entries(ctx)
	if err != nil {
		return err
	}
	defer e.Close()
	for n := int64(0); ; n++ {
		h, _, err := e.Next()
		if err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		if err := f(n, h, look.Unread); err != nil {
			return err
		}
	}
}

// files calls f with the entries in only. Entries close to each other are fetched in one request and decompressed in
// one pass, so nothing is read twice. To know how much to request, the index's entries are read twice in parallel: once
// to look ahead, and once for f. None is kept in memory.
func (l *remoteLayer) files(ctx context.Context, only []int64, f func(n int64, h *tar.Header, content io.Reader) error) error {
	ahead, err := l.choose(ctx, only)
	if err != nil {
		return err
	}
	defer ahead.Close()
	e, err := l.choose(ctx, only)
	if err != nil {
		return err
	}
	defer e.Close()
	holes := &layer.Holes{}
	_, _, first, err := ahead.next()
	for err == nil {
		last, next, k := first, index.Place{}, 0
		for _, end := l.index.Extent(first); ; {
			k++
			if _, _, next, err = ahead.next(); err != nil {
				break
			}
			begin, to := l.index.Extent(next)
			if begin > end+gap {
				break
			}
			last, end = next, max(end, to)
		}
		if err != nil && err != io.EOF {
			return err
		}
		if err := l.group(ctx, e, k, first, last, holes, f); err != nil {
			return err
		}
		first = next
	}
	if err == io.EOF {
		return nil
	}
	return err
}

// group calls f with the next k entries, which are fetched in one request.
func (l *remoteLayer) group(ctx context.Context, e *chosen, k int, first, last index.Place, holes *layer.Holes,
	f func(n int64, h *tar.Header, content io.Reader) error) error {
	files, err := l.index.Files(ctx, l.bytes, first, last, holes)
	if err != nil {
		return err
	}
	defer files.Close()
	for range k {
		n, h, at, err := e.next()
		if err == nil {
			err = files.Next(h, at)
		}
		if err == nil {
			err = f(n, h, files)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// chosen are selected entries of an index.
type chosen struct {
	*index.Entries
	only []int64 // numbers of those that are left
	read int64
}

func (l *remoteLayer) choose(ctx context.Context, only []int64) (*chosen, error) {
	e, err := l.index.Entries(ctx)
	return &chosen{e, only, 0}, err
}

// next returns the next entry with its number, or io.EOF.
func (c *chosen) next() (int64, *tar.Header, index.Place, error) {
	for len(c.only) > 0 {
		h, at, err := c.Next()
		if err == io.EOF {
			err = errclass.Errorf(errdefs.ErrDataLoss, "index: there is no entry %d", c.only[0])
		}
		if err != nil {
			return 0, nil, at, err
		}
		n := c.read
		c.read++
		if n == c.only[0] {
			c.only = c.only[1:]
			return n, h, at, nil
		}
	}
	return 0, nil, index.Place{}, io.EOF
}

// bytes fetches a range of the layer.
func (l *remoteLayer) bytes(ctx context.Context, from, to int64) (io.ReadCloser, error) {
	if from >= to {
		return http.NoBody, nil
	}
	return l.image.remote.Fetch(ctx, string(l.Digest), "mediatype:"+l.MediaType, fmt.Sprintf("size:%d", l.Size), fmt.Sprintf("range:%d-%d", from, to-1))
}
