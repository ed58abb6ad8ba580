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

// A Source calls f with the entries of an archive, in its order. Errors of reading a body have their class.
type Source func(ctx context.Context, f func(h *tar.Header, body io.Reader) error) error

// Stream is the source of a tar, plain or compressed with gzip, zstd, bzip2 or xz. It is read to its end, which an
// end-of-archive marker must precede.
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
				return src.failed(invalid("no tar archive"))
			}
			if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
				return src.failed(err)
			}
			body := classed{archive, src}
			if err := f(h, body); err != nil {
				return err
			}
			// Not left to Next, so that the zeros it reads are no entry's.
			if _, err := io.CopyBuffer(io.Discard, body, buf); err != nil {
				return err
			}
		}
		if end.n < 512 {
			return damaged("archive is truncated: it has no end-of-archive marker")
		}
		// To the end, so that the producer upstream is not killed and checksums are looked at.
		_, err = io.CopyBuffer(io.Discard, classed{plain, src}, buf)
		return err
	}
}

// input reads the archive's bytes, until ctx is done. It remembers a failure to read, which is another thing than an
// archive that is damaged.
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

// failed makes an error of reading the archive one that tells what is wrong with it.
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

// classed is a reader of a part of the archive.
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

// zeroCounter counts the zero bytes at the end of what it has read: an archive ends with a
// block of them at least, and package tar takes one without for whole.
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

// decompress returns the plain bytes of an archive.
func decompress(ctx context.Context, in io.Reader) (io.Reader, func(), error) {
	b := bufio.NewReaderSize(in, 64<<10)
	head, err := b.Peek(compression.HeadSize)
	if len(head) == 0 {
		if err == io.EOF {
			err = invalid("no archive: there is nothing to read")
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

// xzMemory bounds what xz(1) may take, in bytes: what xz -9 needs, and as much again.
const xzMemory = "128MiB"

// xz has xz(1) decompress r.
func xz(ctx context.Context, r io.Reader) (io.Reader, func(), error) {
	ctx, cancel := context.WithCancel(ctx)
	c := exec.CommandContext(ctx, "xz", "--decompress", "--stdout", "--format=xz", "--memlimit-decompress="+xzMemory)
	var told bytes.Buffer
	c.Stdin, c.Stderr = r, &told
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
		if err != nil && told.Len() > 0 {
			line, _, _ := strings.Cut(told.String(), "\n")
			err = fmt.Errorf("%.200q", line)
		}
		return err
	})}
	return p, func() { cancel(); _ = p.wait() }, nil
}

// program is the output of one. It ends with what the program's end tells.
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

// maxNesting bounds how deep the directories of a directory source nest: blobs/sha256 is the deepest of a layout.
const maxNesting = 3

// Dir is the source of a directory that holds an image layout, or an archive that was unpacked. Of a layout no more
// than its documents and blobs are read; symbolic links are entries, as in an archive, and never followed.
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
		// Documents come first: they tell what files are for.
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

// directory calls f with what a tree holds.
type directory struct {
	tree disk.Tree
	f    func(*tar.Header, io.Reader) error
}

// list returns the names in a directory, sorted.
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
