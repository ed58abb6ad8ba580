package remoteimage

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"net/http"

	"distkit/layer/index"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// batch is how many entries are looked up before any of them is read.
	batch = 1024
	// gap is how many bytes of a layer are read and not used to spare a request.
	gap = 512 << 10
)

// remoteLayer is a layer at a remote.
type remoteLayer struct {
	v1.Descriptor
	image  *remoteImage
	number int
	index  *index.Index // nil if there is none yet
}

// Walk gives the layer's entries: see [look.Source].
func (l *remoteLayer) Walk(ctx context.Context, only []int64, f func(n int64, h *tar.Header, content io.Reader) error) error {
	var err error
	switch {
	case l.index == nil:
		err = l.stream(ctx, only, f)
	case only == nil:
		err = l.list(ctx, f)
	default:
		err = l.files(ctx, only, f)
	}
	if err != nil {
		return fmt.Errorf("layer %s: %w", l.Digest, err)
	}
	return nil
}

// stream fetches the whole layer, and makes its index meanwhile.
func (l *remoteLayer) stream(ctx context.Context, only []int64, f func(n int64, h *tar.Header, content io.Reader) error) (err error) {
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
	l.index, err = l.image.cache.add(l.Descriptor, func(w io.Writer) error { return b.Write(w, l.image.diffID(l.number)) })
	return err
}

// list gives all entries out of the index. Contents are fetched once they are read.
func (l *remoteLayer) list(ctx context.Context, f func(n int64, h *tar.Header, content io.Reader) error) error {
	e, err := l.index.Entries(ctx)
	if err != nil {
		return err
	}
	defer e.Close()
	for n := int64(0); ; n++ {
		h, at, err := e.Next()
		if err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		content := &lazy{ctx: ctx, layer: l, h: h, at: at}
		err = f(n, h, content)
		content.close()
		if err != nil {
			return err
		}
	}
}

// lazy is the content of an entry, which is opened when it is read.
type lazy struct {
	ctx   context.Context
	layer *remoteLayer
	h     *tar.Header
	at    index.Place
	files *index.Files
}

func (z *lazy) Read(p []byte) (int, error) {
	if z.files == nil {
		files, err := z.layer.index.Files(z.ctx, z.layer.bytes, z.at, z.at)
		if err != nil {
			return 0, err
		}
		z.files = files
		if err := files.Next(z.h, z.at); err != nil {
			return 0, err
		}
	}
	return z.files.Read(p)
}

func (z *lazy) close() {
	if z.files != nil {
		_ = z.files.Close()
	}
}

// A wanted is an entry that is to be read.
type wanted struct {
	n  int64
	h  *tar.Header
	at index.Place
}

// files gives some entries. What lies close together is fetched in one request.
func (l *remoteLayer) files(ctx context.Context, only []int64, f func(n int64, h *tar.Header, content io.Reader) error) error {
	e, err := l.index.Entries(ctx)
	if err != nil {
		return err
	}
	defer e.Close()
	var list []wanted
	for n := int64(0); len(only) > 0; n++ {
		h, at, err := e.Next()
		if err == io.EOF {
			return fmt.Errorf("entry %d: there is none", only[0])
		} else if err != nil {
			return err
		}
		if only[0] != n {
			continue
		}
		only = only[1:]
		if list = append(list, wanted{n, h, at}); len(list) == batch || len(only) == 0 {
			if err := l.read(ctx, list, f); err != nil {
				return err
			}
			list = list[:0]
		}
	}
	return nil
}

// read gives a batch of entries.
func (l *remoteLayer) read(ctx context.Context, list []wanted, f func(n int64, h *tar.Header, content io.Reader) error) error {
	for len(list) > 0 {
		_, end := l.index.Extent(list[0].at)
		k := 1
		for ; k < len(list); k++ {
			begin, next := l.index.Extent(list[k].at)
			if begin > end+gap {
				break
			}
			end = max(end, next)
		}
		if err := l.group(ctx, list[:k], f); err != nil {
			return err
		}
		list = list[k:]
	}
	return nil
}

// group gives entries that are fetched in one request.
func (l *remoteLayer) group(ctx context.Context, list []wanted, f func(n int64, h *tar.Header, content io.Reader) error) error {
	files, err := l.index.Files(ctx, l.bytes, list[0].at, list[len(list)-1].at)
	if err != nil {
		return err
	}
	defer files.Close()
	for _, w := range list {
		if err := files.Next(w.h, w.at); err != nil {
			return err
		}
		if err := f(w.n, w.h, files); err != nil {
			return err
		}
	}
	return nil
}

// bytes fetches a range of the layer.
func (l *remoteLayer) bytes(ctx context.Context, from, to int64) (io.ReadCloser, error) {
	if from >= to {
		return http.NoBody, nil
	}
	return l.image.remote.Fetch(ctx, string(l.Digest), "mediatype:"+l.MediaType, fmt.Sprintf("size:%d", l.Size), fmt.Sprintf("range:%d-%d", from, to-1))
}
