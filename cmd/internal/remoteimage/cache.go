package remoteimage

import (
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

// stale is how long an unused index is kept.
const stale = 30 * 24 * time.Hour

// cache is a directory of indexes. Processes of this user have made them from layers that they had verified
// (dist-index(5), TRUST), and nobody else can write to it. dir is "" if there is no such directory.
type cache struct{ dir string }

func openCache() *cache {
	dir, err := os.UserCacheDir()
	if err != nil || os.MkdirAll(dir, 0o700) != nil {
		return &cache{}
	}
	for _, name := range []string{"distkit", "index"} {
		if dir = filepath.Join(dir, name); !disk.PrivateDir(dir) {
			return &cache{}
		}
	}
	return &cache{dir}
}

func (c *cache) path(layer v1.Descriptor) string {
	return filepath.Join(c.dir, layer.Digest.Algorithm().String()+"-"+layer.Digest.Encoded())
}

// remove removes the index of a layer.
func (c *cache) remove(layer v1.Descriptor) {
	if c.dir != "" {
		_ = os.Remove(c.path(layer))
	}
}

// open opens the index of a layer. It returns nil if there is none, or if it is damaged; then it removes it.
func (c *cache) open(layer v1.Descriptor) *index.Index {
	if c.dir == "" {
		return nil
	}
	f, err := os.OpenFile(c.path(layer), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	var x *index.Index
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && int(st.Uid) == os.Geteuid() && st.Mode&0o022 == 0 {
		x, err = openIndex(f, st.Size, layer)
	}
	if x == nil {
		_ = f.Close()
		if errdefs.IsDataLoss(err) {
			c.remove(layer)
		}
		return nil
	}
	now := time.Now()
	_ = os.Chtimes(f.Name(), now, now)
	return x
}

// add opens the index of a layer that write writes, and keeps it in the directory if possible. It can be used until the
// process ends. If there is no room even for that, add returns nil: an index only saves reading the layer again.
func (c *cache) add(layer v1.Descriptor, write func(io.Writer) error) *index.Index {
	f, err := unnamed()
	if err != nil {
		return nil
	}
	var x *index.Index
	if err = write(f); err == nil {
		var size int64
		if size, err = f.Seek(0, io.SeekCurrent); err == nil {
			x, err = openIndex(f, size, layer)
		}
	}
	if err != nil {
		_ = f.Close()
		return nil
	}
	c.keep(layer, f)
	return x
}

// keep copies an index into the directory.
func (c *cache) keep(layer v1.Descriptor, from *os.File) {
	if c.dir == "" {
		return
	}
	c.sweep()
	f, err := os.CreateTemp(c.dir, ".index-")
	if err != nil {
		return
	}
	defer f.Close()
	if _, err = from.Seek(0, io.SeekStart); err == nil {
		_, err = io.Copy(f, from)
	}
	if err != nil || f.Sync() != nil || os.Rename(f.Name(), c.path(layer)) != nil {
		_ = os.Remove(f.Name())
	}
}

// sweep removes indexes that have not been used for long, and files that killed processes have left.
func (c *cache) sweep() {
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && info.Mode().IsRegular() && time.Since(info.ModTime()) > stale {
			_ = os.Remove(filepath.Join(c.dir, e.Name()))
		}
	}
}

// unnamed makes a temporary file that is deleted when it is closed.
func unnamed() (*os.File, error) {
	f, err := os.CreateTemp("", ".index-")
	if err != nil {
		return nil, fmt.Errorf("temporary file: %w", disk.Cause(err))
	}
	return f, os.Remove(f.Name())
}

// openIndex opens an index and checks that it is for the layer.
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
