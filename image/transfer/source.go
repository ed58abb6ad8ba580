package transfer

import (
	"archive/tar"
	"bufio"
	"bytes"
	"cmp"
	"compress/bzip2"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"distkit/compression"
	"distkit/disk"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Source calls f with each entry of an archive, in order. Errors of reading a body have a class.
type Source func(ctx context.Context, f func(h *tar.Header, body io.Reader) error) error

// Stream returns the source for a tar that may be compressed with gzip, zstd, bzip2 or xz. It is read to its end, and
// must have an end-of-archive marker.
func Stream(in io.Reader) Source {
	return func(ctx context.Context, f func(*tar.Header, io.Reader) error) error {
		src := &input{ctx: ctx, r: in}
		plain, stop, err := decompress(ctx, src)
		if err != nil {
			return src.failed(err)
		}
		defer stop()
		end := &zeroCounter{r: plain}
		archive := tar.NewReader(end)
		buf := make([]byte, 64<<10)
		for n := 0; ; n++ {
			end.n = 0
			h, err := archive.Next()
			if err == io.EOF {
				break
			}
			if errors.Is(err, tar.ErrHeader) && n == 0 {
				return src.failed(invalid("not a tar archive"))
			}
			if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
				return src.failed(err)
			}
			body := classed{archive, src}
			if err := f(h, body); err != nil {
				return err
			}
			// Skip the rest of the entry here: Next would count zeros at its end as those of the marker.
			if _, err := io.CopyBuffer(io.Discard, body, buf); err != nil {
				return err
			}
		}
		if end.n < 512 {
			return damaged("archive is truncated: it has no end-of-archive marker")
		}
		// Read to the end, so that the producer isn't killed by SIGPIPE and checksums are verified.
		_, err = io.CopyBuffer(io.Discard, classed{plain, src}, buf)
		return err
	}
}

// input reads the bytes of an archive until ctx is done. It keeps a read error, which is different from a damaged
// archive.
type input struct {
	ctx context.Context
	r   io.Reader
	mu  sync.Mutex
	err error
}

func (s *input) Read(p []byte) (int, error) {
	err := s.ctx.Err()
	n := 0
	if err == nil {
		n, err = s.r.Read(p)
	}
	if err != nil && err != io.EOF {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.err = err
	}
	return n, err
}

// failed returns the read error, if there was one, or else err with the class of a damaged archive.
func (s *input) failed(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.err != nil:
		return fmt.Errorf("read archive: %w", s.err)
	case errdefs.IsInvalidArgument(err), errdefs.IsNotImplemented(err), errdefs.IsDataLoss(err):
		return err
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return damaged("archive is truncated")
	}
	return damaged("archive is damaged: %w", err)
}

// classed is a reader of a part of the archive, whose errors have a class.
type classed struct {
	r   io.Reader
	src *input
}

func (c classed) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if err != nil && err != io.EOF {
		err = c.src.failed(err)
	}
	return n, err
}

// zeroCounter counts the zero bytes at the end of what was read. An archive ends with at least a block of zeros, but
// package tar accepts one without.
type zeroCounter struct {
	r io.Reader
	n int
}

func (z *zeroCounter) Read(p []byte) (int, error) {
	n, err := z.r.Read(p)
	rest := len(bytes.TrimRight(p[:n], "\x00"))
	if rest > 0 {
		z.n = 0
	}
	z.n = min(z.n+n-rest, math.MaxInt32)
	return n, err
}

// decompress returns the uncompressed bytes of an archive.
func decompress(ctx context.Context, in io.Reader) (io.Reader, func(), error) {
	b := bufio.NewReaderSize(in, 64<<10)
	head, err := b.Peek(compression.HeadSize)
	if len(head) == 0 {
		if err == io.EOF {
			err = invalid("not an archive: the input is empty")
		}
		return nil, nil, err
	}
	switch compression.Sniff(head) {
	case compression.Bzip2:
		return bzip2.NewReader(b), func() {}, nil
	case compression.XZ:
		return xz(ctx, b)
	}
	return compression.NewReader(b)
}

// xzMemory bounds the memory of xz(1): twice what xz -9 needs.
const xzMemory = "128MiB"

// xz decompresses r with xz(1).
func xz(ctx context.Context, r io.Reader) (io.Reader, func(), error) {
	ctx, cancel := context.WithCancel(ctx)
	c := exec.CommandContext(ctx, "xz", "--decompress", "--stdout", "--format=xz", "--memlimit-decompress="+xzMemory)
	var stderr bytes.Buffer
	c.Stdin, c.Stderr = r, &stderr
	c.WaitDelay = time.Second // r may block for longer
	out, err := c.StdoutPipe()
	if err == nil {
		err = c.Start()
	}
	if errors.Is(err, exec.ErrNotFound) {
		err = errclass.Errorf(errdefs.ErrNotImplemented, "compressed with xz: the program xz is not on PATH")
	}
	if err != nil {
		cancel()
		return nil, nil, err
	}
	p := &program{out: out, wait: sync.OnceValue(func() error {
		err := c.Wait()
		if err != nil && stderr.Len() > 0 {
			line, _, _ := strings.Cut(stderr.String(), "\n")
			err = fmt.Errorf("%.200q", line)
		}
		return err
	})}
	return p, func() { cancel(); _ = p.wait() }, nil
}

// program is the output of a program. It ends with the program's error, if any.
type program struct {
	out  io.Reader
	wait func() error
}

func (p *program) Read(b []byte) (int, error) {
	n, err := p.out.Read(b)
	if err == io.EOF {
		err = cmp.Or(p.wait(), io.EOF)
	}
	return n, err
}

// maxNesting bounds the depth of a directory source. blobs/sha256 is the deepest directory of a layout.
const maxNesting = 3

// Dir returns the source for a directory with an image layout, or with an unpacked archive. Of a layout it reads only
// documents and blobs. Symbolic links are entries, as in an archive, and never followed.
func Dir(dir string) Source {
	return func(ctx context.Context, f func(*tar.Header, io.Reader) error) error {
		root, err := filepath.EvalSymlinks(dir)
		if err != nil {
			return err
		}
		if root, err = filepath.Abs(root); err != nil {
			return err
		}
		d := directory{disk.Tree(root), f}
		top, err := d.list(".")
		if err != nil {
			return err
		}
		// Documents come first, because they say what the files are.
		documents := []string{v1.ImageLayoutFile, v1.ImageIndexFile, dockerManifestsFile}
		layout := slices.Contains(top, v1.ImageLayoutFile)
		names := slices.DeleteFunc(slices.Clone(documents), func(name string) bool { return !slices.Contains(top, name) })
		for _, name := range top {
			if !slices.Contains(documents, name) && (!layout || name == v1.ImageBlobsDir) {
				names = append(names, name)
			}
		}
		for _, name := range names {
			if err := d.add(ctx, name, 0); err != nil {
				return err
			}
		}
		return nil
	}
}

// directory calls f with each file of a tree.
type directory struct {
	tree disk.Tree
	f    func(*tar.Header, io.Reader) error
}

// list returns the sorted names in a directory.
func (d directory) list(name string) ([]string, error) {
	f, err := d.tree.OpenDir(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(maxEntries + 1)
	if err != nil && err != io.EOF {
		return nil, err
	}
	slices.Sort(names)
	return names, nil
}

func (d directory) add(ctx context.Context, name string, depth int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	fi, err := d.tree.Stat(name)
	if err != nil {
		return err
	}
	h := &tar.Header{Name: name, Typeflag: tar.TypeFifo}
	switch fi.Mode().Type() {
	case fs.ModeDir:
		h.Typeflag = tar.TypeDir
		if err := d.f(h, nil); err != nil || depth == maxNesting {
			return err
		}
		names, err := d.list(name)
		for _, n := range names {
			if err == nil {
				err = d.add(ctx, path.Join(name, n), depth+1)
			}
		}
		return err
	case fs.ModeSymlink:
		h.Typeflag = tar.TypeSymlink
		if h.Linkname, err = d.tree.Readlink(name); err != nil {
			return err
		}
	case 0:
		h.Typeflag = tar.TypeReg
		f, err := d.tree.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		if fi, err = f.Stat(); err != nil {
			return err
		}
		h.Size = fi.Size()
		in := &input{ctx: ctx, r: f}
		return d.f(h, io.LimitReader(classed{in, in}, h.Size))
	}
	return d.f(h, nil)
}
