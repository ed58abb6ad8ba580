package remoteimage

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"distkit/disk"
	"distkit/errclass"
	"distkit/layer/index"

	"github.com/containerd/errdefs"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// stale is how long an index is kept that is not used.
const stale = 30 * 24 * time.Hour

// cache is a directory of indexes that processes of this user have made of layers that they had verified: dist-index(5), TRUST. Nobody
// else can write to it. dir is "" where there is no such directory.
type cache struct{ dir string }

func openCache() *cache {
	dir, err := os.UserCacheDir()
	if err != nil {
		return &cache{}
	}
	for _, name := range []string{"", "distkit", "index"} {
		dir = filepath.Join(dir, name)
		var st unix.Stat_t
		if err := os.Mkdir(dir, 0o700); err != nil && !os.IsExist(err) {
			return &cache{}
		}
		if unix.Lstat(dir, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 {
			return &cache{}
		}
	}
	return &cache{dir}
}

func name(layer v1.Descriptor) string {
	return layer.Digest.Algorithm().String() + "-" + layer.Digest.Encoded()
}

// open opens the index of a layer. It returns nil if there is none, and for one that is damaged.
func (c *cache) open(layer v1.Descriptor) (*index.Index, error) {
	if c.dir == "" {
		return nil, nil
	}
	f, err := os.OpenFile(filepath.Join(c.dir, name(layer)), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	var x *index.Index
	if err == nil && !info.Mode().IsRegular() {
		err = errclass.Errorf(errdefs.ErrDataLoss, "not a file")
	}
	if err == nil {
		x, err = openIndex(f, info.Size(), layer)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	now := time.Now()
	_ = os.Chtimes(f.Name(), now, now)
	return x, nil
}

// add keeps the index of a layer that write writes, and opens it. Where it can't be kept it is there until the process ends.
func (c *cache) add(layer v1.Descriptor, write func(io.Writer) error) (*index.Index, error) {
	var f *os.File
	err := os.ErrNotExist
	if c.dir != "" {
		f, err = os.CreateTemp(c.dir, ".index-")
	}
	isKept := err == nil
	if !isKept {
		f, err = unnamed()
	}
	if err != nil {
		return nil, err
	}
	err = write(f)
	var x *index.Index
	if err == nil {
		var size int64
		if size, err = f.Seek(0, io.SeekCurrent); err == nil {
			x, err = openIndex(f, size, layer)
		}
	}
	if isKept && (err != nil || f.Sync() != nil || os.Rename(f.Name(), filepath.Join(c.dir, name(layer))) != nil) {
		_ = os.Remove(f.Name())
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	c.sweep()
	return x, nil
}

// sweep removes indexes that were not used for long, and what processes that died have left.
func (c *cache) sweep() {
	entries, err := os.ReadDir(cmp.Or(c.dir, os.DevNull))
	if err != nil {
		return
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && info.Mode().IsRegular() && time.Since(info.ModTime()) > stale {
			_ = os.Remove(filepath.Join(c.dir, e.Name()))
		}
	}
}

// unnamed makes a temporary file that is gone when it is closed.
func unnamed() (*os.File, error) {
	f, err := os.CreateTemp("", ".index-")
	if err != nil {
		return nil, fmt.Errorf("temporary file: %w", disk.Cause(err))
	}
	return f, os.Remove(f.Name())
}

// openIndex opens an index, which must be of that layer.
func openIndex(f *os.File, size int64, layer v1.Descriptor) (*index.Index, error) {
	x, err := index.Open(f, size)
	if err != nil {
		return nil, err
	}
	if d, n := x.Layer(); d != layer.Digest || n != layer.Size {
		return nil, errclass.Errorf(errdefs.ErrDataLoss, "it is of another layer, %s", d)
	}
	return x, nil
}
